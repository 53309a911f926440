"""Listeners and connects: who gets through, and what the others are told."""

from __future__ import annotations

import errno
import gc
import ipaddress
import socket
import warnings
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStreamConnectable, SocketAttribute

import shmsock
import shmsock.anyio as shm
from tests.anyio_face.conftest import Run, World, until


async def ask(host: Any, port: int, node: shmsock.Node, question: bytes = b"ask") -> bytes:
    async with await shm.connect_shm(host, port, node=node) as stream:
        await stream.send(question)
        await stream.send_eof()
        return b"".join([data async for data in stream])


async def answer(stream: shm.ShmStream) -> None:
    async with stream:
        question = b"".join([data async for data in stream])
        await stream.send(question.upper())


@pytest.mark.parametrize("own_group", [True, False])
def test_serve(run: Run, world: World, own_group: bool) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b), await shm.create_shm_listener(node=b) as listener:
            port = listener.extra(SocketAttribute.local_port)
            assert listener.extra(SocketAttribute.local_address) == (b.name, port)
            assert listener.extra(SocketAttribute.family) == socket.AF_INET
            assert listener.extra(SocketAttribute.raw_socket).getsockname() == (b.name, port)
            async with anyio.create_task_group() as tg:
                tg.start_soon(listener.serve, answer, None if own_group else tg)
                answers: list[bytes] = []

                async def one(i: int) -> None:
                    answers.append(await ask(b.name, port, a, b"q%d" % i))

                async with anyio.create_task_group() as askers:
                    for i in range(40):
                        askers.start_soon(one, i)
                assert sorted(answers) == sorted(b"Q%d" % i for i in range(40))
                tg.cancel_scope.cancel()

    run(main)


def test_a_handler_that_fails_ends_its_group_and_the_listener_goes_on(run: Run, world: World) -> None:
    async def main() -> None:
        async def fail(stream: shm.ShmStream) -> None:
            async with stream:
                raise ZeroDivisionError

        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
        ):
            client = await shm.connect_shm(b.name, 7000, node=a)
            with pytest.raises(BaseException, match=r"unhandled|Trio") as caught:
                await listener.serve(fail)
            (error,) = caught.value.exceptions  # type: ignore[attr-defined]
            assert isinstance(error, ZeroDivisionError)
            with pytest.raises(anyio.EndOfStream):
                await client.receive()
            await client.aclose()
            async with anyio.create_task_group() as tg:
                tg.start_soon(listener.serve, answer)
                assert await ask(b.name, 7000, a) == b"ASK"
                tg.cancel_scope.cancel()

    run(main)


