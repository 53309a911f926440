"""Datagram sockets, connected and not."""

from __future__ import annotations

import errno
import gc
import socket
import warnings

import anyio
import pytest
from anyio.abc import SocketAttribute

import shmsock
import shmsock.anyio as shm
from shmsock.engine.datagrams import DATAGRAM_MAX
from tests.aio.processes import pattern
from tests.anyio_face.conftest import Run, World, until

SMALL_QUEUE = shmsock.Settings(datagram_queue_bytes=1 << 18)


def test_to_and_fro(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(node=a) as one,
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as other,
        ):
            address = one.extra(SocketAttribute.local_address)
            assert other.extra(SocketAttribute.local_address) == (b.name, 5000)
            assert other.extra(SocketAttribute.raw_socket).type == socket.SOCK_DGRAM
            with pytest.raises(anyio.TypedAttributeLookupError):
                other.extra(SocketAttribute.remote_address)
            for size in (0, 1, 64, 9000, DATAGRAM_MAX):
                await one.sendto(pattern(1, size, size), b.name, 5000)
                data, source = await other.receive()
                assert (data, source) == (pattern(1, size, size), address)
                await other.send((data[::-1], source))
                assert await one.receive() == (data[::-1], (b.name, 5000))

    run(main)


def test_connected(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as server,
            await shm.create_connected_shm_datagram_socket(b.name, 5000, node=a) as client,
            await shm.create_shm_datagram_socket(node=a) as stranger,
        ):
            assert client.extra(SocketAttribute.remote_address) == (b.name, 5000)
            await stranger.sendto(b"not for you", *client.extra(SocketAttribute.local_address))
            await client.send(b"hello")
            data, source = await server.receive()
            assert data == b"hello"
            await server.sendto(b"you too", *source)
            assert await client.receive() == b"you too"

    run(main)


def test_many_in_order(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as server,
            await shm.create_connected_shm_datagram_socket(b.name, 5000, node=a) as client,
            anyio.create_task_group() as tg,
        ):
            count = 5000

            async def send() -> None:
                for i in range(count):
                    await client.send(b"%d" % i)

            tg.start_soon(send)
            for i in range(count):
                data, _ = await server.receive()
                assert data == b"%d" % i

    run(main)


def test_a_sender_waits_for_room(run: Run, region: str) -> None:
    """Neither the ring nor the queues behind it are overrun by a sender that awaits."""

    async def main() -> None:
        async with (
            World("nodes", region).nodes(links=True, settings=SMALL_QUEUE) as (a, b),
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as server,
            await shm.create_connected_shm_datagram_socket(b.name, 5000, node=a) as client,
        ):
            # The receiver node gives its endpoint what the ring brings; that is kept within its bound,
            # and the rest is lost: what the sender's side lost is none.
            for _ in range(200):
                await client.send(bytes(10_000))
            assert a.statistics()["datagrams_dropped_unsent"] == 0
            got = 0
            with anyio.move_on_after(0.2):
                while True:
                    await server.receive()
                    got += 1
            full = b.statistics()["datagrams_dropped_full"]
            assert got + full == 200
            assert full > 0

    run(main)


def test_nobody_has_the_port(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_connected_shm_datagram_socket(b.name, 5000, node=a) as client,
            await shm.create_shm_datagram_socket(node=a) as loose,
        ):
            await client.send(b"x")
            with pytest.raises(anyio.BrokenResourceError) as caught:
                await client.receive()
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            await loose.sendto(b"x", b.name, 5000)  # silence, as over UDP
            async with await shm.create_shm_datagram_socket(local_port=5000, node=b) as server:
                await client.send(b"now")
                assert (await server.receive())[0] == b"now"
            with pytest.raises(socket.gaierror):
                await loose.sendto(b"x", "nobody", 5000)
            with pytest.raises(socket.gaierror):
                await shm.create_connected_shm_datagram_socket("nobody", 5000, node=a)

    run(main)


def test_arguments(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as server,
        ):
            with pytest.raises(OSError) as caught:
                await server.sendto(bytes(DATAGRAM_MAX + 1), b.name, 5000)
            assert caught.value.errno == errno.EMSGSIZE
            with pytest.raises(TypeError):
                await server.sendto("text", b.name, 5000)  # type: ignore[arg-type]
            for kwargs, code in (
                ({"local_port": 5000}, errno.EADDRINUSE),
                ({"local_host": "elsewhere"}, errno.EADDRNOTAVAIL),
            ):
                with pytest.raises(OSError) as caught:
                    await shm.create_shm_datagram_socket(node=b, **kwargs)
                assert caught.value.errno == code
            assert not a.closed

    run(main)


def test_closing(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes(links=True) as (a, b), anyio.create_task_group() as tg:
            server = await shm.create_shm_datagram_socket(local_port=5000, node=b)

            async def closed() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await server.receive()

            tg.start_soon(closed)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await server.receive()
            await server.aclose()
            await server.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await server.sendto(b"x", b.name, 5000)
            assert not a.closed

    run(main)


def test_what_was_sent_last_goes_out_after_close(run: Run, world: World) -> None:
    """The first one opens the way to the peer, and may still wait for it."""

    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as server,
        ):
            client = await shm.create_connected_shm_datagram_socket(b.name, 5000, node=a)
            await client.send(b"last words")
            with anyio.CancelScope() as scope:
                scope.cancel()
                await client.aclose()
            assert (await server.receive())[0] == b"last words"
            await until(lambda: len(a.transports) == (a is b))

    run(main)


def test_receives_that_are_cancelled_lose_nothing(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(local_port=5000, node=b) as server,
            await shm.create_connected_shm_datagram_socket(b.name, 5000, node=a) as client,
            anyio.create_task_group() as tg,
        ):

            async def send() -> None:
                for i in range(500):
                    await client.send(b"%d" % i)

            tg.start_soon(send)
            got = 0
            while got < 500:
                with anyio.move_on_after(0):
                    data, _ = await server.receive()
                    assert data == b"%d" % got
                    got += 1
                with anyio.move_on_after(0.0001):
                    data, _ = await server.receive()
                    assert data == b"%d" % got
                    got += 1

    run(main)


def test_broadcast(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes(links=True) as (a, b),
            await shm.create_shm_datagram_socket(node=a) as caller,
            await shm.create_shm_datagram_socket(local_port=5000, reuse_port=True, node=b) as listener,
        ):
            await caller.sendto(b"all", "*", 5000)
            assert await listener.receive() == (b"all", caller.extra(SocketAttribute.local_address))

    run(main)


def test_a_dropped_socket_is_closed(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes(links=True) as (a, b):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                await shm.create_shm_datagram_socket(local_port=5000, node=b)
                gc.collect()
            assert [w.category for w in caught] == [ResourceWarning]
            await until(lambda: not b.transports)
            await (await shm.create_shm_datagram_socket(local_port=5000, node=b)).aclose()
            assert not a.closed

    run(main)
