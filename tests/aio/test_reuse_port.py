"""Processes that share a port: the connections of one client go round all of them, however it connects."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop

import shmsock
import shmsock.anyio
from tests.aio.processes import PATIENCE, Child

HOST, PORT = "crowd", 7000


async def _pid(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> int:
    reader, writer = streams
    pid = int(await reader.readline())
    writer.close()
    await writer.wait_closed()
    return pid


async def streams() -> int:
    return await _pid(await shmsock.open_connection(HOST, PORT))


async def anyio_streams() -> int:
    async with await shmsock.anyio.connect_shm(HOST, PORT) as stream:
        return int(await stream.receive())


async def by_name() -> int:
    return await _pid(await asyncio.open_connection(f"{HOST}.shm", PORT))


async def _address() -> Any:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(f"{HOST}.shm", PORT, type=socket.SOCK_STREAM)
    return found[0][4]


async def by_address() -> int:
    return await _pid(await asyncio.open_connection(*(await _address())[:2]))


async def by_socket() -> int:
    """As aiohttp does."""
    sock = socket.socket(socket.AF_INET6)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, await _address())
    return await _pid(await asyncio.open_connection(sock=sock))


@pytest.mark.parametrize("base", [None, uvloop.Loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("ask", [streams, anyio_streams, by_name, by_address, by_socket])
def test_connections_go_round_all(
    ask: Callable[[], Awaitable[int]], base: Any, make: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(region: str) -> None:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Child("sign", region, HOST)) for _ in range(4)]
            for server in servers:
                await server.says("ready")
            order = [await ask() for _ in range(400)]
            assert all(order[i] != order[i - 1] for i in range(1, 400))
            served = Counter(order)
            assert set(served) == {s.pid for s in servers}
            assert min(served.values()) >= 50, served  # 100, unless one has not beaten for long
            dead = servers.pop()
            dead.kill()
            assert set([await ask() for _ in range(100)]) == {s.pid for s in servers}

    region = make(peers=8)
    monkeypatch.setenv("SHMSOCK_REGION", region)
    monkeypatch.setenv("SHMSOCK_NAME", "client")
    loop = shmsock.loop_factory(base)()
    try:
        loop.run_until_complete(asyncio.wait_for(main(region), PATIENCE))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
