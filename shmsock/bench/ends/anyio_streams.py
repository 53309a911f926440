"""Over anyio's streams, on its asyncio and its trio backend: echoes."""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any

import anyio
from anyio.abc import ByteStream

from .timing import percentiles, same, trips

__all__ = ["MODULES", "client", "serve"]

MODULES = {
    "anyio": ("create_tcp_listener", "connect_tcp"),
    "shmsock.anyio": ("create_shm_listener", "connect_shm"),
}
BLOCK = 64 * 1024


async def handle(stream: ByteStream) -> None:
    async with stream:
        try:
            while True:
                await stream.send(await stream.receive(BLOCK))
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass


async def serve(options: argparse.Namespace, announce: Any) -> None:
    """Until standard input ends."""
    listen = getattr(importlib.import_module(options.module), MODULES[options.module][0])
    listener = await listen(local_host=options.host, local_port=options.port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        host, port = listener.extra(anyio.abc.SocketAttribute.local_address)[:2]
        announce({"host": host, "port": port})
        while True:
            await anyio.wait_readable(0)
            if not os.read(0, 1):
                break
        tasks.cancel_scope.cancel()


async def client(options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    connect = getattr(importlib.import_module(options.module), MODULES[options.module][1])
    size = options.echo
    data = os.urandom(size)
    async with await connect(options.host, options.port) as stream:
        for _ in trips(times, options.seconds):
            await stream.send(data)
            back = await stream.receive(size)
            while len(back) < size:
                back += await stream.receive(size - len(back))
        same(data, back)
    return percentiles(times)
