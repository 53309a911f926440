"""What only trio has: its own end of a run, its clocks, its notion of being idle."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable

import anyio
import pytest
import trio
from trio import lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

import shmsock
import shmsock.anyio as shm
from shmsock.aio import trio_loop
from shmsock.aio.attach import current_node
from shmsock.aio.trio_loop import current_loop
from tests.aio.conftest import keepers
from tests.anyio_face.conftest import World


async def implicit(region: str) -> shmsock.Node:
    return await current_node(region, "a")


def in_two_threads(
    serve: Callable[[threading.Event], Awaitable[None]], ask: Callable[[], Awaitable[None]]
) -> None:
    """A run in each; the second begins when the first is ready for it."""
    ready = threading.Event()
    thread = threading.Thread(target=trio.run, args=(serve, ready))
    thread.start()
    assert ready.wait(60)
    trio.run(ask)
    thread.join(60)
    assert not thread.is_alive()


def test_the_implicit_node_ends_with_its_run(region: str) -> None:
    async def main(fail: bool) -> shmsock.Node:
        node = await implicit(region)
        assert await implicit(region) is node
        assert node.statistics()["state"] == "attached"
        if fail:
            raise ZeroDivisionError
        return node

    for _ in range(2):
        assert trio.run(main, False).closed
        with pytest.raises(ZeroDivisionError):
            trio.run(main, True)
    assert keepers() == 0


def test_several_that_need_it_at_once_get_the_same(region: str) -> None:
    async def main() -> None:
        nodes = []

        async def one(scope: trio.CancelScope | None = None) -> None:
            with scope or trio.CancelScope():
                nodes.append(await implicit(region))

        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()
            nursery.start_soon(one, first)
            for _ in range(5):
                nursery.start_soon(one)
            await lowlevel.checkpoint()
            first.cancel()
        assert first.cancelled_caught
        assert len(nodes) == 5
        assert len(set(map(id, nodes))) == 1

    trio.run(main)


def test_all_that_wait_for_it_are_cancelled(region: str) -> None:
    """It is made all the same, or the run ends first; both leave nothing."""

    async def main(stay: bool) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(implicit, region)
                await lowlevel.checkpoint()
                scope.cancel()
        if stay:
            assert not (await implicit(region)).closed

    for stay in (True, False):
        trio.run(main, stay)
    assert keepers() == 0


def test_making_it_fails_for_all(region: str) -> None:
    async def main() -> None:
        failed = 0

        async def one() -> None:
            nonlocal failed
            with pytest.raises(shmsock.RegionNotFoundError):
                await current_node("/nowhere/region")
            failed += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert failed == 3

    trio.run(main)


def test_two_runs_in_two_threads(region: str) -> None:
    async def serve(ready: threading.Event) -> None:
        async with await shm.create_shm_listener(local_port=7000, region=region, name="server") as listener:
            ready.set()
            async with await listener.accept() as stream:
                async for data in stream:
                    await stream.send(data)

    async def ask() -> None:
        async with await shm.connect_shm("server", 7000, region=region, name="client") as stream:
            for i in range(100):
                await stream.send(b"%d" % i)
                assert await stream.receive() == b"%d" % i

    in_two_threads(serve, ask)


@pytest.mark.parametrize("busy", [False, True])
def test_an_idle_run_is_seen_as_idle(region: str, busy: bool) -> None:
    async def main() -> None:
        async with World("nodes", region).pair() as (c, s):
            for _ in range(100):
                if busy:
                    await c.send(b"x")
                    await s.receive()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(s.receive)
                    with trio.fail_after(10):
                        await wait_all_tasks_blocked(0.001)
                    nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_pump_is_hot_for_few_turns(region: str) -> None:
    """However long hot_us would have it: each turn of a system task keeps the run from being idle."""

    async def main() -> None:
        async with World("nodes", region).pair(settings=shmsock.Settings(hot_us=100_000)) as (c, s):
            node = s.extra(shm.ShmAttribute.node)
            await trio.sleep(0.05)  # time without looking in vain: what it may spend on that is full
            for _ in range(10):
                await c.send(b"x")
                await s.receive()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(s.receive)
                await lowlevel.checkpoint()
                before = node.statistics()["pumps"]
                await wait_all_tasks_blocked()
                assert node.statistics()["pumps"] - before <= 16
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_who_waits_is_woken_when_a_reader_does_not_come_back(region: str) -> None:
    """Turns that follow a receive() leave out the pump, but not when the run is about to sleep."""

    async def serve(ready: threading.Event) -> None:
        told = woken = trio.Event()

        async def wait(quiet: shm.ShmStream) -> None:
            nonlocal woken
            async with quiet:
                async for _ in quiet:
                    woken.set()
                    woken = trio.Event()

        async with await shm.create_shm_listener(local_port=7000, region=region, name="server") as listener:
            ready.set()
            busy, quiet = await listener.accept(), await listener.accept()
        async with trio.open_nursery() as nursery, busy:
            nursery.start_soon(wait, quiet)
            with trio.fail_after(30):  # the heartbeat alone would take 50
                for _ in range(1000):
                    await busy.receive(1)
                    await told.wait()
                    told = woken  # before the client is let go on
                    await busy.send(b"z")

    async def ask() -> None:
        async with (
            await shm.connect_shm("server", 7000, region=region, name="client") as busy,
            await shm.connect_shm("server", 7000, region=region, name="client") as quiet,
        ):
            for i in range(1000):
                await busy.send(b"x")
                for _ in range(i % 5):
                    await lowlevel.checkpoint()
                await quiet.send(b"y")
                await busy.receive()

    in_two_threads(serve, ask)


class Turns(trio.abc.Instrument):
    """How many there were."""

    count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


def test_a_receive_is_a_turn_only_for_others(region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no time went by, with which there would be more."""
    monkeypatch.setattr(trio_loop, "TURN_NS", 1 << 62)

    async def main() -> None:
        async with World("nodes", region).pair() as (c, s), trio.open_nursery() as nursery:
            await c.send(bytes(300))
            await s.receive(1)
            turns = Turns()
            lowlevel.add_instrument(turns)
            for _ in range(100):
                await s.receive(1)
            assert turns.count < 20
            told, ran = trio.Event(), 0

            async def other() -> None:
                nonlocal told, ran
                while True:
                    await told.wait()
                    told, ran = trio.Event(), ran + 1

            nursery.start_soon(other)
            for i in range(50):
                told.set()
                for _ in range(2):  # it may come after this one in the turn
                    await s.receive(1)
                assert ran >= i
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_who_receives_alone_is_cancelled_in_time(region: str) -> None:
    """Deadlines are looked at in turns: there is one long before hold_us is over."""

    async def main() -> None:
        async with World("nodes", region).pair(settings=shmsock.Settings(hold_us=10**7)) as (c, s):
            size = 50_000
            await c.send(bytes(size))
            with trio.move_on_after(0.001) as scope:
                while size:
                    size -= len(await s.receive(1))
            assert scope.cancelled_caught

    trio.run(main)


