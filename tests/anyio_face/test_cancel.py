"""Cancelling takes nothing with it: no byte, no connection, no slot."""

from __future__ import annotations

import random

import anyio
import pytest
from anyio.lowlevel import checkpoint

import shmsock.anyio as shm
from tests.aio.conftest import held
from tests.aio.processes import pattern
from tests.anyio_face.conftest import SMALL, Run, World, fill, receive_pattern, send_pattern, until

DELAYS = (0, 0, 0.00001, 0.001)


async def cancelled_after(turns: int, call: object, *args: object) -> bool:
    """Cancel after so many turns of the loop; was it in time?"""
    finished = False

    async def one() -> None:
        nonlocal finished
        await call(*args)  # type: ignore[operator]
        finished = True

    async with anyio.create_task_group() as tg:
        tg.start_soon(one)
        for _ in range(turns):
            await checkpoint()
        tg.cancel_scope.cancel()
    return not finished


@pytest.mark.parametrize("seed", range(3))
def test_receives_that_are_cancelled_lose_nothing(run: Run, world: World, seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        size = 300_000
        async with world.pair(settings=rng.choice((SMALL, None))) as (c, s), anyio.create_task_group() as tg:
            tg.start_soon(send_pattern, c, 1, size, rng.choice((100, 3000)))
            got = 0
            while got < size:
                with anyio.move_on_after(rng.choice(DELAYS)):
                    data = await s.receive(rng.choice((1000, 50_000)))
                    assert data == pattern(1, got, len(data))
                    got += len(data)

    run(main)


@pytest.mark.parametrize("seed", range(3))
def test_sends_that_are_cancelled_leave_a_prefix(run: Run, world: World, seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        async with world.pair(settings=SMALL) as (c, s), anyio.create_task_group() as tg:
            heard = bytearray()

            async def receiver() -> None:
                async for data in s:
                    heard.extend(data)

            tg.start_soon(receiver)
            said: list[tuple[bytes, bool]] = []
            for i in range(100):
                data = bytes([i]) * rng.choice((1, 100, 30_000))
                with anyio.move_on_after(rng.choice(DELAYS)) as scope:
                    await c.send(data)
                said.append((data, not scope.cancelled_caught))
            await c.send_eof()
        for data, whole in said:
            got = len(heard) - len(heard.lstrip(data[:1]))
            assert got == len(data) if whole else got <= len(data)
            del heard[:got]
        assert not heard

    run(main)


def test_a_scope_that_is_cancelled_already_does_nothing(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            await c.send(b"there")
            for call, args in ((s.receive, ()), (c.send, (b"not there",)), (c.send_eof, ())):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await call(*args)
                assert scope.cancelled_caught
            assert await s.receive() == b"there"
            await c.send(b"later")
            assert await s.receive() == b"later"

    run(main)


def test_deadlines(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, s):
            with anyio.move_on_after(0.02) as scope:
                await s.receive()
            assert scope.cancelled_caught
            room = await fill(c)
            with pytest.raises(TimeoutError), anyio.fail_after(0.02):
                await c.send(b"x" * 10_000)
            assert len(await s.receive(room)) > 0
            await c.send(b"y")

    run(main)


def test_a_connect_cancelled_at_every_step(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
        ):
            before = held(a), held(b)
            turns = in_time = 0

            async def connect() -> None:
                await (await shm.connect_shm(b.name, 7000, node=a)).aclose()

            while turns < 3 or in_time:
                in_time = await cancelled_after(turns, connect)
                turns += 1
                with anyio.move_on_after(0) as scope:
                    while not scope.cancel_called:
                        await (await listener.accept()).aclose()
            assert turns > 3

            async def accept() -> None:
                await (await listener.accept()).aclose()

            async with anyio.create_task_group() as tg:
                tg.start_soon(listener.serve, lambda stream: stream.aclose())
                await until(lambda: (held(a), held(b)) == before)
                tg.cancel_scope.cancel()

    run(main)


def test_an_accept_that_is_cancelled_takes_no_connection(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
        ):
            for turns in range(30):
                streams: list[shm.ShmStream] = []

                async def accept(streams: list[shm.ShmStream] = streams) -> None:
                    streams.append(await listener.accept())

                async def connect(streams: list[shm.ShmStream] = streams) -> None:
                    streams.append(await shm.connect_shm(b.name, 7000, node=a))

                async with anyio.create_task_group() as tg:
                    tg.start_soon(connect)
                    await cancelled_after(turns, accept)
                if len(streams) == 1:
                    await accept()
                for stream in streams:
                    await stream.aclose()

    run(main)


def test_cancelled_at_every_step_and_still_whole(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, s), anyio.create_task_group() as tg:
            tg.start_soon(send_pattern, c, 1, 100_000)
            got = 0

            async def receive() -> None:
                nonlocal got
                data = await s.receive(700)
                assert data == pattern(1, got, len(data))
                got += len(data)

            for turns in [*range(6)] * 10:
                await cancelled_after(turns, receive)
            rest = 0
            while got < 100_000:
                await receive()
                rest += 1
            assert rest

    run(main)


def test_what_waits_for_eof_is_told_after_a_cancel(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            with anyio.move_on_after(0.01):
                await s.receive()
            await send_pattern(c, 1, 1000)
            await c.aclose()
            assert await receive_pattern(s, 1) == 1000

    run(main)
