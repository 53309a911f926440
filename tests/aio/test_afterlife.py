"""What outlives its node: calls raise, or do nothing, and never reach for memory that is gone."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

import shmsock
from tests.aio.afterlife import ON_TRIO, WAYS
from tests.aio.conftest import Run
from tests.aio.processes import PATIENCE
from tests.aio.roles import echo
from tests.forked import ROOT

CALLS = {"trio": 1500, "by_signal": 100}


def test_everything_may_be_called_after_the_end(loop_name: str, way: str, region: str) -> None:
    """In a process of its own: what goes wrong here ends it."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.aio.afterlife", loop_name, way, region],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    calls = int(done.stdout.split()[0])
    assert calls >= CALLS.get(way, CALLS.get(loop_name, 5000))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        cases = [(loop, way) for loop in ("asyncio", "uvloop") for way in WAYS]
        metafunc.parametrize("loop_name, way", cases + [("trio", way) for way in ON_TRIO])


def test_a_refusal_while_the_node_is_closed(run: Run, region: str) -> None:
    """The next try, at another of that name, finds the node closed: not refused, and nothing is looked up."""

    async def main() -> None:
        async with shmsock.attach(region, name="b") as b:
            a = await shmsock.attach(region, name="a")
            connecting = a.connect("b", 7000)
            server = await shmsock.start_server(echo, None, 7000, node=b)
            waiting = connecting.send(None)
            server.close()
            while not waiting.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            a.close()
            with pytest.raises(shmsock.NodeClosedError, match="it was closed"):
                connecting.send(None)

    run(main())
