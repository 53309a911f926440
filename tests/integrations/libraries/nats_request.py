"""nats-py: requests that another client of the server answers, over a connection of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats


async def quiet(error: Exception) -> None:
    """Say nothing of a connection that is lost: the client connects again."""


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    options: Any = {"error_cb": quiet, "reconnect_time_wait": 0.1, "max_reconnect_attempts": -1}
    url = f"nats://{host}:{port}"
    async with await nats.connect(url, **options) as answers, await nats.connect(url, **options) as asks:

        async def echo(message: Any) -> None:
            await message.respond(message.data)

        await answers.subscribe("echo", cb=echo)
        await answers.flush()

        async def ask(data: bytes) -> bytes:
            answer: bytes = (await asks.request("echo", data, timeout=30)).data
            return answer

        yield ask
