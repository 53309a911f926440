"""Every test on asyncio and on uvloop; nothing may be left: no descriptor, no thread, no lost wakeup."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import shmsock
from shmsock.testing import make_region
from tests.aio.processes import PATIENCE, runner

LOOPS = ["asyncio", "uvloop"]
LIMIT = 1 << 16


PF_EXITING = 4


def keepers() -> int:
    """Threads of that name. One that was joined is to be seen for a moment still, on its way out."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            flags = int((task / "stat").read_text().rpartition(")")[2].split()[6])
            found += not flags & PF_EXITING and (task / "comm").read_text().startswith("shmsock")
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def open_files() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass
    return found


def shmsock_files() -> list[str]:
    return sorted(
        f"{fd}: {what}" for fd, what in open_files().items() if "eventfd" in what or "shmsock" in what
    )


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    # There may be some that a test of another kind left to the collector.
    files, threads = set(shmsock_files()), keepers()
    yield
    gc.collect()
    assert set(shmsock_files()) <= files, "descriptors are left"
    assert keepers() <= threads, "heartbeat threads are left"


@pytest.fixture(params=LOOPS)
def loop_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Run:
    """run(coroutine): a fresh loop each time, for at most `timeout` seconds. What its exception handler got
    ends up in `reports`; the test fails if it is not taken out of there."""

    def __init__(self, loop: str) -> None:
        self.loop = loop
        self.reports: list[dict[str, Any]] = []

    def __call__(self, main: Coroutine[Any, Any, Any], timeout: float = 2 * PATIENCE) -> Any:
        async def guarded() -> Any:
            asyncio.get_running_loop().set_exception_handler(
                lambda loop, context: self.reports.append(context)
            )
            return await asyncio.wait_for(main, timeout)

        return runner(self.loop)(guarded())


@pytest.fixture
def run(loop_name: str) -> Iterator[Run]:
    made = Run(loop_name)
    yield made
    # (The callback that StreamReaderProtocol gives a handler's task raises when the task was cancelled.)
    assert [r for r in made.reports if not isinstance(r.get("exception"), asyncio.CancelledError)] == []


@pytest.fixture
def region() -> Iterator[str]:
    path = make_region()
    yield path
    os.unlink(path)


@pytest.fixture
def make() -> Iterator[Callable[..., str]]:
    """make(size=, peers=): a region of its own kind."""
    made: list[str] = []

    def one(**kwargs: Any) -> str:
        made.append(make_region(**kwargs))
        return made[-1]

    yield one
    for path in made:
        os.unlink(path)


async def until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE) -> None:
    """Poll: some things have no event."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, f"still not, after {seconds} s: {what or condition}"
        await asyncio.sleep(0.001)


class End:
    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, node: shmsock.Node
    ) -> None:
        self.reader, self.writer, self.node = reader, writer, node

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except (ConnectionError, shmsock.NodeClosedError):
            pass

    @property
    def transport(self) -> Any:
        return self.writer.transport


HELD = ("connections", "free_slots", "arena_free_bytes")


def held(node: shmsock.Node) -> dict[str, int]:
    """What a node holds: the same before and after, or something leaked."""
    counts = node.statistics()
    return {name: counts[name] for name in HELD}


class World:
    """Nodes in this process, on one region: one that talks to itself, or two."""

    def __init__(self, how: str, region: str) -> None:
        self.how, self.region = how, region

    @asynccontextmanager
    async def nodes(self, **kwargs: Any) -> AsyncIterator[tuple[shmsock.Node, shmsock.Node]]:
        """(client's, server's). Nothing may be held at the end, and no wakeup have been lost."""
        async with shmsock.attach(self.region, name="a", **kwargs) as a:
            if self.how == "self":
                before = held(a)
                yield a, a
                await until(lambda: held(a) == before, f"{held(a)} is {before}", 10)
                assert a.statistics()["healed"] == 0
                return
            async with shmsock.attach(self.region, name="b", **kwargs) as b:
                before, there = held(a), held(b)
                yield a, b
                await until(lambda: held(a) == before, f"{held(a)} is {before}", 10)
                await until(lambda: held(b) == there, f"{held(b)} is {there}", 10)
                assert a.statistics()["healed"] == b.statistics()["healed"] == 0

    @asynccontextmanager
    async def pair(self, *, limit: int = LIMIT, **kwargs: Any) -> AsyncIterator[tuple[End, End]]:
        """(client, server): both ends of one connection."""
        async with self.nodes(**kwargs) as (a, b):
            accepted: asyncio.Future[End] = asyncio.get_running_loop().create_future()

            def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                accepted.set_result(End(reader, writer, b))

            server = await shmsock.start_server(handler, None, 7000, limit=limit, node=b)
            reader, writer = await shmsock.open_connection(b.name, 7000, limit=limit, node=a)
            client = End(reader, writer, a)
            del reader, writer
            other = await accepted
            server.close()
            try:
                yield client, other
            finally:
                if not a.closed:
                    client.transport.abort()
                if not b.closed:
                    other.transport.abort()
                await asyncio.sleep(0)
                await server.wait_closed()


@pytest.fixture(params=["self", "nodes"])
def world(request: pytest.FixtureRequest, region: str) -> World:
    return World(request.param, region)
