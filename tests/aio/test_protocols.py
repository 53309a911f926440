"""Protocols that do odd things, where the conformance suite (tests/conformance) does not look."""

from __future__ import annotations

import asyncio
import contextvars
import select
import socket
import ssl
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trustme

import shmsock
from tests.aio.conftest import Run, World, until
from tests.aio.processes import Child, pattern

SIZE = 200_000


class Collector(asyncio.Protocol):
    def __init__(self) -> None:
        self.data, self.ended = b"", False
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set_result(exc)


class Buffered(asyncio.BufferedProtocol):
    """With a buffer of its own kind, made anew each time."""

    def __init__(self, buffer: Any) -> None:
        self.make, self.data = buffer, b""
        self.lost = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> Any:
        self.buffer = self.make()
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        del self.buffer[nbytes:]  # nobody else holds it any more
        self.data += self.buffer

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set_result(exc)


async def received_by(protocol: Any, data: bytes, world: World) -> Any:
    """`data` is sent to it, and EOF."""
    async with world.nodes() as (a, b):
        server = await shmsock.create_server(lambda: protocol, None, 7000, node=b)
        _, writer = await shmsock.open_connection(b.name, 7000, node=a)
        writer.write(data)
        writer.close()
        lost = await protocol.lost
        server.close()
        return lost


def test_a_buffer_that_is_resized(run: Run, world: World) -> None:
    async def main() -> None:
        protocol = Buffered(lambda: bytearray(64))
        assert await received_by(protocol, pattern(1, 0, 5000), world) is None
        assert protocol.data == pattern(1, 0, 5000)

    run(main())


def test_a_buffer_that_cannot_be_written(run: Run, world: World) -> None:
    async def main() -> None:
        lost = await received_by(Buffered(lambda: bytes(100)), b"x", world)
        assert isinstance(lost, TypeError)

    run(main())
    assert [type(r["exception"]) for r in run.reports] == [TypeError]
    run.reports.clear()


def test_tiny_buffers_leave_the_loop_its_turns(run: Run, world: World) -> None:
    """The budget of a turn is time: sixty thousand callbacks are not made in one."""

    async def main() -> None:
        turns, at = 0, []

        def turn() -> None:
            nonlocal turns
            turns += 1
            if not protocol.lost.done():
                asyncio.get_running_loop().call_soon(turn)

        class Tiny(Buffered):
            def buffer_updated(self, nbytes: int) -> None:
                super().buffer_updated(nbytes)
                at.append(turns)

        protocol = Tiny(lambda: bytearray(1))
        turn()
        assert await received_by(protocol, bytes(60_000), world) is None
        assert protocol.data == bytes(60_000)
        assert max(Counter(at).values()) < 30_000

    run(main())


def test_resume_writing_has_the_connections_context(run: Run, world: World) -> None:
    variable = contextvars.ContextVar("variable", default="nobody's")
    seen = []

    class Writer(Collector):
        def pause_writing(self) -> None:
            seen.append(("pause", variable.get()))

        def resume_writing(self) -> None:
            seen.append(("resume", variable.get()))

    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(lambda r, w: readers.append((r, w)), None, 7000, node=b)
            readers: list[Any] = []
            variable.set("the client's")
            transport, writer = await shmsock.create_connection(Writer, b.name, 7000, node=a)
            await until(lambda: readers)
            transport.write(bytes(3 << 20))
            reader, other = readers[0]
            assert len(await reader.readexactly(3 << 20)) == 3 << 20
            await until(lambda: len(seen) == 2)
            transport.close()
            await writer.lost
            other.close()
            server.close()

    run(main())
    assert seen == [("pause", "the client's"), ("resume", "the client's")]


@pytest.mark.parametrize("how", ["readexactly", "read", "readline"])
def test_a_polled_socket_of_a_stream(run: Run, world: World, how: str) -> None:
    """What is asked for once tells the truth for good."""

    async def main() -> None:
        async with world.pair() as (c, s):
            poll = select.poll()
            poll.register(s.writer.get_extra_info("socket").fileno(), select.POLLIN)
            for text in (b"x\n", b"yy\n", b"z" * 5000 + b"\n"):
                assert poll.poll(0) == []
                c.writer.write(text)
                await until(lambda: poll.poll(0))
                if how == "readline":
                    assert await s.reader.readline() == text
                elif how == "readexactly":
                    assert await s.reader.readexactly(len(text)) == text
                else:
                    got = b""
                    while len(got) < len(text):
                        got += await s.reader.read(3000)
                    assert got == text
            assert poll.poll(0) == []
            c.writer.close()
            await until(lambda: poll.poll(0))

    run(main())


