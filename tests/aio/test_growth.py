"""Rings that grow under streams and protocols, between processes and within one."""

from __future__ import annotations

import asyncio

import pytest

import shmsock
from tests.aio.conftest import Run, World, held, until
from tests.aio.processes import Child, pattern

WRITES = [(1, 7), (5000, 5000), (70_000, 70_000), (70_000, 1000), (300_000, 300), (3_000_000, 65_536)]


@pytest.mark.parametrize("chunk", [1000, 3 << 20])
def test_between_processes(run: Run, region: str, loop_name: str, chunk: int) -> None:
    async def main() -> None:
        async with Child("serve", region, "server", loop=loop_name) as server:
            await server.says("ready")
            sizes = [1, 5000, 70_000, 300_000, 3 << 20]
            async with Child("growing", region, sizes, chunk, loop=loop_name) as client:
                await client.says("512")
                await client.says("all is back")
                assert await client.ended() == 0

    run(main())


def test_a_first_large_write_goes_in_at_once(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            for end, other in ((c, s), (s, c)):
                end.writer.write(pattern(1, 0, 1 << 17))
                assert end.transport.get_write_buffer_size() == 0
                assert await other.reader.readexactly(1 << 17) == pattern(1, 0, 1 << 17)

    run(main())


def test_what_nobody_reads_is_kept_as_before(run: Run, world: World) -> None:
    """Small writes grow the ring to its end, then the transport's buffer, then writing is paused."""

    async def main() -> None:
        async with world.pair() as (c, s):
            data, sent = pattern(3, 0, 3000), 0
            while not c.transport._protocol_paused:
                c.writer.write(data)
                sent += 1
            assert c.transport.conn.ring[1] >= 1 << 17
            assert sent * 3000 >= c.transport.conn.ring[1] + (1 << 16)
            for _ in range(sent):
                assert await s.reader.readexactly(3000) == data
            await c.writer.drain()

    run(main())


def test_protocols(run: Run, world: World) -> None:
    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    class Collect(Echo):
        def __init__(self) -> None:
            self.got = bytearray()

        def data_received(self, data: bytes) -> None:
            self.got += data

    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.create_server(Echo, None, 7000, node=b)
            for size, chunk in WRITES:
                transport, protocol = await shmsock.create_connection(Collect, b.name, 7000, node=a)
                data = pattern(5, 0, size)
                for at in range(0, size, chunk):
                    transport.write(data[at : at + chunk])
                await until(lambda p=protocol, n=size: len(p.got) == n)  # type: ignore[misc]
                assert protocol.got == data
                transport.close()
            server.close()
            await server.wait_closed()

    run(main())


def test_aborted_while_both_rings_are_there(run: Run, world: World) -> None:
    """(world.nodes() looks for what is left.)"""

    async def to_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def main() -> None:
        async with world.nodes() as (a, b):
            before = held(a)["arena_free_bytes"]
            server = await shmsock.start_server(to_the_end, None, 7000, node=b)
            for how in ("abort", "close"):
                _, writer = await shmsock.open_connection(b.name, 7000, node=a)
                for _ in range(5):
                    writer.write(bytes(1000))
                assert before - held(a)["arena_free_bytes"] >= (1 << 13) + 512
                getattr(writer.transport, how)()
                del writer
                await until(lambda: held(a)["arena_free_bytes"] == before)
            server.close()
            await server.wait_closed()

    run(main())
