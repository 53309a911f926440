"""redis.asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async with Redis(host=host, port=port) as redis:

        async def ask(data: bytes) -> bytes:
            answer: Any = await redis.echo(data)
            return bytes(answer)

        yield ask