@pytest.mark.parametrize("value", [struct.pack("ii", 1, 0), bytearray(struct.pack("ii", 1, 0))])
def test_abort_with_options_of_any_kind(run: Run, world: World, value: Any) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
            c.transport.abort()
            with pytest.raises(ConnectionResetError):
                await s.reader.read()

    run(main())


@pytest.mark.parametrize("loop_name", ["asyncio"])  # uvloop has no sendfile for others' transports
def test_reading_goes_on_after_sendfile(run: Run, world: World, tmp_path: Path) -> None:
    """asyncio's fallback pauses reading meanwhile, although more is there than the reader's limit."""
    (tmp_path / "file").write_bytes(pattern(2, 0, SIZE))

    async def main() -> None:
        async with world.pair(limit=1000) as (c, s):
            c.writer.write(pattern(1, 0, SIZE))
            c.writer.write_eof()
            with (tmp_path / "file").open("rb") as file:
                sending = asyncio.ensure_future(asyncio.get_running_loop().sendfile(s.transport, file))
                assert await c.reader.readexactly(SIZE) == pattern(2, 0, SIZE)
                assert await sending == SIZE
            assert await s.reader.read() == pattern(1, 0, SIZE)

    run(main())


class StockReader(asyncio.StreamReader):
    """Not adopted: it is fed."""


@pytest.mark.parametrize("how", ["TLS", "fed reader", "protocol"])
def test_what_a_killed_peer_had_written_is_read(run: Run, region: str, tmp_path: Path, how: str) -> None:
    """All of it, then EOF, as when the kernel of a killed process closes its sockets."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    ca.issue_cert("victim").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert"))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca")) if how == "TLS" else None

    async def main() -> None:
        loop = asyncio.get_running_loop()
        certificate = str(tmp_path / "cert") if context else None
        async with (
            shmsock.attach(region, name="test") as node,
            Child("writes_at_once", region, "victim", SIZE, certificate) as child,
        ):
            await child.says("ready")
            if how == "protocol":
                transport, protocol = await shmsock.create_connection(Collector, "victim", 7000, node=node)
                await child.says("written")
                child.kill()
                assert await protocol.lost is None
                assert (len(protocol.data), protocol.ended) == (SIZE, True)
                return
            if how == "TLS":
                reader, writer = await shmsock.open_connection("victim", 7000, ssl=context, node=node)
            else:
                reader = StockReader(loop=loop)
                protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
                transport, _ = await shmsock.create_connection(lambda: protocol, "victim", 7000, node=node)
                writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            assert len(await reader.readexactly(10)) == 10
            await child.says("written")
            child.kill()
            await until(lambda: node.statistics()["peers_lost"] == 1)
            assert len(await reader.read()) == SIZE - 10
            writer.close()

    run(main())


def test_start_tls_when_the_handshake_came_early(run: Run, world: World) -> None:
    """The pump has moved it into the buffer of a reader that nobody asks: it belongs to TLS."""
    ca, server = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("server").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(client)

    async def main() -> None:
        async with world.pair() as (c, s):
            here: Any = c.writer  # (typeshed has start_tls() from 3.11 on)
            there: Any = s.writer
            starting = asyncio.ensure_future(here.start_tls(client, server_hostname="server"))
            await until(lambda: s.reader._buffer)  # type: ignore[attr-defined]
            await there.start_tls(server)
            await starting
            c.writer.write(b"secret")
            assert await s.reader.readexactly(6) == b"secret"
            c.writer.close()
            assert await s.reader.read() == b""

    run(main())


class Asking(asyncio.Protocol):
    """Asks once, and notes in which pieces the answer came."""

    def __init__(self, pieces: Counter[int]) -> None:
        self.pieces, self.left = pieces, len(QUESTION)
        self.answered = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(QUESTION)

    def data_received(self, data: bytes) -> None:
        self.pieces[len(data)] += 1
        self.left -= len(data)
        if not self.left:
            self.answered.set_result(None)


QUESTION = b"hello\n"


def test_a_first_answer_that_comes_in_the_midst_of_a_delivery_is_whole(run: Run, region: str) -> None:
    """It finds the new connection at any point of its first look for bytes: one of twenty in the midst."""
    pieces: Counter[int] = Counter()

    async def main() -> None:
        async with Child("serve", region, "server") as child, shmsock.attach(region, name="test") as node:
            await child.says("ready")
            for _ in range(300):
                transport, asking = await shmsock.create_connection(
                    lambda: Asking(pieces), "server", 7000, node=node
                )
                await asking.answered
                transport.close()

    run(main())
    assert pieces == {len(QUESTION): 300}
