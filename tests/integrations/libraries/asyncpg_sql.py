"""asyncpg."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

COPY = (100 if os.environ.get("SHMSOCK_LONG") == "1" else 10) << 20
LOGIN = {"user": "tester", "database": "postgres", "password": "secret"}


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(host=host, port=port, min_size=0, max_size=50, **LOGIN) as pool:

        async def ask(data: bytes) -> bytes:
            answer: bytes = await pool.fetchval("SELECT $1::bytea", data)
            return answer

        yield ask


async def more(host: str, port: int) -> None:
    """TLS, a query that is cancelled, and COPY, in both directions."""
    context = ssl.create_default_context(cafile=os.environ["TEST_CA"])
    for tls in (context, None):
        connection = await asyncpg.connect(host=host, port=port, ssl=tls or False, **LOGIN)
        used = await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert used == bool(tls)
        waits = asyncio.ensure_future(connection.execute("SELECT pg_sleep(3600)"))
        other = await asyncpg.connect(host=host, port=port, ssl=tls or False, **LOGIN)
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
        while not await other.fetchval(sleeping):
            pass
        waits.cancel()
        await asyncio.wait({waits})
        assert waits.cancelled()
        while await other.fetchval(sleeping + " AND state = 'active'"):  # the server has heard of it
            pass
        assert await connection.fetchval("SELECT 1") == 1
        await connection.execute("CREATE TEMP TABLE copied (line text)")
        sent = 0
        piece = b"%s\n" % (b"x" * 99) * 1000

        async def rows(piece: bytes = piece) -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < COPY:
                sent += len(piece)
                yield piece

        await connection.copy_to_table("copied", source=rows())
        got = 0

        async def take(data: bytes) -> None:
            nonlocal got
            assert data.strip(b"x\n") == b""
            got += len(data)

        await connection.copy_from_table("copied", output=take)
        assert got == sent >= COPY
        await connection.close()
        await other.close()
