"""What child processes do in these tests: `python -m tests.aio.roles LOOP ROLE '[ARGUMENTS]'`.

A role is a coroutine function. It tells its test how far it is with say(), and waits for it with hear().
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import shmsock
from shmsock import Settings
from tests.aio.processes import Lines, pattern, runner

_heard = Lines(0)


def say(*words: object) -> None:
    print(*words, flush=True)


async def hear() -> str:
    """The next line from the test; "" when the test is over."""
    return await _heard.next()


def settings(dead_after_s: float | None) -> Settings | None:
    return None if dead_after_s is None else Settings(dead_after_s=dead_after_s)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def serve(region: str, name: str, port: int = 7000, dead_after_s: float | None = None) -> None:
    """Echoes until it hears a line."""
    async with shmsock.attach(region, name=name, settings=settings(dead_after_s)) as node:
        server = await shmsock.start_server(echo, None, port, node=node, reuse_port=True)
        say("ready")
        await hear()
        server.close()


async def idle(region: str, name: str, port: int = 7000) -> None:
    """Accepts one connection after the other and leaves them alone; says what it got when it hears "read"."""
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    async with shmsock.attach(region, name=name) as node:
        await shmsock.start_server(lambda r, w: accepted.put_nowait((r, w)), None, port, node=node)
        say("ready")
        await hear()
        while not accepted.empty():
            _, writer = accepted.get_nowait()
            writer.close()


async def connect_write(
    region: str, to: str, count: int, size: int, end: str, port: int = 7000, name: str = "clients"
) -> None:
    """`count` connections; each writes its number and a pattern, `size` bytes in all; then the process ends as
    `end` says, at once."""
    node = await shmsock.attach(region, name=name)
    ends = await asyncio.gather(*(shmsock.open_connection(to, port, node=node) for _ in range(count)))
    say("connected")
    base = int(await hear())
    for i, (_, writer) in enumerate(ends):
        writer.write((base + i).to_bytes(4, "little") + pattern(base + i, 4, size - 4))
        if end == "drain":
            await writer.drain()
        elif end.startswith("close"):
            writer.close()
    if end.endswith("exit"):
        os._exit(0)
    if end == "drain":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "close":  # neither wait_closed() nor aclose(): the interpreter ends, and detaches the node
        return
    raise AssertionError(end)


async def victim(region: str, to: str, size: int, close: bool = False, port: int = 7000) -> None:
    """Connects, publishes `size` bytes, says so, and stays until it is killed."""
    async with shmsock.attach(region, name="victim") as node:
        reader, writer = await shmsock.open_connection(to, port, node=node)
        unread, idle = await shmsock.open_connection(to, port, node=node)
        writer.write(pattern(1, 0, size))
        await writer.drain()
        if close:
            writer.close()
        say("published", writer.get_extra_info("sockname")[1])
        if await hear() == "again":  # stopped, thought dead, continued
            for stream in (reader, unread):
                try:
                    await stream.read()
                except ConnectionResetError:
                    say("reset")
            reader, writer = await shmsock.open_connection(to, port, node=node)
            writer.write(b"again")
            writer.close()
            await hear()
        idle.close()


async def saturated(region: str, seconds: float) -> None:
    """Client and server in one loop, with never a pause between them: SIGINT must get through."""

    async def source(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunk = bytes(1 << 16)
        while True:
            writer.write(chunk)
            await writer.drain()

    async with shmsock.attach(region, name="busy") as node:
        await shmsock.start_server(source, None, 7000, node=node)
        reader, _writer = await shmsock.open_connection("busy", 7000, node=node)
        read = 0
        try:
            while True:
                read += len(await reader.readexactly(1000))
                if read == 10_000_000:
                    say("streaming")
        finally:
            say("cancelled", read > 10_000_000)


async def blaster(region: str, to: str) -> None:
    """Writes without end."""
    async with shmsock.attach(region, name="blaster") as node:
        _, writer = await shmsock.open_connection(to, 7000, node=node)
        say("ready")
        chunk = bytes(1 << 16)
        try:
            while True:
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            say("over")


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


class Plan:
    """What both sides of connection `i` do, drawn from the seed: so that each knows what the other means to."""

    def __init__(self, seed: int, i: int) -> None:
        rng = random.Random(f"{seed} {i}")
        self.there, self.back = rng.randrange(300_000), rng.randrange(300_000)
        self.chunk = rng.choice((100, 4096, 100_000))
        self.kind = rng.choice(
            ("half-close", "half-close", "close", "abort", "abort by the server", "cancel")
        )
        self.rng = rng


async def stress(region: str, seed: int, count: int) -> None:
    """The client's side of tests/aio/test_many.py."""
    async with shmsock.attach(region, name="clients") as node:
        say("ready")
        await hear()
        results = await asyncio.gather(*(one_client(node, seed, i) for i in range(count)))
        say(json.dumps(results))
        await hear()
        stats = node.statistics()
        say(json.dumps({k: stats[k] for k in ("connections", "free_slots", "arena_free_bytes", "healed")}))


async def send(writer: asyncio.StreamWriter, seed: int, size: int, chunk: int) -> None:
    for at in range(0, size, chunk):
        writer.write(pattern(seed, at, min(chunk, size - at)))
        await writer.drain()


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


async def one_client(node: shmsock.Node, seed: int, i: int) -> list[object]:
    plan = Plan(seed, i)
    reader, writer = await shmsock.open_connection(
        "test", 7000, node=node, limit=plan.rng.choice((1000, 1 << 16))
    )
    writer.write(i.to_bytes(4, "little"))
    sending = asyncio.create_task(send(writer, 2 * i, plan.there, plan.chunk))
    receiving = asyncio.create_task(receive(reader, 2 * i + 1, plan.rng))
    if plan.kind == "abort":
        while not sending.done() and plan.rng.random() < 0.8:
            await asyncio.sleep(0.001)
        writer.transport.abort()
    elif plan.kind == "cancel":
        for _ in range(3):  # cancelled reads and drains lose nothing: the sum of the parts is the whole
            await asyncio.sleep(0.001)
            receiving.cancel()
            break
    sent = "all"
    try:
        await sending
    except ConnectionError:
        sent = "failed"
    if plan.kind in ("half-close", "abort by the server"):
        writer.write_eof()
    elif plan.kind == "close":
        await asyncio.sleep(0)
    try:
        got, end = await receiving
    except asyncio.CancelledError:
        got, end = -1, "cancelled"
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass
    return [i, sent, got, end]


def main() -> None:
    loop, role, args = sys.argv[1:]
    roles: dict[str, Callable[..., Any]] = globals()
    try:
        runner(loop)(roles[role](*json.loads(args)))
    except KeyboardInterrupt:
        say("interrupted")


if __name__ == "__main__":
    main()