def test_nobody_there(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            with pytest.raises(ConnectionRefusedError):
                await shm.connect_shm(b.name, 7000, node=a)
            for unknown in ("nobody", 9, ipaddress.ip_address("10.0.0.1")):
                with pytest.raises(socket.gaierror):
                    await shm.connect_shm(unknown, 7000, node=a)
            for port in (-1, 65536):
                with pytest.raises(OverflowError):
                    await shm.connect_shm(b.name, port, node=a)

    run(main)


def test_hosts(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            for bind in (None, "localhost", b.name, "0.0.0.0", ipaddress.ip_address("::1")):
                async with await shm.create_shm_listener(
                    local_host=bind, local_port=7000, node=b
                ) as listener:
                    for host in (b.name, b.section, None, "localhost", ipaddress.ip_address("127.0.0.1")):
                        async with anyio.create_task_group() as tg:
                            tg.start_soon(listener.serve, answer)
                            assert await ask(host, 7000, a) == b"ASK"
                            tg.cancel_scope.cancel()
            with pytest.raises(OSError) as caught:
                await shm.create_shm_listener(local_host="elsewhere", node=b)
            assert caught.value.errno == errno.EADDRNOTAVAIL

    run(main)


def test_a_port_is_taken_once(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (_, b):
            async with await shm.create_shm_listener(local_port=7000, node=b):
                with pytest.raises(OSError) as caught:
                    await shm.create_shm_listener(local_port=7000, node=b)
                assert caught.value.errno == errno.EADDRINUSE
            first = await shm.create_shm_listener(local_port=7000, reuse_port=True, node=b)
            second = await shm.create_shm_listener(local_port=7000, reuse_port=True, node=b)
            await first.aclose()
            await second.aclose()

    run(main)


def test_local_port(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
            await shm.connect_shm(b.name, 7000, local_port=4321, node=a) as client,
            await listener.accept() as server,
        ):
            assert client.extra(SocketAttribute.local_port) == 4321
            assert server.extra(SocketAttribute.remote_address) == (a.name, 4321)

    run(main)


def test_closing_a_listener(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            listener = await shm.create_shm_listener(local_port=7000, node=b)
            client = await shm.connect_shm(b.name, 7000, node=a)
            accepted = await listener.accept()
            waiting = await shm.connect_shm(b.name, 7000, node=a)
            await listener.aclose()
            await listener.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await listener.accept()
            with pytest.raises(anyio.BrokenResourceError) as caught:
                await waiting.receive()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
            with pytest.raises(ConnectionRefusedError):
                await shm.connect_shm(b.name, 7000, node=a)
            await client.send(b"still")
            assert await accepted.receive() == b"still"
            for stream in (client, accepted, waiting):
                await stream.aclose()

    run(main)


def test_closing_wakes_accept_and_two_may_not_wait(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (_, b), anyio.create_task_group() as tg:
            listener = await shm.create_shm_listener(local_port=7000, node=b)

            async def closed() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await listener.accept()

            tg.start_soon(closed)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await listener.accept()
            await listener.aclose()

    run(main)


def test_backlog(run: Run, make: Callable[..., str]) -> None:
    """It bounds what is not accepted yet; who comes then waits, until there is room or it is cancelled."""

    async def main() -> None:
        async with World("nodes", make(peers=2)).nodes() as (a, b):
            async with await shm.create_shm_listener(local_port=7000, backlog=3, node=b) as listener:
                clients: list[shm.ShmStream] = []

                async def connect() -> None:
                    clients.append(await shm.connect_shm(b.name, 7000, node=a))

                for _ in range(3):
                    await connect()
                with anyio.move_on_after(0.05) as scope:
                    await connect()
                assert scope.cancelled_caught
                async with anyio.create_task_group() as group:
                    group.start_soon(connect)
                    for _ in range(4):
                        await (await listener.accept()).aclose()
                assert len(clients) == 4
            for client in clients:
                await client.aclose()

    run(main)


def test_a_connection_that_was_reset_before_it_was_accepted(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
        ):
            client = await shm.connect_shm(b.name, 7000, node=a)
            client._conn.abort()
            await client.aclose()
            await until(lambda: not a.engine.connections)
            async with await listener.accept() as server:
                with pytest.raises(anyio.BrokenResourceError):
                    await server.receive()

    run(main)


def test_connectable(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            there: ByteStreamConnectable = shm.ShmConnectable(b.name, 7000, node=a)
            with pytest.raises(anyio.ConnectionFailed, match=f"{b.name}:7000") as caught:
                await there.connect()
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            async with (
                await shm.create_shm_listener(local_port=7000, node=b) as listener,
                await there.connect() as client,
                await listener.accept() as server,
            ):
                await client.send(b"x")
                assert await server.receive() == b"x"

    run(main)
    with pytest.raises(ValueError, match="range"):
        shm.ShmConnectable("host", 0)


def test_a_dropped_listener_is_closed(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                await shm.create_shm_listener(local_port=7000, node=b)
                gc.collect()
            assert [w.category for w in caught] == [ResourceWarning]
            await until(lambda: not b.transports)
            with pytest.raises(ConnectionRefusedError):
                await shm.connect_shm(b.name, 7000, node=a)

    run(main)
