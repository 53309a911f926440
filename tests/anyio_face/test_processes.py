"""Between processes, and between backends."""

from __future__ import annotations

import anyio
import pytest

import shmsock.anyio as shm
from tests.anyio_face.conftest import BACKENDS, Run, receive_pattern, send_pattern
from tests.anyio_face.processes import Child

SIZE = 5 << 20


@pytest.mark.parametrize("there", ["asyncio", "trio"])
def test_echo_between_backends(run: Run, region: str, there: str) -> None:
    async def main() -> None:
        async with shm.attach(region, name="client") as node, Child(there, "serve", region) as child:
            await child.says("ready")
            async with await shm.connect_shm("server", 7000, node=node) as stream:

                async def send() -> None:
                    await send_pattern(stream, 1, SIZE)
                    await stream.send_eof()

                async with anyio.create_task_group() as tg:
                    tg.start_soon(send)
                    assert await receive_pattern(stream, 1) == SIZE
            assert node.statistics()["healed"] == 0

    run(main)


def test_a_server_of_asyncio_streams(run: Run, region: str) -> None:
    async def main() -> None:
        role = ("asyncio", "serve", f'["{region}", "server"]')
        async with shm.attach(region, name="client") as node, Child(*role, module="tests.aio.roles") as child:
            await child.says("ready")
            async with await shm.connect_shm("server", 7000, node=node) as stream:
                for size in (1, 64, 10_000):
                    await send_pattern(stream, 1, size)
                    assert await receive_pattern(stream, 1, size) == size
                await stream.send_eof()
                assert await receive_pattern(stream, 1) == 0

    run(main)


def test_the_peer_is_killed(run: Run, region: str) -> None:
    async def main() -> None:
        async with shm.attach(region, name="client") as node, Child("trio", "serve", region) as child:
            await child.says("ready")
            async with await shm.connect_shm("server", 7000, node=node) as stream:
                await stream.send(b"x")
                assert await stream.receive() == b"x"

                async def broken() -> None:
                    with pytest.raises(anyio.BrokenResourceError) as caught:
                        await stream.receive()
                    assert isinstance(caught.value.__cause__, ConnectionResetError)

                async with anyio.create_task_group() as tg:
                    tg.start_soon(broken)
                    await anyio.wait_all_tasks_blocked()
                    child.process.kill()
                with pytest.raises(anyio.BrokenResourceError):
                    await stream.send(b"x")

    run(main)


@pytest.mark.parametrize("there", BACKENDS)
@pytest.mark.parametrize("how", ["exception", "return"])
def test_what_was_sent_before_the_end_of_the_run_arrives(run: Run, region: str, there: str, how: str) -> None:
    """The implicit node's, left open."""

    async def main() -> None:
        async with (
            shm.attach(region, name="test") as node,
            await shm.create_shm_listener(local_port=7000, node=node) as listener,
            Child(there, "leave_open", region, how) as child,
            await listener.accept() as stream,
        ):
            assert await receive_pattern(stream, 1) == 100_000
            assert await child.ended() == (3 if how == "exception" else 0)

    run(main)
