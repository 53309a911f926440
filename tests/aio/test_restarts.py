"""A server that is restarted again and again, however it ends, under clients that stay attached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from statistics import median

import pytest

import shmsock
from tests.aio.conftest import Run
from tests.aio.processes import Child


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize(
    ("times", "clients"), [(6, 3), pytest.param(40, 8, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_it_is_found_again_and_nothing_is_lost(
    run: Run, make: Callable[..., str], times: int, clients: int, spare: int
) -> None:
    """`spare`: sections that are free while all are there."""
    region = make(peers=clients + 1 + spare)
    found, attached = list[float](), list[float]()

    async def started(stack: AsyncExitStack) -> Child:
        server = await stack.enter_async_context(Child("short_lived", region, "server", loop=run.loop))
        await server.says("loaded")
        return server

    async def main() -> None:
        async with AsyncExitStack() as stack:
            crowd = [
                await stack.enter_async_context(
                    Child("regular", region, f"client-{i}", "server", times, loop=run.loop)
                )
                for i in range(clients)
            ]
            for client in crowd:
                await client.says("ready")
            server = await started(stack)
            for number in range(times):
                server.tell()
                took, since = map(float, (await server.line()).split())
                attached.append(took)
                found.extend([float(await client.line()) - since for client in crowd])
                successor = await started(stack)
                if number % 3 == 0:
                    server.tell()
                    assert await server.ended() == 0
                elif number % 3 == 1:
                    server.kill()
                else:
                    server.process.terminate()
                    await server.ended()
                server = successor  # and at once
            for client in crowd:
                await client.says("all is back")
            async with AsyncExitStack() as nodes:  # whoever has died: its section is to be had
                for i in range(1 + spare):
                    await nodes.enter_async_context(shmsock.attach(region, name=f"other-{i}"))
            for client in crowd:
                client.tell()
                assert await client.ended() == 0

    run(main(), 300)
    for what, took in (("attached", attached), ("found again", found)):
        print(f"{what} within {1e3 * median(took):.1f} ms, at most {1e3 * max(took):.1f}")
    assert len(found) == times * clients
    assert max(found) < 5
