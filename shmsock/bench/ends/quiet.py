"""Over asyncio's streams, with little said: echoes with pauses, idle connections, and what those cost."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

from .networks import Network
from .streams import connect, held, let_go
from .timing import LEAST, WARM_UP, percentiles, same
from .usage import Usages

__all__ = ["CLIENTS"]


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
        same(data, back)
    return {"thought_us": (now - begin - sum(times)) / len(times) / 1000, **percentiles(times)}


async def sporadic(network: Network, options: argparse.Namespace, _: list[int]) -> dict[str, Any]:
    """Echoes with pauses, and the CPU time of it."""
    usages, pause = Usages([await connect(network, b"u")]), Pause()
    reader, writer = await connect(network, b"e")
    work = partial(echoes, reader, writer, pause, options.echo, options.think)
    await work(options.seconds * WARM_UP, 3)
    found = await usages.during(partial(work, options.seconds, LEAST))
    pause.close()
    await let_go([(reader, writer), *usages.held])
    return found


async def idle(network: Network, options: argparse.Namespace, _: list[int]) -> dict[str, Any]:
    """Connections on which nothing is said; and the CPU time of that."""
    usages = Usages([await connect(network, b"u") for _ in range(options.connections)])
    for number in range(options.connections):
        await usages.ask(number)  # each of them works

    async def nothing() -> dict[str, Any]:
        await asyncio.sleep(options.seconds)
        return {"connections": options.connections}

    await asyncio.sleep(options.seconds * WARM_UP)
    found = await usages.during(nothing)
    for number in range(options.connections):
        await usages.ask(number)  # and still does
    await let_go(usages.held)
    return found


class Nowhere(asyncio.Transport):
    """For a StreamWriter that nobody connected."""

    def is_closing(self) -> bool:
        return True


def own_objects() -> Any:
    """Make what asyncio itself makes for a connection, above its transport."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    return reader, asyncio.StreamWriter(Nowhere(), protocol, reader, loop)


def heap() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def memory(network: Network, options: argparse.Namespace, _: list[int]) -> dict[str, Any]:
    """Weigh one idle connection of a client in Python's heap, and in the arena of its section."""
    await let_go(await held(network, options.connections))  # whatever is made once has been made
    count = options.connections
    tracemalloc.start()
    try:
        before = heap()
        bare = [own_objects() for _ in range(count)]
        own = (heap() - before) / count
        del bare
        reader, writer = await connect(network, b"e")
        node = writer.get_extra_info("shmsock_node")
        free: Callable[[], int] = (lambda: node.statistics()["arena_free_bytes"]) if node else (lambda: 0)
        for _wait in range(500):  # those that were closed are released when the server has seen it
            if node is None or node.statistics()["free_slots"] >= node.engine.layout.slots - 1:
                break
            await asyncio.sleep(0.01)
        before, arena = heap(), free()
        pairs = await held(network, count)
        await asyncio.sleep(options.seconds)
        found = {
            "connections": count,
            "heap_bytes": (heap() - before) / count,
            "own_bytes": own,
            "arena_bytes": (arena - free()) / count,
        }
    finally:
        tracemalloc.stop()
    await let_go([(reader, writer), *pairs])
    return {**found, "beyond_bytes": found["heap_bytes"] - own}


CLIENTS = {"sporadic": sporadic, "idle": idle, "memory": memory}
