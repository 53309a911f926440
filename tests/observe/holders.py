"""Processes that hold connections, and say which: `python -m tests.observe.holders REGION NAME [PEER]`.

Without PEER: takes connections at port 7000, of which it reads nothing until told "read", and at 7001, where
it echoes. With PEER: holds HELD connections to its port 7000, each with as many bytes in the ring as its
number says; told "churn", it opens and closes others at 7001, COMING at least, until told "quiet". Each
prints a line of JSON when it is as it is to be, and after each line of its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

import shmsock

HELD, COMING, AT_ONCE = 40, 200, 25
WRITTEN = 300
HELD_OPEN: list[asyncio.Transport] = []


class Holder(asyncio.Protocol):
    """Reads nothing until it is told to."""

    got = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        HELD_OPEN.append(transport)

    def data_received(self, data: bytes) -> None:
        Holder.got += len(data)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def churn(node: shmsock.Node, peer: str, stop: asyncio.Event) -> int:
    """Open connections, a byte each way, and close them: COMING at least."""
    rounds = 0

    async def one() -> None:
        reader, writer = await shmsock.open_connection(peer, 7001, node=node)
        writer.write(b"x")
        await reader.readexactly(1)
        writer.close()
        await writer.wait_closed()

    while not stop.is_set() or rounds * AT_ONCE < COMING:
        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        rounds += 1
    return rounds * AT_ONCE


async def echo(reader: Any, writer: Any) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(100):
            writer.write(data)
    writer.close()


async def main(region: str, name: str, peer: str | None) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with shmsock.attach(region, name=name) as node:
        ports: list[int] = []
        task: asyncio.Task[int] | None = None
        stop = asyncio.Event()
        if peer is None:
            await shmsock.create_server(Holder, port=7000, node=node)
            await shmsock.start_server(echo, port=7001, node=node)
        else:
            for number in range(HELD):
                transport, _ = await shmsock.create_connection(Holder, peer, 7000, node=node)
                transport.write(bytes(number))
                ports.append(transport.get_extra_info("sockname")[1])
        say(section=node.section, ports=ports)
        while (line := (await lines.readline()).decode().strip()) != "":
            if line == "churn" and peer is not None:
                stop.clear()
                task = asyncio.create_task(churn(node, peer, stop))
                say(churning=True)
            elif line == "quiet" and task is not None:
                stop.set()
                say(came=await task, **node.statistics())
            elif line == "write":
                HELD_OPEN[0].write(bytes(WRITTEN))
                say(wrote=WRITTEN)
            elif line == "read":
                for held in HELD_OPEN:
                    held.resume_reading()
                say(reading=True)
            elif line == "tell":
                say(got=Holder.got, **node.statistics())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
