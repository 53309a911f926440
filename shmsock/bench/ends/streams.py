"""Over asyncio's streams: echoes, lines, writes one way, connections, and many of them at once."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from typing import Any

from .networks import Network
from .probe import here, spin
from .timing import batches, percentiles, same, shared, trips
from .usage import usage

__all__ = ["BLOCK", "CLIENTS", "connect", "disconnect", "handle", "held", "let_go", "rates"]

BLOCK = 64 * 1024
LINE = 32
AT_ONCE = 32
"""Connections that are opened at the same time; what a peer of shmsock answers at once."""

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The server's side. What the client wants is its first byte: b"e" echo, b"l" echo of lines, b"s" a sink
    that counts, b"c" that byte back and no more, b"u" what this process used, b"p" a probe of so many ms."""
    try:
        kind = await reader.readexactly(1)
        if kind == b"e":
            while data := await reader.read(BLOCK):
                writer.write(data)
                await writer.drain()
        elif kind == b"l":
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
        elif kind == b"u":
            while await reader.read(1):
                writer.write(json.dumps(usage(writer)).encode() + b"\n")
                await writer.drain()
        elif kind == b"c":
            writer.write(kind)
        elif kind == b"p":
            found = spin(int.from_bytes(await reader.readexactly(2), "big") / 1000)
            writer.write(json.dumps({**found, **here(writer)}).encode() + b"\n")
        else:
            count = 0
            while data := await reader.read(BLOCK):
                count += len(data)
            writer.write(count.to_bytes(8, "big"))
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the client was interrupted
    finally:
        writer.close()


async def connect(network: Network, kind: bytes) -> Pair:
    reader, writer = await network.open_connection()
    writer.write(kind)
    return reader, writer


async def disconnect(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def held(network: Network, count: int, kind: bytes = b"e") -> list[Pair]:
    """Open so many connections, and try each of them."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> Pair:
        async with gate:
            reader, writer = await connect(network, kind)
            writer.write(b"?")
            await reader.readexactly(1)
            return reader, writer

    return await asyncio.gather(*(one() for _ in range(count)))


async def let_go(pairs: list[Pair]) -> None:
    for _, writer in pairs:
        writer.close()
    for _, writer in pairs:
        await writer.wait_closed()


async def echo(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Round trips of `size` bytes, one at a time."""
    reader, writer = await connect(network, b"e")
    size = options.echo
    data = os.urandom(size)
    for _ in trips(times, options.seconds):
        writer.write(data)
        await writer.drain()
        back = await reader.readexactly(size)
    same(data, back)
    await disconnect(writer)
    return percentiles(times)


async def readline(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Round trips of one line, one at a time."""
    reader, writer = await connect(network, b"l")
    data = b"x" * (LINE - 1) + b"\n"
    for _ in trips(times, options.seconds):
        writer.write(data)
        await writer.drain()
        back = await reader.readline()
    same(data, back)
    await disconnect(writer)
    return percentiles(times)


async def write(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Writes of a block one way, each with a drain(), until all have been counted at the other end."""
    reader, writer = await connect(network, b"s")
    size, count = options.block, 0
    data = os.urandom(size)
    start = time.perf_counter()
    for count in batches(options.seconds):  # noqa: B007 (the last one counts)
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    received = int.from_bytes(await reader.readexactly(8), "big")
    took = time.perf_counter() - start
    await disconnect(writer)
    return rates(count, size, received, took)


def rates(count: int, size: int, received: int, took: float) -> dict[str, Any]:
    if received != count * size:
        raise ValueError(f"{count * size} bytes were sent and {received} ({received:#x}) received")
    return {"bytes": received, "mb_s": received / took / 1e6, "per_s": count / took}


async def connections(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Connect, one byte each way, close; one after another."""
    await disconnect((await connect(network, b"c"))[1])  # the first attaches the process to its region
    for _ in trips(times, options.seconds):
        reader, writer = await connect(network, b"c")
        back = await reader.readexactly(1)
        await disconnect(writer)
    same(b"c", back)
    return percentiles(times)


async def all_at_once(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Connects that are all started at once, and a byte each way on each: how many a second."""
    await disconnect((await connect(network, b"c"))[1])

    async def one() -> Pair:
        begin = time.perf_counter_ns()
        reader, writer = await connect(network, b"c")
        same(b"c", await reader.readexactly(1))
        times.append(time.perf_counter_ns() - begin)
        return reader, writer

    count = options.connections
    begin = time.perf_counter()
    pairs = await asyncio.gather(*(one() for _ in range(count)))
    took = time.perf_counter() - begin
    await let_go(pairs)
    return {**percentiles(times), "per_s": count / took, "connections": count}


async def many(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """Echoes on several connections at once: how many in all."""
    pairs = await held(network, options.connections)
    each: list[list[int]] = [[] for _ in pairs]
    data = os.urandom(options.echo)

    async def echoes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, taken: list[int]) -> None:
        for _ in trips(taken, options.seconds, begin):
            writer.write(data)
            await writer.drain()
            back = await reader.readexactly(len(data))
        same(data, back)

    begin = time.perf_counter_ns()
    await asyncio.gather(*(echoes(*pair, taken) for pair, taken in zip(pairs, each, strict=True)))
    found = shared(each, times, options.seconds, begin)
    await let_go(pairs)
    return found


async def beside(network: Network, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    """An echo alone, and beside idle connections, twice in turn: the placement of virtual CPUs moves."""
    found: dict[str, Any] = {"connections": options.connections}
    alone: list[int] = []
    for _ in range(2):
        taken: list[int] = []
        await echo(network, options, taken)
        alone += taken
        idle = await held(network, options.connections)
        taken = []
        await echo(network, options, taken)
        times += taken
        await let_go(idle)
    found["alone"] = percentiles(alone)
    return {**found, **percentiles(times)}


CLIENTS = {
    "echo": echo,
    "readline": readline,
    "write": write,
    "connect": connections,
    "many": many,
    "connect-at-once": all_at_once,
    "beside": beside,
}
