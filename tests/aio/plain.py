"""What a subinterpreter does, which is refused the extension: streams, protocols and datagrams without it."""

from __future__ import annotations

import asyncio
from typing import Any

import shmsock
from shmsock.aio.pump import PlainPump, Pump, extension

SIZE = 1 << 20


class Collects(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.got: asyncio.Queue[Any] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.put_nowait((data, addr))


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def streams() -> None:
    async with await shmsock.start_server(echo, None, 7000):
        reader, writer = await shmsock.open_connection(None, 7000)
        for line in (b"a line\n", b"\n", b"x" * 5000 + b"\n"):
            writer.write(line)
            assert await reader.readline() == line
        data = bytes(range(256)) * (SIZE // 256)

        async def write() -> None:
            for at in range(0, SIZE, 10_000):
                writer.write(data[at : at + 10_000])
                await writer.drain()
            writer.write_eof()

        writing = asyncio.create_task(write())
        assert await reader.readexactly(SIZE) == data
        assert await reader.read() == b""
        await writing
        writer.close()
        await writer.wait_closed()


async def datagrams() -> None:
    here, protocol = await shmsock.create_datagram_endpoint(Collects, (None, 7001))
    there, _ = await shmsock.create_datagram_endpoint(Collects, remote_addr=("localhost", 7001))
    for n in range(10):
        there.sendto(bytes([n]))
    for n in range(10):
        assert await protocol.got.get() == (bytes([n]), there.get_extra_info("sockname"))
    here.close()
    there.close()


async def play() -> None:
    await streams()
    await datagrams()


def main(region: str) -> None:
    """Called in the subinterpreter."""
    import os

    assert extension is None
    assert Pump is PlainPump
    os.environ["SHMSOCK_REGION"] = region
    asyncio.run(asyncio.wait_for(play(), 30))
