"""In CI nothing is skipped but for what another version of Python has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FILES = {
    "test_module.py": """
        import pytest
        pytest.importorskip("no_such_module")
    """,
    "test_skips.py": """
        import pytest

        @pytest.mark.skipif(True, reason="sshd is not installed")
        def test_marked(): pass

        def test_on_the_way(): pytest.skip("takes root")

        @pytest.mark.skipif(True, reason="eager tasks are of 3.12")
        def test_version(): pass

        @pytest.mark.xfail(reason="known")
        def test_known(): assert 0
    """,
}


@pytest.mark.parametrize(
    ("ci", "counts"),
    [("", "4 skipped, 1 xfailed"), ("true", "1 failed, 1 skipped, 1 xfailed, 2 errors")],
)
def test_in_ci_a_skip_fails(tmp_path: Path, ci: str, counts: str) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text("\n".join(line.removeprefix("        ") for line in text.splitlines()))
    argv = ["-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            *argv,
            "--rootdir",
            tmp_path,
            tmp_path,
            "--continue-on-collection-errors",
        ],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        stdout=subprocess.PIPE,
        text=True,
    )
    last = done.stdout.splitlines()[-1]
    assert (done.returncode != 0) == bool(ci)
    assert last.startswith(counts), done.stdout
    assert ("sshd is not installed" in done.stdout) == bool(ci)
