"""What child processes do in these tests: `python -m tests.aio.roles LOOP ROLE '[ARGUMENTS]'`.

A role is a coroutine function. It tells its test how far it is with say(), and waits for it with hear().
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import shmsock
from shmsock import Settings
from shmsock.aio.datagram import create_datagram_endpoint
from tests.aio.processes import Lines, pattern, reset, runner

_heard = Lines(0)


def say(*words: object) -> None:
    print(*words, flush=True)


def held(node: shmsock.Node) -> list[int]:
    """What connections take: the same before and after, or something leaked."""
    counts = node.statistics()
    return [counts[name] for name in ("connections", "free_slots", "arena_free_bytes")]


async def hear() -> str:
    """The next line from the test; "" when the test is over."""
    return await _heard.next()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def serve(region: str, name: str, port: int = 7000) -> None:
    """Echoes until it hears a line."""
    async with shmsock.attach(region, name=name) as node:
        server = await shmsock.start_server(echo, None, port, node=node, reuse_port=True)
        say("ready")
        await hear()
        server.close()


async def both(region: str, name: str, ips: list[str], port: int = 7000) -> None:
    """Answers each line, over TCP and through memory alike, with the way that it came; until it hears one."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = writer.get_extra_info("shmsock_path", "tcp")
        try:
            while line := await reader.readline():
                writer.write(path.encode() + b" " + line)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    tcp = await asyncio.start_server(answer, ips, port)
    async with shmsock.attach(region, name=name) as node:
        server = await shmsock.start_server(answer, None, port, node=node)
        say("ready")
        await hear()
        server.close()
    say("left")
    await hear()
    tcp.close()


async def as_before(node: shmsock.Node, before: list[int]) -> None:
    """Say so when nothing of its connections is left (what has no event of its own)."""
    for _ in range(6000):
        if held(node) == before:
            return say("as before")
        await asyncio.sleep(0.01)
    say(f"before {before}, now {held(node)}")


async def serve_many(region: str, name: str) -> None:
    """Echoes, and tells when nothing of its connections is left."""
    async with shmsock.attach(region, name=name) as node:
        before = held(node)
        async with await shmsock.start_server(echo, None, 7000, node=node):
            say("ready")
            while await hear():
                await as_before(node, before)


class Clients:
    """Many connections to port 7000 of a name."""

    def __init__(self, node: shmsock.Node, server: str) -> None:
        self.node, self._server = node, server
        self._ends: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self, count: int) -> None:
        connect = shmsock.open_connection
        self._ends = await asyncio.gather(
            *(connect(self._server, 7000, node=self.node) for _ in range(count))
        )

    async def echo(self) -> int:
        """An echo on each at the same time. Returns how many came back right."""

        async def one(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            writer.write(b"%06d" % number * 10)
            return await reader.readexactly(60) == b"%06d" % number * 10

        return sum(await asyncio.gather(*(one(i, *end) for i, end in enumerate(self._ends))))

    async def close(self) -> None:
        for _, writer in self._ends:
            writer.close()
        for _, writer in self._ends:
            await writer.wait_closed()
        self._ends.clear()


async def many_clients(region: str, name: str, server: str, count: int) -> None:
    async with shmsock.attach(region, name=name) as node:
        before, clients = held(node), Clients(node, server)
        await clients.open(count)
        say("open", count)
        await hear()
        say("echoed", await clients.echo())
        await hear()
        await clients.close()
        await as_before(node, before)
        await hear()


async def sign(region: str, name: str, port: int = 7000) -> None:
    """Shares the port, and tells everyone who connects its process id."""

    def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d\n" % os.getpid())
        writer.close()

    async with shmsock.attach(region, name=name) as node:
        await shmsock.start_server(handler, None, port, node=node, reuse_port=True)
        say("ready")
        await hear()


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


async def short_lived(region: str, name: str, port: int = 7000) -> None:
    """Attaches when it hears a line, and echoes until it hears another. Says how many seconds it took to
    attach, and when it listened."""
    say("loaded")
    await hear()
    begin = time.monotonic()
    async with shmsock.attach(region, name=name) as node:
        took = time.monotonic() - begin
        server = await shmsock.create_server(Echo, None, port, node=node)
        say(took, time.monotonic())
        await hear()
        server.close()
        server.close_clients()
        await server.wait_closed()


async def regular(region: str, name: str, server: str, times: int) -> None:
    """Connects as soon as it can and stays until the server goes, so many times. Says each time when it was
    served, and at the end whether it holds what it held before."""
    async with shmsock.attach(region, name=name) as node:
        before = held(node)
        say("ready")
        for _ in range(times):
            while True:
                try:
                    reader, writer = await shmsock.open_connection(server, 7000, node=node)
                except (ConnectionError, socket.gaierror):
                    await asyncio.sleep(0.005)  # it is not there
                    continue
                try:
                    writer.write(b"x")
                    if await reader.read(1) == b"x":
                        break
                except ConnectionError:
                    pass  # just gone
                writer.close()
            say(time.monotonic())
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
            writer.close()
        while held(node) != before:  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.01)
        say("all is back")
        await hear()


