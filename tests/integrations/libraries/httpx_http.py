"""httpx, with an application that uvicorn or hypercorn serves."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def echo(request: Request) -> Response:
    return Response(await request.body())


app = Starlette(routes=[Route("/", echo, methods=["POST"])])


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    authority = os.environ.get("TEST_CA")  # HTTP/2 goes with TLS
    verify = ssl.create_default_context(cafile=authority)
    url = f"{'https' if authority else 'http'}://{host}:{port}/"
    limits = httpx.Limits(max_keepalive_connections=100)
    async with httpx.AsyncClient(
        verify=verify, http2=bool(authority), limits=limits, timeout=60, trust_env=False
    ) as session:

        async def ask(data: bytes) -> bytes:
            answer = await session.post(url, content=data)
            answer.raise_for_status()
            assert answer.http_version == ("HTTP/2" if authority else "HTTP/1.1")
            return answer.content

        yield ask
