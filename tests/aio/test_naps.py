"""Beside a hog, waits are naps that the peer's kick ends."""

from __future__ import annotations

import asyncio
import os

import shmsock
from shmsock.bench.hogs import hogs
from tests.aio.conftest import Run
from tests.aio.processes import PATIENCE, Child

NAPS = 200


class Echoes(asyncio.Protocol):
    """Sends a byte, and again when it has come back, until the node has napped often."""

    def __init__(self, node: shmsock.Node) -> None:
        self.node, self.done = node, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.until = transport, self.node.statistics()["naps"] + NAPS
        transport.write(b"x")

    def data_received(self, data: bytes) -> None:
        assert data == b"x"
        if self.node.statistics()["naps"] < self.until:
            self.transport.write(b"x")
        else:
            self.done.set_result(None)


def test_streams_and_protocols_on_one_processor_with_a_hog(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="test") as node, Child("serve", region, "server") as child:
            await child.says("ready")
            for thread in os.listdir(f"/proc/{child.pid}/task"):
                os.sched_setaffinity(int(thread), {cpu})
            reader, writer = await shmsock.open_connection("server", 7000, node=node)
            # ended_naps: those of the child, which learns by itself that its yields come back late.
            while not ((seen := node.statistics())["naps"] >= NAPS and seen["ended_naps"]):
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
            _, echoes = await shmsock.create_connection(lambda: Echoes(node), "server", 7000, node=node)
            await asyncio.wait_for(echoes.done, PATIENCE)

    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    try:
        with hogs({cpu}):
            run(main())
    finally:
        os.sched_setaffinity(0, before)
