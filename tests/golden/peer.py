"""A server or a client, of whatever version of shmsock is imported: `python peer.py LOOP ROLE REGION`.

It is run as a script, with that version first on PYTHONPATH. TERMS in the environment makes it a version to
come, which says so much of itself: "release least features to_link to_look".
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
from typing import Any

import shmsock

STREAM, DATAGRAMS = 300_000, 8
#: What a client meets while its server is gone.
GONE = (ConnectionError, EOFError, OSError, asyncio.TimeoutError)


def say(*words: object) -> None:
    print(*words, flush=True)


async def until_told() -> None:
    """Return at a line on standard input, or at its end."""
    loop = asyncio.get_running_loop()
    told = loop.create_future()

    def tell() -> None:
        loop.remove_reader(0)
        told.set_result(None)

    loop.add_reader(0, tell)
    await told


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes, and its checksum behind it."""
    seen = hashlib.sha256()
    try:
        while data := await reader.read(65536):
            seen.update(data)
            writer.write(data)
            await writer.drain()
        writer.write(seen.digest())
    except ConnectionError:
        pass
    writer.close()


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class Replies(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.queue.put_nowait(data)


async def server(region: str) -> None:
    async with shmsock.attach(region, name="server") as node:
        listening = await shmsock.start_server(serve, None, 7000, node=node)
        transport, _ = await shmsock.create_datagram_endpoint(Echo, local_addr=(None, 7001), node=node)
        say("ready")
        await until_told()
        transport.close()
        listening.close()


async def stream(node: Any, data: bytes) -> None:
    reader, writer = await shmsock.open_connection("server", 7000, node=node)
    try:
        assert writer.get_extra_info("peername") == ("server", 7000)

        async def send() -> None:
            for at in range(0, len(data), 20_000):
                writer.write(data[at : at + 20_000])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.ensure_future(send())
        try:
            back = await reader.read(-1)
            await sending
        finally:
            sending.cancel()
        cut = len(back) < len(data) + 32
        if back[: len(data)] != data[: len(back)]:
            say("bad: other bytes came back")
        elif cut:
            raise ConnectionResetError("the server was restarted")
        elif back[len(data) :] != hashlib.sha256(data).digest():
            say("bad: the server saw other bytes")
    finally:
        writer.close()


async def datagrams(node: Any) -> None:
    transport, replies = await shmsock.create_datagram_endpoint(
        Replies, remote_addr=("server", 7001), node=node
    )
    try:
        for number in range(DATAGRAMS):
            data = b"%d " % number * (number * 200 + 1)
            transport.sendto(data)
            if await asyncio.wait_for(replies.queue.get(), 2) != data:
                say("bad: another datagram came back")
    finally:
        transport.close()


async def client(region: str) -> None:
    """Says "round" for each time that all came back right; begins anew where the server went away."""
    rng = random.Random(1)
    async with shmsock.attach(region, name="client") as node:
        told = asyncio.ensure_future(until_told())
        last = ""
        while not told.done():
            try:
                await stream(node, rng.randbytes(STREAM))
                await datagrams(node)
            except GONE as error:
                if str(error) != last:
                    last = str(error)
                    say("failed:", type(error).__name__, last)
                await asyncio.sleep(0.02)  # nothing tells when a server is there
            else:
                last = ""
                say("round")


def main(loop: str, role: str, region: str) -> None:
    if terms := os.environ.get("TERMS"):
        from shmsock.engine import features

        features.OWN = features.Terms(*map(int, terms.split()))
    run: Any = asyncio.run
    if loop == "uvloop":
        import uvloop

        run = uvloop.run
    run({"server": server, "client": client}[role](region))


if __name__ == "__main__":
    main(*sys.argv[1:])
