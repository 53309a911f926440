"""Streams: what comes through, and what every call raises when it cannot."""

from __future__ import annotations

import array
import gc
import select
import socket
import threading
import warnings
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint

import shmsock
import shmsock.anyio as shm
from tests.anyio_face.conftest import SMALL, Run, World, fill, receive_pattern, send_pattern, until

BIG = 5 << 20


async def echo(stream: shm.ShmStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


def test_echo(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s), anyio.create_task_group() as tg:
            tg.start_soon(echo, s)
            for size in (1, 64, 5000, 200_000):
                tg.start_soon(send_pattern, c, size, size)
                assert await receive_pattern(c, size, size) == size
            await c.send(b"")
            await c.send_eof()
            with pytest.raises(anyio.EndOfStream):
                await c.receive()

    run(main)


def test_attributes(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            address: Any = c.extra(SocketAttribute.remote_address)
            name, port = address
            assert address == s.extra(SocketAttribute.local_address)
            assert port == c.extra(SocketAttribute.remote_port) == s.extra(SocketAttribute.local_port) == 7000
            assert c.extra(SocketAttribute.local_address) == s.extra(SocketAttribute.remote_address)
            assert c.extra(SocketAttribute.family) == socket.AF_INET
            node = s.extra(shm.ShmAttribute.node)
            assert node.name == name
            assert c.extra(shm.ShmAttribute.peer) == node.section

    run(main)


def test_the_raw_socket_can_be_polled(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            raw = c.extra(SocketAttribute.raw_socket)
            assert raw.getpeername() == c.extra(SocketAttribute.remote_address)

            def readable() -> bool:
                return bool(select.select([raw.fileno()], [], [], 0)[0])

            assert not readable()
            await s.send(b"x")
            fd = raw.fileno()
            await anyio.wait_readable(fd)
            assert await c.receive() == b"x"
            assert not readable()
            await s.aclose()
            await anyio.wait_readable(fd)
            await c.aclose()
            assert raw.fileno() == -1

    run(main)


@pytest.mark.parametrize("settings", [None, SMALL])
def test_much_both_ways_at_once(run: Run, world: World, settings: shmsock.Settings | None) -> None:
    async def main() -> None:
        size = BIG if settings is None else BIG // 10
        async with world.pair(settings=settings) as (c, s), anyio.create_task_group() as tg:
            for sender, receiver, seed in ((c, s, 1), (s, c, 2)):

                async def one_way(sender: shm.ShmStream, seed: int) -> None:
                    await send_pattern(sender, seed, size)
                    await sender.send_eof()

                async def other_way(receiver: shm.ShmStream, seed: int) -> None:
                    assert await receive_pattern(receiver, seed, chunk=10_000) == size

                tg.start_soon(one_way, sender, seed)
                tg.start_soon(other_way, receiver, seed)

    run(main)


def test_half_close(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            await c.send(b"question")
            await c.send_eof()
            await c.send_eof()
            assert await s.receive() == b"question"
            for _ in range(2):
                with pytest.raises(anyio.EndOfStream):
                    await s.receive()
            await s.send(b"answer")
            assert await c.receive() == b"answer"
            # anyio's own raises the one on trio and the other on asyncio
            for error in (anyio.BrokenResourceError, RuntimeError):
                with pytest.raises(error, match="send_eof"):
                    await c.send(b"more")
            await s.aclose()
            with pytest.raises(anyio.EndOfStream):
                await c.receive()

    run(main)


def test_what_was_sent_before_close_arrives(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            await send_pattern(c, 1, 30_000)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await c.aclose()
            assert scope.cancelled_caught
            await c.aclose()
            assert await receive_pattern(s, 1) == 30_000
            await s.send(b"as over TCP, the first is lost")
            for _ in range(2):
                with pytest.raises(anyio.BrokenResourceError) as caught:
                    await s.send(b"the second")
                assert isinstance(caught.value.__cause__, BrokenPipeError)
            with pytest.raises(anyio.EndOfStream):
                await s.receive()

    run(main)


def test_closed_here(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            await s.send(b"unread")
            await c.aclose()
            for data in (b"x", b""):
                with pytest.raises(anyio.ClosedResourceError):
                    await c.send(data)
            with pytest.raises(anyio.ClosedResourceError):
                await c.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await c.send_eof()

    run(main)


def test_closing_wakes_who_waits(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, _s):
            await fill(c)

            async def closed(call: object, *args: object) -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await call(*args)  # type: ignore[operator]

            async with anyio.create_task_group() as tg:
                tg.start_soon(closed, c.receive)
                tg.start_soon(closed, c.send, b"x" * 10_000)
                await anyio.wait_all_tasks_blocked()
                await c.aclose()

    run(main)


def test_the_peer_closes_while_we_wait(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, s):
            await fill(c)

            async def ended() -> None:
                with pytest.raises(anyio.EndOfStream):
                    await c.receive()

            async def broken() -> None:
                with pytest.raises(anyio.BrokenResourceError):
                    await c.send(b"x" * 10_000)

            async with anyio.create_task_group() as tg:
                tg.start_soon(ended)
                tg.start_soon(broken)
                await anyio.wait_all_tasks_blocked()
                await s.aclose()

    run(main)


def test_a_reset_breaks_both_ways(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, s):
            await fill(c)

            async def broken(call: object, *args: object) -> None:
                for _ in range(2):
                    with pytest.raises(anyio.BrokenResourceError) as caught:
                        await call(*args)  # type: ignore[operator]
                    assert isinstance(caught.value.__cause__, ConnectionResetError)

            async with anyio.create_task_group() as tg:
                tg.start_soon(broken, c.receive)
                tg.start_soon(broken, c.send, b"x" * 10_000)
                await anyio.wait_all_tasks_blocked()
                s._conn.abort()

    run(main)


def test_send_nowait(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, s), anyio.create_task_group() as tg:
            data = bytes(range(256)) * 100
            sent = c.send_nowait(data)
            assert 0 < sent < len(data)
            assert c.send_nowait(b"more") == 0
            tg.start_soon(c.send, data[sent:])
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                c.send_nowait(b"x")
            got = b""
            while len(got) < len(data):
                got += await s.receive()
            assert got == data
            c.close()
            assert c.send_nowait(b"x") == 0

    run(main)


@pytest.mark.parametrize("into", [False, True])
def test_who_has_nothing_else_to_do_polls_for_bytes(run: Run, region: str, into: bool) -> None:
    async def main() -> None:
        async with World("nodes", region).pair() as (c, s):
            node = s.extra(shm.ShmAttribute.node)
            before = node.statistics()["spin_misses"]
            await c.send(b"x")
            assert await s.receive() == b"x"
            with anyio.fail_after(10):
                while node.statistics()["spin_misses"] == before:
                    with anyio.move_on_after(0.001):
                        await (s.receive_into(bytearray(10)) if into else s.receive(10))

    run(main)


def test_one_task_a_direction(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair(settings=SMALL) as (c, _s), anyio.create_task_group() as tg:
            await fill(c)
            tg.start_soon(c.receive)
            tg.start_soon(c.send, b"x" * 10_000)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await c.receive()
            with pytest.raises(anyio.BusyResourceError):
                await c.send(b"x")
            with pytest.raises(anyio.BusyResourceError):
                await c.send_eof()
            tg.cancel_scope.cancel()

    run(main)


def test_arguments(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            for wrong in (0, -1):
                with pytest.raises(ValueError, match="positive"):
                    await c.receive(wrong)
            for item in ("text", None, 3):
                with pytest.raises(TypeError):
                    await c.send(item)  # type: ignore[arg-type]
            for good in (bytearray(b"abcd"), memoryview(b"abcd"), array.array("I", [1])):
                await c.send(good)  # type: ignore[arg-type]
                assert await s.receive(2) + await s.receive(1 << 40) == bytes(good)

    run(main)


def test_receive_into(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s), anyio.create_task_group() as tg:
            for wrong in (b"abc", bytearray()):
                with pytest.raises(TypeError):
                    await s.receive_into(wrong)
            room = memoryview(bytearray(BIG))
            got = anyio.Event()

            async def receive() -> None:
                assert await s.receive_into(room[:10]) == 10
                got.set()

            tg.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await s.receive_into(room)
            await c.send(b"0123456789")
            await got.wait()
            assert bytes(room[:11]) == b"0123456789\0"
            data, at = bytes(range(256)) * (BIG // 256), 0
            tg.start_soon(c.send, data)
            while at < BIG:
                at += await s.receive_into(room[at : at + 100_000])
            assert bytes(room) == data
            with anyio.move_on_after(0.001):
                await s.receive_into(room)
            await c.send(b"x")
            assert (await s.receive_into(room), room[0]) == (1, ord("x"))
            await c.send(b"last")
            c.close()
            assert c.ended
            assert not s.ended
            assert await s.receive() == b"last"
            with pytest.raises(anyio.EndOfStream):
                await s.receive_into(room)
            await until(lambda: s.ended)
            with pytest.raises(anyio.ClosedResourceError):
                await c.receive_into(room)

    run(main)


def test_a_receive_lets_others_run_though_its_bytes_are_there(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            await c.send(bytes(100))
            ran = 0

            async def other() -> None:
                nonlocal ran
                while True:
                    ran += 1
                    await checkpoint()

            async with anyio.create_task_group() as tg:
                tg.start_soon(other)
                for _ in range(100):
                    await s.receive(1)
                assert ran >= 99
                tg.cancel_scope.cancel()

    run(main)


def test_a_saturated_stream_lets_others_run(run: Run, world: World) -> None:
    """Sends that never wait are bounded by the turn's budget."""

    async def main() -> None:
        async with world.pair() as (c, s), anyio.create_task_group() as tg:

            async def sender() -> None:
                while True:
                    await c.send(bytes(1))

            async def receiver() -> None:
                while True:
                    await s.receive()

            tg.start_soon(sender)
            tg.start_soon(receiver)
            with anyio.move_on_after(0.05):
                await anyio.sleep_forever()
            tg.cancel_scope.cancel()

    run(main)


def test_who_waits_is_woken_beside_a_stream_that_never_does(run: Run, region: str) -> None:
    """The pump leaves out passes for a reader that looks itself, but never many."""

    async def main() -> None:
        async with World("nodes", region).nodes() as (a, b), anyio.create_task_group() as tg:
            async with await shm.create_shm_listener(local_port=7000, node=b) as listener:
                pairs = [
                    (await shm.connect_shm("b", 7000, node=a), await listener.accept()) for _ in range(2)
                ]
            (busy, busy_end), (quiet, quiet_end) = pairs

            async def hammer() -> None:
                while True:
                    await busy.send(b"x")
                    await busy_end.receive()

            tg.start_soon(hammer)
            for _ in range(20):
                async with anyio.create_task_group() as waiting:
                    waiting.start_soon(quiet_end.receive)
                    await anyio.sleep(0.001)
                    await quiet.send(b"y")
            tg.cancel_scope.cancel()
            for stream in (busy, busy_end, quiet, quiet_end):
                with anyio.CancelScope(shield=True):
                    await stream.aclose()

    run(main)


def test_the_node_goes_first(run: Run, region: str) -> None:
    async def main() -> None:
        async with World("nodes", region).pair() as (c, s):

            async def closed() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await c.receive()

            async with anyio.create_task_group() as tg:
                tg.start_soon(closed)
                await anyio.wait_all_tasks_blocked()
                await c.send(b"last words")
                await c.extra(shm.ShmAttribute.node).aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await c.send(b"x")
            assert await s.receive() == b"last words"
            with pytest.raises(anyio.EndOfStream):
                await s.receive()

    run(main)


def test_the_section_is_taken_away(run: Run, region: str) -> None:
    async def main() -> None:
        async with World("nodes", region).pair() as (c, s):
            node = c.extra(shm.ShmAttribute.node)
            node.lib.sh_node_inert(node.nd)
            with pytest.raises(anyio.BrokenResourceError):
                await c.receive()
            with pytest.raises(anyio.BrokenResourceError):
                await c.send(b"x")
            await c.aclose()
            await s.aclose()
            await s.extra(shm.ShmAttribute.node).aclose()
            await node.aclose()

    run(main)


def test_another_thread_is_told(run: Run, world: World, backend: str) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            seen: list[BaseException] = []

            def wrong(call: object, *args: object) -> None:
                try:
                    coroutine = call(*args)  # type: ignore[operator]
                    while True:
                        coroutine.send(None)
                except BaseException as error:
                    seen.append(error)

            await c.send(b"x")
            # (Of trio's calls, most fail in trio itself: nothing runs there.)
            for call in (c.aclose, c.receive) if backend != "trio" else (c.aclose,):
                thread = threading.Thread(target=wrong, args=(call,))
                thread.start()
                thread.join()
                assert isinstance(seen.pop(), shmsock.WrongThreadError)
            await c.send(b"y")
            assert await s.receive() == b"xy"

    run(main)


def test_a_dropped_stream_is_closed(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            async with await shm.create_shm_listener(local_port=7000, node=b) as listener:
                client = await shm.connect_shm(b.name, 7000, node=a)
                server = await listener.accept()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                del client
                gc.collect()
            assert [w.category for w in caught] == [ResourceWarning]
            with pytest.raises(anyio.EndOfStream):
                await server.receive()
            await server.aclose()
            await until(lambda: not a.engine.connections)

    run(main)


@pytest.mark.parametrize("before", ["sent", "fresh"])
@pytest.mark.parametrize("unread", [False, True])
def test_sends_to_who_has_closed_fail_before_a_pass_tells(
    run: Run, world: World, before: str, unread: bool
) -> None:
    """In a row, while this loop looks after nothing else. Over TCP one is lost silently, or two."""

    sent = 0

    async def send(stream: shm.ShmStream) -> None:
        nonlocal sent
        for sent in range(100):  # noqa: B007
            await stream.send(b"foo")

    async def main() -> None:
        async with world.pair() as (c, s):
            if before == "sent":
                await c.send(b"x")
                assert await s.receive() == b"x"
            if unread:
                await c.send(b"nobody reads this")
            s._end.close()  # and no turn of the loop
            with pytest.raises(anyio.BrokenResourceError):
                await send(c)
            assert sent <= 2

    run(main)
