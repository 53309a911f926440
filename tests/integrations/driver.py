"""A program that uses a library, of those in `libraries`, as its documentation says. It knows nothing of
shared memory: tests and rates.py run it under `shmsock run`, or as it is.

    python -m tests.integrations.driver serve LIBRARY PORT
    python -m tests.integrations.driver check LIBRARY HOST PORT   # says "restart", waits for a line
    python -m tests.integrations.driver more LIBRARY HOST PORT    # what it alone can
    python -m tests.integrations.driver rate LIBRARY HOST PORT SECONDS AT_ONCE
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

Ask = Callable[[bytes], Awaitable[bytes]]
Client = Callable[[str, int], AbstractAsyncContextManager[Ask]]
BODY = 10 << 20
AT_ONCE = 50


async def serve(server: Callable[[int], AbstractAsyncContextManager[None]], port: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with server(int(port)):
        print("serving", flush=True)
        await stop.wait()


async def connections() -> int:
    """How many this process has opened through memory."""
    if "shmsock.aio.attach" not in sys.modules:
        return 0
    from shmsock.aio.attach import current_node

    return int((await current_node()).statistics()["connected"])


async def all_at_once(ask: Ask) -> None:
    async def some(number: int) -> None:
        for data in (b"%d" % number, b"x" * number * 100, b"last %d" % number):
            assert await ask(data) == data

    await asyncio.gather(*map(some, range(1, AT_ONCE + 1)))


async def check(client: Client, host: str, port: str) -> None:
    """Exchange little, much, and from many tasks; then again with a server that was started anew."""
    errors = []
    async with client(host, int(port)) as ask:
        for data in (b"hello", os.urandom(BODY), b"\0"):
            assert await ask(data) == data
        await all_at_once(ask)
        await all_at_once(ask)
        opened = await connections()
        print("restart", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        while True:
            try:
                assert await ask(b"again") == b"again"
                break
            except Exception as error:
                errors.append(repr(error))
                await asyncio.sleep(0.02)
        await all_at_once(ask)
    said = {"opened": opened, "errors": errors[:5], "more": len(errors[5:])}
    print("said", json.dumps(said), flush=True)


async def more(what: Callable[[str, int], Awaitable[None]], host: str, port: str) -> None:
    await what(host, int(port))
    print("said", json.dumps({"opened": await connections()}), flush=True)


async def rate(client: Client, host: str, port: str, seconds: str, at_once: str) -> None:
    """Print requests per second, and the median of their times in microseconds."""
    times: list[float] = []
    async with client(host, int(port)) as ask:

        async def some() -> None:
            before = start
            while before < start + float(seconds):
                await ask(b"x" * 64)
                now = time.perf_counter()
                times.append(now - before)
                before = now

        await asyncio.gather(*(ask(b"x") for _ in range(int(at_once))))  # connects
        start = time.perf_counter()
        await asyncio.gather(*(some() for _ in range(int(at_once))))
        took = time.perf_counter() - start
    print("said", json.dumps({"rate": len(times) / took, "us": sorted(times)[len(times) // 2] * 1e6}))


if __name__ == "__main__":
    what, library, *rest = sys.argv[1:]
    module: Any = importlib.import_module(f"tests.integrations.libraries.{library}")
    if what == "serve":
        asyncio.run(serve(module.server, *rest))
    elif what == "more":
        asyncio.run(more(module.more, *rest))
    else:
        task: Any = {"check": check, "rate": rate}[what]
        asyncio.run(task(module.client, *rest))
