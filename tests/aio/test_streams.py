"""Streams: what asyncio's own promise, over shared memory."""

from __future__ import annotations

import array
import asyncio
import gc
import inspect
import weakref
from typing import Any

import pytest

import shmsock
from tests.aio.conftest import End, Run, World, until
from tests.aio.processes import pattern, reset

BIG = 5 << 20  # beyond every ring, limit and high-water mark


async def write_until_it_fails(end: End) -> None:
    for _ in range(1000):
        end.writer.write(b"nobody reads this")
        await end.writer.drain()
        await asyncio.sleep(0)


async def transfer(a: End, b: End, data: Any) -> bytes:
    """Everything, then EOF."""

    async def send() -> None:
        a.writer.write(data)
        a.writer.write_eof()
        await a.writer.drain()

    sending = asyncio.create_task(send())
    got = await b.reader.read()
    await sending
    return got


# -- the face


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (shmsock.open_connection, asyncio.open_connection),
        (shmsock.start_server, asyncio.start_server),
        (shmsock.create_connection, asyncio.BaseEventLoop.create_connection),
        (shmsock.create_server, asyncio.BaseEventLoop.create_server),
    ],
)
def test_signatures_are_asyncios(ours: Any, theirs: Any) -> None:
    """Order, kinds and defaults; older Pythons have fewer parameters than the newest, whose they are."""
    mine = {p.name: (p.kind, p.default) for p in inspect.signature(ours).parameters.values()}
    other = {p.name: (p.kind, p.default) for p in inspect.signature(theirs).parameters.values()}
    other.pop("self", None)
    assert {name: mine.get(name) for name in other} == other
    assert [name for name in mine if name in other] == list(other)


def test_reader_and_writer_have_all_that_asyncios_have(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            for end in (c, s):
                assert isinstance(end.reader, asyncio.StreamReader)
                assert isinstance(end.writer, asyncio.StreamWriter)
                assert isinstance(end.transport, asyncio.Transport)
                for name, member in vars(asyncio.StreamWriter).items():
                    if callable(member) and not name.startswith("_"):
                        theirs = list(inspect.signature(member).parameters)
                        mine = list(inspect.signature(getattr(type(end.writer), name)).parameters)
                        assert mine[: len(theirs)] == theirs

    run(main())


def test_extra_info(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            assert c.writer.get_extra_info("peername") == (s.node.name, 7000)
            assert s.writer.get_extra_info("sockname") == (s.node.name, 7000)
            name, port = c.writer.get_extra_info("sockname")
            assert (name, port) == s.writer.get_extra_info("peername")
            assert name == "a"
            assert 32768 <= port <= 65535
            assert c.writer.get_extra_info("nonsense", "default") == "default"
            assert c.writer.can_write_eof()

    run(main())


# -- bytes


def test_echo(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            for i in range(300):
                message = b"%d " % i * (i + 1)
                c.writer.write(message)
                await c.writer.drain()
                assert await s.reader.readexactly(len(message)) == message
                s.writer.write(message)
                await s.writer.drain()
                assert await c.reader.read(len(message)) == message

    run(main())


@pytest.mark.parametrize(("limit", "size"), [(1, 20000), (1000, BIG), (1 << 16, BIG), (1 << 21, BIG)])
def test_more_than_ring_and_limit(run: Run, world: World, limit: int, size: int) -> None:
    async def main() -> None:
        data = pattern(1, 0, size)
        async with world.pair(limit=limit) as (c, s):
            sending = asyncio.create_task(transfer(s, c, data))
            assert await transfer(c, s, data) == data
            assert await sending == data

    run(main())


@pytest.mark.parametrize("n", [1 << 20, (1 << 20) + 1, BIG])
def test_readexactly_beyond_ring_and_limit(run: Run, world: World, n: int) -> None:
    async def main() -> None:
        data = pattern(2, 0, n + 3)
        async with world.pair(limit=1000) as (c, s):
            c.writer.write(data)
            assert await s.reader.readexactly(n) == data[:n]
            assert await s.reader.readexactly(3) == data[n:]

    run(main())


@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"view"),
        memoryview(array.array("i", range(1000))),
        memoryview(array.array("d", range(300000))),
        memoryview(b"0123456789" * 50000)[::3],
        memoryview(bytes(range(64))).cast("B", (4, 4, 4)),
        memoryview(b"xyz").cast("c"),
        memoryview(array.array("i")),
        memoryview(b""),
        b"",
        bytearray(),
    ],
    ids=lambda d: f"{type(d).__name__}-{len(d)}",
)
def test_everything_like_bytes_is_written(run: Run, world: World, data: Any) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            assert await transfer(c, s, data) == bytes(data)
            if isinstance(data, bytearray):
                data.append(1)  # nobody still has a hold of it
                del data[-1]

    run(main())


