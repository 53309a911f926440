"""From the ring into a reader's or a protocol's hands: no byte is lost on the way, whatever fails there.

Either the connection ends with what failed, as over TCP, or the bytes come later; nobody reads on behind a
gap.
"""

from __future__ import annotations

import asyncio
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import shmsock
from tests.aio.conftest import End, Run, World, until
from tests.aio.test_streams import write_until_it_fails

Read = Callable[[asyncio.StreamReader], Coroutine[Any, Any, bytes]]

READS: dict[str, Read] = {
    "read": lambda r: r.read(4000),
    "readexactly": lambda r: r.readexactly(4000),
    "readline": lambda r: r.readline(),
    "readuntil": lambda r: r.readuntil(b"---"),
}


def taken_reports(run: Run) -> list[str]:
    reports, run.reports[:] = [r["message"] for r in run.reports], []
    return reports


class NoRoom(bytearray):
    """A buffer that gets no memory."""

    def __iadd__(self, more: Any) -> Any:  # type: ignore[misc]
        raise MemoryError

    def extend(self, more: Any) -> None:
        raise MemoryError


class Early(SSLProtocol):
    """Stands where TLS does, and collects what it is given."""

    def __init__(self) -> None:
        self.got, self.room, self.ended = bytearray(), bytearray(), False

    def connection_lost(self, exc: Any) -> None:
        self.ended = True

    def eof_received(self) -> None:
        self.ended = True

    def data_received(self, data: bytes) -> None:  # of Python 3.10
        self.got += data

    def get_buffer(self, n: int) -> bytearray:
        self.room = bytearray(n)
        return self.room

    def buffer_updated(self, n: int) -> None:
        self.got += self.room[:n]


async def some_in_the_buffer(c: End, s: End) -> Any:
    """As a pool or a parser sees it."""
    s.writer.write(b"0123456789")
    assert await c.reader.readexactly(4) == b"0123"
    reader: Any = c.reader
    await until(lambda: bytes(reader._buffer) == b"456789")
    return reader


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("size", [1000, 20_000])
def test_a_buffer_that_is_held_while_somebody_reads(run: Run, world: World, name: str, size: int) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reader = await some_in_the_buffer(c, s)
            if name == "read":
                assert await reader.read(100) == b"456789"
            with memoryview(reader._buffer) if name != "read" else memoryview(b""):
                if name == "read":
                    reader._buffer = NoRoom()  # an empty one has nothing to be held
                    reader._fast_path.can_read = False
                waiting = asyncio.ensure_future(READS[name](reader))
                await asyncio.sleep(0)
                s.writer.write(b"A" * size)
                with pytest.raises((BufferError, MemoryError)):
                    await waiting
                with pytest.raises((BufferError, MemoryError)):
                    await reader.read(10)
                assert c.transport.is_closing()
            with pytest.raises((BufferError, MemoryError)):
                await c.reader.read()
            assert taken_reports(run) == ["Fatal error: protocol.data_received() call failed."]
            with pytest.raises(ConnectionError):
                await write_until_it_fails(s)

    run(main())


@pytest.mark.parametrize("end", ["open", "finished", "closed"])
def test_a_buffer_that_is_held_while_nobody_reads(run: Run, world: World, end: str) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reader = await some_in_the_buffer(c, s)
            with memoryview(reader._buffer):
                s.writer.write(b"A" * 1000)
                if end == "finished":
                    s.writer.write_eof()
                elif end == "closed":
                    s.writer.close()
                await until(lambda: reader.exception() is not None)
            with pytest.raises(BufferError):
                await reader.read()
            assert taken_reports(run) == ["Fatal error: protocol.data_received() call failed."]

    run(main())


def test_a_buffer_that_is_held_for_a_while_in_which_nothing_comes(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reader = await some_in_the_buffer(c, s)
            with memoryview(reader._buffer) as view:
                assert bytes(view) == b"456789"
            s.writer.write(b"A" * 9000)
            s.writer.close()
            assert await reader.read() == b"456789" + b"A" * 9000

    run(main())


def test_a_buffer_that_is_held_at_the_own_close(run: Run, world: World) -> None:
    """The connection has its end, and its reader the error."""

    async def main() -> None:
        async with world.pair() as (c, s):
            reader = await some_in_the_buffer(c, s)
            with memoryview(reader._buffer):
                s.writer.write(b"A" * 1000)
                c.writer.close()
            with pytest.raises(BufferError):
                await c.writer.wait_closed()
            with pytest.raises(BufferError):
                await reader.read()
            taken_reports(run)

    run(main())


def test_a_buffer_that_is_held_when_a_handshake_begins(run: Run, world: World) -> None:
    """What came early begins it, and is not read twice."""

    async def main() -> None:
        async with world.pair() as (c, s):
            reader = await some_in_the_buffer(c, s)
            with memoryview(reader._buffer):
                protocol = Early()
                c.transport.set_protocol(protocol)
                s.writer.write(b"more")
                await until(lambda: bytes(protocol.got) == b"456789more")
            assert not reader._buffer

    run(main())


@pytest.mark.parametrize("closed", [False, True])
def test_bytes_for_a_handshake_whose_peer_has_gone(run: Run, world: World, closed: bool) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            reader = await some_in_the_buffer(c, s)
            if closed:
                s.writer.close()
                await until(reader.at_eof if not reader._buffer else lambda: reader._eof)
            protocol = Early()
            c.transport.set_protocol(protocol)
            if not closed:
                s.writer.close()
            await until(lambda: bytes(protocol.got) == b"456789")
            if not closed:
                await until(lambda: protocol.ended)

    run(main())


@pytest.mark.parametrize("kind", ["data_received", "buffer_updated"])
def test_ctrl_c_in_a_protocol_loses_nothing(world: World, loop_name: str, kind: str) -> None:
    """The loop may be run again, and goes on where it was."""
    got = bytearray()
    interrupted = False

    def take(data: bytes) -> None:
        nonlocal interrupted
        got.extend(data)
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    class Streaming(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            take(data)

    class Buffered(asyncio.BufferedProtocol):
        room = bytearray(1000)

        def get_buffer(self, n: int) -> bytearray:
            return self.room

        def buffer_updated(self, n: int) -> None:
            take(bytes(self.room[:n]))

    import uvloop

    loop = uvloop.new_event_loop() if loop_name == "uvloop" else asyncio.new_event_loop()
    factory: Any = Streaming if kind == "data_received" else Buffered
    data = bytes(range(256)) * 40

    async def first() -> tuple[Any, ...]:
        node = await shmsock.attach(world.region, name="a")
        server = await shmsock.create_server(factory, None, 7000, node=node)
        transport, _ = await shmsock.create_connection(asyncio.Protocol, "a", 7000, node=node)
        return node, server, transport

    node, server, transport = loop.run_until_complete(first())
    try:
        transport.write(data)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        loop.run_until_complete(asyncio.wait_for(until(lambda: len(got) == len(data)), 10))
        assert bytes(got) == data
    finally:
        transport.close()
        server.close()
        loop.run_until_complete(node.aclose())
        loop.close()
