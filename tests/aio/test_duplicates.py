"""dup() of a connection's pseudo-socket: create_connection(sock=) goes on with the connection."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ssl
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

import shmsock
from shmsock.aio.pseudosocket import Duplicate
from tests.aio.conftest import until
from tests.aio.processes import reset
from tests.aio.test_addresses import Run, base, node_of_this_loop, run_shm
from tests.conformance.certificates import Contexts

__all__ = ["base", "run_shm"]  # fixtures

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
BIG = bytes(range(256)) * 8192  # more than a ring takes at once


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[Streams, Streams]]:
    """(client's, server's)."""
    accepted: asyncio.Queue[Streams] = asyncio.Queue()
    server = await asyncio.start_server(lambda *streams: accepted.put_nowait(streams), "me.shm", 7000)
    client = await asyncio.open_connection("me.shm", 7000)
    try:
        yield client, await accepted.get()
    finally:
        server.close()
        client[1].close()


def dup(writer: asyncio.StreamWriter) -> Any:
    return writer.get_extra_info("socket").dup()


async def create_connection(*args: Any, **how: Any) -> tuple[Any, Any]:
    """The loop's, whose annotations want a socket."""
    make: Any = asyncio.get_running_loop().create_connection
    made: tuple[Any, Any] = await make(*args, **how)
    return made


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.log: list[Any] = []
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.log.append("made")
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.log.append("eof")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.log.append(exc)


@pytest.mark.parametrize("first", ["close", "later", "never"])
def test_tls_as_drivers_of_databases_begin_it(run_shm: Run, first: str) -> None:
    """In clear first, then dup(), close() of the transport, and TLS over the copy."""
    tls = Contexts()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"starttls\n"
        writer.write(b"go\n")
        await writer.drain()
        before, protocol = writer.transport, writer.transport.get_protocol()
        protocol._over_ssl = True  # type: ignore[attr-defined]  # StreamWriter.start_tls() is of 3.11
        made = await asyncio.get_running_loop().start_tls(before, protocol, tls.server, server_side=True)
        writer._transport = made  # type: ignore[attr-defined]
        writer.write(b"encrypted " + await reader.readline())
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(handler, "me.shm", 7000):
            reader, writer = await asyncio.open_connection("me.shm", 7000)
            names = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
            writer.write(b"starttls\n")
            assert await reader.readline() == b"go\n"
            copy = dup(writer)
            assert copy.getpeername() == names[0]
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            if first == "close":
                writer.transport.close()
            elif first == "later":
                asyncio.get_running_loop().call_soon(writer.transport.close)
            reader2, writer2 = await asyncio.open_connection(
                sock=copy, ssl=tls.client, server_hostname="127.0.0.1"
            )
            assert (writer2.get_extra_info("peername"), writer2.get_extra_info("sockname")) == names
            assert writer2.get_extra_info("ssl_object") is not None
            writer2.write(b"hello\n")
            assert await reader2.readline() == b"encrypted hello\n"
            writer2.close()
            await writer2.wait_closed()
            assert writer.is_closing()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    run_shm(main())


def test_tls_at_the_servers_side(run_shm: Run) -> None:
    """connect_accepted_socket() takes a copy as well."""
    tls = Contexts()

    async def main() -> None:
        async with pair() as ((_, writer), (_, peer_writer)):
            copies = dup(writer), dup(peer_writer)
            make: Any = asyncio.get_running_loop().connect_accepted_socket
            got, sent = Recorder(), Recorder()
            (_, client), _ = await asyncio.gather(
                create_connection(lambda: sent, sock=copies[0], ssl=tls.client, server_hostname="127.0.0.1"),
                make(lambda: got, copies[1], ssl=tls.server),
            )
            assert client is sent
            sent.transport.write(b"encrypted")
            await until(lambda: got.data == b"encrypted")
            for end in (sent, got):
                end.transport.close()
            await until(lambda: got.log[-1:] == sent.log[-1:] == [None])
            peer_writer.close()

    run_shm(main())


