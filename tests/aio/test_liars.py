"""Peers that write what is not so into their sections, or into others', as whoever maps a region can."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import shmsock
from shmsock.aio.datagram import create_datagram_endpoint
from shmsock.engine import layout as lay
from tests.aio.conftest import Run, until
from tests.aio.liars import ALWAYS, FLOODS, ONCE_A_SLEEP, SENT, SILENT, compiled, memory_of
from tests.aio.processes import Child, Lines, runner
from tests.aio.roles import Datagrams
from tests.aio.test_doorbells import STILL, ping
from tests.forked import ROOT


def is_locked(path: Path) -> bool:
    """By another process than the one that asks."""
    if not (child := os.fork()):
        try:
            with path.open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        except BlockingIOError:
            os._exit(1)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 1


def test_no_descriptor_is_touched_that_a_section_names(run: Run, region: str, tmp_path: Path) -> None:
    """Whatever stands in the identity of a peer, and in the words beside it: a process keeps its record
    locks, which the kernel drops when any descriptor of the file is closed, and nobody rings its eventfds."""
    database = tmp_path / "database"
    database.touch()
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    with open(f"/proc/self/fdinfo/{bell}", encoding="ascii") as file:
        ident = next(int(line.split()[1]) for line in file if line.startswith("eventfd-id")) + 1

    async def main() -> None:
        with memory_of(region) as layout, database.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            async with Child("serve", region, "b") as child, shmsock.attach(region, name="a") as node:
                await child.says("ready")
                _reader, writer = await shmsock.open_connection("b", 7000, node=node)
                peer = node.find("b", 7000, ())
                at, load, store = layout.section(peer.section), layout.memory.load, layout.memory.store
                for fd, number in ((file.fileno(), 1), (bell, ident)):
                    store(at + lay.PID, os.getpid())
                    for word in (lay.DOORBELL + 8, *range(0x198, lay.LISTENER, 8), 0xE0, 0xE8, 0xF0, 0xF8):
                        store(at + word, fd << 32 | number)
                    store(at + lay.INCARNATION, life := load(at + lay.INCARNATION) ^ 2)
                    await until(lambda life=life: peer.incarnation == life)  # type: ignore[misc]
                    await asyncio.sleep(0)
                    _again, back = await shmsock.open_connection("b", 7000, node=node)
                    back.close()
                    await back.wait_closed()
                    assert is_locked(database)
                    try:
                        raise AssertionError(f"the eventfd holds {os.eventfd_read(bell)}")
                    except BlockingIOError:
                        pass
                writer.close()

    try:
        run(main())
    finally:
        os.close(bell)


# -- what a liar costs


@asynccontextmanager
async def liar(region: str, kind: str, rings: int) -> AsyncIterator[None]:
    """It lies within the block."""
    words = [region, kind, str(rings), "60"]
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.aio.liars", *words], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert await Lines(process.stdout.fileno()).next() == "lying"
            yield
        finally:
            process.kill()


async def reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echoes what comes first, and waits for more."""
    with contextlib.suppress(ConnectionError):
        writer.write(await reader.readexactly(SENT))
        await reader.read()
    writer.close()


PASSES = 4000
"""A second, of the pump: a thousand for nothing, and what goes with each where a loop stays awake for it."""
CPU = 0.4
"""Of one. It takes 0.03 where nobody else wants it; 0.2 to 1 when nothing is done about it."""
SETTLE, WATCHED = 0.2, 0.6
"""Seconds: until a liar is muted, and of counting. It keeps a processor busy all along."""

SOME = ("bell", "tag", "open toggle", "want", "rings", "names", "messages", "everything")
"""The others take too long for each time."""
HOW = {"silent": SILENT, "rings": ONCE_A_SLEEP, "rings always": ALWAYS}


