"""One process at one end of a demonstration, on this host or in a guest. Prints a JSON object per line.

    python -m shmsock.bench.worker serve --port 7000 [--file F] [--save F]   until its standard input ends
    python -m shmsock.bench.worker echo vm-b --port 7000 --count 10000
    python -m shmsock.bench.worker send vm-b --port 7000 --bytes 200000000 [--file F] [--both [--save F]]

What is sent is a file or, without one, random bytes made on the way; what comes is kept with --save. Hashes
are taken while the bytes pass. `--both`: the other end sends as much at the same time, on one connection.
Lines are {"event": "listening" | "progress" | "lost" | "done", ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from shmsock.aio.attach import attach
from shmsock.aio.endpoints import open_connection, start_server
from shmsock.aio.node import Node

CHUNK = 256 * 1024
PROGRESS_S = 0.2


def say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def chunks(size: int, file: IO[bytes] | None) -> Iterator[bytes]:
    """`size` bytes: the beginning of a file, or random ones (one block, each time with another number)."""
    block, number = b"" if file else os.urandom(CHUNK), 0
    while size > 0:
        length = min(size, CHUNK)
        data = file.read(length) if file else (number.to_bytes(8, "little") + block[8:])[:length]
        if not data:
            raise EOFError(f"the file ends {size} bytes too early")
        yield data
        size -= len(data)
        number += 1


class Transfer:
    """Bytes on their way, with progress and hashes."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.moved = {"sent": 0, "received": 0}
        self.hashes = {"sent": hashlib.sha256(), "received": hashlib.sha256()}
        self.said = self.start = time.monotonic()

    def took(self, what: str, data: bytes) -> None:
        self.moved[what] += len(data)
        self.hashes[what].update(data)
        now = time.monotonic()
        if not self.quiet and now - self.said >= PROGRESS_S:
            self.said = now
            say("progress", **self.moved)

    async def send(self, writer: asyncio.StreamWriter, size: int, file: IO[bytes] | None) -> None:
        for data in chunks(size, file):
            writer.write(data)
            await writer.drain()
            self.took("sent", data)

    async def receive(self, reader: asyncio.StreamReader, size: int, file: IO[bytes] | None) -> None:
        while self.moved["received"] < size:
            data = await reader.read(min(CHUNK, size - self.moved["received"]))
            if not data:
                raise EOFError(f"the stream ended after {self.moved['received']} of {size} bytes")
            if file:
                file.write(data)
            self.took("received", data)

    def result(self) -> dict[str, Any]:
        return {
            **self.moved,
            "seconds": time.monotonic() - self.start,
            **{f"sha256_{what}": sha.hexdigest() for what, sha in self.hashes.items() if self.moved[what]},
        }


@contextmanager
def files(options: argparse.Namespace) -> Iterator[tuple[IO[bytes] | None, IO[bytes] | None]]:
    """Open what is sent, and where to save what comes; None where no file was named."""
    with ExitStack() as stack:
        source = stack.enter_context(open(options.file, "rb")) if options.file else None
        sink = stack.enter_context(open(options.save, "wb")) if options.save else None
        yield source, sink


async def handle(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, options: argparse.Namespace
) -> None:
    """The serving side: the first line says what is wanted."""
    try:
        wish = json.loads(await reader.readline())
        if wish["do"] == "echo":
            while data := await reader.read(CHUNK):
                writer.write(data)
                await writer.drain()
            return
        transfer = Transfer(quiet=True)
        with files(options) as (source, sink):
            work = [transfer.receive(reader, wish["bytes"], sink)]
            if wish["both"]:
                work.append(transfer.send(writer, wish["bytes"], source))
            await asyncio.gather(*work)
        writer.write(json.dumps(transfer.result()).encode() + b"\n")
        await writer.drain()
    except ConnectionError as error:
        say("lost", error=str(error))
    finally:
        writer.close()


async def serve(node: Node, options: argparse.Namespace) -> None:
    server = await start_server(lambda r, w: handle(r, w, options), port=options.port, node=node)
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(0, lambda: None if os.read(0, 1) else over.set())
    host, port = server.sockets[0].getsockname()
    say("listening", host=host, port=port, region=node.region.url, section=node.section)
    await over.wait()
    loop.remove_reader(0)
    server.close()


async def echo(node: Node, options: argparse.Namespace) -> None:
    reader, writer = await open_connection(options.host, options.port, node=node)
    writer.write(json.dumps({"do": "echo"}).encode() + b"\n")
    times, clock = [], time.perf_counter_ns
    said = time.monotonic()
    for number in range(options.count):
        data = number.to_bytes(8, "little") * (options.size // 8)
        start = clock()
        writer.write(data)
        await writer.drain()
        back = await reader.readexactly(len(data))
        times.append(clock() - start)
        if back != data:
            raise ValueError(f"echo {number} came back as {back[:16]!r}...")
        if number % 256 == 0 and time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            say("progress", echoes=number)
    writer.close()
    await writer.wait_closed()
    times.sort()
    p50, p99 = times[len(times) // 2] / 1000, times[len(times) * 99 // 100] / 1000
    say("done", count=len(times), size=options.size, p50_us=p50, p99_us=p99, seconds=sum(times) / 1e9)


async def send(node: Node, options: argparse.Namespace) -> None:
    reader, writer = await open_connection(options.host, options.port, node=node)
    wish = {"do": "take", "bytes": options.bytes, "both": options.both}
    writer.write(json.dumps(wish).encode() + b"\n")
    transfer = Transfer(quiet=False)
    with files(options) as (source, sink):
        work = [transfer.send(writer, options.bytes, source)]
        if options.both:
            work.append(transfer.receive(reader, options.bytes, sink))
        await asyncio.gather(*work)
    there = json.loads(await reader.readline())
    here = transfer.result()
    writer.close()
    await writer.wait_closed()
    same = here["sha256_sent"] == there["sha256_received"] and here.get("sha256_received") == there.get(
        "sha256_sent"
    )
    say("done", **here, there=there, same=same)


async def attached(options: argparse.Namespace) -> None:
    async with attach(options.region, name=options.name) as node:
        await {"serve": serve, "echo": echo, "send": send}[options.role](node, options)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shmsock.bench.worker")
    parser.add_argument("role", choices=("serve", "echo", "send"))
    parser.add_argument("host", nargs="?", default="localhost")
    parser.add_argument("--region")
    parser.add_argument("--name")
    parser.add_argument("--port", type=int, default=7000)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=1 << 20)
    parser.add_argument("--file")
    parser.add_argument("--save")
    parser.add_argument("--both", action="store_true")
    options = parser.parse_intermixed_args()  # options before the host, too
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    importlib.import_module(options.loop).run(attached(options))


if __name__ == "__main__":
    main()
