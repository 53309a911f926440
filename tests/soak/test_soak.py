"""The soak in its short form: three minutes, gently. `make soak HOURS=3` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.forked import ROOT

MINUTES = 3


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 240)
def test_three_minutes() -> None:
    options = ["--seconds", str(MINUTES * 60), "--clients", "30", "--pause", "3"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.soak", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["verdict"], done.returncode, done.stderr) == ([], 0, "")
    # It did what it is for, however slow the machine is.
    assert summary["exchanges"] > 1000
    assert summary["bytes"] > 10 << 20
    assert summary["datagrams"] > 100
    assert sum(summary["deaths"].values()) > 10
