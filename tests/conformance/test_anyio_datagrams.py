"""Datagram sockets of anyio."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from tests.conformance.datagram_networks import ANYIO_DATAGRAMS, AnyioDatagrams
from tests.conformance.networks import fixture_for, pattern

net = fixture_for(ANYIO_DATAGRAMS)


@pytest.mark.parametrize("size", [1, 100, 1473, 9000, 65507])
async def test_boundaries(net: AnyioDatagrams, size: int) -> None:
    async with await net.socket() as s, await net.connected(net.port(s)) as c:
        for n in range(3):
            data = pattern(n, size)
            await c.send(data)
            assert await s.receive() == (data, net.address(c))
            await s.send((data, net.address(c)))
            assert await c.receive() == data
            await s.sendto(data, *net.address(c))
            assert await c.receive() == data


async def test_order(net: AnyioDatagrams) -> None:
    async with await net.socket() as s, await net.connected(net.port(s)) as c:
        for at in range(0, 1000, 50):
            for n in range(at, at + 50):
                await c.send(b"%d" % n)
            for n in range(at, at + 50):
                assert (await s.receive())[0] == b"%d" % n


async def test_iteration(net: AnyioDatagrams) -> None:
    async with await net.socket() as s, await net.connected(net.port(s)) as c:
        for n in range(10):
            await c.send(b"%d" % n)
        n = 0
        async for data, address in s:
            assert data == b"%d" % n
            assert address == net.address(c)
            n += 1
            if n == 10:
                break


async def test_unconnected(net: AnyioDatagrams) -> None:
    """Each to each, itself included."""
    ends = [await net.socket() for _ in range(3)]
    for one in ends:
        for to in ends:
            await one.sendto(b"from %d" % net.port(one), *net.address(to))
    for to in ends:
        got = [await to.receive() for _ in ends]
        assert sorted(got) == sorted((b"from %d" % net.port(one), net.address(one)) for one in ends)
    for one in ends:
        await one.aclose()


async def test_connected_hears_nobody_else(net: AnyioDatagrams) -> None:
    async with await net.socket() as s, await net.socket() as other, await net.connected(net.port(s)) as c:
        await other.sendto(b"psst", *net.address(c))
        await other.sendto(b"psst", *net.address(s))
        assert await s.receive() == (b"psst", net.address(other))
        await s.sendto(b"hello", *net.address(c))
        assert await c.receive() == b"hello"


async def test_nobody_there_and_unconnected(net: AnyioDatagrams) -> None:
    """Silence."""
    async with await net.socket() as s:
        async with await net.socket() as gone:
            address = net.address(gone)
        for _ in range(3):
            await s.sendto(b"anybody?", *address)
        await s.sendto(b"to myself", *net.address(s))
        assert await s.receive() == (b"to myself", net.address(s))


async def test_closed_here(net: AnyioDatagrams) -> None:
    s = await net.socket()
    c = await net.connected(net.port(s))
    address = net.address(s)
    for one in (s, c):
        await one.aclose()
        await one.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await one.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await s.sendto(b"data", *address)
    with pytest.raises(anyio.ClosedResourceError):
        await c.send(b"data")


async def test_closed_here_while_waiting(net: AnyioDatagrams) -> None:
    closed = False

    async def receive() -> None:
        nonlocal closed
        with pytest.raises(anyio.ClosedResourceError):
            await s.receive()
        closed = True

    async with await net.socket() as s, anyio.create_task_group() as group:
        group.start_soon(receive)
        for _ in range(20):
            await checkpoint()
        assert not closed
        await s.aclose()
    assert closed


async def test_two_receivers(net: AnyioDatagrams) -> None:
    got: list[Any] = []

    async def receive() -> None:
        got.append(await s.receive())

    async with await net.socket() as s, anyio.create_task_group() as group:
        group.start_soon(receive)
        for _ in range(20):
            await checkpoint()
        with pytest.raises(anyio.BusyResourceError):
            await s.receive()
        await s.sendto(b"data", *net.address(s))
        while not got:
            await checkpoint()
    assert [data for data, _ in got] == [b"data"]


async def test_receiving_cancelled_at_every_step(net: AnyioDatagrams) -> None:
    """What one call did not return, the next does."""
    got: list[bytes] = []

    async def receive(scope: anyio.CancelScope) -> None:
        with scope:
            got.append((await s.receive())[0])

    async with await net.socket() as s:
        for k in range(25):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(receive, scope)
                for _ in range(k % 5):
                    await checkpoint()
                await s.sendto(b"%d" % k, *net.address(s))
                for _ in range(k // 3):
                    await checkpoint()
                scope.cancel()
        while len(got) < 25:
            got.append((await s.receive())[0])
        assert got == [b"%d" % k for k in range(25)]


async def test_a_deadline(net: AnyioDatagrams) -> None:
    async with await net.socket() as s:
        with anyio.move_on_after(0.02) as scope:
            await s.receive()
        assert scope.cancelled_caught
        await s.sendto(b"data", *net.address(s))
        assert (await s.receive())[0] == b"data"


async def test_addresses(net: AnyioDatagrams) -> None:
    async with await net.socket() as s, await net.connected(net.port(s)) as c:
        attributes = anyio.abc.SocketAttribute
        assert c.extra(attributes.remote_address) == net.address(s)
        assert c.extra(attributes.remote_port) == net.port(s)
        assert c.extra(attributes.local_address)[1] == c.extra(attributes.local_port)
        with pytest.raises(anyio.TypedAttributeLookupError):
            s.extra(attributes.remote_address)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # uvloop's own leaves its handle
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_port_taken(net: AnyioDatagrams) -> None:
    async with await net.socket() as s:
        with pytest.raises(OSError, match=r"in use|could not bind"):
            await net.socket(net.port(s))
        port = net.port(s)
    async with await net.socket(port) as again:
        assert net.port(again) == port


async def test_what_is_no_bytes(net: AnyioDatagrams) -> None:
    async with await net.socket() as s, await net.connected(net.port(s)) as c:
        with pytest.raises(TypeError):
            await c.send("text")
        await c.send(b"fine")
        assert (await s.receive())[0] == b"fine"