def test_an_autojump_clock(region: str) -> None:
    """Attaching takes real time where the region needs it, and timeouts of those who wait for a peer fire at
    once."""

    async def main() -> None:
        begin = time.monotonic()
        async with World("nodes", region).pair() as (c, s):
            with trio.move_on_after(1000) as scope:
                await s.receive()
            assert scope.cancelled_caught
            await c.send(b"x")
            assert await s.receive() == b"x"
            loop, real = current_loop(), time.monotonic()
            await loop.sleep(0.02)
            assert time.monotonic() - real >= 0.02
        assert time.monotonic() - begin < 60

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_callback_that_raises_is_logged(region: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with World("nodes", region).pair() as (c, s):

            def fail() -> None:
                raise ZeroDivisionError

            current_loop().call_soon(fail)
            await c.send(b"x")
            assert await s.receive() == b"x"

    with caplog.at_level(logging.ERROR, "shmsock"):
        trio.run(main)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_callbacks_keep_their_order_and_their_context(region: str) -> None:
    async def main() -> None:
        loop, seen, waiter = current_loop(), list[int](), trio.Event()

        def first() -> None:
            seen.append(1)
            loop.call_soon(seen.append, 3)
            loop.call_soon(waiter.set)

        loop.call_soon(first)
        loop.call_soon(seen.append, 2)
        await trio.to_thread.run_sync(loop.call_soon_threadsafe, seen.append, 4)
        await waiter.wait()
        while len(seen) < 4:
            await lowlevel.checkpoint()
        assert [x for x in seen if x != 4] == [1, 2, 3]

    trio.run(main)


def test_a_node_closed_before_its_reader_ever_ran(region: str) -> None:
    async def main() -> None:
        for _ in range(3):
            node = await shm.attach(region, name="a")
            node.close()
        await lowlevel.checkpoint()

    trio.run(main)


def test_a_node_left_open_is_named(region: str) -> None:
    async def main() -> None:
        await shm.attach(region, name="a")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trio.run(main)
        gc.collect()
    assert "unclosed node" in "".join(str(w.message) for w in caught if w.category is ResourceWarning)
    assert keepers() == 0


def test_an_async_generator_may_close_after_the_run(region: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its node has ended by then, or is about to; closing is no error."""
    closed: list[bool] = []

    async def main() -> None:
        async def talk() -> object:
            node = await implicit(region)
            async with await shm.create_shm_listener(local_port=7000, node=node) as listener:
                stream = await shm.connect_shm("a", 7000, node=node)
                server = await listener.accept()
                try:
                    yield stream
                finally:
                    try:
                        await server.aclose()  # cancelled, as all is that waits by then
                    finally:
                        try:
                            await stream.aclose()
                        finally:
                            closed.append(True)

        generator = talk()
        _kept.append(generator)
        await generator.__anext__()  # type: ignore[attr-defined]

    trio.run(main)
    _kept.clear()
    assert closed == [True]
    assert caplog.records == []


_kept: list[object] = []


@pytest.mark.parametrize(
    ("statement", "free_of"),
    [("import shmsock", ["anyio", "trio"]), ("import shmsock.anyio", ["trio"])],
)
def test_imports_on_request(statement: str, free_of: list[str]) -> None:
    code = f"import sys; {statement}; print([x for x in {free_of} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_asyncio_beside_an_imported_trio_does_not_become_trio(region: str) -> None:
    assert "trio" in sys.modules

    async def main() -> None:
        async with shm.attach(region, name="a") as node:
            assert type(node.loop).__module__.startswith("asyncio")

    anyio.run(main)
