"""A thousand clients that are gone before they are read, and two hundred conversations at once."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Callable

import pytest

import shmsock
from tests.aio.conftest import Run, held, until
from tests.aio.processes import Child, pattern
from tests.aio.roles import Plan, converse

SIZE = 100_000


@pytest.mark.parametrize(
    ("end", "code", "after"),
    [
        ("close", 0, "eof"),
        ("close and os._exit", 0, "eof"),
        ("os._exit", 0, "reset"),
        ("drain and SIGKILL", -9, "reset"),
    ],
)
def test_a_thousand_clients_that_are_gone_before_they_are_read(
    run: Run, make: Callable[..., str], end: str, code: int, after: str
) -> None:
    processes, each = 5, 200
    ends: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, str]:
        data = b""
        try:
            while more := await reader.read(1 << 16):
                data += more
            seen = "eof"
        except ConnectionResetError:
            seen = "reset"
        writer.close()
        number = int.from_bytes(data[:4], "little")
        assert data[4:] == pattern(number, 4, SIZE - 4), f"{len(data)} bytes"
        return number, seen

    async def main() -> None:
        region = make(size=4 << 30)
        async with shmsock.attach(region, name="test") as node:
            before = held(node)
            await shmsock.start_server(lambda r, w: ends.append((r, w)), None, 7000, node=node)
            children = [Child("connect_write", region, i * each, each, SIZE, end) for i in range(processes)]
            try:
                for child in children:
                    await child.says("connected")
                await until(lambda: len(ends) == processes * each)
                for child in children:
                    child.tell()
                for child in children:
                    assert await child.ended() == code
            finally:
                for child in children:
                    child.close()
            seen = [await read(*pair) for pair in ends]
            assert sorted(seen) == [(i, after) for i in range(processes * each)]
            await until(lambda: held(node) == before)
            assert node.statistics()["healed"] == 0

    run(main())


@pytest.mark.parametrize("other", ["asyncio", "uvloop"])
def test_two_hundred_conversations_at_once(run: Run, make: Callable[..., str], other: str) -> None:
    seed = int(os.environ.get("SHMSOCK_SEED") or random.randrange(1 << 32))
    print(f"SHMSOCK_SEED={seed}")
    count = 200
    here: dict[int, dict[str, object]] = {}
    handlers: set[object] = set()

    async def main() -> None:
        region = make(size=256 << 20)

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handlers.add(writer)
            try:
                await handle(reader, writer)
            finally:
                handlers.discard(writer)

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                i = int.from_bytes(await reader.readexactly(4), "little")
            except ConnectionResetError:
                writer.close()
                return  # aborted before it said who it is
            plan = Plan(seed, i)
            here[i] = await converse(reader, writer, plan, (2 * i + 1, 2 * i), plan.back, False)

        async with shmsock.attach(region, name="test") as node:
            before = held(node)
            await shmsock.start_server(handler, None, 7000, node=node)
            async with Child("stress", region, seed, count, loop=other) as child:
                await child.says("ready")
                child.tell()
                there = json.loads(await child.line())
                await until(lambda: not handlers)
                await until(lambda: held(node) == before, f"{held(node)}, {before}")
                child.tell()
                assert json.loads(await child.line()) == {}
            assert node.statistics()["healed"] == 0
            kinds = Counter(Plan(seed, i).kind for i in range(count))
            assert len(kinds) == 5
            for i in range(count):
                check(Plan(seed, i), there[i], here.get(i))

    run(main())


def check(plan: Plan, client: dict[str, object], server: dict[str, object] | None) -> None:
    """All that was meant to arrive did, or somebody had an exception."""
    what = f"{plan.kind}: {plan.there} there, {plan.back} back; client {client}, server {server}"
    if plan.kind in ("half-close", "cancel reads"):
        assert client == {"sent": "sent", "got": plan.back, "end": "eof"}, what
        assert server == {"sent": "sent", "got": plan.there, "end": "eof"}, what
    elif plan.kind == "close":
        assert server is not None, what
        assert client["sent"] == "sent", what
        assert server["got"] == plan.there, what
        assert server["end"] in ("eof", "reset"), what  # reset: the client closed with bytes unread
    elif server is not None:
        # who was aborted has all, or a reset
        aborted, size = (server, plan.there) if plan.kind == "abort here" else (client, plan.back)
        assert aborted["end"] == "reset" or aborted["got"] == size, what
