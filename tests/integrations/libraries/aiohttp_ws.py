"""aiohttp: WebSockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.integrations.libraries.aiohttp_http import server
from tests.integrations.libraries.pool import pool

__all__ = ["client", "server"]


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async with aiohttp.ClientSession() as session:

        async def ask(ws: Any, data: bytes) -> bytes:
            await ws.send_bytes(data)
            answer: bytes = await ws.receive_bytes()
            return answer

        async def connect() -> Any:
            return await session.ws_connect(f"ws://{host}:{port}/ws", max_msg_size=0)

        async with pool(connect, ask) as once:
            yield once
