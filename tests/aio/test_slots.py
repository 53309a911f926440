"""A slot goes from one connection to the next: nothing of one may reach the other, and nothing is leaked."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shmsock
from tests.aio.conftest import End, Run, World, held, until
from tests.aio.processes import Child, pattern, reset


async def listening(node: shmsock.Node, port: int = 7000) -> asyncio.Queue[End]:
    accepted: asyncio.Queue[End] = asyncio.Queue()
    await shmsock.start_server(lambda r, w: accepted.put_nowait(End(r, w, node)), None, port, node=node)
    return accepted


async def connect(a: shmsock.Node, b: shmsock.Node, accepted: asyncio.Queue[End]) -> tuple[End, End]:
    reader, writer = await shmsock.open_connection(b.name, 7000, node=a)
    return End(reader, writer, a), await accepted.get()


def test_a_waiting_reader_gets_nothing_of_the_next_connection(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            accepted = await listening(b)
            for _ in range(50):
                c, s = await connect(a, b, accepted)
                reading = asyncio.create_task(s.reader.read(100))
                await until(lambda s=s: s.reader._waiter is not None)  # type: ignore[misc]
                reset(c.transport)
                d, t = await connect(a, b, accepted)
                d.writer.write(b"for the next one")
                with pytest.raises(ConnectionResetError):
                    await reading
                with pytest.raises(ConnectionResetError):
                    await s.reader.read(100)
                assert await t.reader.readexactly(16) == b"for the next one"
                for end in (c, s, d, t):
                    await end.close()

    run(main())


@pytest.mark.parametrize("how", ["eof", "reset", "unread reset"])
def test_writes_to_an_ended_connection_go_nowhere(run: Run, world: World, how: str) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            accepted = await listening(b)
            for _ in range(50):
                c, s = await connect(a, b, accepted)
                if how == "eof":
                    s.writer.close()
                    assert await c.reader.read() == b""
                elif how == "reset":
                    reset(s.transport)
                    with pytest.raises(ConnectionResetError):
                        await c.reader.read()
                else:
                    s.writer.write(bytes(10000))
                    await asyncio.sleep(0)
                    reset(s.transport)
                    await until(lambda c=c: c.transport.conn.state.value == "FREE")  # type: ignore[misc]
                d, t = await connect(a, b, accepted)
                c.writer.write(b"astray")
                d.writer.write(b"right")
                d.writer.write_eof()
                assert await t.reader.read() == b"right"
                t.writer.write(b"answer")
                t.writer.close()
                assert await d.reader.read() == b"answer"
                for end in (c, s, d, t):
                    await end.close()

    run(main())


def test_a_drain_of_an_ended_connection_ends(run: Run, world: World) -> None:
    """Its slot is another's before it looks."""

    async def main() -> None:
        async with world.nodes() as (a, b):
            accepted = await listening(b)
            for _ in range(20):
                c, s = await connect(a, b, accepted)
                c.writer.write(bytes(3 << 20))
                drain = asyncio.create_task(c.writer.drain())
                await asyncio.sleep(0)
                reset(s.transport)
                d, t = await connect(a, b, accepted)
                with pytest.raises(ConnectionError):
                    await drain
                d.writer.write(b"x")
                assert await t.reader.readexactly(1) == b"x"
                for end in (c, s, d, t):
                    end.transport.abort()
                    await end.close()

    run(main())


