"""Bytes that the kernel takes straight from a ring: half-close, resets, back-pressure, growth of the ring."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import shmsock
from shmsock.forward.relay import Relay, ShmSide, SocketSide
from shmsock.forward.transport import SocketTransport
from tests.forward.processes import PATIENCE_S, reset

MIB = 1 << 20


class Poured:
    """A peer's connection, `reader` and `writer`, that a relay leads to the kernel socket `sock`."""

    def __init__(self, reader: Any, writer: Any, sock: socket.socket, relay: Relay) -> None:
        self.reader, self.writer, self.sock, self.relay = reader, writer, sock, relay
        self.path = relay.client.transport.fast_path

    async def read(self, count: int) -> bytes:
        """Read so many bytes from the socket, or up to its end."""
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < count and (more := await loop.sock_recv(self.sock, min(count - len(data), MIB))):
            data += more
        return bytes(data)

    async def fill(self) -> None:
        """Write until the socket is full, and the ring too."""
        transport = self.writer.transport
        while (waits := transport.get_write_buffer_size()) < MIB or self.relay.client.transport.is_reading():
            if waits < MIB:
                self.writer.write(bytes(MIB))
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def poured(region: str) -> AsyncIterator[Poured]:
    made: asyncio.Future[Relay] = asyncio.get_running_loop().create_future()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    theirs.setblocking(False)

    def start(relay: Relay) -> None:
        SocketTransport(relay.target, theirs)
        made.set_result(relay)

    a, b = [await shmsock.attach(region, name=name) for name in ("vm-a", "vm-b")]
    server = await shmsock.create_server(
        lambda: Relay(ShmSide, SocketSide, id, start).client, None, 0, node=b
    )
    port = server.sockets[0].getsockname()[1]
    reader, writer = await shmsock.open_connection("vm-b", port, node=a)
    try:
        yield Poured(reader, writer, ours, await made)
    finally:
        ours.close()
        writer.close()
        server.close()
        a.close()
        b.close()


def test_bytes_are_sent_from_a_ring_that_grows_and_the_end_comes_behind_them(shm_region: Any) -> None:
    data = random.Random(1).randbytes(5 * MIB)

    async def main() -> None:
        async with poured(str(shm_region)) as it:
            before = it.writer.transport.conn.ring[1]
            it.writer.write(data[:100])
            assert await it.read(100) == data[:100]
            it.writer.write(data[100:])
            it.writer.write_eof()
            assert await it.read(2 * len(data)) == data[100:]
            assert it.writer.transport.conn.ring[1] > before
            assert it.relay.client.received == len(data)
            assert it.path.poured == len(data)
            it.sock.send(b"the other way")
            it.sock.shutdown(socket.SHUT_WR)
            assert await it.reader.read() == b"the other way"

    asyncio.run(main())


def test_a_full_socket_leaves_bytes_in_the_ring_until_it_takes_more(shm_region: Any) -> None:
    async def main() -> None:
        async with poured(str(shm_region)) as it:
            await asyncio.wait_for(it.fill(), PATIENCE_S)
            held = it.relay.client.received
            total = held + it.writer.transport.get_write_buffer_size()
            it.writer.write(b"end")
            it.writer.write_eof()
            data = await it.read(1 << 40)
            assert data.endswith(b"\0end")
            assert total < len(data) <= total + 2 * MIB  # what was in the ring

    asyncio.run(main())


@pytest.mark.parametrize("who", ["writer", "reader"])
@pytest.mark.parametrize("half_closed", [False, True])
def test_a_reset_while_the_socket_is_full(shm_region: Any, who: str, half_closed: bool) -> None:
    async def main() -> None:
        async with poured(str(shm_region)) as it:
            if half_closed:
                it.sock.shutdown(socket.SHUT_WR)
                assert await it.reader.read() == b""
            await asyncio.wait_for(it.fill(), PATIENCE_S)
            if who == "writer":
                it.writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )
                it.writer.transport.abort()
                with pytest.raises(ConnectionResetError):
                    await it.read(1 << 40)
            else:
                reset(it.sock)
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    await it.writer.drain()
            assert it.path.sink == -1  # no other file that gets the socket's number is given its bytes

    asyncio.run(main())