def test_a_bytearray_may_change_after_write(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            data = bytearray(pattern(3, 0, BIG))
            before = bytes(data)
            c.writer.write(data)
            data[:] = bytes(BIG)
            data.clear()
            assert await s.reader.readexactly(BIG) == before

    run(main())


def test_writelines(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.writelines([b"a", bytearray(b"b"), memoryview(b"c"), b""])
            c.writer.writelines([])
            c.writer.writelines(b"%d," % i for i in range(100000))
            c.writer.write_eof()
            assert await s.reader.read() == b"abc" + b"".join(b"%d," % i for i in range(100000))

    run(main())


@pytest.mark.parametrize("data", ["text", None, 5, [b"x"], object()])
def test_what_is_not_bytes_is_a_type_error(run: Run, world: World, data: Any) -> None:
    async def main() -> None:
        async with world.pair() as (c, _):
            with pytest.raises(TypeError):
                c.writer.write(data)
            with pytest.raises(TypeError):
                c.writer.writelines([data])
            c.writer.close()
            with pytest.raises(TypeError):
                c.writer.write(data)

    run(main())


# -- lines


def test_lines(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(limit=100) as (c, s):
            c.writer.write(b"one\ntwo\n\nhalf")
            assert await s.reader.readline() == b"one\n"
            assert await s.reader.readline() == b"two\n"
            assert await s.reader.readline() == b"\n"
            c.writer.write(b" and half\nlast")
            assert await s.reader.readline() == b"half and half\n"
            c.writer.close()
            assert await s.reader.readline() == b"last"
            assert await s.reader.readline() == b""
            assert s.reader.at_eof()

    run(main())


def test_separators_in_pieces(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reading = asyncio.create_task(s.reader.readuntil(b"<END>"))
            for byte in b"x<EN<END>y<END>":
                c.writer.write(bytes([byte]))
                await c.writer.drain()
                await asyncio.sleep(0)
            assert await reading == b"x<EN<END>"
            assert await s.reader.readuntil(b"<END>") == b"y<END>"
            with pytest.raises(ValueError, match=r"[Ss]eparator"):
                await s.reader.readuntil(b"")

    run(main())


def test_lines_beyond_the_limit(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(limit=64) as (c, s):
            c.writer.write(b"x" * 100 + b"\n" + b"next\n")
            with pytest.raises(asyncio.LimitOverrunError) as info:
                await s.reader.readuntil(b"\n")
            assert info.value.consumed == 100
            with pytest.raises(ValueError, match="found, but chunk is longer than limit"):
                await s.reader.readline()  # drops the line
            assert await s.reader.readline() == b"next\n"
            # no separator at all, and more than the ring holds: memory stays bounded
            c.writer.write(b"y" * BIG)
            with pytest.raises(asyncio.LimitOverrunError, match="not found"):
                await s.reader.readuntil(b"\n")
            assert len(s.reader._buffer) <= 1 << 17  # type: ignore[attr-defined]
            assert await s.reader.readexactly(BIG) == b"y" * BIG

    run(main())


def test_readexactly_that_ends_early(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"abc")
            reading = asyncio.create_task(s.reader.readexactly(10))
            await asyncio.sleep(0)
            c.writer.close()
            with pytest.raises(asyncio.IncompleteReadError) as info:
                await reading
            assert (info.value.partial, info.value.expected) == (b"abc", 10)
            with pytest.raises(asyncio.IncompleteReadError):
                await s.reader.readexactly(1)
            with pytest.raises(ValueError, match="less than zero"):
                await s.reader.readexactly(-1)
            with pytest.raises(asyncio.IncompleteReadError):
                await s.reader.readuntil()

    run(main())


def test_read_zero_and_all(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(limit=10) as (c, s):
            assert await s.reader.read(0) == b""
            assert await s.reader.readexactly(0) == b""
            reading = asyncio.create_task(s.reader.read(-1))
            for i in range(50):
                c.writer.write(pattern(4, 1000 * i, 1000))
                await asyncio.sleep(0)
            assert not reading.done()
            c.writer.write_eof()
            assert await reading == pattern(4, 0, 50000)
            assert await s.reader.read(0) == await s.reader.read(5) == await s.reader.read() == b""
            assert not [x async for x in s.reader]

    run(main())


def test_async_iteration(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.writelines(b"%d\n" % i for i in range(1000))
            c.writer.close()
            assert [line async for line in s.reader] == [b"%d\n" % i for i in range(1000)]

    run(main())


def test_at_eof(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            assert not s.reader.at_eof()
            c.writer.write(b"x")
            c.writer.write_eof()
            await until(lambda: s.reader._eof)  # type: ignore[attr-defined]
            assert not s.reader.at_eof()
            assert await s.reader.read(10) == b"x"
            assert s.reader.at_eof()

    run(main())


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8192, 65536])
def test_at_eof_behind_what_fills_a_buffer(run: Run, world: World, size: int) -> None:
    """A reader that nobody waits for is given 4096 bytes: an end behind just those is seen as well."""

    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(bytes(size))
            c.writer.write_eof()
            for _ in range(size // 512):
                assert len(await s.reader.readexactly(512)) == 512
            assert await s.reader.readexactly(size % 512) == bytes(size % 512)
            await until(s.reader.at_eof)
        async with world.pair() as (c, s):
            c.writer.write(bytes(size))
            c.writer.write_eof()
            await until(lambda: len(s.reader._buffer) == min(size, 4096))  # type: ignore[attr-defined]
            assert await s.reader.readexactly(size) == bytes(size)
            await until(s.reader.at_eof)

    run(main())


def test_eof_and_a_little_data_are_seen_with_nobody_reading(run: Run, world: World) -> None:
    """Connection pools look at at_eof() and at the buffer to see whether an idle connection is still good."""

    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.close()
            await until(s.reader.at_eof)
        async with world.pair() as (c, s):
            c.writer.write(b"unexpected")
            await until(lambda: bytes(s.reader._buffer) == b"unexpected")  # type: ignore[attr-defined]

    run(main())


@pytest.mark.parametrize("how", ["read", "readline", "readexactly", "readuntil"])
def test_two_reads_at_once(run: Run, world: World, how: str) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reading = asyncio.create_task(s.reader.readline())
            await until(lambda: s.reader._waiter is not None)  # type: ignore[attr-defined]
            size = (5,) if how in ("read", "readexactly") else ()
            with pytest.raises(RuntimeError, match=r"called while another coroutine is already waiting"):
                await getattr(s.reader, how)(*size)
            c.writer.write(b"line\n")
            assert await reading == b"line\n"

    run(main())


# -- back-pressure


def test_drain_waits_for_a_reader_that_does_not_read(run: Run, world: World) -> None:
    async def main() -> None:
        chunk = pattern(5, 0, 1 << 16)
        async with world.pair() as (c, s):
            written = 0

            async def send() -> None:
                nonlocal written
                for _ in range(400):
                    c.writer.write(chunk)
                    await c.writer.drain()
                    written += len(chunk)

            sending = asyncio.create_task(send())
            before = -1
            while before != written:
                before = written
                for _ in range(100):
                    await asyncio.sleep(0)
                await asyncio.sleep(0.02)
            assert not sending.done()
            assert written < 3 << 20
            assert c.transport.get_write_buffer_size() <= 2 * (1 << 16)
            assert len(s.reader._buffer) <= 4096  # type: ignore[attr-defined]
            for _ in range(400):
                assert await s.reader.readexactly(len(chunk)) == chunk
            await sending

    run(main())


def test_several_drains_wait_at_once(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(bytes(BIG))
            drains = [asyncio.create_task(c.writer.drain()) for _ in range(5)]
            await asyncio.sleep(0.05)
            assert not any(d.done() for d in drains)
            drains[1].cancel()
            await asyncio.sleep(0)
            assert len(await s.reader.readexactly(BIG)) == BIG
            await asyncio.wait(drains)
            assert [d.cancelled() for d in drains] == [False, True, False, False, False]

    run(main())


def test_write_buffer_limits(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            assert c.transport.get_write_buffer_limits() == (1 << 14, 1 << 16)
            c.transport.set_write_buffer_limits(0)
            c.writer.write(bytes(BIG))
            drain = asyncio.create_task(c.writer.drain())
            await asyncio.sleep(0.02)
            assert c.transport.get_write_buffer_size() > 0
            assert not drain.done()
            await s.reader.readexactly(BIG)
            await drain
            assert c.transport.get_write_buffer_size() == 0
            c.transport.set_write_buffer_limits(high=1 << 30)
            c.writer.write(bytes(BIG))
            await c.writer.drain()  # below the mark: no reason to wait
            assert c.transport.get_write_buffer_size() > 0
            assert len(await s.reader.readexactly(BIG)) == BIG

    run(main())


def test_both_sides_write_and_then_read(run: Run, world: World) -> None:
    """A reader that waits for more than the ring holds never leaves the ring full."""

    async def main() -> None:
        data = pattern(6, 0, BIG)

        async def side(end: End) -> None:
            async def send() -> None:
                end.writer.write(data)
                await end.writer.drain()

            sending = asyncio.create_task(send())
            assert await end.reader.readexactly(len(data)) == data
            await sending

        async with world.pair() as (c, s):
            await asyncio.gather(side(c), side(s))

    run(main())


# -- endings


def test_half_close(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"question")
            c.writer.write_eof()
            c.writer.write_eof()
            assert await s.reader.read() == b"question"
            assert s.reader.at_eof()
            assert not s.writer.is_closing()
            data = pattern(7, 0, BIG)
            s.writer.write(data)
            s.writer.close()
            assert await c.reader.read() == data
            with pytest.raises(RuntimeError, match=r"write_eof"):
                c.writer.write(b"more")
            await c.close()
            await s.close()

    run(main())


def test_eof_follows_what_is_still_pending(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            data = pattern(8, 0, BIG)
            c.writer.write(data)
            c.writer.write_eof()
            assert c.transport.get_write_buffer_size() > 0
            with pytest.raises(RuntimeError, match=r"write_eof"):
                c.writer.write(b"more")
            assert await s.reader.read() == data

    run(main())


def test_close_flushes(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            data = pattern(9, 0, BIG)
            c.writer.write(data)
            c.writer.close()
            assert c.writer.is_closing()
            closed = asyncio.create_task(c.writer.wait_closed())
            await asyncio.sleep(0.01)
            assert not closed.done()
            assert await s.reader.read() == data
            await closed
            c.writer.close()
            await c.writer.wait_closed()

    run(main())


def test_many_small_writes_then_close(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            for i in range(30000):
                c.writer.write(b"%05d " % i)
            c.writer.close()
            assert await s.reader.read() == b"".join(b"%05d " % i for i in range(30000))

    run(main())


def test_the_other_side_sees_a_close(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.close()
            assert await s.reader.read() == b""
            with pytest.raises(ConnectionError):
                await write_until_it_fails(s)

    run(main())


def test_what_was_written_before_the_peer_closed_its_reading_side_is_readable(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"last words")
            c.writer.close()
            with pytest.raises(ConnectionError):
                await write_until_it_fails(s)
            assert await s.reader.read() == b"last words"

    run(main())


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("wait", ["drain", "helper"])
def test_a_drain_whose_bytes_were_all_taken_does_not_fail(
    run: Run, world: World, how: str, wait: str
) -> None:
    """The peer takes the rest and closes, all before the one who waits runs again."""

    async def main() -> None:
        async with world.pair(settings=shmsock.Settings(ring_bytes=4096)) as (c, s):
            protocol: Any = c.transport.get_protocol()
            resume, got = protocol.resume_writing, bytearray()

            async def take() -> None:
                got.extend(await s.reader.readexactly(4096))

            def resumed() -> None:
                resume()
                got.extend(s.transport.conn.read(1 << 16))
                getattr(s.transport, how)()

            protocol.resume_writing = resumed
            c.transport.set_write_buffer_limits(0)
            c.writer.write(pattern(1, 0, 8000))
            waiting = asyncio.create_task(c.writer.drain() if wait == "drain" else protocol._drain_helper())
            await asyncio.sleep(0)
            await take()
            await waiting
            assert len(got) == 8000
            assert await c.reader.read() == b""

    run(main())


@pytest.mark.parametrize("wait", ["drain", "helper"])
def test_a_drain_that_waits_while_its_own_side_closes(run: Run, world: World, wait: str) -> None:
    """As over TCP: what was written goes out, and that was waited for."""

    async def main() -> None:
        async with world.pair() as (c, s):
            protocol: Any = c.transport.get_protocol()
            c.writer.write(pattern(1, 0, BIG))
            waiting = asyncio.create_task(c.writer.drain() if wait == "drain" else protocol._drain_helper())
            await asyncio.sleep(0)
            c.writer.close()
            assert await s.reader.read() == pattern(1, 0, BIG)
            await waiting

    run(main())


@pytest.mark.parametrize("how", ["close", "abort", "reset"])
def test_writes_to_who_has_closed_fail_before_a_pass_tells(run: Run, world: World, how: str) -> None:
    """In a row, while this loop looks after nothing else. Over TCP one is lost silently, or two."""

    written = 0

    async def write(end: End) -> None:
        nonlocal written
        for written in range(100):  # noqa: B007
            end.writer.write(b"foo")
            await end.writer.drain()

    async def main() -> None:
        async with world.pair() as (c, s):
            if how == "reset":
                reset(s.transport)
            else:
                getattr(s.transport, how)()
            with pytest.raises(ConnectionError):
                await write(c)
            assert written <= 2

    run(main())


@pytest.mark.parametrize("size", [0, 1000, BIG])
def test_abort_is_an_end(run: Run, world: World, size: int) -> None:
    """As over TCP: what the ring took arrives, what it had no room for is lost, and the end follows."""

    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(pattern(1, 0, size))
            assert (c.transport.get_write_buffer_size() > 0) == (size == BIG)
            published = size - c.transport.get_write_buffer_size()
            c.transport.abort()
            assert c.writer.is_closing()
            assert await s.reader.read() == pattern(1, 0, published)
            await c.writer.wait_closed()
            with pytest.raises(ConnectionError):
                await write_until_it_fails(s)

    run(main())


def test_abort_without_lingering_is_a_reset(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reading = asyncio.create_task(s.reader.read(10))
            await asyncio.sleep(0)
            reset(c.transport)
            assert c.writer.is_closing()
            with pytest.raises(ConnectionResetError, match="reset by peer"):
                await reading
            with pytest.raises(ConnectionResetError):
                await s.reader.read()
            with pytest.raises(ConnectionResetError):
                await s.reader.readline()
            with pytest.raises(ConnectionResetError):
                await write_until_it_fails(s)
            assert await c.reader.read() == b""  # who aborts knows
            await c.writer.wait_closed()
            with pytest.raises(ConnectionResetError):
                await s.writer.wait_closed()

    run(main())


@pytest.mark.parametrize("unread", [0, 1 << 16])
def test_a_reset_ends_a_drain(run: Run, world: World, unread: int) -> None:
    """Also while what the peer had written lies unread."""

    async def main() -> None:
        async with world.pair() as (c, s):
            s.writer.write(bytes(unread))
            c.writer.write(bytes(BIG))
            drain = asyncio.create_task(c.writer.drain())
            await asyncio.sleep(0.05)
            assert not drain.done()
            reset(s.transport)
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(drain, 20)

    run(main())


@pytest.mark.parametrize("unread", [0, 1 << 16])
def test_a_close_of_the_peer_ends_a_drain(run: Run, world: World, unread: int) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            s.writer.write(bytes(unread))
            c.writer.write(bytes(BIG))
            drain = asyncio.create_task(c.writer.drain())
            await asyncio.sleep(0.05)
            s.writer.close()
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(drain, 20)
            if unread:
                assert await c.reader.readexactly(unread) == bytes(unread)
            with pytest.raises(ConnectionResetError):  # not all that was written was read, as over TCP
                await c.reader.read()

    run(main())


def test_a_reset_is_told_to_those_that_ask(run: Run, world: World) -> None:
    """A handler that has seen it need not ask wait_closed() as well, and no loop is told of an exception that
    nobody retrieved: not even when the collector finalizes the future ahead of the protocol."""

    async def main() -> None:
        async with world.pair() as (c, s):
            told: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
            reset(c.transport)
            with pytest.raises(ConnectionResetError):
                await s.reader.read()
            protocol: Any = s.writer._protocol  # type: ignore[attr-defined]
            await until(lambda: protocol._closed is not None)
            closed, protocol._closed = protocol._closed, None
            del closed  # the collector came
            assert told == []

    run(main())


def test_late_writes(run: Run, world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"before")
            c.writer.close()
            for _ in range(10):
                c.writer.write(b"after")
            with pytest.raises(ConnectionResetError):
                await c.writer.drain()
            assert await s.reader.read() == b"before"
            for _ in range(10):
                c.writer.write(b"after")
            c.transport.write_eof()

    run(main())
    assert any("lost connection" in r.message or "closed" in r.message for r in caplog.records)


def test_wait_closed_and_drain_after_the_end(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, _):
            await c.close()
            await c.writer.wait_closed()
            with pytest.raises(ConnectionResetError):
                await c.writer.drain()
            assert await c.reader.read() == b""

    run(main())


def test_close_while_a_read_waits(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, _):
            reading = asyncio.create_task(c.reader.read(10))
            await until(lambda: c.reader._waiter is not None)  # type: ignore[attr-defined]
            c.writer.close()
            assert await reading == b""

    run(main())


# -- dropped and replaced


def test_a_dropped_writer_warns_and_closes(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            gc.collect()
            with pytest.warns(ResourceWarning, match=r"unclosed.*Writer"):
                del c.writer
            assert await s.reader.read() == b""
            c.writer = s.writer  # for the end of the block

    run(main())


def test_a_dropped_reader_reads_and_forgets(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            gone = weakref.ref(c.reader)
            c.writer._reader = None  # type: ignore[attr-defined]
            c.reader = s.reader
            gc.collect()
            assert gone() is None
            s.writer.write(bytes(BIG))
            await s.writer.drain()
            await until(lambda: s.transport.get_write_buffer_size() == 0)

    run(main())


class Collector(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.eof = self.lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> bool:
        self.eof = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


class Buffered(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        self.buffer = bytearray(1000)
        self.data = bytearray()
        self.eof = self.lost = False

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.buffer[:nbytes]

    def eof_received(self) -> bool:
        self.eof = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


@pytest.mark.parametrize("kind", [Collector, Buffered])
def test_set_protocol_ends_direct_mode(run: Run, world: World, kind: Any) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"for the reader\nfor the protocol")
            assert await s.reader.readline() == b"for the reader\n"
            rest = bytes(s.reader._buffer)  # type: ignore[attr-defined]
            collector = kind()
            s.transport.set_protocol(collector)
            assert s.transport.get_protocol() is collector
            c.writer.write(b", all of it")
            await until(lambda: rest + collector.data == b"for the protocol, all of it")
            reading = asyncio.create_task(s.reader.read(100))
            if rest:
                assert await reading == rest
                reading = asyncio.create_task(s.reader.read(100))
            c.writer.write(b" and more")
            await until(lambda: collector.data.endswith(b" and more"))
            assert not reading.done()
            s.reader.feed_data(b"fed")  # as TLS does
            assert await reading == b"fed"
            c.writer.write_eof()
            await until(lambda: collector.eof)
            s.writer.close()
            await until(lambda: collector.lost)
            reading.cancel()

    run(main())


@pytest.mark.parametrize("kind", [Collector, Buffered])
def test_a_protocol_with_pauses(run: Run, world: World, kind: Any) -> None:
    async def main() -> None:
        data = pattern(10, 0, BIG)
        async with world.pair() as (c, s):
            protocol = kind()
            s.transport.pause_reading()
            s.transport.pause_reading()
            assert not s.transport.is_reading()
            s.transport.set_protocol(protocol)
            c.writer.write(data)
            c.writer.write_eof()
            await asyncio.sleep(0.02)
            assert protocol.data == b""
            s.transport.resume_reading()
            s.transport.resume_reading()
            assert s.transport.is_reading()
            await until(lambda: protocol.eof)
            assert protocol.data == data

    run(main())


def test_a_reader_over_its_own_protocol_again(run: Run, world: World) -> None:
    """set_protocol away and back: the reader lives on, fed by its protocol, as asyncio's own."""

    async def main() -> None:
        data = pattern(11, 0, BIG)
        async with world.pair() as (c, s):
            own = s.transport.get_protocol()
            s.transport.set_protocol(asyncio.Protocol())
            s.transport.set_protocol(own)
            assert await transfer(c, s, data) == data

    run(main())
