"""Opens and closes thousands of endpoints of every kind, and tells what is left of them:
`python -X dev -W error -m tests.aio.leaks LOOP REGION ROUNDS`.

Prints "clean" when nothing is.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import shmsock
from shmsock.aio.datagram import ShmDatagramTransport
from shmsock.aio.transport import ShmTransport
from shmsock.engine.datagram_links import REMEMBERED
from tests.aio.processes import runner

AT_ONCE = 50
OF_ROUND = 100
LINKS = 2  # both ends of the link that this node's datagrams to itself take
KINDS = (asyncio.Future, asyncio.StreamReader, asyncio.StreamWriter, ShmTransport, ShmDatagramTransport)


class Echo(asyncio.Protocol):
    """And a reference to its transport, which has one to it: a cycle."""

    transport: Any

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set_result(exc)


class Once(Echo):
    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.answer.set_result(data)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.answer.set_result((data, addr))


class EchoDatagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def stream(node: shmsock.Node, i: int) -> None:
    reader, writer = await shmsock.open_connection(node.name, 7000, node=node)
    writer.write(b"x" * 100)
    assert await reader.readexactly(100) == b"x" * 100
    if i % 3 == 0:
        writer.write_eof()
        assert await reader.read() == b""
    if i % 3 == 1:
        writer.transport.abort()
    writer.close()
    await writer.wait_closed()


async def protocol(node: shmsock.Node, i: int) -> None:
    transport, once = await shmsock.create_connection(Once, node.name, 7001, node=node)
    transport.write(b"y")
    assert await once.answer == b"y"
    if i % 2:
        sock = transport.get_extra_info("socket")
        assert sock.fileno() > 0
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    transport.close()
    await once.lost


async def cancelled(node: shmsock.Node, i: int) -> None:
    task = asyncio.ensure_future(shmsock.open_connection(node.name, 7000, node=node))
    for _ in range(i % 7):
        await asyncio.sleep(0)
    task.cancel()
    try:
        _, writer = await task
    except asyncio.CancelledError:
        return
    writer.close()
    await writer.wait_closed()


async def refused(node: shmsock.Node, i: int) -> None:
    try:
        await shmsock.open_connection(node.name, 7777, node=node)
    except ConnectionRefusedError:
        return
    raise AssertionError("somebody listens there")


async def datagram(node: shmsock.Node, i: int) -> None:
    transport, once = await shmsock.create_datagram_endpoint(Once, remote_addr=(node.name, 7002), node=node)
    transport.sendto(b"z")
    assert await once.answer == (b"z", (node.name, 7002))
    transport.close()
    await once.lost


async def rounds(node: shmsock.Node, count: int) -> None:
    kinds = (stream, stream, stream, stream, protocol, protocol, protocol, cancelled, refused, datagram)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(i: int) -> None:
        async with room:
            await kinds[i % len(kinds)](node, i)

    for _ in range(count):
        await asyncio.gather(*(one(i) for i in range(OF_ROUND)))


async def settled(node: shmsock.Node) -> dict[str, int]:
    """What the node holds when all that was closed has been let go of at both ends."""
    for _ in range(10_000):
        await asyncio.sleep(0.001)
        gc.collect()
        held = {name: node.statistics()[name] for name in ("connections", "free_slots", "arena_free_bytes")}
        if held["connections"] == LINKS and len(asyncio.all_tasks()) == 1:
            return held
    raise AssertionError(f"still held: {held}, expected {LINKS} connections; tasks {asyncio.all_tasks()}")


def census() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    return {
        **Counter(kind.__name__ for o in objects for kind in KINDS if isinstance(o, kind)),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


async def main(region: str, count: int) -> None:
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: reports.append(context))
    loop.slow_callback_duration = 60
    assert loop.get_debug() == sys.flags.dev_mode
    async with shmsock.attach(region, name="me") as node:
        await shmsock.start_server(handle, None, 7000, node=node)
        await shmsock.create_server(Echo, None, 7001, node=node)
        await shmsock.create_datagram_endpoint(EchoDatagrams, local_addr=(None, 7002), node=node)
        await rounds(node, 4)  # what is made once is made here, and addresses are remembered up to a bound
        for i in range(REMEMBERED):
            await datagram(node, i)
        held, before = await settled(node), census()
        start = sys.getallocatedblocks()
        await rounds(node, count)
        assert await settled(node) == held
        grown = sys.getallocatedblocks() - start
        after = census()
        assert after == before, f"left: {before} became {after}"
        assert grown < 300, f"{grown} blocks of memory more after {count * OF_ROUND} endpoints"
        assert node.statistics()["healed"] == 0
    assert reports == [], reports
    print("clean", flush=True)


if __name__ == "__main__":
    runner(sys.argv[1])(main(sys.argv[2], int(sys.argv[3])))
