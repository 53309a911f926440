"""Every test on asyncio, on uvloop and on trio; nothing may be left: no descriptor, no thread, no slot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

import shmsock
import shmsock.anyio as shm
from tests.aio.conftest import _nothing_is_left, held, make, region
from tests.aio.processes import PATIENCE, pattern

__all__ = ["_nothing_is_left", "make", "region"]

BACKENDS = ["asyncio", "uvloop", "trio"]
SMALL = shmsock.Settings(ring_bytes=4096)


def run_on(backend: str, main: Callable[..., Awaitable[Any]], *args: Any, seconds: float = PATIENCE) -> Any:
    async def guarded() -> Any:
        with anyio.fail_after(seconds):
            return await main(*args)

    if backend == "trio":
        return anyio.run(guarded, backend="trio")
    return anyio.run(guarded, backend="asyncio", backend_options={"use_uvloop": backend == "uvloop"})


Run = Callable[..., Any]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def run(backend: str) -> Run:
    """run(main, *args) on that backend, for a limited time."""
    return lambda main, *args: run_on(backend, main, *args)


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Poll: some things have no event."""
    end = anyio.current_time() + PATIENCE
    while not condition():
        assert anyio.current_time() < end, f"still not, after {PATIENCE} s: {what or condition}"
        await anyio.sleep(0.001)


async def nothing_is_held(node: shmsock.Node, before: dict[str, int] | None) -> None:
    if node.closed:
        return
    assert node.statistics()["healed"] == 0
    await until(lambda: not node.transports)
    if before is not None:
        await until(lambda: held(node) == before, f"{held(node)} is {before}")


class World:
    """Nodes in this process, on one region: one that talks to itself, or two."""

    def __init__(self, how: str, region: str) -> None:
        self.how, self.region = how, region

    @asynccontextmanager
    async def nodes(
        self, *, links: bool = False, **kwargs: Any
    ) -> AsyncIterator[tuple[shmsock.Node, shmsock.Node]]:
        """(client's, server's). Nothing may be held at the end (`links`: but those of datagrams, which stay),
        and no wakeup have been lost."""
        async with AsyncExitStack() as stack:
            names = "a" if self.how == "self" else "ab"
            nodes = [
                await stack.enter_async_context(shm.attach(self.region, name=x, **kwargs)) for x in names
            ]
            before = [None if links else held(node) for node in nodes]
            yield nodes[0], nodes[-1]
            for node, was in zip(nodes, before, strict=True):
                await nothing_is_held(node, was)

    @asynccontextmanager
    async def pair(self, **kwargs: Any) -> AsyncIterator[tuple[shm.ShmStream, shm.ShmStream]]:
        """(client, server): both ends of one connection."""
        async with self.nodes(**kwargs) as (a, b):
            async with await shm.create_shm_listener(local_port=7000, node=b) as listener:
                client = await shm.connect_shm(b.name, 7000, node=a)
                server = await listener.accept()
            async with client, server:
                yield client, server


@pytest.fixture(params=["self", "nodes"])
def world(request: pytest.FixtureRequest, region: str) -> World:
    return World(request.param, region)


async def send_pattern(stream: Any, seed: int, size: int, chunk: int = 50_000) -> None:
    for at in range(0, size, chunk):
        await stream.send(pattern(seed, at, min(chunk, size - at)))


async def receive_pattern(stream: Any, seed: int, size: int | None = None, chunk: int = 65536) -> int:
    """Until `size` bytes or EndOfStream; how many came, all as they must be."""
    got = 0
    while size is None or got < size:
        try:
            data = await stream.receive(chunk)
        except anyio.EndOfStream:
            break
        assert data == pattern(seed, got, len(data)), f"wrong bytes after {got}"
        got += len(data)
    return got


async def fill(stream: Any) -> int:
    """Send until there is no room left; how much went in."""
    sent = 0
    while True:
        with anyio.move_on_after(0.05) as scope:
            await stream.send(b"x")
            sent += 1
        if scope.cancelled_caught:
            return sent
