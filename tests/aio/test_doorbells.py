"""Nodes on regions with doorbells: peers of an ivshmem server on this host, and what becomes of them when
doorbells are few, lost, too many, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import shmsock
import shmsock.anyio as shm
from shmsock.engine import layout as lay
from shmsock.errors import RegionFormatError
from tests.aio.conftest import LIMIT, Run, open_files, until
from tests.aio.processes import Child, pattern
from tests.anyio_face.conftest import run_on
from tests.anyio_face.processes import Child as AnyChild
from tests.region.fake_ivshmem import FakeServer, Step
from tests.server.spec_client import Client

SIZE = 32 << 20
STILL = shmsock.Settings(busy_poll_us=0, hot_us=0)
"""Never spins, and sleeps as soon as it can: all depends on who rings."""
PLAIN = shmsock.Settings(busy_poll_us=0, hot_us=0, doorbells=False)


class Server:
    """`shmsock ivshmem-server` in a process of its own."""

    def __init__(self, directory: Path, *region: str) -> None:
        self.path = str(directory / "ivshmem.sock")
        words = ["--socket", self.path, "--region", *(region or ("memfd", "--size", str(SIZE)))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shmsock", "ivshmem-server", *words], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline() + self.process.stderr.readline()
        assert "room for" in said, said + self.process.stderr.read()

    @property
    def url(self) -> str:
        return f"ivshmem:{self.path}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="doorbells-") as name:
        yield Path(name)


@pytest.fixture
def server(directory: Path) -> Iterator[Server]:
    made = Server(directory)
    yield made
    made.close()


@pytest.fixture
def fake(directory: Path) -> Iterator[FakeServer]:
    made = FakeServer(str(directory / "fake.sock"), SIZE)
    yield made
    made.close()


class Ends:
    """Two nodes of this process, and connections between them."""

    def __init__(self, a: shmsock.Node, b: shmsock.Node) -> None:
        self.a, self.b = a, b

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """To who echoes at b."""
        reader, writer = await shmsock.open_connection("b", 7000, node=self.a, limit=LIMIT)
        try:
            yield reader, writer
        finally:
            writer.close()
            await writer.wait_closed()

    def woken_by(self) -> tuple[str | None, str | None]:
        a, b = self.a.statistics()["woken_by"], self.b.statistics()["woken_by"]
        return a.get("b"), b.get("a")

    def wakes(self) -> tuple[str | None, str | None]:
        a, b = self.a.statistics()["wakes"], self.b.statistics()["wakes"]
        return a.get("b"), b.get("a")

    async def are_woken_by(self, *ways: str) -> None:
        await until(lambda: self.woken_by() == ways, f"{self.woken_by()} become {ways}", 10)

    def counts(self, key: str) -> tuple[int, int]:
        return self.a.statistics()[key], self.b.statistics()[key]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def ping(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int = 1, size: int = 64
) -> float:
    """There and back, one at a time; returns the longest time."""
    longest = 0.0
    for number in range(count):
        data = pattern(number, 0, size)
        start = time.monotonic()
        writer.write(data)
        assert await reader.readexactly(size) == data
        longest = max(longest, time.monotonic() - start)
    return longest


@asynccontextmanager
async def both(first: Any, second: Any) -> AsyncIterator[Ends]:
    """`first` and `second`: what attach() gives."""
    async with first as a, second as b:
        listening = await shmsock.start_server(echo, None, 7000, node=b)
        yield Ends(a, b)
        listening.close()
        await listening.wait_closed()


def nodes(url: str, other: str | None = None, settings: shmsock.Settings = STILL) -> Any:
    return both(
        shmsock.attach(url, name="a", settings=settings),
        shmsock.attach(other or url, name="b", settings=settings),
    )


# -- as it should be


def test_two_peers_in_one_process(run: Run, server: Server) -> None:
    async def main() -> None:
        async with nodes(server.url) as ends:
            assert ends.counts("doorbell") == (0, 1)
            await ends.are_woken_by("doorbell", "doorbell")
            async with ends.connection() as (reader, writer):
                await ping(reader, writer, 100)
                await ping(reader, writer, 3, 300_000)
            assert min(*ends.counts("kicks"), *ends.counts("received")) > 50
            assert ends.counts("healed") == (0, 0)

    run(main())


@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])
def test_every_loop(server: Server, backend: str) -> None:
    """In this process, with two others that serve, on both loops of asyncio."""

    async def main() -> None:
        async with shmsock.attach(server.url, name="test", settings=STILL) as node:
            for loop in "asyncio", "uvloop":
                child = AnyChild(loop, "serve", f'["{server.url}", "{loop}"]', module="tests.aio.roles")
                async with child:
                    await child.says("ready")
                    stream = await shm.connect_shm(loop, 7000, node=node)
                    async with stream:
                        for number in range(20):
                            await anyio.sleep(0.003)  # so that the other one sleeps
                            data, got = pattern(number, 0, 2000), b""
                            await stream.send(data)
                            while len(got) < len(data):
                                got += await stream.receive()
                            assert got == data
                        assert node.statistics()["woken_by"][loop] == "doorbell"
            seen = node.statistics()
            assert min(seen["kicks"], seen["received"]) > 0
            assert (seen["healed"], seen["spin_hits"]) == (0, 0)

    run_on(backend, main)


def test_with_and_without_doorbells(run: Run, make: Any, directory: Path) -> None:
    """The same memory by the server and by its file: the kernel wakes both, by futexes."""
    file = make(size=SIZE)

    async def main() -> None:
        async with nodes(serving.url, file) as ends:
            await ends.are_woken_by("futex", "futex")
            assert ends.counts("doorbell") == (0, None)
            assert ends.wakes() == ("futex", "futex")
            async with ends.connection() as (reader, writer):
                await ping(reader, writer, 100)
            assert min(*ends.counts("kicks"), *ends.counts("received")) > 50
            assert ends.counts("healed") == (0, 0)

    serving = Server(directory, file)
    try:
        run(main())
    finally:
        serving.close()


@pytest.mark.parametrize("way", ["futex", "doorbell"])
def test_few_are_rung_when_hot(run: Run, server: Server, region: str, way: str) -> None:
    """Between two processes, with the default settings: under one in a hundred writes."""

    async def main() -> None:
        url = server.url if way == "doorbell" else region
        async with Child("serve", url, "b") as child, shmsock.attach(url, name="a") as node:
            await child.says("ready")
            reader, writer = await shmsock.open_connection("b", 7000, node=node)
            await until(lambda: node.statistics()["wakes"] == {"b": way})
            size, piece, found = 3_000_000, 100, []

            async def send() -> None:
                for at in range(0, size, piece):
                    writer.write(pattern(1, at, piece))
                    await writer.drain()

            for _ in range(5):  # where others take the CPUs, the two cannot stay hot: once they can
                before = node.statistics()
                sending, at = asyncio.ensure_future(send()), 0
                while at < size:
                    data = await reader.read(1 << 16)
                    assert data == pattern(1, at, len(data))
                    at += len(data)
                await sending
                after = node.statistics()
                counted = ("kicks", "suppressed", "notifies_pending", "writes")
                found.append({key: after[key] - before[key] for key in counted})
                if found[-1]["kicks"] * 100 < found[-1]["writes"]:
                    break
            else:
                pytest.fail(f"too many doorbells: {found}")
            assert found[-1]["writes"] > 10_000  # (those that find no room are put together)
            # who looks at its ring itself has been told already, and need not even be found awake
            assert found[-1]["suppressed"] + found[-1]["notifies_pending"] > 10_000
            assert after["healed"] == 0
            writer.close()
            await writer.wait_closed()

    run(main())


class Counting(asyncio.SelectorEventLoop):
    """Counts how often it wakes up."""

    turns = 0

    def _run_once(self) -> None:
        self.turns += 1
        super()._run_once()  # type: ignore[misc]


def test_idle_is_idle(server: Server, region: str, make: Any) -> None:
    """Ten connections on which nothing is said: what wakes a node is a look around, once a second, be it by
    doorbells, by futexes, or with neither, where the heartbeat's looks do not wake it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Counting)
        async with (
            nodes(server.url) as rung,
            nodes(region) as woken,
            nodes(make(), settings=PLAIN) as polling,
            contextlib.AsyncExitStack() as open_ones,
        ):
            pairs = [rung, woken, polling]
            for ends, way in zip(pairs, ("doorbell", "futex", "polling"), strict=True):
                await ends.are_woken_by(way, way)
                for _ in range(10):
                    reader, writer = await open_ones.enter_async_context(ends.connection())
                    await ping(reader, writer)
            await asyncio.sleep(0.3)  # the last beats of hotness
            pumps, turns = [ends.counts("pumps") for ends in pairs], loop.turns
            await asyncio.sleep(3)
            grown = [
                new - old
                for ends, before in zip(pairs, pumps, strict=True)
                for new, old in zip(ends.counts("pumps"), before, strict=True)
            ]
            assert max(grown) <= 6, grown
            assert min(grown) > 0
            assert loop.turns - turns <= sum(grown) + 4
            assert [ends.counts("healed") for ends in pairs] == [(0, 0)] * 3

    loop = Counting()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 60))
    finally:
        loop.close()


