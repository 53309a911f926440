"""Cancelling takes nothing with it: no byte, no slot, no descriptor."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

import shmsock
from tests.aio.conftest import Run, World, held, keepers, shmsock_files, until
from tests.aio.processes import PATIENCE, Child, pattern
from tests.aio.roles import echo, receive_cancelled

BIG = 3 << 20


async def cancelled_after(task: asyncio.Task[object], turns: int) -> bool:
    """Cancel after so many turns of the loop; was it in time?"""
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


@pytest.mark.parametrize("seed", range(3))
def test_reads_that_are_cancelled_lose_nothing(run: Run, world: World, seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        async with world.pair(limit=rng.choice((1000, 1 << 16))) as (c, s):
            reading = asyncio.create_task(receive_cancelled(s.reader, 1, rng))
            at = 0
            while at < 200_000:
                size = rng.choice((1, 10, 3000))
                c.writer.write(pattern(1, at, size))
                at += size
                if rng.random() < 0.5:
                    await asyncio.sleep(0)
                await c.writer.drain()
            c.writer.write_eof()
            assert await reading == (at, "eof")

    run(main())


def test_reads_from_another_process_that_are_cancelled_lose_nothing(run: Run, region: str) -> None:
    async def main() -> None:
        rng = random.Random(4)
        async with shmsock.attach(region, name="test") as node, Child("source", region, "source") as child:
            await child.says("ready")
            reader, writer = await shmsock.open_connection("source", 7000, node=node)
            got = 0
            while got < BIG:
                n = rng.choice((1, 5000, 100_000))
                read = reader.readexactly if rng.random() < 0.5 else reader.read
                try:
                    data = await asyncio.wait_for(read(n), rng.choice((0, 0.00001, 0.001)))
                except asyncio.TimeoutError:
                    continue
                assert data == pattern(1, got, len(data))
                got += len(data)
            writer.close()

    run(main())


@pytest.mark.parametrize("how", ["read", "readexactly", "readuntil", "readline"])
@pytest.mark.parametrize("late", [False, True])
def test_each_kind_of_read_cancelled(run: Run, world: World, how: str, late: bool) -> None:
    """Also in the very turn in which its bytes came."""

    async def main() -> None:
        async with world.pair() as (c, s):
            text = b"one\ntwo\n"
            for _ in range(20):
                args = {"read": (100,), "readexactly": (8,), "readuntil": (b"o\n",), "readline": ()}[how]
                task = asyncio.create_task(getattr(s.reader, how)(*args))
                await until(lambda: s.reader._waiter is not None)  # type: ignore[attr-defined]
                if late:
                    c.writer.write(text)
                    s.node.pump._pump()
                    assert s.reader._waiter.done()  # type: ignore[attr-defined]
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                if not late:
                    c.writer.write(text)
                # a pool that looks into the buffer sees it, although nobody reads
                await until(lambda: bytes(s.reader._buffer) == text)  # type: ignore[attr-defined]
                assert await s.reader.readexactly(8) == text

    run(main())


def test_drains_that_are_cancelled_lose_nothing(run: Run, world: World) -> None:
    async def main() -> None:
        rng = random.Random(5)
        async with world.pair() as (c, s):
            reading = asyncio.create_task(s.reader.readexactly(BIG))
            at = 0
            while at < BIG:
                size = min(rng.choice((100, 50_000)), BIG - at)
                c.writer.write(pattern(2, at, size))
                at += size
                await cancelled_after(asyncio.ensure_future(c.writer.drain()), rng.randrange(3))
            assert await reading == pattern(2, 0, BIG)

    run(main())


def test_wait_closed_cancelled(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(pattern(3, 0, BIG))
            c.writer.close()
            waiting = asyncio.create_task(c.writer.wait_closed())
            assert await cancelled_after(waiting, 3)
            assert await s.reader.read() == pattern(3, 0, BIG)
            try:
                await c.writer.wait_closed()
            except asyncio.CancelledError:
                pass  # asyncio's own: there is one future for all who wait, and it was cancelled

    run(main())


def test_connects_cancelled_at_every_step(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, node=b)
            before, there = held(a), held(b)
            for i in range(60):
                task = asyncio.create_task(shmsock.open_connection(b.name, 7000, node=a))
                if i >= 40:
                    await asyncio.sleep((i - 40) * 0.0002)
                if not await cancelled_after(task, i % 40):
                    task.result()[1].close()
                await until(lambda: held(a) == before)
                await until(lambda: held(b) == there)
            reader, writer = await shmsock.open_connection(b.name, 7000, node=a)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            writer.close()
            server.close()

    run(main())


class _Buffered(asyncio.BufferedProtocol):
    def __init__(self, told: Callable[[], object]) -> None:
        self.buffer, self.told = bytearray(10), told

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.told()


def test_a_connect_cancelled_by_what_came_with_its_answer(run: Run, region: str) -> None:
    """One pass of the pump finds bytes and the answer; who is given the bytes gives the connect up."""

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a, shmsock.attach(region, name="b") as b:
            protocols: list[asyncio.Protocol] = []
            answered: list[bool] = []

            def first() -> asyncio.Protocol:
                protocols.append(asyncio.Protocol())
                return protocols[-1]

            def second() -> asyncio.Protocol:  # right behind the ACCEPT
                transports[0].write(b"x")
                answered.append(True)
                return asyncio.Protocol()

            servers = [
                await shmsock.create_server(factory, None, 7000 + i, node=b)
                for i, factory in enumerate((first, second))
            ]
            given_up = asyncio.Event()

            def give_up() -> None:
                connecting.close()
                given_up.set()

            await shmsock.create_connection(lambda: _Buffered(give_up), "b", 7000, node=a)
            await until(lambda: protocols and len(b.transports) == 1)
            transports: list[Any] = list(b.transports)
            connecting = a.connect("b", 7001)
            connecting.send(None)
            await given_up.wait()
            assert answered
            await asyncio.sleep(0.01)
            for server in servers:
                server.close()

    run(main())  # and nothing was reported


def test_many_connects_and_some_are_cancelled(run: Run, world: World) -> None:
    async def main() -> None:
        rng = random.Random(6)
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, node=b)
            tries = [asyncio.create_task(shmsock.open_connection(b.name, 7000, node=a)) for _ in range(100)]
            doomed = set(rng.sample(tries, 50))
            for task in doomed:
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
                task.cancel()
            for i, task in enumerate(tries):
                try:
                    reader, writer = await task
                except asyncio.CancelledError:
                    assert task in doomed
                    continue
                writer.write(b"%3d" % i)
                assert await reader.readexactly(3) == b"%3d" % i
                writer.close()
            server.close()

    run(main())


@pytest.mark.parametrize("waits", ["to see that the claim stands", "as all sections are taken"])
def test_attach_cancelled_at_every_step(
    run: Run, make: Callable[..., str], waits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left open, and the section is as it was."""
    monkeypatch.setattr("shmsock.engine.attach._of_one_kernel", lambda *args: False)  # as where guests are

    async def main() -> None:
        region = make(peers=2, size=8 << 20)
        async with AsyncExitStack() as stack:
            if "taken" in waits:
                for _ in range(2):
                    child = await stack.enter_async_context(Child("serve", region, "server"))
                    await child.says("ready")
            else:
                monkeypatch.setattr("shmsock.engine.attach.SETTLE_S", PATIENCE)
            files = shmsock_files()
            for turns in [0, 1, 2, 3, 5, 10]:
                task = asyncio.ensure_future(shmsock.attach(region).__aenter__())
                assert await cancelled_after(task, turns)
                assert (shmsock_files(), keepers()) == (files, 0)
            for seconds in (0.001, 0.01, 0.1):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(shmsock.attach(region).__aenter__(), seconds)
                await until(lambda: (shmsock_files(), keepers()) == (files, 0))
        monkeypatch.undo()
        async with shmsock.attach(region, name="one"), shmsock.attach(region, name="two"):
            pass

    run(main())