async def honest(region: str, name: str, still: bool) -> None:
    """Echoes streams at 7000 and datagrams at 8000, sends without end to who connects to 7001, and reads to
    the end what comes to 7002. Says at the end how often it muted somebody."""

    async def reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def writes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(bytes(50_000))
                await writer.drain()
        except ConnectionError:
            writer.close()

    settings = Settings(busy_poll_us=0, hot_us=0) if still else Settings()
    async with shmsock.attach(region, name=name, settings=settings) as node:
        await shmsock.start_server(echo, None, 7000, node=node)
        await shmsock.start_server(writes, None, 7001, node=node)
        await shmsock.start_server(reads, None, 7002, node=node)
        await create_datagram_endpoint(Datagrams, (None, 8000), node=node)
        say("ready")
        await hear()
        say(node.statistics()["rate_limited"])


async def growing(region: str, sizes: list[int], chunk: int) -> None:
    """Fresh connections to "server", which echoes: so many bytes through each, both ways at once. Says what
    an idle connection takes of the arena, and whether all that was taken came back."""

    async def through(node: shmsock.Node, size: int) -> None:
        reader, writer = await shmsock.open_connection("server", 7000, node=node)
        data = random.randbytes(size)
        for at in range(0, size, chunk):
            writer.write(data[at : at + chunk])
        assert sha256(await reader.readexactly(size)).digest() == sha256(data).digest()
        writer.close()
        await writer.wait_closed()

    async with shmsock.attach(region, name="client") as node:
        before = node.statistics()["arena_free_bytes"]
        _, idle = await shmsock.open_connection("server", 7000, node=node)
        say(before - node.statistics()["arena_free_bytes"])
        await asyncio.gather(*(through(node, size) for size in sizes))
        idle.close()
        await idle.wait_closed()
        while node.statistics()["arena_free_bytes"] != before:  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.01)
        say("all is back")


async def source(region: str, name: str) -> None:
    """Sends everyone who connects the pattern of seed 1, without end."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at = 0
        try:
            while True:
                writer.write(pattern(1, at, 50_000))
                await writer.drain()
                at += 50_000
        except ConnectionError:
            writer.close()

    async with shmsock.attach(region, name=name) as node:
        await shmsock.start_server(handler, None, 7000, node=node)
        say("ready")
        await hear()


async def connect_write(region: str, first: int, count: int, size: int, end: str) -> None:
    """`count` connections; each writes its number and a pattern, `size` bytes in all; then the process
    ends as `end` says, at once."""
    node = await shmsock.attach(region, name="clients")
    ends = await asyncio.gather(*(shmsock.open_connection("test", 7000, node=node) for _ in range(count)))
    say("connected")
    await hear()
    for i, (_, writer) in enumerate(ends, first):
        writer.write(i.to_bytes(4, "little") + pattern(i, 4, size - 4))
        if end == "drain and SIGKILL":
            await writer.drain()
        elif end.startswith("close"):
            writer.close()
    if end.endswith("os._exit"):
        os._exit(0)
    if end.endswith("SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    # else neither wait_closed() nor aclose(): the interpreter ends, and detaches the node


async def victim(region: str, size: int, dead_after_s: float = 3.0) -> None:
    """Connects twice, publishes `size` bytes on the first connection, and stays until it is killed."""
    settings = Settings(dead_after_s=dead_after_s)
    async with shmsock.attach(region, name="victim", settings=settings) as node:
        reader, writer = await shmsock.open_connection("test", 7000, node=node)
        idle, idle_writer = await shmsock.open_connection("test", 7000, node=node)
        idle_writer.write(b"idle")
        writer.write(pattern(1, 0, size))
        await writer.drain()
        say("published")
        if await hear() != "again":
            return
        for stream in (reader, idle):  # it was stopped, thought dead, and is continued
            try:
                await stream.read()
            except ConnectionResetError:
                say("reset")
        _, writer = await shmsock.open_connection("test", 7000, node=node)
        writer.write(b"again")
        writer.close()
        await hear()


async def writes_at_once(region: str, name: str, size: int, certificate: str | None) -> None:
    """Writes `size` bytes to who connects, and then waits for its end."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(size))
        await writer.drain()
        say("written")
        await reader.read()

    async with shmsock.attach(region, name=name) as node:
        await shmsock.start_server(handler, None, 7000, node=node, ssl=context)
        say("ready")
        await hear()


