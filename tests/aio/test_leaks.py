"""Ten thousand endpoints, opened and closed: nothing of them is left. See leaks.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.aio.processes import ROOT


@pytest.mark.slow
def test_ten_thousand_endpoints(loop_name: str, region: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "tests.aio.leaks", loop_name, region, "90"],
        cwd=ROOT,
        env={**os.environ, "PYTHONASYNCIODEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "clean\n")
