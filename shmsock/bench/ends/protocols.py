"""Over asyncio's protocols: echoes, what goes one way (writes, files), and echoes of datagrams."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .networks import Network
from .streams import rates
from .timing import batches, percentiles, same, shared, trips

__all__ = ["CLIENTS", "SERVERS"]

BUFFER = 1 << 18
FILE_PIECE = 1 << 18
"""What a program reads at once where the loop cannot send files."""
LOST_S = 30.0
"""A datagram on its way for so long is not coming any more."""


class Server(asyncio.Protocol):
    """Echoes what comes, or counts it, or sends one byte back and closes: the first byte says which."""

    transport: Any
    kind = b""
    count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.kind:
            self.kind, data = data[:1], data[1:]
        if self.kind == b"e":
            self.transport.write(data)
        elif self.kind == b"c":
            self.transport.write(self.kind)
            self.transport.close()
        else:
            self.count += len(data)

    def eof_received(self) -> bool:
        if self.kind == b"s":
            self.transport.write(self.count.to_bytes(8, "big"))
        return False


class BufferedServer(asyncio.BufferedProtocol):
    """Counts what comes, into a buffer of its own; the first byte only begins."""

    transport: Any
    count = -1

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(BUFFER))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.count += nbytes

    def eof_received(self) -> bool:
        self.transport.write(self.count.to_bytes(8, "big"))
        return False


class DatagramServer(asyncio.DatagramProtocol):
    transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class Client(asyncio.Protocol):
    """Plays ball: what comes back goes out again, for as long as `steps` has steps."""

    send: Callable[[bytes], None]
    transport: Any

    def __init__(self, size: int, steps: Iterator[bool]) -> None:
        self.data, self.steps = os.urandom(size), steps
        self.back = b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport, self.send = transport, transport.write

    def data_received(self, data: bytes) -> None:
        self.back = self.back + data if self.back else data
        if len(self.back) < len(self.data):
            return
        if next(self.steps, False):
            self.back = b""
            self.send(self.data)
        elif not self.over.done():
            self.over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(exc or ConnectionResetError("the server closed the connection"))

    async def play(self, kind: bytes, patience: float) -> None:
        next(self.steps)
        self.send(kind + self.data)
        await asyncio.wait_for(self.over, patience)
        same(self.data, self.back)


class DatagramClient(Client, asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.send = transport.sendto

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.data_received(data)

    def error_received(self, exc: Exception) -> None:
        if not self.over.done():
            self.over.set_exception(exc)


class Caller(asyncio.Protocol):
    """Sends one byte, and closes when it is back."""

    transport: Any
    back = b""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(b"c")

    def data_received(self, data: bytes) -> None:
        self.back += data
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)


class Writer(asyncio.Protocol):
    """Writes until it is told to pause."""

    transport: Any

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.resumed: asyncio.Future[None] | None = None
        self.back = b""
        self.over: asyncio.Future[None] = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        self.resumed = self.loop.create_future()

    def resume_writing(self) -> None:
        if self.resumed is not None:
            resumed, self.resumed = self.resumed, None
            resumed.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.back += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)

    async def counted(self) -> int:
        """End what is written, and wait until the other end has all of it: how many bytes it counted."""
        self.transport.write_eof()
        await self.over
        return int.from_bytes(self.back, "big")


async def echo(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    client = Client(options.echo, trips(times, options.seconds))
    transport, _ = await network.create_connection(lambda: client)
    await client.play(b"e", LOST_S + 2 * options.seconds)
    transport.close()
    return percentiles(times)


async def connections(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Connect, one byte each way, close; one after another."""
    _, caller = await network.create_connection(Caller)  # the first attaches the process to its region
    await caller.over
    for _ in trips(times, options.seconds):
        _, caller = await network.create_connection(Caller)
        await caller.over
    same(b"c", caller.back)
    return percentiles(times)


async def many(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Echoes on several connections at once: how many in all."""
    clients: list[Client] = []
    each: list[list[int]] = []
    for _ in range(options.connections):
        _, client = await network.create_connection(lambda: Client(options.echo, iter(())))
        clients.append(client)
        each.append([])
    begin = time.perf_counter_ns()
    for client, taken in zip(clients, each, strict=True):
        client.steps = trips(taken, options.seconds, begin)
    await asyncio.gather(*(client.play(b"e", LOST_S + 2 * options.seconds) for client in clients))
    found = shared(each, times, options.seconds, begin)
    for client in clients:
        client.transport.close()
    return found


async def datagrams(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    client = DatagramClient(options.echo, trips(times, options.seconds))
    remote = (options.host, options.port)
    transport, _ = await network.create_datagram_endpoint(lambda: client, remote_addr=remote)
    await client.play(b"", LOST_S + 2 * options.seconds)
    transport.close()
    return percentiles(times)


async def write(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Blocks one way, until all of them have come through data_received() at the other end."""
    writer = Writer()
    transport, _ = await network.create_connection(lambda: writer)
    transport.write(b"s")
    size, count = options.block, 0
    data = os.urandom(size)
    start = time.perf_counter()
    for count in batches(options.seconds):  # noqa: B007 (the last one counts)
        transport.write(data)
        if writer.resumed is not None:
            await writer.resumed
    received = await writer.counted()
    return rates(count, size, received, time.perf_counter() - start)


async def one_write(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """One write() of a large block, each on a connection of its own, until all of it has come."""
    data = os.urandom(options.block)
    took, count, received, end = 0.0, 0, 0, time.perf_counter() + options.seconds
    while not count or time.perf_counter() < end:
        writer = Writer()
        transport, _ = await network.create_connection(lambda writer=writer: writer)
        transport.write(b"s")
        start = time.perf_counter()
        transport.write(data)
        received += await writer.counted()
        took += time.perf_counter() - start
        count += 1
    return rates(count, options.block, received, took)


async def sendfile(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """A file again and again, by the loop's sendfile(); where it has none, as web servers do then."""
    writer, loop, count = Writer(), asyncio.get_running_loop(), 0
    transport, _ = await network.create_connection(lambda: writer)
    transport.write(b"s")
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(options.block))
        file.flush()
        start = time.perf_counter()
        for count in batches(options.seconds):  # noqa: B007 (the last one counts)
            try:
                await loop.sendfile(transport, file)
            except NotImplementedError:
                file.seek(0)
                while data := await loop.run_in_executor(None, file.read, FILE_PIECE):
                    transport.write(data)
                    if writer.resumed is not None:
                        await writer.resumed
        received = await writer.counted()
        took = time.perf_counter() - start
    return rates(count, options.block, received, took)


async def serve_streams(network: Network) -> Any:
    return await network.create_server(Server)


async def serve_buffered(network: Network) -> Any:
    return await network.create_server(BufferedServer)


async def serve_datagrams(network: Network) -> Any:
    """A transport, which is closed like a server."""
    local = (network.host, network.port)
    transport, _ = await network.create_datagram_endpoint(DatagramServer, local_addr=local)
    return transport


CLIENTS = {
    "protocol-echo": echo,
    "protocol-connect": connections,
    "protocol-many": many,
    "protocol-write": write,
    "buffered-write": write,
    "one-write": one_write,
    "sendfile": sendfile,
    "datagram": datagrams,
}
SERVERS = {
    **dict.fromkeys(CLIENTS, serve_streams),
    "buffered-write": serve_buffered,
    "datagram": serve_datagrams,
}