async def saturated(region: str) -> None:
    """Client and server in one loop, with never a pause between them: SIGINT must get through."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunk = bytes(1 << 16)
        try:
            while True:
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            writer.close()

    async with shmsock.attach(region, name="busy") as node:
        await shmsock.start_server(handler, None, 7000, node=node)
        reader, writer = await shmsock.open_connection("busy", 7000, node=node)
        read = 0
        try:
            while True:
                read += len(await reader.readexactly(1000))
                if read == 10_000_000:
                    say("streaming")
        finally:
            writer.close()
            say("cancelled")


async def unclosed(region: str, how: str) -> None:
    """Leaves a node behind."""
    node = await shmsock.attach(region, name="unclosed")
    _, writer = await shmsock.open_connection("test", 7000, node=node)
    writer.write(b"will")
    say("ready")
    await hear()
    if how == "raise":
        raise SystemExit(3)
    if how == "close":
        writer.close()


# -- 200 connections between two processes, with everything that can happen to one


class Plan:
    """What both sides of connection `i` do, drawn from the seed: each knows what the other means to."""

    def __init__(self, seed: int, i: int) -> None:
        rng = random.Random(f"{seed} {i}")
        self.kind = rng.choice(("half-close", "close", "abort here", "abort there", "cancel reads"))
        self.there, self.back = (rng.choice((0, 10, 5000, rng.randrange(500_000))) for _ in range(2))
        self.chunk = rng.choice((100, 4096, 100_000))
        self.limit = rng.choice((1000, 1 << 16))
        self.patience = rng.randrange(2000)
        self.rng = rng


async def send(writer: asyncio.StreamWriter, seed: int, size: int, chunk: int) -> str:
    try:
        for at in range(0, size, chunk):
            writer.write(pattern(seed, at, min(chunk, size - at)))
            await writer.drain()
    except ConnectionError:
        return "failed"
    return "sent"


async def receive(reader: asyncio.StreamReader, seed: int | None, rng: random.Random) -> tuple[int, str]:
    """How many bytes came, in order (of that seed's pattern), and what came after them."""
    got = 0
    try:
        while data := await reader.read(rng.choice((100, 5000, 1 << 16))):
            assert seed is None or data == pattern(seed, got, len(data)), f"wrong bytes after {got}"
            got += len(data)
            if rng.random() < 0.1:
                await asyncio.sleep(0)
    except ConnectionResetError:
        return got, "reset"
    return got, "eof"


async def receive_cancelled(reader: asyncio.StreamReader, seed: int, rng: random.Random) -> tuple[int, str]:
    """The same with reads that are cancelled again and again: none of them may take a byte with it."""
    got = 0
    while True:
        n = rng.choice((1, 100, 3000))
        task = asyncio.ensure_future(reader.readexactly(n) if rng.random() < 0.5 else reader.read(n))
        for _ in range(rng.choice((1, 1, 2, 5, 100))):
            if not task.done():
                await asyncio.sleep(0)
        task.cancel()
        try:
            data = await task
        except asyncio.CancelledError:
            continue
        except asyncio.IncompleteReadError as error:
            data = error.partial
            assert data == pattern(seed, got, len(data))
            return got + len(data), "eof"
        except ConnectionResetError:
            rest, end = await receive(reader, None, rng)  # readexactly left what there was
            return got + rest, end
        if not data:
            return got, "eof"
        assert data == pattern(seed, got, len(data)), f"wrong bytes after {got}"
        got += len(data)


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    plan: Plan,
    seeds: tuple[int, int],
    size: int,
    here: bool,
) -> dict[str, Any]:
    """One side of a connection: writes, reads, ends as planned, and tells what it saw."""
    sending = asyncio.ensure_future(send(writer, seeds[0], size, plan.chunk))
    how = receive_cancelled if plan.kind == "cancel reads" else receive
    receiving = asyncio.ensure_future(how(reader, seeds[1], plan.rng))
    if plan.kind == ("abort here" if here else "abort there"):
        for _ in range(plan.patience):
            await asyncio.sleep(0)
        reset(writer.transport)
    sent = await sending
    if plan.kind == "close" and here:
        writer.close()  # and what the other side has not written yet fails there
    elif not writer.is_closing():
        writer.write_eof()
    got, end = await receiving
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass
    return {"sent": sent, "got": got, "end": end}


