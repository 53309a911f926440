"""psycopg, whose sockets are libpq's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from tests.integrations.libraries.asyncpg_sql import COPY
from tests.integrations.libraries.pool import pool

LOGIN: Any = {"user": "tester", "dbname": "postgres", "password": "secret", "autocommit": True}


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async def connect() -> Any:
        return await psycopg.AsyncConnection.connect(host=host, port=port, **LOGIN)

    async def ask(connection: Any, data: bytes) -> bytes:
        cursor = await connection.execute("SELECT %b::bytea", (data,), binary=True)
        (answer,) = await cursor.fetchone()
        return bytes(answer)

    async with pool(connect, ask) as once:
        yield once


async def more(host: str, port: int) -> None:
    """TLS, a query that is cancelled, and COPY, in both directions."""
    tls: dict[str, Any] = {"sslmode": "verify-full", "sslrootcert": os.environ["TEST_CA"]}
    plain: dict[str, Any] = {"sslmode": "disable"}
    for options in (tls, plain):
        connection = await psycopg.AsyncConnection.connect(host=host, port=port, **options, **LOGIN)
        assert connection.pgconn.ssl_in_use == (options is tls)
        waits = asyncio.ensure_future(connection.execute("SELECT pg_sleep(3600)"))
        other = await psycopg.AsyncConnection.connect(host=host, port=port, **options, **LOGIN)
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
        while await (await other.execute(sleeping)).fetchone() == (0,):
            pass
        await connection.cancel_safe()
        try:
            await waits
        except psycopg.errors.QueryCanceled:
            pass
        else:
            raise AssertionError("it was not cancelled")
        await connection.execute("CREATE TEMP TABLE copied (line text)")
        sent = got = 0
        piece = b"%s\n" % (b"x" * 99) * 1000
        async with connection.cursor().copy("COPY copied FROM STDIN") as copy:
            while sent < COPY:
                await copy.write(piece)
                sent += len(piece)
        async with connection.cursor().copy("COPY copied TO STDOUT") as copy:
            async for data in copy:
                got += len(data)
        assert got == sent
        await connection.close()
        await other.close()
