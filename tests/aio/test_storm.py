"""Connects that are started at once: all of them succeed, whatever it is that is full at the moment, and who
gives up leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shmsock
from tests.aio.conftest import Run, held, until
from tests.aio.processes import Child


async def echoed(node: shmsock.Node, i: int) -> None:
    reader, writer = await shmsock.open_connection("server", 7000, node=node)
    try:
        data = i.to_bytes(4, "little")
        writer.write(data)
        assert await reader.readexactly(4) == data
    finally:
        writer.close()


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_all_connects_of_a_storm_succeed(run: Run, make: Callable[..., str], count: int) -> None:
    """Each then echoes, and all are open at the same time, as nobody closes before the last is there."""

    async def main() -> None:
        region = make(size=256 << 20, peers=4)
        async with (
            Child("serve", region, "server") as child,
            shmsock.attach(region, name="clients") as node,
        ):
            await child.says("ready")
            before = held(node)
            streams = [shmsock.open_connection("server", 7000, node=node) for _ in range(count)]
            ends = await asyncio.gather(*streams)
            assert held(node)["connections"] == count
            for i, (_, writer) in enumerate(ends):
                writer.write(i.to_bytes(4, "little"))
            for i, (reader, _) in enumerate(ends):
                assert await reader.readexactly(4) == i.to_bytes(4, "little")
            for _, writer in ends:
                writer.close()
            await until(lambda: held(node) == before)
            await asyncio.gather(*(echoed(node, i) for i in range(count)))
            await until(lambda: held(node) == before)
            assert node.statistics()["healed"] == 0

    run(main())


def test_connects_that_are_given_up_in_the_middle_leave_nothing(run: Run, make: Callable[..., str]) -> None:
    async def main() -> None:
        region = make(size=64 << 20, peers=4)
        async with (
            Child("serve", region, "server") as child,
            shmsock.attach(region, name="clients") as node,
        ):
            await child.says("ready")
            before = held(node)
            tasks = [asyncio.create_task(echoed(node, i)) for i in range(500)]
            await tasks[100]
            for task in tasks[1::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(r) for r in done} <= {type(None), asyncio.CancelledError}
            assert done[::2] == [None] * 250
            await until(lambda: held(node) == before)
            await echoed(node, 1)
            assert node.statistics()["healed"] == 0

    run(main())


def test_as_many_as_create_says(run: Run, tmp_path: Path) -> None:
    """And one more fails with words that say what to do."""
    path = tmp_path / "region"
    made = subprocess.run(
        [sys.executable, "-m", "shmsock", "create", path, "--size", "1M", "--peers", "2"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"up to (\d+) connections", made.stdout)
    assert found is not None
    most = int(found[1])

    async def main() -> None:
        region = str(path)
        async with (
            Child("serve", region, "server") as child,
            shmsock.attach(region, name="clients") as node,
        ):
            await child.says("ready")
            streams = [shmsock.open_connection("server", 7000, node=node) for _ in range(most)]
            ends = await asyncio.gather(*streams)
            larger = r"shmsock create /dev/shm/NAME --size 2MiB --peers 2"
            with pytest.raises(
                OSError, match=f"no connection slots .* this process's section.*{larger}"
            ) as info:
                await shmsock.open_connection("server", 7000, node=node)
            assert info.value.errno == errno.ENOBUFS
            for i, (_, writer) in enumerate(ends):
                writer.write(i.to_bytes(4, "little"))
            for i, (reader, writer) in enumerate(ends):
                assert await reader.readexactly(4) == i.to_bytes(4, "little")
                writer.close()
            await until(lambda: held(node)["connections"] == 0)

    assert most > 100
    run(main())