@pytest.mark.parametrize("way", ["futex", "doorbell"])
def test_a_forked_child_keeps_no_way_to_ring(run: Run, server: Server, region: str, way: str) -> None:
    """Neither the eventfds by which peers are woken, nor our own."""

    def eventfds() -> int:
        return sum("eventfd" in what for what in open_files().values())

    async def main() -> None:
        before = eventfds()
        async with nodes(server.url if way == "doorbell" else region) as ends:
            await ends.are_woken_by(way, way)
            async with ends.connection() as (reader, writer):
                await ping(reader, writer, 3)
                assert eventfds() > before
                if not (child := os.fork()):
                    os._exit(eventfds() - before)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                await ping(reader, writer, 3)

    run(main())


# -- doorbells that do not come, or come for nothing


class Relay:
    """Between the eventfds that peers of a FakeServer ring and those that they wait for: swallows what is
    rung, or lets it through."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        self.lets_through = False
        self.swallowed = 0
        self._waited: dict[int, int] = {}
        fake.edit = self._edit

    def _edit(self, burst: list[Step]) -> list[Step]:
        """What the client waits for is another than others ring."""
        number = burst[1][0]
        assert isinstance(number, int)
        self._waited[number] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return [*burst[:-1], (number, [self._waited[number]])]

    def start(self) -> None:
        for number in self._waited:
            (rung,) = self.fake.peers[number]
            asyncio.get_running_loop().add_reader(rung, self._rung, number, rung)

    def _rung(self, number: int, fd: int) -> None:
        times = os.eventfd_read(fd)
        if self.lets_through:
            os.eventfd_write(self._waited[number], times)
        else:
            self.swallowed += times

    def close(self) -> None:
        for number, fd in self._waited.items():
            asyncio.get_running_loop().remove_reader(self.fake.peers[number][0])
            os.close(fd)


async def through_fake(fake: FakeServer, name: str) -> shmsock.Node:
    thread = threading.Thread(target=fake.accept)
    thread.start()
    try:
        return await shmsock.attach(f"ivshmem:{fake.path}", name=name, settings=STILL)
    finally:
        thread.join()


@asynccontextmanager
async def closing(node: shmsock.Node) -> AsyncIterator[shmsock.Node]:
    yield node
    await node.aclose()


def test_every_doorbell_dropped(run: Run, fake: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """All arrives, at the pace of the heartbeat's looks; and it is told."""

    async def main() -> None:
        relay = Relay(fake)
        a = await through_fake(fake, "a")
        b = await through_fake(fake, "b")
        relay.start()
        async with both(closing(a), closing(b)) as ends:
            async with ends.connection() as (reader, writer):
                end = time.monotonic() + 10
                while ends.woken_by() != ("polling", "polling"):
                    assert time.monotonic() < end, ends.woken_by()
                    assert await ping(reader, writer, 1, 100_000) < 5
                healed = ends.counts("healed")
                assert min(healed) >= 1
                lost = [r.getMessage() for r in caplog.records if "do not arrive" in r.message]
                assert len(lost) == sum(healed)
                assert any("doorbells of b do not arrive: polling instead" in text for text in lost)
                assert await ping(reader, writer, 100) < 1  # some milliseconds, where nothing else is busy
                assert ends.counts("healed") == healed
                assert ends.counts("received") == (0, 0)
                assert relay.swallowed > 0

                relay.lets_through = True
                await ping(reader, writer)
                end = time.monotonic() + 10
                while ends.woken_by() != ("doorbell", "doorbell"):
                    assert time.monotonic() < end, ends.woken_by()
                    await ping(reader, writer)
                    await asyncio.sleep(0.02)  # so that both sleep, and are rung
                await ping(reader, writer, 100)
                assert ends.counts("healed") == healed
                assert min(ends.counts("received")) > 50
            relay.close()

    with caplog.at_level(logging.WARNING, "shmsock"):
        run(main())