def test_no_byte_is_lost(run_shm: Run) -> None:
    """What waited to be written, and what nobody had read, either way; the old protocol sees one end."""

    async def main() -> None:
        for closed in (True, False):
            async with pair() as ((_, writer), (peer, peer_writer)):
                peer_writer.write(b"unread")
                await until(lambda: peer_writer.transport.get_write_buffer_size() == 0)
                await asyncio.sleep(0.01)  # the pump may move it to the reader's buffer, or not
                writer.write(BIG)
                assert writer.transport.get_write_buffer_size() > 0
                copy = dup(writer)
                if closed:
                    writer.close()
                protocol = Recorder()
                transport, _ = await create_connection(lambda: protocol, sock=copy)  # noqa: B023
                transport.write(b"behind")
                peer_writer.write(b", and more")
                assert await peer.readexactly(len(BIG) + 6) == BIG + b"behind"
                await until(lambda: protocol.data == b"unread, and more")  # noqa: B023
                transport.close()
                assert await peer.read() == b""
                await until(lambda: protocol.log == ["made", None])  # noqa: B023
                peer_writer.close()

    run_shm(main())


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("end", ["close", "collector", "with", "detach"])
def test_never_used(run_shm: Run, closed: bool, end: str) -> None:
    """The connection ends with the last that holds it open, and not before; nothing is left."""

    async def main() -> None:
        async with pair() as ((_, writer), (peer, peer_writer)):
            copies = [dup(writer), dup(writer)]
            copies.append(copies[0].dup())
            writer.write(b"x")
            if closed:
                writer.close()
            assert await peer.readexactly(1) == b"x"
            while copies:
                if end == "collector":
                    copies.pop()
                    gc.collect()
                elif end == "with":
                    with copies.pop():
                        pass
                else:
                    copy = copies.pop()
                    getattr(copy, end)()
                    copy.close()
                    with pytest.raises(OSError, match="another dup") as info:
                        await create_connection(Recorder, sock=copy)
                    assert info.value.errno == errno.EBADF
                if copies:
                    await asyncio.sleep(0)
                    peer_writer.write(b"still there")
                    assert not peer.at_eof()
            if not closed:
                writer.close()
            with contextlib.suppress(ConnectionResetError):  # bytes were left unread
                assert await peer.read() == b""
            peer_writer.close()
            (node,) = node_of_this_loop()
            await until(lambda: not node.engine.connections)

    run_shm(main())


def test_the_peer_goes_meanwhile(run_shm: Run) -> None:
    async def main() -> None:
        async with pair() as ((_, writer), (_, peer_writer)):
            copy = dup(writer)
            writer.close()
            peer_writer.write(b"last words")
            peer_writer.close()
            await peer_writer.wait_closed()
            protocol = Recorder()
            await create_connection(lambda: protocol, sock=copy)
            await until(lambda: protocol.log == ["made", "eof", None])
            assert protocol.data == b"last words"

    run_shm(main())


def test_the_peer_resets_meanwhile(run_shm: Run) -> None:
    async def main() -> None:
        async with pair() as ((_, writer), (_, peer_writer)):
            copy, unused = dup(writer), dup(writer)
            writer.close()
            reset(peer_writer.transport)
            (node,) = node_of_this_loop()
            await until(lambda: not node.engine.connections)
            protocol = Recorder()
            await create_connection(lambda: protocol, sock=copy)
            await until(lambda: len(protocol.log) == 2)
            assert protocol.log[0] == "made"
            assert isinstance(protocol.log[1], ConnectionResetError)
            unused.close()

    run_shm(main())


def test_the_node_ends_meanwhile(run_shm: Run) -> None:
    async def main() -> None:
        async with pair() as ((_, writer), (peer, _)):
            copy, other = dup(writer), dup(writer)
            writer.close()
            (node,) = node_of_this_loop()
            await node.aclose()
            with pytest.raises(shmsock.NodeClosedError):
                await create_connection(Recorder, sock=copy)
            for one in (copy, other):
                one.close()
            with contextlib.suppress(ConnectionError, shmsock.NodeClosedError):
                await peer.read()

    run_shm(main())


def test_what_is_refused(run_shm: Run) -> None:
    async def main() -> None:
        async with pair() as ((_, writer), (_, peer_writer)):
            copy = dup(writer)
            assert isinstance(copy, Duplicate)
            with pytest.raises(ValueError, match="can not be specified at the same time"):
                await create_connection(Recorder, "me.shm", 7000, sock=copy)
            with pytest.raises(ValueError, match="goes on with the dup"):
                await create_connection(Recorder, sock=writer.get_extra_info("socket"))
            with pytest.raises(ValueError, match="server_hostname"):
                await create_connection(Recorder, sock=copy, ssl=ssl.create_default_context())

            raised: list[BaseException] = []

            def elsewhere() -> None:
                async def use() -> None:
                    await create_connection(Recorder, sock=copy)

                other = shmsock.new_event_loop()
                try:
                    other.run_until_complete(use())
                except RuntimeError as error:
                    raised.append(error)
                other.close()

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert [type(error) for error in raised] == [shmsock.WrongThreadError]
            with pytest.raises(ZeroDivisionError):
                await create_connection(lambda: 1 // 0, sock=copy)
            transport, _ = await create_connection(Recorder, sock=copy)  # it can still be used
            with pytest.raises(OSError, match="nothing to duplicate"):
                dup(writer)
            transport.close()
            peer_writer.close()
        server = await asyncio.start_server(lambda r, w: None, "me.shm", 7000)
        with pytest.raises(OSError, match="only a connection has") as info:
            server.sockets[0].dup()
        assert info.value.errno == errno.EOPNOTSUPP
        server.close()

    run_shm(main())
