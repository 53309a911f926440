"""websockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from tests.integrations.libraries.pool import pool


async def echo(ws: Any) -> None:
    async for message in ws:
        await ws.send(message)


@asynccontextmanager
async def server(port: int) -> AsyncIterator[None]:
    async with serve(echo, "127.0.0.1", port, max_size=None):
        yield


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async def ask(ws: Any, data: bytes) -> bytes:
        await ws.send(data)
        answer: bytes = await ws.recv()
        return answer

    async def begin() -> Any:
        return await connect(f"ws://{host}:{port}", max_size=None)

    async with pool(begin, ask) as once:
        yield once