def test_five_hundred_connections_one_after_the_other(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            accepted = await listening(b)
            before = held(a), held(b)
            for i in range(500):
                c, s = await connect(a, b, accepted)
                c.writer.write(pattern(i, 0, 5000))
                c.writer.write_eof()
                assert await s.reader.read() == pattern(i, 0, 5000)
                s.writer.write(b"thanks")
                s.writer.close()
                assert await c.reader.read() == b"thanks"
                c.writer.close()
            await until(lambda: (held(a), held(b)) == before)

    run(main())


def test_more_connections_than_slots(run: Run, region: str) -> None:
    """ENOBUFS that names a region size, here or from there; and when some are closed there is room again."""

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            accepted = await listening(a)
            ends: list[tuple[End, End]] = []

            async def connect_until_it_fails() -> None:
                while True:
                    ends.append(await connect(a, a, accepted))

            with pytest.raises(
                OSError, match=r"no connection slots .* in this process.* --size 128MiB --peers 16`"
            ) as info:
                await connect_until_it_fails()
            assert info.value.errno == 105
            assert len(ends) >= a.engine.layout.slots * 7 // 16 - 1
            for end in ends[-1]:
                await end.close()
            ends[-1] = await connect(a, a, accepted)
            for c, s in ends:
                c.writer.write(b"still good")
                assert await s.reader.readexactly(10) == b"still good"
                c.writer.close()
                s.writer.close()
            await until(lambda: held(a)["connections"] == 0)

    run(main())


def test_a_program_gets_seven_of_eight_slots(run: Run, make: Callable[..., str]) -> None:
    """Those that write first get large rings, and the later ones small ones, but all get one."""

    async def main() -> None:
        region = make(size=16 << 20)
        async with shmsock.attach(region, name="a") as a, shmsock.attach(region, name="b") as b:
            accepted = await listening(b)
            ends = [await connect(a, b, accepted) for _ in range(b.engine.layout.slots * 7 // 8)]
            with pytest.raises(OSError, match=r"connection slots .* left in this process") as info:
                await connect(a, b, accepted)
            assert info.value.errno == 105
            for i, (c, s) in enumerate(ends):
                s.writer.write(pattern(i, 0, 100_000))
                assert await c.reader.readexactly(100_000) == pattern(i, 0, 100_000)
            assert ends[0][1].transport.conn.ring[1] >= 1 << 15
            assert all(s.transport.conn.ring[1] >= 512 for _, s in ends)
            with pytest.raises(OSError, match="connection slots"):
                await connect(a, b, accepted)
            ends.append(await connect(b, a, await listening(a)))  # b has kept something for itself

    run(main())


def test_slots_that_a_peer_does_not_let_go_of(run: Run, make: Callable[..., str]) -> None:
    """It stands still, and says DONE to none that we closed: they are looked for in vain, and are of our own
    share. Others can still reach us. The slots are free when it goes on."""

    async def connect_until_it_fails(node: shmsock.Node, writers: list[asyncio.StreamWriter]) -> None:
        while True:
            writers.append((await shmsock.open_connection("b", 7000, node=node))[1])

    async def main() -> None:
        region = make(size=2 << 20, peers=4)
        async with (
            shmsock.attach(region, name="a") as a,
            shmsock.attach(region, name="c") as c,
            Child("serve", region, "b") as child,
        ):
            await child.says("ready")
            accepted, before = await listening(a), held(a)
            writers: list[asyncio.StreamWriter] = []
            with pytest.raises(OSError, match="connection slots"):
                await connect_until_it_fails(a, writers)
            child.stop()
            for writer in writers:
                writer.close()
            with pytest.raises(OSError, match="connection slots") as info:
                await connect_until_it_fails(a, [])
            assert info.value.errno == errno.ENOBUFS
            for _ in range(len(writers)):
                mine, theirs = await connect(c, a, accepted)
                mine.writer.write(b"still good")
                assert await theirs.reader.readexactly(10) == b"still good"
                await mine.close()
                await theirs.close()
            child.resume()
            await until(lambda: held(a) == before)
            reader, writer = await shmsock.open_connection("b", 7000, node=a)
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again"
            writer.close()

    run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount a file system")
def test_a_full_disk(run: Run, tmp_path: Path) -> None:
    """A file with holes: each error says so, whoever needed the storage, and what is open goes on."""
    settings = shmsock.Settings(first_ring_bytes=1 << 18)

    async def main() -> None:
        path = tmp_path / "region"
        async with (
            shmsock.attach(str(path), name="a", settings=settings) as a,
            shmsock.attach(str(path), name="b", settings=settings) as b,
        ):
            accepted = await listening(b)
            ends = []

            async def connect_until_it_fails() -> None:
                while True:
                    ends.append(await connect(a, b, accepted))

            with pytest.raises(
                OSError, match=r"disk full: .* are free|no ring memory left in the section of 'b'"
            ) as info:
                await connect_until_it_fails()
            assert info.value.errno in (errno.ENOSPC, errno.ENOBUFS)
            assert 2 <= len(ends) < a.engine.layout.slots // 2
            c, s = ends[0]
            c.writer.write(pattern(1, 0, 1 << 18))
            assert await s.reader.readexactly(1 << 18) == pattern(1, 0, 1 << 18)
            for c, s in ends:
                await c.close()
                await s.close()

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)], check=True)
    try:
        with open(tmp_path / "region", "wb") as new:
            new.truncate(64 << 20)
        run(main())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_connection_that_is_gone_before_its_opener_looks(run: Run, world: World) -> None:
    """The server resets it at once, and the slot is another's before open_connection() returns."""

    async def main() -> None:
        async with world.nodes() as (a, b):
            handled = 0

            def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal handled
                handled += 1
                if handled % 2:
                    reset(writer.transport)
                else:
                    writer.write(b"well")
                    writer.close()

            server = await shmsock.start_server(handler, None, 7000, node=b)
            for _ in range(20):
                opened = await asyncio.gather(
                    *(shmsock.open_connection(b.name, 7000, node=a) for _ in range(20)),
                    return_exceptions=True,
                )
                results: list[object] = []
                for one in opened:
                    if isinstance(one, BaseException):
                        results.append(type(one))
                        continue
                    reader, writer = one
                    writer.write(b"x")
                    try:
                        results.append(await reader.read())
                    except ConnectionResetError as error:
                        results.append(type(error))
                    writer.close()
                assert sorted(map(str, results)) == [str(ConnectionResetError)] * 10 + [str(b"well")] * 10
            server.close()

    run(main())


def test_who_closes_and_waits_lets_others_run(run: Run, world: World) -> None:
    """wait_closed() need not let the loop turn, but in the end somebody else is to have a turn."""

    async def main() -> None:
        async with world.nodes() as (a, b):
            accepted = await listening(b)
            ends = [end for _ in range(100) for end in await connect(a, b, accepted)]
            loop, turns = asyncio.get_running_loop(), 0

            def turn() -> None:
                nonlocal turns
                turns += 1
                if turns < 1000:
                    loop.call_soon(turn)

            loop.call_soon(turn)
            for end in ends:
                end.writer.close()
                await end.writer.wait_closed()
                assert end.reader.at_eof()
                time.sleep(0.00005)  # it has something to do
            assert turns > 1
            await asyncio.sleep(0)
            assert (a.pump.moot, b.pump.moot) == (0, 0)

    run(main())
