"""Processes of one host that are killed, or stopped for long, while others talk to them."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable

import pytest

import shmsock
from shmsock import Settings
from tests.aio.conftest import End, Run, held, keepers, open_files, until
from tests.aio.processes import PATIENCE, Child, pattern
from tests.aio.roles import echo

AT_ONCE = 1.5
"""Seconds; a beat that stands still would take `dead_after_s`, 3, to be believed."""


async def listening(node: shmsock.Node) -> asyncio.Queue[End]:
    accepted: asyncio.Queue[End] = asyncio.Queue()
    await shmsock.start_server(lambda r, w: accepted.put_nowait(End(r, w, node)), None, 7000, node=node)
    return accepted


async def two_of(accepted: asyncio.Queue[End]) -> tuple[End, End]:
    """The victim's connections: (the one with bytes, the idle one)."""
    one, two = await accepted.get(), await accepted.get()
    return (one, two) if one.transport.conn.remote[1] < two.transport.conn.remote[1] else (two, one)


async def read_to_the_reset(end: End) -> bytes:
    data = b""
    try:
        while more := await end.reader.read(1 << 16):
            data += more
    except ConnectionResetError:
        return data
    raise AssertionError(f"EOF after {len(data)} bytes")


def test_a_successor_need_not_wait_for_a_beat(
    run: Run, make: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the section of one that was killed, which is free when its reader knows of that."""
    region = make(peers=2)
    monkeypatch.setattr("shmsock.wakeup.BEAT_NS", 3600 * 10**9)

    async def main() -> None:
        async with (
            shmsock.attach(region, name="reader") as node,
            Child("serve", region, "victim", loop=run.loop) as victim,
        ):
            await victim.says("ready")
            reader, writer = await shmsock.open_connection("victim", 7000, node=node)
            reading = asyncio.create_task(reader.read())
            victim.kill()
            successor = await asyncio.wait_for(shmsock.attach(region, name="successor"), PATIENCE)
            with pytest.raises(ConnectionResetError):
                await reading
            writer.close()
            await successor.aclose()

    run(main())


@pytest.mark.parametrize("times", [6, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_again_and_again(run: Run, make: Callable[..., str], times: int) -> None:
    """Four sections, and every life takes one: a section, a slot or a byte that leaks is missed soon."""

    async def one_life(i: int, region: str, accepted: asyncio.Queue[End], rng: random.Random) -> None:
        loop = asyncio.get_running_loop()
        size = rng.choice((0, 10, 5000, 200_000))
        async with Child("victim", region, size) as child:
            await child.says("published")
            end, idle = await two_of(accepted)
            assert await idle.reader.readexactly(4) == b"idle"
            waiting = asyncio.create_task(idle.reader.read(1))
            idle.writer.write(bytes(5 << 20))
            blocked = asyncio.create_task(idle.writer.drain())
            early = asyncio.create_task(read_to_the_reset(end)) if i % 2 else None
            await asyncio.sleep(0.001 * (i % 5))
            assert not waiting.done()
            assert not blocked.done()
            child.kill()
            killed = loop.time()
            with pytest.raises(ConnectionError):
                await blocked
            with pytest.raises(ConnectionResetError):
                await waiting
            data = await (early or read_to_the_reset(end))
            assert loop.time() - killed < AT_ONCE
            assert data == pattern(1, 0, size)
            for survivor in (end, idle):
                await survivor.close()

    async def main() -> None:
        lives = times if run.loop == "asyncio" else min(times, 10)
        rng = random.Random(times)
        region = make(peers=4, size=32 << 20)
        async with shmsock.attach(region, name="test") as node:
            before = held(node)
            accepted = await listening(node)
            await one_life(0, region, accepted, rng)
            files, threads = len(open_files()), len(os.listdir("/proc/self/task"))
            for i in range(lives):
                await one_life(i, region, accepted, rng)
                await until(lambda: held(node) == before, f"after {i} lives: {held(node)}, {before}")
            assert (len(open_files()), len(os.listdir("/proc/self/task"))) == (files, threads)
            assert keepers() == 1
            stats = node.statistics()
            assert (stats["healed"], stats["violations"]) == (0, 0)
            assert stats["peers_lost"] == lives + 1

    run(main(), timeout=100)


def test_killed_in_the_middle_of_a_stream(run: Run, region: str) -> None:
    async def main() -> None:
        rng = random.Random(3)
        async with shmsock.attach(region, name="test") as node:
            before = held(node)
            for i in range(8):
                async with Child("source", region, f"source-{i}") as child:
                    await child.says("ready")
                    streams = [
                        await shmsock.open_connection(f"source-{i}", 7000, node=node) for _ in range(3)
                    ]
                    ends = [End(r, w, node) for r, w in streams]
                    for end in ends:
                        size = rng.randrange(3_000_000)
                        assert await end.reader.readexactly(size) == pattern(1, 0, size)
                        end.read = size  # type: ignore[attr-defined]
                    child.kill()
                    for end in ends:
                        rest = await read_to_the_reset(end)
                        assert rest == pattern(1, end.read, len(rest))  # type: ignore[attr-defined]
                        await end.close()
                await until(lambda: held(node) == before)
            assert node.statistics()["healed"] == 0

    run(main())


@pytest.mark.parametrize("dead_after_s", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_stopped_for_long_and_continued(run: Run, region: str, dead_after_s: float) -> None:
    """The survivor does not wait, and the one that was stopped finds out, and connects again."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        size = 100_000
        async with shmsock.attach(region, name="test", settings=Settings(dead_after_s=dead_after_s)) as node:
            before = held(node)
            accepted = await listening(node)
            async with Child("victim", region, size) as child:
                await child.says("published")
                end, idle = await two_of(accepted)
                assert await idle.reader.readexactly(4) == b"idle"
                child.stop()
                stopped = loop.time()
                reading = asyncio.create_task(read_to_the_reset(end))
                with pytest.raises(ConnectionResetError):
                    await idle.reader.read()
                assert await reading == pattern(1, 0, size)
                assert dead_after_s - 0.5 < loop.time() - stopped < dead_after_s + 1
                await end.close()
                await idle.close()
                assert held(node) == before
                await asyncio.sleep(2 * dead_after_s - (loop.time() - stopped))
                child.resume()
                child.tell("again")
                await child.says("reset")
                await child.says("reset")
                again = await accepted.get()
                assert await again.reader.read() == b"again"
                await again.close()
                child.tell()
                assert await child.ended() == 0
            await until(lambda: held(node) == before)

    run(main())


def test_stopped_for_a_moment_is_nothing(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="test") as node, Child("serve", region, "server") as child:
            await child.says("ready")
            reader, writer = await shmsock.open_connection("server", 7000, node=node)
            child.stop()
            writer.write(b"anybody?")
            reading = asyncio.create_task(reader.readexactly(8))
            await asyncio.sleep(1)
            assert not reading.done()
            child.resume()
            assert await reading == b"anybody?"
            writer.close()

    run(main())


def test_an_observer_that_was_stopped_itself_kills_nobody(run: Run, region: str) -> None:
    """The child stands still for longer than it gives others, and must not hold that against them."""

    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            accepted = await listening(node)
            async with Child("victim", region, 10, 0.5) as child:
                await child.says("published")
                end, idle = await two_of(accepted)
                for _ in range(3):
                    child.stop()
                    await asyncio.sleep(0.7)
                    child.resume()
                    await asyncio.sleep(0.05)
                end.writer.write(b"x")
                await asyncio.sleep(0.5)
                assert await end.reader.readexactly(10) == pattern(1, 0, 10)
                assert not end.reader.at_eof()
                child.tell("over")
                assert await child.ended() == 0
                assert await end.reader.read() == b""
                for survivor in (end, idle):
                    await survivor.close()

    run(main())


def test_connecting_to_one_that_is_stopped(run: Run, region: str) -> None:
    """It takes as long as it takes; cancelled, nothing is left, and continued, all is well."""

    async def main() -> None:
        settings = Settings(dead_after_s=1)
        async with (
            shmsock.attach(region, name="test", settings=settings) as node,
            Child("serve", region, "server") as child,
        ):
            await child.says("ready")
            before = held(node)
            child.stop()
            tries = [
                asyncio.create_task(shmsock.open_connection("server", 7000, node=node)) for _ in range(50)
            ]
            await asyncio.sleep(0.1)
            assert not any(t.done() for t in tries)
            assert held(node)["connections"] == 50
            for task in tries:
                task.cancel()
            await asyncio.wait(tries)
            assert all(t.cancelled() for t in tries)
            assert held(node) == before
            last = asyncio.create_task(shmsock.open_connection("server", 7000, node=node))
            await asyncio.sleep(0.1)
            child.resume()
            reader, writer = await last
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await until(lambda: held(node) == before)
            child.stop()
            with pytest.raises(ConnectionResetError, match="went away"):
                await shmsock.open_connection("server", 7000, node=node)
            child.resume()
            resumed = time.monotonic()
            while True:  # with its first beat, and not with our next look at all of them
                try:
                    reader, writer = await shmsock.open_connection("server", 7000, node=node)
                    break
                except socket.gaierror:
                    assert time.monotonic() - resumed < 0.5
                    await asyncio.sleep(0)
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again"
            writer.close()
            await until(lambda: held(node) == before)

    run(main())


def test_the_next_life_takes_over_at_once(run: Run, region: str) -> None:
    """A server is killed and started again; its clients connect to the new one, and never to the ghost."""

    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            before = held(node)
            for _ in range(5):
                async with Child("serve", region, "server") as child:
                    await child.says("ready")
                    for _ in range(3):
                        reader, writer = await shmsock.open_connection("server", 7000, node=node)
                        writer.write(b"hello")
                        assert await reader.readexactly(5) == b"hello"
                        writer.close()
                    child.kill()
            await until(lambda: held(node) == before)

    run(main())


def test_a_server_that_dies_takes_its_clients_connects_with_it(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            async with Child("serve", region, "server") as child:
                await child.says("ready")
                child.stop()
                tries = [
                    asyncio.create_task(shmsock.open_connection("server", 7000, node=node)) for _ in range(50)
                ]
                await asyncio.sleep(0.05)
                child.kill()
                for result in await asyncio.gather(*tries, return_exceptions=True):
                    assert isinstance(result, (ConnectionResetError, ConnectionRefusedError))
            assert held(node)["connections"] == 0
            server = await shmsock.start_server(echo, None, 7000, node=node)
            reader, writer = await shmsock.open_connection("test", 7000, node=node)
            writer.write(b"well")
            assert await reader.readexactly(4) == b"well"
            writer.close()
            server.close()

    run(main())
