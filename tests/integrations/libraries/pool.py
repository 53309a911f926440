"""Connections that are kept, for libraries that leave this to the program."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def pool(
    connect: Callable[[], Awaitable[Any]], ask: Callable[[Any, bytes], Awaitable[bytes]]
) -> AsyncIterator[Callable[[bytes], Awaitable[bytes]]]:
    """Give a function that asks over a connection that is idle, or a new one. One that fails is closed."""
    idle: list[Any] = []

    async def once(data: bytes) -> bytes:
        connection = idle.pop() if idle else await connect()
        try:
            answer = await ask(connection, data)
        except BaseException:
            await connection.close()
            raise
        idle.append(connection)
        return answer

    try:
        yield once
    finally:
        for connection in idle:
            await connection.close()
