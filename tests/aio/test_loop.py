"""A busy stream does not have the loop to itself. Judged by what happens before what, never by the clock."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import shmsock
from tests.aio.conftest import Run, until
from tests.aio.processes import Child, pattern

Reader = asyncio.StreamReader


async def by_read(reader: Reader) -> None:
    while await reader.read(1 << 16):
        pass


async def by_small_reads(reader: Reader) -> None:
    while await reader.read(10):
        pass


async def by_readexactly(reader: Reader) -> None:
    while True:
        await reader.readexactly(1000)


async def by_large_readexactly(reader: Reader) -> None:
    while True:
        await reader.readexactly(3 << 20)


async def by_lines(reader: Reader) -> None:
    while True:
        try:
            await reader.readline()
        except ValueError:  # a line beyond the limit
            pass


@asynccontextmanager
async def saturated(where: str, region: str, loop: str) -> AsyncIterator[tuple[Reader, Any]]:
    """A stream that never pauses: from the own loop, or from another process."""

    async def source(reader: Reader, writer: asyncio.StreamWriter) -> None:
        chunk = pattern(1, 0, 1 << 16)
        try:
            while True:
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            writer.close()

    async with shmsock.attach(region, name="test") as node:
        if where == "process":
            async with Child("source", region, "source", loop=loop) as child:
                await child.says("ready")
                reader, writer = await shmsock.open_connection("source", 7000, node=node)
                yield reader, writer
                writer.close()
        else:
            await shmsock.start_server(source, None, 7000, node=node)
            reader, writer = await shmsock.open_connection("test", 7000, node=node)
            yield reader, writer
            writer.close()


@pytest.mark.parametrize("where", ["loop", "process"])
@pytest.mark.parametrize("how", [by_read, by_small_reads, by_readexactly, by_large_readexactly, by_lines])
def test_timers_and_timeouts_beside_a_saturated_stream(
    run: Run, region: str, where: str, how: Callable[[Reader], Any]
) -> None:
    """If the stream had the loop to itself, neither would ever come."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ticks: list[int] = []

        def tick() -> None:
            ticks.append(len(ticks))
            if len(ticks) < 1000:
                loop.call_later(0.001, tick)

        async with saturated(where, region, run.loop) as (reader, _):
            tick()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(how(reader), 0.1)
            assert len(ticks) > 1
            if sys.version_info >= (3, 11):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await how(reader)
            reading = asyncio.create_task(how(reader))
            soon = asyncio.Event()
            loop.call_soon(soon.set)
            await soon.wait()
            loop.call_later(0.01, soon.clear)
            await until(lambda: not soon.is_set())
            assert not reading.done()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            ticks.extend([0] * 1000)

    run(main())


def test_a_timeout_beside_a_saturating_writer(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="test") as node, Child("serve", region, "echo") as child:
            await child.says("ready")
            reader, writer = await shmsock.open_connection("echo", 7000, node=node)

            async def write() -> None:
                while True:
                    writer.write(bytes(1000))
                    await writer.drain()

            async def read() -> None:
                while await reader.read(1 << 16):
                    pass

            reading = asyncio.create_task(read())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(write(), 0.3)
            writer.write_eof()
            await reading
            writer.close()

    run(main())


def test_two_saturated_streams_share_the_loop(run: Run, region: str) -> None:
    """Neither has read twenty times what the other has."""

    async def main() -> None:
        read = [0, 0]
        enough = asyncio.Event()

        async def count(i: int, reader: Reader) -> None:
            while True:
                read[i] += len(await reader.read(1000))
                if min(read) > 2_000_000:
                    enough.set()

        async with saturated("process", region, run.loop) as (one, writer):
            two, other = await shmsock.open_connection("source", 7000, node=writer.transport.node)
            tasks = [asyncio.create_task(count(i, r)) for i, r in enumerate((one, two))]
            await enough.wait()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            other.close()
            assert max(read) < 20 * min(read)

    run(main())


@pytest.mark.parametrize("child_loop", ["asyncio", "uvloop"])
def test_one_control_c_beside_a_saturated_stream(region: str, child_loop: str) -> None:
    """It gets through, is told to the program once, and the node is detached."""

    async def main() -> None:
        async with Child("saturated", region, loop=child_loop) as child:
            await child.says("streaming")
            child.process.send_signal(signal.SIGINT)
            await child.says("cancelled")
            await child.says("interrupted")
            assert await child.ended() == 0
        async with shmsock.attach(region, name="test") as node:
            assert node.statistics()["names"] == ["test"]

    asyncio.run(main())
