"""One end of a benchmark, the same code over TCP and over shared memory.

Run by path it imports nothing of shmsock unless it is told to, so that the TCP side is what everybody has.

    python bench_handlers.py --module asyncio --loop uvloop --role server
    python bench_handlers.py --module shmsock --loop asyncio --role client --host localhost --port 7000

With --shm-loop asyncio's own functions run on shmsock's loop, where a host that ends in .shm is a peer.

Prints JSON: the server its address, the client what it measured. The server ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

BLOCK = 64 * 1024
WARM_UP = 0.2  # of the seconds of a measure


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The server's side: b"e" for echo, b"s" for a sink that counts."""
    try:
        if await reader.readexactly(1) == b"e":
            while data := await reader.read(BLOCK):
                writer.write(data)
                await writer.drain()
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


async def echo(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, seconds: float
) -> dict[str, Any]:
    """Round trips of `size` bytes, one at a time."""
    writer.write(b"e")
    times: list[int] = []
    data, clock = os.urandom(size), time.perf_counter_ns
    warm = clock() + int(seconds * WARM_UP * 1e9)
    end = warm + int(seconds * 1e9)
    now = clock()
    while now < end or not times:  # one at least, however busy the machine is
        start = now
        writer.write(data)
        await writer.drain()
        back = await reader.readexactly(size)
        now = clock()
        if start >= warm:
            times.append(now - start)
    if back != data:
        raise ValueError("the echo differs from what was sent")
    times.sort()
    return {
        "count": len(times),
        "p50_us": times[len(times) // 2] / 1000,
        "p99_us": times[len(times) * 99 // 100] / 1000,
    }


async def write(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, seconds: float
) -> dict[str, Any]:
    """Writes of `size` bytes one way, until all of them have been counted at the other end."""
    writer.write(b"s")
    data, count = os.urandom(size), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            writer.write(data)
            await writer.drain()
        count += 8
    writer.write_eof()
    received = int.from_bytes(await reader.readexactly(8), "big")
    took = time.perf_counter() - start
    if received != count * size:
        raise ValueError(f"{count * size} bytes were sent and {received} ({received:#x}) received")
    return {"bytes": received, "mb_s": received / took / 1e6}


async def client(module: Any, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    measures = [("echo", echo, options.echo), ("write", write, options.block)]
    for name, measure, size in measures:
        if name not in options.measure.split(","):
            continue
        reader, writer = await module.open_connection(options.host, options.port)
        found[name] = await measure(reader, writer, size, options.seconds)
        writer.close()
        await writer.wait_closed()
    return found


async def serve(module: Any, options: argparse.Namespace) -> None:
    server = await module.start_server(handle, options.host, options.port)
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(0, lambda: None if os.read(0, 1) else over.set())
    host, port = server.sockets[0].getsockname()[:2]
    print(json.dumps({"host": host, "port": port}), flush=True)
    await over.wait()
    loop.remove_reader(0)
    server.close()


async def report(module: Any, options: argparse.Namespace) -> None:
    found = await client(module, options)
    foreign = sorted(name for name in sys.modules if name.partition(".")[0] == "shmsock")
    found["shmsock_modules"] = len(foreign)
    print(json.dumps(found), flush=True)


def runner(loop: str, shm: bool) -> Callable[[Any], Any]:
    """asyncio.run or uvloop.run, or the same on a loop that knows `.shm` hosts."""
    module = importlib.import_module(loop)
    if not shm:
        run: Callable[[Any], Any] = module.run
        return run

    def run_on(main: Any) -> None:
        made = importlib.import_module("shmsock").loop_factory(module.new_event_loop)()
        try:
            made.run_until_complete(main)
            made.run_until_complete(made.shutdown_asyncgens())
        finally:
            made.close()

    return run_on


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", choices=("asyncio", "shmsock"), required=True)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), required=True)
    parser.add_argument("--shm-loop", action="store_true")
    parser.add_argument("--role", choices=("server", "client"), required=True)
    parser.add_argument("--host", default=None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--measure", default="echo,write")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--echo", type=int, default=64)
    parser.add_argument("--block", type=int, default=BLOCK)
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    module = importlib.import_module(options.module)
    run = runner(options.loop, options.shm_loop)
    run(serve(module, options) if options.role == "server" else report(module, options))


if __name__ == "__main__":
    main()