async def stress_client(node: shmsock.Node, seed: int, i: int) -> dict[str, Any]:
    plan = Plan(seed, i)
    reader, writer = await shmsock.open_connection("test", 7000, node=node, limit=plan.limit)
    writer.write(i.to_bytes(4, "little"))
    return await converse(reader, writer, plan, (2 * i, 2 * i + 1), plan.there, True)


async def stress(region: str, seed: int, count: int) -> None:
    async with shmsock.attach(region, name="clients") as node:
        before = node.statistics()
        say("ready")
        await hear()
        results = await asyncio.gather(*(stress_client(node, seed, i) for i in range(count)))
        say(json.dumps(results))
        await hear()
        left, end = {"": (0, 1)}, asyncio.get_running_loop().time() + 10
        while (
            left and asyncio.get_running_loop().time() < end
        ):  # what the test let go of just now is on its way
            after = node.statistics()
            held = ("connections", "free_slots", "arena_free_bytes", "healed")
            left = {k: (before[k], after[k]) for k in held if before[k] != after[k]}
            await asyncio.sleep(0.001)
        say(json.dumps(left))
        await hear()


class Gatherer(asyncio.Protocol):
    """Keeps all that comes until it has so many bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.pieces = size, list[bytes]()
        self.has_all = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)
        if sum(map(len, self.pieces)) == self.size:
            self.has_all.set()


async def gather(region: str, kind: str, size: int) -> None:
    """Ask "test" for so many bytes ten times, keep them until they are all there, and tell how many page
    faults the last five took."""
    async with shmsock.attach(region, name="gatherer") as node:
        if kind == "streams":
            reader, writer = await shmsock.open_connection("test", 7000, node=node)
        else:
            transport, protocol = await shmsock.create_connection(
                lambda: Gatherer(size), "test", 7000, node=node
            )
        for turn in range(10):
            if turn == 5:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            if kind == "streams":
                writer.write(b"?")
                pieces = [await reader.readexactly(size // 16) for _ in range(16)]
            else:
                transport.write(b"?")
                await protocol.has_all.wait()
                protocol.has_all.clear()
                pieces = protocol.pieces
            pieces.clear()
        say(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


class Datagrams(asyncio.DatagramProtocol):
    """Echoes, and tells when it may send."""

    def __init__(self) -> None:
        self.may_send = asyncio.Event()
        self.may_send.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)

    def pause_writing(self) -> None:
        self.may_send.clear()

    def resume_writing(self) -> None:
        self.may_send.set()


async def datagram_echo(region: str, name: str, port: int) -> None:
    async with shmsock.attach(region, name=name) as node:
        transport, _ = await create_datagram_endpoint(Datagrams, (None, port), node=node, reuse_port=True)
        say("ready")
        await hear()
        transport.close()


async def datagram_source(region: str, count: int, size: int) -> None:
    """Numbered datagrams to port 9 of "test", as fast as pause_writing allows."""
    async with shmsock.attach(region, name="source") as node:
        transport, protocol = await create_datagram_endpoint(Datagrams, None, ("test", 9), node=node)
        for i in range(count):
            transport.sendto(i.to_bytes(size, "little"))
            if not protocol.may_send.is_set():
                await protocol.may_send.wait()
            elif not i % 1000:
                await asyncio.sleep(0)
        transport.close()
        await hear()
        say(json.dumps({k: v for k, v in node.statistics().items() if k.startswith("datagrams")}))


def main() -> None:
    loop, role, args = sys.argv[1:]
    roles: dict[str, Callable[..., Any]] = globals()
    try:
        runner(loop)(roles[role](*json.loads(args)))
    except KeyboardInterrupt:
        say("interrupted")


if __name__ == "__main__":
    main()
