"""A process at one end of a region, in a guest or on the host: it does what it is told, line by line.

Standard input has requests, a JSON list per line: [number, command, arguments]; its end ends the process.
Standard output has a JSON object per line: {"number": n, "result": ...} or {"number": n, "error": name,
"message": text} when a request is done, and {"event": name, ...} when something happens unasked.
`Peer` in peers.py is the other side.
"""

from __future__ import annotations

import asyncio
import faulthandler
import hashlib
import json
import logging
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import shmsock
from shmsock.address import boot_id, machine_id
from shmsock.aio.attach import current_node

CHUNK = 1 << 16
LIMIT = 1 << 20
FLOOD = 65521  # bytes, a prime: no size of a buffer or a ring is a multiple of it


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Tell(logging.Handler):
    """Says what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say(event="log", level=record.levelname, text=record.getMessage())


class Datagrams(asyncio.DatagramProtocol):
    """Sends all back, or keeps all for who waits."""

    def __init__(self, echo: bool) -> None:
        self.echo = echo
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if self.echo:
            self.transport.sendto(data, addr)
        else:
            self.queue.put_nowait(data)


async def send_bytes(writer: asyncio.StreamWriter, size: int) -> str:
    """Write random bytes; returns their SHA-256."""
    sha, rng = hashlib.sha256(), random.Random()
    while size:
        data = rng.randbytes(min(size, CHUNK))
        sha.update(data)
        writer.write(data)
        await writer.drain()
        size -= len(data)
    return sha.hexdigest()


async def receive_bytes(reader: asyncio.StreamReader, size: int) -> str:
    sha = hashlib.sha256()
    while size:
        data = await reader.read(min(size, CHUNK))
        if not data:
            raise EOFError(f"{size} bytes are missing")
        sha.update(data)
        size -= len(data)
    return sha.hexdigest()


class Worker:
    def __init__(self) -> None:
        self.node: Any = None
        self.servers: dict[int, shmsock.Server] = {}
        self.held: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self.datagrams: list[asyncio.DatagramTransport] = []
        self.flood = random.Random(1).randbytes(FLOOD)

    # -- the serving side: the first line of a connection says what it is for

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            what, _, size = (await reader.readline()).decode().strip().partition(" ")
            if what == "echo":
                while data := await reader.read(CHUNK):
                    writer.write(data)
                    await writer.drain()
            elif what == "swap":
                sent, received = await asyncio.gather(
                    send_bytes(writer, int(size)), receive_bytes(reader, int(size))
                )
                writer.write(f"{sent} {received}\n".encode())
                await writer.drain()
            elif what == "take":
                got = await self.compare(reader, int(size))
                writer.write(json.dumps(got).encode() + b"\n")
                await writer.drain()
            elif what == "pour":
                say(event="pouring")
                while True:  # until somebody is no more
                    writer.write(self.flood)
                    await writer.drain()
            elif what == "hold":
                writer.transport.set_write_buffer_limits(0)  # drain() waits until all is in the ring
                sent = await send_bytes(writer, int(size))
                say(event="published", sha=sent)
                rest = await reader.read(1)
                say(event="end", error=None if not rest else "bytes came")
        except OSError as error:
            say(event="end", error=type(error).__name__)
        finally:
            writer.close()

    async def compare(self, reader: asyncio.StreamReader, most: int) -> dict[str, Any]:
        """Read until there are so many bytes, or no more, which should be `flood` again and again."""
        expected, size, end, wrong = self.flood * 3, 0, "", False
        try:
            while size < most and not end:
                data = await reader.read(min(CHUNK, most - size))
                start = size % FLOOD
                wrong = wrong or data != expected[start : start + len(data)]
                if not size:
                    say(event="reading")
                size += len(data)
                end = "" if data else "EOF"
        except OSError as error:
            end = type(error).__name__
        return {"bytes": size, "wrong": wrong, "end": end}

    # -- commands

    async def attach(
        self, region: str | None = None, name: str | None = None, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Without arguments: the node that the module's functions use."""
        if region or name or settings:
            wanted = shmsock.Settings(**(settings or {}))
            self.node = await shmsock.attach(region, name=name, settings=wanted)
        else:
            self.node = await current_node()
        return {
            "name": self.node.name,
            "section": self.node.section,
            "region": self.node.region.url,
            "path": self.node.region.path,
            "write_combining": self.node.region.write_combining,
            "can_lock": self.node.region.can_lock,
            "peers": self.node.engine.layout.peers,
            "boot": boot_id().hex(),
            "machine": machine_id().hex(),
            "loop": type(asyncio.get_running_loop()).__module__,
        }

    async def detach(self) -> None:
        for server in self.servers.values():
            server.close()
        self.servers.clear()
        for transport in self.datagrams:
            transport.close()
        self.datagrams.clear()
        await self.node.aclose()

    async def listen(self, port: int, host: str | None = None) -> int:
        server = await shmsock.start_server(self.serve, host, port, limit=LIMIT, node=self.node)
        port = server.sockets[0].getsockname()[1]
        self.servers[port] = server
        return port

    async def implicit_echo(self, host: str, port: int) -> str:
        """Nothing but the two public functions, as in everybody's program."""
        reader, writer = await shmsock.open_connection(host, port)
        writer.write(b"echo\nhello\n")
        line = await reader.readline()
        peer: tuple[str, int] = writer.get_extra_info("peername")
        writer.close()
        await writer.wait_closed()
        return f"{line.decode().strip()} from {peer[0]}:{peer[1]}"

    async def implicit_listen(self, port: int) -> str:
        server = self.servers[port] = await shmsock.start_server(self.serve, port=port)
        return str(server.sockets[0].getsockname()[0])

    @asynccontextmanager
    async def to(
        self, host: str | int, port: int, what: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await shmsock.open_connection(host, port, limit=LIMIT, node=self.node)
        try:
            writer.write(f"{what}\n".encode())
            yield reader, writer
        finally:
            writer.close()
            await writer.wait_closed()

    async def echo(self, host: str | int, port: int, count: int, size: int = 64) -> dict[str, Any]:
        times = []
        async with self.to(host, port, "echo") as (reader, writer):
            for number in range(count):
                data = number.to_bytes(4, "big") * (size // 4)
                start = time.perf_counter()
                writer.write(data)
                await writer.drain()
                back = await reader.readexactly(size)
                times.append(time.perf_counter() - start)
                if back != data:
                    raise ValueError(f"echo {number} came back as {back[:16]!r}...")
        return {"count": len(times), "p50_us": round(sorted(times)[len(times) // 2] * 1e6, 1)}

    async def swap(self, host: str | int, port: int, size: int) -> dict[str, str]:
        """`size` bytes in each direction at once: what was sent and received here, and there."""
        async with self.to(host, port, f"swap {size}") as (reader, writer):
            sent, received = await asyncio.gather(send_bytes(writer, size), receive_bytes(reader, size))
            there = (await reader.readline()).decode().split()
        return {"sent": sent, "received": received, "there_sent": there[0], "there_received": there[1]}

    async def give(self, host: str | int, port: int, size: int, piece: int) -> dict[str, Any]:
        """`size` bytes one way, by writes of `piece`, as fast as it goes; returns what came of them there."""
        data = memoryview(self.flood * (2 + piece // FLOOD))
        async with self.to(host, port, f"take {size}") as (reader, writer):
            for at in range(0, size, piece):
                start = at % FLOOD
                writer.write(data[start : start + min(piece, size - at)])
                await writer.drain()
            got: dict[str, Any] = json.loads(await reader.readline())
        return got

    async def listen_datagrams(self, port: int) -> None:
        transport, _ = await shmsock.create_datagram_endpoint(
            lambda: Datagrams(echo=True), (None, port), node=self.node
        )
        self.datagrams.append(transport)

    async def echo_datagrams(self, host: str | int, port: int, sizes: list[int]) -> list[int]:
        """Random ones, there and back, one at a time; returns their sizes as they came back."""
        rng, found = random.Random(), []
        transport, protocol = await shmsock.create_datagram_endpoint(
            lambda: Datagrams(echo=False), remote_addr=(host, port), node=self.node
        )
        for size in sizes:
            data = rng.randbytes(size)
            transport.sendto(data)
            back = await protocol.queue.get()
            if back != data:
                raise ValueError(f"{data[:16]!r}... came back as {back[:16]!r}...")
            found.append(len(back))
        transport.close()
        return found

    async def many(self, host: str | int, port: int, count: int) -> int:
        """Open so many connections, echo on each at the same time, close them. Returns how many echoes came
        back."""
        ends = await asyncio.gather(
            *(shmsock.open_connection(host, port, limit=LIMIT, node=self.node) for _ in range(count))
        )

        async def one(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            writer.write(b"echo\n%08d" % number)
            return await reader.readexactly(8) == b"%08d" % number

        echoes = sum(await asyncio.gather(*(one(i, *end) for i, end in enumerate(ends))))
        for _, writer in ends:
            writer.close()
        for _, writer in ends:
            await writer.wait_closed()
        return echoes

    async def keep(self, key: int, host: str | int, port: int) -> None:
        """Open a connection that echoes, for ping()."""
        reader, writer = await shmsock.open_connection(host, port, limit=LIMIT, node=self.node)
        writer.write(b"echo\n")
        self.held[key] = reader, writer

    async def ping(self, key: int, count: int = 1) -> float:
        """Bytes over that connection, there and back; returns the median of the times, in seconds."""
        reader, writer = self.held[key]
        times = []
        for number in range(count):
            data = random.randbytes(64) + number.to_bytes(4, "big")
            start = time.perf_counter()
            writer.write(data)
            back = await reader.readexactly(len(data))
            times.append(time.perf_counter() - start)
            if back != data:
                raise ValueError(f"echo {number} came back as {back[:16]!r}...")
        return sorted(times)[count // 2]

    async def drop(self, key: int) -> None:
        _, writer = self.held.pop(key)
        writer.close()
        await writer.wait_closed()

    async def drink(self, host: str | int, port: int) -> dict[str, Any]:
        """Read what the other end writes without end, until the connection ends."""
        reader, writer = await shmsock.open_connection(host, port, limit=LIMIT, node=self.node)
        writer.write(b"pour\n")
        got = await self.compare(reader, 1 << 62)
        writer.close()
        return got

    async def hold(self, key: int, host: str | int, port: int, size: int) -> None:
        """Have the other end write `size` bytes and wait; nothing is read here."""
        reader, writer = await shmsock.open_connection(host, port, limit=LIMIT, node=self.node)
        writer.write(f"hold {size}\n".encode())
        self.held[key] = reader, writer

    async def read_to_end(self, key: int) -> dict[str, Any]:
        """Everything there is, then how it ended."""
        reader, writer = self.held.pop(key)
        sha, size, end = hashlib.sha256(), 0, "EOF"
        try:
            while data := await reader.read(CHUNK):
                sha.update(data)
                size += len(data)
        except OSError as error:
            end = type(error).__name__
        writer.close()
        return {"bytes": size, "sha": sha.hexdigest(), "end": end}

    async def statistics(self) -> dict[str, Any]:
        return {**self.node.statistics(), "down": not self.node.engine.alive}

    async def raw_write(self, region: str, offset: int, text: str) -> int:
        with shmsock.open_region(region) as memory:
            memory[offset : offset + len(text)] = text.encode()
            return len(memory)

    async def raw_read(self, region: str, offset: int, size: int) -> str:
        with shmsock.open_region(region) as memory:
            return bytes(memory[offset : offset + size]).decode()

    async def execute(self, number: int, command: str, arguments: dict[str, Any]) -> None:
        try:
            task: Coroutine[Any, Any, Any] = getattr(self, command)(**arguments)
            say(number=number, result=await task)
        except Exception as error:
            say(number=number, error=type(error).__name__, message=str(error))


async def main() -> None:
    worker, tasks = Worker(), set()
    requests = asyncio.StreamReader(limit=LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(requests), sys.stdin
    )
    say(event="ready")
    while line := await requests.readline():
        task = asyncio.ensure_future(worker.execute(*json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    logging.getLogger("shmsock").addHandler(Tell())
    assert Path(shmsock.__file__).exists()
    if sys.argv[1:] == ["uvloop"]:
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
