"""One end of a benchmark, the same code over TCP and over shared memory.

Run by path it imports nothing of shmsock unless it is told to, so that the TCP side is what everybody has.

    python bench_handlers.py --module asyncio --loop uvloop --role server
    python bench_handlers.py --module shmsock --loop asyncio --role client --host localhost --port 7000

With --shm-loop asyncio's own functions run on shmsock's loop, where a host that ends in .shm is a peer.
--measure says what the client does: echo and write, or sporadic (echoes with pauses), or idle (nothing).

Prints JSON: the server its address, the client what it measured. The server ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

BLOCK = 64 * 1024
WARM_UP = 0.2  # of the seconds of a measure
LEAST = 30  # echoes for a median, however long the pauses between them


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The server's side: b"e" for echo, b"s" for a sink that counts, b"u" for what this process used."""
    try:
        kind = await reader.readexactly(1)
        if kind == b"e":
            while data := await reader.read(BLOCK):
                writer.write(data)
                await writer.drain()
        elif kind == b"u":
            while await reader.read(1):
                writer.write(json.dumps(usage(writer)).encode() + b"\n")
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
    return percentiles(times)


def percentiles(times: list[int]) -> dict[str, Any]:
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


class Pause:
    """A sleep of the length asked for, on every loop: of 0.1 ms asyncio's timers make 1.1 ms, and uvloop's
    nothing at all."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create: " + os.strerror(ctypes.get_errno()))
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.fd, self.over)
        self.waiter: asyncio.Future[None] | None = None

    def over(self) -> None:
        os.read(self.fd, 8)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def sleep(self, us: int) -> None:
        self.waiter = self.loop.create_future()
        once = (ctypes.c_long * 4)(0, 0, us // 1_000_000, us % 1_000_000 * 1000)
        self.libc.timerfd_settime(self.fd, 0, once, None)
        await self.waiter

    def close(self) -> None:
        self.loop.remove_reader(self.fd)
        os.close(self.fd)


def usage(writer: asyncio.StreamWriter) -> dict[str, Any]:
    """What the kernel has counted for this process, all of its threads; and shmsock its node."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    node = writer.get_extra_info("shmsock_node")
    counters = node.statistics() if node is not None else {}
    return {
        "at": time.monotonic(),
        "user": used.ru_utime,
        "system": used.ru_stime,
        "sleeps": used.ru_nvcsw,
        "counters": {name: value for name, value in counters.items() if type(value) is int},
    }


def used(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Between two usages: percent of one CPU, how much of it in the kernel, and how often a thread slept."""
    took = after["at"] - before["at"]
    system = (after["system"] - before["system"]) / took * 100
    counts = {name: after["counters"].get(name, value) - value for name, value in before["counters"].items()}
    return {
        "cpu": system + (after["user"] - before["user"]) / took * 100,
        "system": system,
        "sleeps_s": (after["sleeps"] - before["sleeps"]) / took,
        "counters": {name: count for name, count in counts.items() if count},
    }


class Usages:
    """Connections on which the server says what it used."""

    def __init__(self, held: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self.held = held

    async def ask(self, number: int = 0) -> dict[str, Any]:
        reader, writer = self.held[number]
        writer.write(b"?")
        said: dict[str, Any] = json.loads(await reader.readline())
        return said

    async def during(self, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """What that gives, and what both processes used for it."""
        _, writer = self.held[0]
        theirs = await self.ask()
        ours = usage(writer)
        found = await work()
        ours = used(ours, usage(writer))
        return {**found, "client": ours, "server": used(theirs, await self.ask())}


async def connect(
    module: Any, options: argparse.Namespace, kind: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await module.open_connection(options.host, options.port)
    writer.write(kind)
    return reader, writer


async def disconnect(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def echoes(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    pause: Pause,
    size: int,
    think: int,
    seconds: float,
    least: int,
) -> dict[str, Any]:
    """Round trips of `size` bytes with a pause of `think` microseconds before each."""
    times: list[int] = []
    data, clock = os.urandom(size), time.perf_counter_ns
    begin = now = clock()
    while now - begin < seconds * 1e9 or len(times) < least:
        if think:
            await pause.sleep(think)
        start = clock()
        writer.write(data)
        await writer.drain()
        back = await reader.readexactly(size)
        now = clock()
        times.append(now - start)
        if back != data:
            raise ValueError("the echo differs from what was sent")
    return {"thought_us": (now - begin - sum(times)) / len(times) / 1000, **percentiles(times)}


async def sporadic(module: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Echoes with pauses, for every length of pause; and the CPU time of it."""
    usages, pause = Usages([await connect(module, options, b"u")]), Pause()
    found: dict[str, Any] = {}
    for think in (int(text) for text in options.think.split(",")):
        reader, writer = await connect(module, options, b"e")
        work = partial(echoes, reader, writer, pause, options.echo, think)
        await work(options.seconds * WARM_UP, 3)
        found[str(think)] = await usages.during(partial(work, options.seconds, LEAST))
        await disconnect(writer)
    pause.close()
    await disconnect(usages.held[0][1])
    return found


async def idle(module: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Connections on which nothing is said; and the CPU time of that."""
    usages = Usages([await connect(module, options, b"u") for _ in range(options.connections)])
    for number in range(options.connections):
        await usages.ask(number)  # each of them works

    async def nothing() -> dict[str, Any]:
        await asyncio.sleep(options.seconds)
        return {"connections": options.connections}

    await asyncio.sleep(options.seconds * WARM_UP)
    found = await usages.during(nothing)
    for number in range(options.connections):
        await usages.ask(number)  # and still does
    for _, writer in usages.held:
        await disconnect(writer)
    return found


async def client(module: Any, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wanted = options.measure.split(",")
    for name, measure, size in (("echo", echo, options.echo), ("write", write, options.block)):
        if name not in wanted:
            continue
        reader, writer = await module.open_connection(options.host, options.port)
        found[name] = await measure(reader, writer, size, options.seconds)
        await disconnect(writer)
    for kind, quiet in (("sporadic", sporadic), ("idle", idle)):
        if kind in wanted:
            found[kind] = await quiet(module, options)
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
    parser.add_argument("--think", default="0", help="microseconds, several with commas")
    parser.add_argument("--connections", type=int, default=10)
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    module = importlib.import_module(options.module)
    run = runner(options.loop, options.shm_loop)
    run(serve(module, options) if options.role == "server" else report(module, options))


if __name__ == "__main__":
    main()