def test_first_use_cancelled_at_every_step(run: Run, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", region)

    async def main(turns: int, others: int) -> None:
        first = asyncio.create_task(shmsock.start_server(echo, None, 7000))
        rest = [asyncio.create_task(shmsock.start_server(echo, None, 7001 + i)) for i in range(others)]
        await cancelled_after(first, turns)
        for server in await asyncio.gather(*rest):
            server.close()

    for turns in range(8):
        for others in (0, 1):
            run(main(turns, others))
            assert keepers() == 0
    run(main(100, 2))


def test_a_node_closed_while_others_wait(run: Run, world: World) -> None:
    """Reads end, drains and connects fail; nobody waits forever."""

    async def main() -> None:
        async with shmsock.attach(world.region, name="b") as b:
            ends: list[asyncio.StreamWriter] = []
            await shmsock.start_server(lambda r, w: ends.append(w), None, 7000, node=b)
            async with shmsock.attach(world.region, name="a") as a:
                reader, writer = await shmsock.open_connection("b", 7000, node=a)
                reading = asyncio.create_task(reader.readexactly(10))
                writer.write(bytes(BIG))
                draining = asyncio.create_task(writer.drain())
                connecting = asyncio.create_task(shmsock.open_connection("b", 7000, node=a))
                await asyncio.sleep(0)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reading
            with pytest.raises(ConnectionError):
                await draining
            with pytest.raises(shmsock.NodeClosedError):
                await connecting
            for end in ends:
                end.close()
            forever = await shmsock.start_server(echo, None, 7001, node=b)
            serving = asyncio.create_task(forever.serve_forever())
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert not forever.is_serving()
        await forever.wait_closed()

    run(main())