@pytest.mark.parametrize(
    ("kind", "rings"),
    [
        pytest.param(
            kind,
            rings,
            id=f"{kind}, {how}",
            marks=[] if kind in SOME and rings == ONCE_A_SLEEP else pytest.mark.slow,
        )
        for kind in FLOODS
        for how, rings in HOW.items()
    ],
)
def test_what_costs_a_store_has_a_bounded_cost(region: str, kind: str, rings: int) -> None:
    """Whatever word a liar changes without end, and however it rings: a node that has nothing to do has
    little to do, and serves others meanwhile."""
    compiled()

    async def main() -> None:
        async with (
            shmsock.attach(region, name="victim") as node,
            Child("serve", region, "honest") as child,
        ):
            await child.says("ready")
            await shmsock.start_server(reads, None, 7000, node=node)
            reader, writer = await shmsock.open_connection("honest", 7000, node=node)
            await ping(reader, writer)
            async with liar(region, kind, rings):
                await asyncio.sleep(SETTLE)
                passes, cpu, start = node.statistics()["pumps"], time.process_time(), time.monotonic()
                await asyncio.sleep(WATCHED)
                seconds = time.monotonic() - start
                passes = node.statistics()["pumps"] - passes
                cpu = time.process_time() - cpu
                assert passes < PASSES * seconds
                assert cpu < CPU * seconds
                await ping(reader, writer, 20)
                again, back = await shmsock.open_connection("honest", 7000, node=node)
                await ping(again, back, 20)
                back.close()
            writer.close()

    asyncio.run(asyncio.wait_for(main(), 60))


# -- and what is no lie

SECONDS = 1.2
"""Of each load. Somebody is muted for a thousand looks within one."""


async def ping_pong(node: shmsock.Node) -> None:
    reader, writer = await shmsock.open_connection("honest", 7000, node=node)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await ping(reader, writer, 100)
    writer.close()
    await writer.wait_closed()


async def many_streams(node: shmsock.Node) -> None:
    await asyncio.gather(*(ping_pong(node) for _ in range(64)))


async def drain_each(node: shmsock.Node) -> None:
    _, writer = await shmsock.open_connection("honest", 7002, node=node)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for _ in range(1000):
            writer.write(bytes(64))
            await writer.drain()
    writer.close()
    await writer.wait_closed()


async def large_writes(node: shmsock.Node) -> None:
    _, writer = await shmsock.open_connection("honest", 7002, node=node)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        writer.write(bytes(1 << 16))
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def small_reads(node: shmsock.Node) -> None:
    """Of much that waits: each turn of the loop a few bytes."""
    reader, writer = await shmsock.open_connection("honest", 7001, node=node)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await reader.readexactly(100)
        await asyncio.sleep(0)
    writer.transport.abort()


async def short_connections(node: shmsock.Node) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        reader, writer = await shmsock.open_connection("honest", 7000, node=node)
        await ping(reader, writer, 1, 1)
        writer.close()
        await writer.wait_closed()


async def refused_connections(node: shmsock.Node) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with pytest.raises(ConnectionRefusedError):
            await shmsock.open_connection("honest", 9999, node=node)


async def datagram_flood(node: shmsock.Node) -> None:
    transport, protocol = await create_datagram_endpoint(Datagrams, None, ("honest", 8000), node=node)
    protocol.datagram_received = lambda data, addr: None
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for _ in range(100):
            transport.sendto(bytes(100))
        await protocol.may_send.wait()
        await asyncio.sleep(0)
    transport.close()


async def datagram_echoes(node: shmsock.Node) -> None:
    transport, _ = await create_datagram_endpoint(Datagrams, None, ("honest", 8000), node=node)
    transport.sendto(bytes(64))  # each echoes what the other does
    await asyncio.sleep(SECONDS)
    transport.close()


Load = Callable[[shmsock.Node], Awaitable[None]]
LOADS: list[Load] = [
    ping_pong, many_streams, drain_each, large_writes, small_reads, short_connections, refused_connections,
    datagram_flood, datagram_echoes,
]  # fmt: skip


@pytest.mark.parametrize(("still", "loop"), [(False, "uvloop"), (True, "asyncio")], ids=["hot", "still"])
@pytest.mark.parametrize("load", LOADS, ids=[load.__name__ for load in LOADS])
def test_honest_peers_are_never_muted(region: str, load: Load, still: bool, loop: str) -> None:
    """However fast they go: each look at them finds something, or one of the next does."""

    async def main() -> None:
        settings = STILL if still else shmsock.Settings()
        async with (
            Child("honest", region, "honest", still, loop=loop) as child,
            shmsock.attach(region, name="test", settings=settings) as node,
        ):
            await child.says("ready")
            await load(node)
            assert node.statistics()["rate_limited"] == 0
            child.tell()
            await child.says("0")

    runner(loop)(asyncio.wait_for(main(), 60))
