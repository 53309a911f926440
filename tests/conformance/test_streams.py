"""Streams of bytes: what asyncio's and anyio's have in common."""

from __future__ import annotations

import errno
import socket
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from shmsock.aio.transport import ShmTransport
from shmsock.anyio import ShmStream
from tests.conformance.networks import PATIENCE, fixture_for, pattern
from tests.conformance.stream_networks import STREAMS, AsyncioStream, StreamNetwork

net = fixture_for(STREAMS)
BIG = 3 << 20


async def send_and_end(stream: Any, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def echo(stream: Any) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def send_until_it_fails(stream: Any, size: int) -> None:
    with anyio.move_on_after(PATIENCE):
        while True:
            await stream.send_all(bytes(size))
            await checkpoint()


# -- bytes


async def test_each_network_is_what_it_says(net: StreamNetwork) -> None:
    """Nothing goes over TCP unseen, and the control over nothing else."""
    kinds = (ShmTransport, ShmStream)
    async with net.pair() as ends:
        for end in ends:
            below = end.writer.transport if hasattr(end, "writer") else end.stream
            below = getattr(below, "_transport", below)  # anyio's stream over a loop's transport
            assert isinstance(below, kinds) is not net.control


async def test_echo(net: StreamNetwork) -> None:
    async with net.listen(echo) as port:
        stream = await net.connect(port)
        for n in range(100):
            text = b"message %d" % n
            await stream.send_all(text)
            assert await stream.receive_exactly(len(text)) == text
        await stream.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()


@pytest.mark.parametrize("size", [1, 2, 1000, 65535, 65536, 65537, BIG])
async def test_sizes(net: StreamNetwork, size: int) -> None:
    data = pattern(size, size)
    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(send_and_end, c, data)
        assert await s.receive_all() == data


@pytest.mark.parametrize("size", [1, 10, 4096])
async def test_reads_are_bounded(net: StreamNetwork, size: int) -> None:
    data = pattern(1, 300 * size)
    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(send_and_end, c, data)
        got = b""
        while part := await s.receive_some(size):
            assert len(part) <= size
            got += part
        assert got == data


async def test_both_ways_at_once(net: StreamNetwork) -> None:
    got: dict[str, bytes] = {}

    async def receive(who: str, stream: Any) -> None:
        got[who] = await stream.receive_all()

    async with net.pair() as (c, s):
        async with anyio.create_task_group() as group:
            group.start_soon(send_and_end, c, pattern(2, BIG))
            group.start_soon(send_and_end, s, pattern(3, BIG))
            group.start_soon(receive, "c", c)
            group.start_soon(receive, "s", s)
        assert got == {"c": pattern(3, BIG), "s": pattern(2, BIG)}


async def test_receive_exactly_and_the_end(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        await c.send_all(b"12345")
        await c.send_eof()
        assert await s.receive_exactly(3) == b"123"
        with pytest.raises(EOFError):
            await s.receive_exactly(3)


# -- the end


async def test_half_close(net: StreamNetwork) -> None:
    async with net.pair() as (c, s), anyio.create_task_group() as group:
        await c.send_all(b"question")
        await c.send_eof()
        assert await s.receive_all() == b"question"
        group.start_soon(send_and_end, s, pattern(4, BIG))
        assert await c.receive_all() == pattern(4, BIG)


async def test_the_end_stays(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        await c.send_eof()
        await c.send_eof()
        for _ in range(3):
            assert await s.receive_some() == b""
        await s.send_eof()
        for _ in range(3):
            assert await c.receive_some() == b""


@pytest.mark.parametrize("size", [5, 16 << 20])
async def test_what_was_sent_before_the_end_arrives(net: StreamNetwork, size: int) -> None:
    """Although the receiver begins late."""
    data = pattern(5, size)

    async def leave(stream: Any) -> None:
        await stream.send_all(data)
        await stream.aclose()

    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(leave, c)
        for _ in range(20):
            await checkpoint()
        assert await s.receive_all() == data


async def test_aclose_again(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        await c.aclose()
        await c.aclose()
        assert await s.receive_some() == b""


async def test_sending_to_who_left(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        await s.aclose()
        with pytest.raises(net.broken):
            await send_until_it_fails(c, 10_000)


async def test_left_while_the_other_waits_to_send(net: StreamNetwork) -> None:
    async def leave() -> None:
        await anyio.sleep(0.05)
        await s.aclose()

    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(leave)
        with pytest.raises(net.broken):
            await send_until_it_fails(c, BIG)


async def test_left_while_the_other_waits_to_receive(net: StreamNetwork) -> None:
    async def leave() -> None:
        for _ in range(20):
            await checkpoint()
        await s.aclose()

    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(leave)
        assert await c.receive_some() == b""


async def test_closed_here(net: StreamNetwork) -> None:
    """anyio says so; asyncio reads the end."""
    async with net.pair() as (c, _):
        await c.aclose()
        if net.is_anyio:
            with pytest.raises(anyio.ClosedResourceError):
                await c.receive_some()
            with pytest.raises(anyio.ClosedResourceError):
                await c.send_all(b"data")
        else:
            assert await c.receive_some() == b""


async def test_closed_here_while_waiting(net: StreamNetwork) -> None:
    outcome: list[Any] = []

    async def receive(stream: Any) -> None:
        try:
            outcome.append(await stream.receive_some())
        except anyio.ClosedResourceError as error:
            outcome.append(type(error))

    async with net.pair() as (c, _):
        async with anyio.create_task_group() as group:
            group.start_soon(receive, c)
            for _ in range(20):
                await checkpoint()
            await c.aclose()
        assert outcome == [anyio.ClosedResourceError if net.is_anyio else b""]


@pytest.mark.parametrize("size", [1, 4096, 9000, 60_000])
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_what_had_arrived_is_readable_after_the_own_close(
    net: StreamNetwork, size: int, how: str
) -> None:
    """asyncio's readers have it in their buffers by then; anyio's streams have nothing."""
    async with net.pair() as (client, server), net.pair() as (beside, other):
        data = pattern(1, size)
        await server.send_all(data)
        await other.send_all(b".")  # over TCP, too, this comes last
        assert await beside.receive_some() == b"."
        for _ in range(20):
            await checkpoint()
        if isinstance(client, AsyncioStream):
            getattr(client.writer.transport, how)()
            assert await client.receive_all() == data
        else:
            await client.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await client.receive_some()


async def test_sending_after_send_eof(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        await c.send_eof()
        with pytest.raises((RuntimeError, anyio.BrokenResourceError, anyio.ClosedResourceError)):
            await c.send_all(b"late")
        assert await s.receive_some() == b""


# -- waiting


async def test_two_receivers(net: StreamNetwork) -> None:
    got: list[bytes] = []

    async def receive(stream: Any) -> None:
        got.append(await stream.receive_some())

    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(receive, c)
        for _ in range(20):
            await checkpoint()
        with pytest.raises(net.busy):
            await c.receive_some()
        await s.send_all(b"data")
        while not got:
            await checkpoint()
        assert got == [b"data"]


async def test_a_sender_waits_for_the_receiver(net: StreamNetwork) -> None:
    data = pattern(6, 1 << 20)
    sent = 0

    async def send(stream: Any) -> None:
        nonlocal sent
        for _ in range(64):
            await stream.send_all(data)
            sent += 1
        await stream.send_eof()

    async with net.pair() as (c, s), anyio.create_task_group() as group:
        group.start_soon(send, s)  # (an accepted stream of anyio's TCP reads without bounds at first)
        before = -1
        while sent != before:  # until it stands still
            before = sent
            await anyio.sleep(0.02)
        assert sent < 64
        got = 0
        while part := await c.receive_some(1 << 20):
            assert part == (data * 2)[got % len(data) :][: len(part)]
            got += len(part)
        assert got == 64 * len(data)


async def test_a_deadline(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        with anyio.move_on_after(0.02) as scope:
            await s.receive_some()
        assert scope.cancelled_caught
        await c.send_all(b"data")
        assert await s.receive_some() == b"data"
        with anyio.move_on_after(0) as scope:
            await s.receive_some()
        assert scope.cancelled_caught


async def test_receiving_cancelled_at_every_step(net: StreamNetwork) -> None:
    """What one call did not return, the next does."""
    data = pattern(7, 2000)
    got = b""

    async def receive(scope: anyio.CancelScope) -> None:
        nonlocal got
        with scope:
            got += await s.receive_some(10)

    async with net.pair() as (c, s):
        for k in range(25):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(receive, scope)
                for _ in range(k % 5):
                    await checkpoint()
                await c.send_all(data[k * 80 : (k + 1) * 80])
                for _ in range(k // 3):
                    await checkpoint()
                scope.cancel()
        await c.send_eof()
        got += await s.receive_all()
        assert got == data


async def test_connecting_cancelled_at_every_step(net: StreamNetwork) -> None:
    async def connect(scope: anyio.CancelScope) -> None:
        with scope:
            stream = await net.connect(port)
            with anyio.CancelScope(shield=True):
                await stream.aclose()

    async with net.listen(echo) as port:
        await connect(anyio.CancelScope())  # what is made at first use is there now
        for k in range(20):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(connect, scope)
                for _ in range(k):
                    await checkpoint()
                scope.cancel()
        stream = await net.connect(port)
        await stream.send_all(b"last")
        assert await stream.receive_exactly(4) == b"last"
        await stream.aclose()


async def test_sending_cancelled(net: StreamNetwork) -> None:
    """A part of it may have gone; what has gone is a prefix, and the connection lives."""
    data = pattern(8, 16 << 20)
    async with net.pair() as (c, s):
        with anyio.move_on_after(0.02) as scope:
            await s.send_all(data)
        assert scope.cancelled_caught
        await s.send_eof()
        with anyio.fail_after(PATIENCE):
            got = await c.receive_all()
        assert got == data[: len(got)]


# -- servers


async def test_many_at_once(net: StreamNetwork) -> None:
    async def client(n: int) -> None:
        stream = await net.connect(port)
        data = pattern(n, 5000)
        await stream.send_all(data)
        await stream.send_eof()
        assert await stream.receive_all() == data
        await stream.aclose()

    async with net.listen(echo) as port, anyio.create_task_group() as group:
        for n in range(40):
            group.start_soon(client, n)


async def test_nobody_listens(net: StreamNetwork) -> None:
    async with net.listen(echo) as port:
        pass
    with pytest.raises(OSError) as info:
        await net.connect(port)
    if net.is_anyio:
        assert isinstance(info.value.__cause__ or info.value, ConnectionRefusedError)
    else:
        assert isinstance(info.value, ConnectionRefusedError)


async def test_nobody_has_the_name(net: StreamNetwork) -> None:
    with pytest.raises(OSError) as info:
        await net.connect_to_nobody()  # type: ignore[attr-defined]
    assert isinstance(info.value.__cause__ or info.value, socket.gaierror)


async def test_port_taken(net: StreamNetwork) -> None:
    async with net.listen(echo) as port:
        with pytest.raises(OSError) as info:
            async with net.listen(echo, port):
                pass
        assert info.value.errno == errno.EADDRINUSE


async def test_port_taken_again(net: StreamNetwork) -> None:
    port = 0
    for _ in range(3):
        async with net.listen(echo, port) as port:
            stream = await net.connect(port)
            await stream.send_all(b"ping")
            assert await stream.receive_exactly(4) == b"ping"
            await stream.aclose()


async def test_connections_outlive_their_listener(net: StreamNetwork) -> None:
    if net.is_anyio:
        return  # the task group of its handlers ends them there
    ends: list[Any] = []
    done = anyio.Event()

    async def handler(stream: Any) -> None:
        ends.append(stream)
        await done.wait()

    async with net.listen(handler) as port:
        stream = await net.connect(port)
        while not ends:
            await checkpoint()
        await stream.send_all(b"data")
        assert await ends[0].receive_exactly(4) == b"data"
        done.set()
    assert await stream.receive_some() == b""
    await stream.aclose()


async def test_addresses(net: StreamNetwork) -> None:
    async with net.pair() as (c, s):
        assert c.local() == s.remote()
        assert c.remote() == s.local()
        name, port = c.remote()
        assert isinstance(name, str)
        assert isinstance(port, int)


async def test_anyio_rejects_nonsense(net: StreamNetwork) -> None:
    if not net.is_anyio:
        return
    async with net.pair() as (c, s):
        await c.send_all(b"data")
        with pytest.raises(TypeError):
            await c.send_all("text")
        assert await s.receive_exactly(4) == b"data"


async def test_used_again(net: StreamNetwork) -> None:
    """Slots, rings and ports come back."""
    async with net.listen(echo) as port:
        for _ in range(100):
            stream = await net.connect(port)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            await stream.aclose()


def test_run_after_run(net: StreamNetwork) -> None:
    async def once() -> None:
        async with net.pair() as (c, s):
            await c.send_all(b"data")
            assert await s.receive_exactly(4) == b"data"

    for _ in range(3):
        net.run(once)