def test_server_killed(run: Run, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """What is open lives on, and who comes to its successor... has other memory: see tests/vm."""

    async def main() -> None:
        async with nodes(server.url) as ends:
            await ends.are_woken_by("doorbell", "doorbell")
            async with ends.connection() as (reader, writer):
                await ping(reader, writer, 10)
                server.kill()
                await until(lambda: ends.counts("doorbell") == (None, None))
                await ends.are_woken_by("futex", "futex")
                await ping(reader, writer, 100)
                assert all(
                    f"the ivshmem server at {server.path} has gone" in why
                    for why in map(str, ends.counts("doorbell_lost"))
                )
                told = [
                    r.getMessage() for r in caplog.records if "goes on without doorbells" in r.getMessage()
                ]
                assert len(told) == 2
            assert ends.counts("healed") == (0, 0)

    with caplog.at_level(logging.WARNING, "shmsock"):
        run(main())


@pytest.mark.parametrize("loop_name", ["uvloop"])  # (a second on each)
def test_rung_for_nothing(run: Run, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand times within a second: then a node does not listen for a second, and is woken otherwise."""

    async def main() -> None:
        async with nodes(server.url) as ends:
            node = ends.b
            await ends.are_woken_by("doorbell", "doorbell")
            with Client(server.path, 1) as hostile:
                hostile.handshake()
                async with ends.connection() as (reader, writer):
                    for _ in range(20_000):
                        hostile.ring(1, 0)
                        await asyncio.sleep(0)
                        if caplog.records:
                            break
                    assert "a thousand interrupts within a second for nothing: polling for 1 s" in caplog.text
                    seen = node.statistics()
                    assert 1000 <= seen["spurious"] <= seen["received"]
                    assert seen["doorbell"] == 1
                    pumps = seen["pumps"]
                    for _ in range(1000):  # nobody hears it
                        hostile.ring(1, 0)
                        await asyncio.sleep(0)
                    seen = node.statistics()
                    assert seen["pumps"] - pumps < 100
                    await ends.are_woken_by("futex", "futex")
                    before = node.statistics()["spurious"]
                    await ping(reader, writer, 100)
                    assert ends.counts("healed") == (0, 0)
                    assert node.statistics()["spurious"] == before
                    await ends.are_woken_by("doorbell", "doorbell")
                    received = node.statistics()["received"]
                    await ping(reader, writer, 100)
                    assert node.statistics()["received"] - received > 50
            assert ends.counts("healed") == (0, 0)
            assert len(caplog.records) == 1

    with caplog.at_level(logging.WARNING, "shmsock"):
        run(main())


# -- memory that will not do


@pytest.mark.parametrize("loop_name", ["asyncio"])
@pytest.mark.parametrize(
    ("offset", "word", "problem"),
    [
        (
            lay.H_MAGIC,
            int.from_bytes(b"GARBAGE!", "little"),
            r"begins with|has magic .* holds something else",
        ),
        (
            lay.H_VERSION,
            99,
            r"has format version 99, this shmsock knows \d+: upgrade it here",
        ),
        (lay.H_BYTES, 2 * SIZE, rf"formatted with {2 * SIZE} bytes, but only {SIZE} are there"),
        (lay.H_ID, 1 << 63, "do not go together"),
    ],
)
def test_memory_that_is_no_region(run: Run, fake: FakeServer, offset: int, word: int, problem: str) -> None:
    async def main() -> None:
        async with closing(await through_fake(fake, "first")):
            pass
        with mmap.mmap(fake.memory, 4096) as memory:
            memory[offset : offset + 8] = word.to_bytes(8, "little")
        with pytest.raises(RegionFormatError, match=problem) as caught:
            await through_fake(fake, "second")
        assert f"ivshmem:{fake.path}: " in str(caught.value)
        assert caught.value.errno == errno.EINVAL
        assert fake.gone(1)

    run(main())
