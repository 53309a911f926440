"""Writes regions to be kept, by whatever version of shmsock is imported: `scenes.py FOLDER [SCENE...]`.

It is run as a script, with that version first on PYTHONPATH, and uses only what every version has: attach,
streams, and from Layout 2 on datagrams. A region is kept as it is at one moment, compressed.
"""

from __future__ import annotations

import asyncio
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shmsock

THERE, BACK = b"there " * 500, b"back " * 400
DATAGRAMS = [b"one", b"two" * 100, b"three"]


async def ends(region: str) -> tuple[Any, Any, Any, Any, Any]:
    """Two nodes, vm-a and vm-b, with a connection of which both ends are held."""
    a, b = await shmsock.attach(region, name="vm-a"), await shmsock.attach(region, name="vm-b")
    accepted = asyncio.get_running_loop().create_future()
    server = await shmsock.start_server(lambda *end: accepted.set_result(end), None, 7000, node=b)
    reader, writer = await shmsock.open_connection("vm-b", 7000, node=a)
    return a, b, server, (reader, writer), await accepted


async def idle(region: str) -> bytes:
    """Nobody is there any more."""
    async with shmsock.attach(region, name="vm-a"):
        pass
    return Path(region).read_bytes()


async def live(region: str) -> bytes:
    """One node, which listens."""
    async with shmsock.attach(region, name="vm-a") as node:
        server = await shmsock.start_server(print, None, 7000, node=node)
        kept = Path(region).read_bytes()
        server.close()
    return kept


async def busy(region: str) -> bytes:
    """Two nodes, with bytes and datagrams on their way between them."""
    a, b, server, near, far = await ends(region)
    loop = asyncio.get_running_loop()
    met = loop.create_future()

    class Met(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            met.set_result(data)

    make = shmsock.create_datagram_endpoint
    receiving, _ = await make(Met, local_addr=(None, 7001), node=b)
    sending, _ = await make(Met, remote_addr=("vm-b", 7001), node=a)
    sending.sendto(b"hello")
    await met  # the link is there
    near[1].write(THERE)
    far[1].write(BACK)
    for datagram in DATAGRAMS:
        sending.sendto(datagram)
    kept = Path(region).read_bytes()  # before anybody reads
    for transport in (receiving, sending):
        transport.close()
    server.close()
    for node in (a, b):
        await node.aclose()
    return kept


async def left(region: str) -> bytes:
    """vm-b has left, and vm-a has not read what it wrote before."""
    a, b, server, _near, far = await ends(region)
    far[1].write(BACK)
    server.close()
    await b.aclose()
    kept = Path(region).read_bytes()
    await a.aclose()
    return kept


SCENES = {scene.__name__: scene for scene in (idle, live, busy, left)}


def write(folder: str, scenes: list[str]) -> None:
    os.makedirs(folder, exist_ok=True)
    for name in scenes or SCENES:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
            create = [sys.executable, "-m", "shmsock", "create", "region", "--size", "4M", "--peers", "4"]
            subprocess.run(create, cwd=made, check=True, stdout=subprocess.DEVNULL)
            kept = asyncio.run(SCENES[name](f"{made}/region"))
        Path(folder, f"{name}.xz").write_bytes(lzma.compress(kept, preset=9))


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2:])
