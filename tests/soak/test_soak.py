"""The soak in its short form: three minutes, gently. `make soak HOURS=3` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.forked import ROOT

MINUTES = 3


def run(seconds: int, *options: str) -> dict[str, Any]:
    """What the soak of so many seconds found: nothing, or this fails."""
    command = ["-m", "tests.soak", "--seconds", str(seconds), *options]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    assert (summary["verdict"], done.returncode, done.stderr) == ([], 0, "")
    return summary


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 240)
def test_three_minutes() -> None:
    summary = run(MINUTES * 60, "--clients", "30", "--pause", "3")
    # It did what it is for, however slow the machine is.
    assert summary["exchanges"] > 1000
    assert summary["bytes"] > 10 << 20
    assert summary["datagrams"] > 100
    assert sum(summary["deaths"].values()) > 10


@pytest.mark.slow
@pytest.mark.timeout(270)
@pytest.mark.parametrize("where", ["own", "everywhere"])
def test_a_peer_that_writes_nonsense(where: str) -> None:
    """Into its own section: nobody else notices. Everywhere: nobody crashes or hangs, and none of their own
    code meets an error that it does not know."""
    summary = run(12, "--clients", "10", "--pause", "1", "--lies", where)
    assert summary["words"] > 1000
    assert summary["exchanges"] > 50
