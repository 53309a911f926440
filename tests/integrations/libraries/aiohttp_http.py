"""aiohttp: requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import aiohttp
from aiohttp import web


def in_pieces(data: bytes) -> Any:
    """What aiohttp warns of when it is given much at once."""
    return data if len(data) < 1 << 20 else BytesIO(data)


async def echo(request: web.Request) -> web.StreamResponse:
    return web.Response(body=in_pieces(await request.read()))


async def echo_messages(request: web.Request) -> web.StreamResponse:
    ws = web.WebSocketResponse(max_msg_size=0)
    await ws.prepare(request)
    async for message in ws:
        await ws.send_bytes(message.data)
    return ws


@asynccontextmanager
async def server(port: int) -> AsyncIterator[None]:
    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.post("/", echo), web.get("/ws", echo_messages)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield
    await runner.cleanup()


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async with aiohttp.ClientSession(f"http://{host}:{port}") as session:

        async def ask(data: bytes) -> bytes:
            async with session.post("/", data=in_pieces(data)) as answer:
                answer.raise_for_status()
                return await answer.read()

        yield ask
