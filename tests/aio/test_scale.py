"""Ten thousand connections between two processes, sixteen processes with one, and no trace of them after."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

import shmsock
from shmsock.engine.layout import SLOTS_USED
from tests.aio.conftest import Run, held, until
from tests.aio.liars import memory_of
from tests.aio.processes import Child
from tests.aio.roles import Clients

ROUNDS = int(os.environ.get("SHMSOCK_SCALE_ROUNDS") or 1)  # `make scale`: 20


async def rounds(clients: Clients, server: Child, before: dict[str, int], count: int, times: int) -> None:
    """Open, echo on each, close, so many times; then all is as before, on both sides."""
    for _ in range(times):
        await clients.open(count)
        assert await clients.echo() == count
        await clients.close()
        await until(lambda: held(clients.node) == before)
        server.tell("held?")
        await server.says("as before")


@pytest.mark.parametrize(
    ("size", "count", "times"),
    [
        (64 << 20, 3000, 2),
        pytest.param(256 << 20, 10_000, ROUNDS, marks=pytest.mark.slow),
        pytest.param(2 << 30, 30_000, 1, marks=pytest.mark.slow),
    ],
)
def test_between_two_processes(
    run: Run, make: Callable[..., str], loop_name: str, size: int, count: int, times: int
) -> None:
    async def main() -> None:
        region = make(size=size, peers=4)
        async with Child("serve_many", region, "srv", loop=loop_name) as server:
            await server.says("ready")
            async with shmsock.attach(region, name="cli") as node:
                before = held(node)
                await rounds(Clients(node, "srv"), server, before, count, times)
                assert node.statistics()["healed"] == 0

    run(main())


@pytest.mark.parametrize(("peers", "each"), [(4, 200), pytest.param(16, 600, marks=pytest.mark.slow)])
def test_many_processes_with_one(
    run: Run, make: Callable[..., str], loop_name: str, peers: int, each: int
) -> None:
    async def main() -> None:
        region = make(size=512 << 20, peers=peers + 1)
        async with shmsock.attach(region, name="srv") as node, AsyncExitStack() as stack:
            before = held(node)
            handled = set[asyncio.StreamWriter]()

            async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                handled.add(writer)
                while data := await reader.read(100):
                    writer.write(data)
                writer.close()

            async with await shmsock.start_server(echo, None, 7000, node=node):
                children = [
                    await stack.enter_async_context(
                        Child("many_clients", region, f"c{i}", "srv", each, loop=loop_name)
                    )
                    for i in range(peers)
                ]
                for child in children:
                    await child.says(f"open {each}")
                assert len(handled) == peers * each
                for child in children:
                    child.tell("echo")
                for child in children:
                    await child.says(f"echoed {each}")
                for child in children:
                    child.tell("close")
                for child in children:
                    await child.says("as before")
                handled.clear()
                await until(lambda: held(node) == before)

    run(main())


def test_bursts_beside_many_slots_are_no_lie(run: Run, make: Callable[..., str]) -> None:
    """One more notification than the log has room for makes the other side look at all toggles: of all slots
    that any owner of its section ever used. Still each of these notifications tells of something."""

    async def main() -> None:
        region = make(size=256 << 20, peers=2)
        with memory_of(region) as layout:
            assert layout.slots == 65536
            for section in range(2):
                layout.memory.store(layout.section(section) + SLOTS_USED, layout.slots)
        came: asyncio.Queue[int] = asyncio.Queue()

        class Receiver(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                came.put_nowait(len(data))

        async with (
            shmsock.attach(region, name="a") as a,
            shmsock.attach(region, name="b") as b,
            await shmsock.create_server(Receiver, None, 7000, node=b),
        ):
            ends = [await shmsock.open_connection("b", 7000, node=a) for _ in range(16)]
            for _ in range(100):
                for _, writer in ends:
                    writer.write(b"burst")
                assert [await came.get() for _ in ends] == [5] * 16
            assert a.statistics()["rate_limited"] == b.statistics()["rate_limited"] == 0
            for _, writer in ends:
                writer.close()

    run(main())
