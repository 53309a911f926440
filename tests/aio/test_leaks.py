"""Ten thousand endpoints, opened and closed: nothing of them is left. See leaks.py.

Debug mode makes them five times as slow, so it sees a tenth of them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.forked import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(("debug", "rounds"), [("-Xdev", 10), ("", 90)], ids=["debug", "plain"])
def test_ten_thousand_endpoints(loop_name: str, region: str, debug: str, rounds: int) -> None:
    argv = ["-Werror", *filter(None, [debug]), "-m", "tests.aio.leaks", loop_name, region, str(rounds)]
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "clean\n")
