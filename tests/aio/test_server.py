"""The server object, and who gets through to it."""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

import shmsock
from tests.aio.conftest import End, Run, World, held, until
from tests.aio.processes import Child
from tests.aio.roles import echo


async def ask(host: Any, port: int, node: shmsock.Node, text: bytes = b"ping") -> bytes:
    reader, writer = await shmsock.open_connection(host, port, node=node)
    writer.write(text)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


def test_surface(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (_, b):
            server = await shmsock.start_server(echo, None, 7000, node=b)
            theirs = [n for n in vars(asyncio.base_events.Server) if not n.startswith("_")]
            assert [n for n in theirs if not hasattr(server, n)] == []
            assert isinstance(server, asyncio.AbstractServer)
            assert server.get_loop() is asyncio.get_running_loop()
            assert server.is_serving()
            (sock,) = server.sockets
            assert sock.getsockname() == (b.name, 7000)
            assert "7000" in repr(server)
            server.close()
            server.close()
            assert server.sockets == ()
            assert not server.is_serving()
            await server.wait_closed()
            assert "closed" in repr(server)

    run(main())


def test_async_with_and_port_zero(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            async with (
                await shmsock.start_server(echo, node=b) as one,
                await shmsock.start_server(echo, port=0, node=b) as two,
            ):
                ports = [s.sockets[0].getsockname()[1] for s in (one, two)]
                assert ports[0] != ports[1]
                assert all(32768 <= port <= 65535 for port in ports)
                for port in ports:
                    assert await ask(b.name, port, a) == b"ping"
            for port in ports:
                with pytest.raises(ConnectionRefusedError):
                    await ask(b.name, port, a)

    run(main())


def test_not_serving_yet(run: Run, world: World) -> None:
    """The port is taken, and whoever connects is refused, as over TCP."""

    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, node=b, start_serving=False)
            assert not server.is_serving()
            assert server.sockets[0].getsockname() == (b.name, 7000)
            with pytest.raises(ConnectionRefusedError):
                await ask(b.name, 7000, a)
            with pytest.raises(OSError, match="in use") as info:
                await shmsock.start_server(echo, None, 7000, node=b)
            assert info.value.errno == errno.EADDRINUSE
            await server.start_serving()
            await server.start_serving()
            assert server.is_serving()
            assert await ask(b.name, 7000, a) == b"ping"
            server.close()

    run(main())


def test_serve_forever_and_cancel(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, node=b, start_serving=False)
            forever = asyncio.create_task(server.serve_forever())
            await until(server.is_serving)
            with pytest.raises(RuntimeError, match="already being awaited"):
                await server.serve_forever()
            assert await ask(b.name, 7000, a) == b"ping"
            forever.cancel()
            with pytest.raises(asyncio.CancelledError):
                await forever
            assert not server.is_serving()
            with pytest.raises(RuntimeError, match="is closed"):
                await server.serve_forever()
            with pytest.raises(ConnectionRefusedError):
                await ask(b.name, 7000, a)

    run(main())


def test_close_ends_serve_forever(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (_, b):
            server = await shmsock.start_server(echo, None, 7000, node=b)
            forever = asyncio.create_task(server.serve_forever())
            await asyncio.sleep(0)
            server.close()
            with pytest.raises(asyncio.CancelledError):
                await forever

    run(main())


def test_connections_live_on_when_the_server_closes(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):  # it has closed the server
            c.writer.write(b"still here")
            assert await s.reader.readexactly(10) == b"still here"

    run(main())


def test_wait_closed_is_that_of_the_version(run: Run, world: World) -> None:
    """From Python 3.12 on it waits for the last connection."""

    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, node=b)
            early = asyncio.create_task(server.wait_closed())
            await asyncio.sleep(0)
            assert not early.done()
            reader, writer = await shmsock.open_connection(b.name, 7000, node=a)
            writer.write(b"x")
            await reader.readexactly(1)
            server.close()
            waiting = asyncio.create_task(server.wait_closed())
            await asyncio.sleep(0.01)
            assert waiting.done() == (sys.version_info < (3, 12))
            writer.close()
            await waiting
            await early

    run(main())


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
def test_closing_the_clients(run: Run, world: World, how: str) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            handled = 0

            async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal handled
                try:
                    assert await reader.read() == b""
                except ConnectionResetError:
                    raise AssertionError("nobody reset it") from None
                handled += 1

            server = await shmsock.start_server(handler, None, 7000, node=b)
            streams = [await shmsock.open_connection(b.name, 7000, node=a) for _ in range(5)]
            server.close()
            getattr(server, how)()
            for reader, writer in streams:
                assert await reader.read() == b""
                writer.close()
            await server.wait_closed()
            await until(lambda: handled == 5)

    run(main())


def test_a_handler_that_fails(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):

            async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                raise ZeroDivisionError

            server = await shmsock.start_server(handler, None, 7000, node=b)
            reader, writer = await shmsock.open_connection(b.name, 7000, node=a)
            if sys.version_info >= (3, 12):  # asyncio closes the connection then
                assert await reader.read() == b""
                await until(lambda: run.reports)
            server.abort_clients()
            writer.close()
            server.close()

    run(main())
    gc.collect()  # before Python 3.12, that is when a task's exception is told
    assert [type(r["exception"]) for r in run.reports] == [ZeroDivisionError]
    run.reports.clear()


def test_a_handler_may_be_a_function(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(lambda r, w: w.close(), None, 7000, node=b)
            assert await ask(b.name, 7000, a) == b""
            server.close()

    run(main())


def test_context_variables_of_one_client_are_not_seen_by_another(run: Run, world: World) -> None:
    import contextvars

    who: contextvars.ContextVar[str] = contextvars.ContextVar("who")

    async def main() -> None:
        seen: list[Any] = []

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(who.get())
            who.set((await reader.readline()).decode())
            writer.write(who.get().encode())
            assert await reader.read() == b""
            seen.append(who.get())
            writer.close()

        async def client(name: str) -> None:
            who.set(f"client {name}")
            reader, writer = await shmsock.open_connection(b.name, 7000, node=a)
            writer.write(f"{name}\n".encode())
            assert await reader.readline() == f"{name}\n".encode()
            assert who.get() == f"client {name}"
            await asyncio.sleep(0.001)
            writer.close()
            await writer.wait_closed()

        async with world.nodes() as (a, b):
            who.set("main")
            server = await shmsock.start_server(handler, None, 7000, node=b)
            who.set("main, later")
            await asyncio.gather(*(client(str(i)) for i in range(30)))
            await until(lambda: len(seen) == 60)
            server.close()
            assert seen.count("main") == 30
            assert sorted(s for s in seen if s != "main") == sorted(f"{i}\n" for i in range(30))

    run(main())


def test_a_backlog_of_one_serves_everybody_who_comes_again(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, backlog=1, node=b)
            got = await asyncio.gather(*(ask(b.name, 7000, a) for _ in range(30)), return_exceptions=True)
            assert b"ping" in got
            assert [x for x in got if x != b"ping" and not isinstance(x, ConnectionRefusedError)] == []
            assert await ask(b.name, 7000, a) == b"ping"
            server.close()

    run(main())


def test_reuse_port_between_processes(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            with pytest.raises(socket.gaierror):
                await ask("crowd", 7000, node)
            async with Child("serve", region, "crowd") as one, Child("serve", region, "crowd") as two:
                await one.says("ready")
                await two.says("ready")
                served = set()
                for _ in range(100):
                    reader, writer = await shmsock.open_connection("crowd", 7000, node=node)
                    writer.write(b"x")
                    assert await reader.readexactly(1) == b"x"
                    served.add(writer.transport.conn.peer)  # type: ignore[attr-defined]
                    writer.close()
                    if len(served) == 2:
                        break
                assert len(served) == 2
                one.kill()  # and from now on the other one serves all
                for _ in range(20):
                    assert await ask("crowd", 7000, node) == b"ping"
            async with shmsock.attach(region, name="crowd") as alone:
                await shmsock.start_server(echo, None, 7000, reuse_port=False, node=alone)

    run(main())


def test_a_port_belongs_to_a_name(run: Run, world: World) -> None:
    async def main() -> None:
        async with Child("serve", world.region, "mine") as child:
            await child.says("ready")
            async with (
                shmsock.attach(world.region, name="mine") as node,
                shmsock.attach(world.region, name="other") as other,
            ):
                with pytest.raises(OSError, match="in use") as info:
                    await shmsock.start_server(echo, None, 7000, node=node)
                assert info.value.errno == errno.EADDRINUSE
                await shmsock.start_server(echo, None, 7000, node=other)
                child.kill()
                await shmsock.start_server(echo, None, 7000, node=node)
                assert await ask("mine", 7000, other) == b"ping"

    run(main())


@pytest.mark.parametrize(
    ("host", "fits"),
    [
        (None, True), ("", True), ("0.0.0.0", True), ("::", True), ("localhost", True), ("127.0.0.1", True),
        ("b", True), ("B.shm", True), (["b", "localhost"], True), ("somebody", False), ("192.168.0.1", False),
        (["b", "nobody"], False),
    ],
)  # fmt: skip
def test_where_to_listen(run: Run, region: str, host: Any, fits: bool) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as a, shmsock.attach(region, name="b") as b:
            if fits:
                await shmsock.start_server(echo, host, 7000, node=b)
                assert await ask("b", 7000, a) == b"ping"
                assert await ask(b.section, 7000, a) == b"ping"
            else:
                with pytest.raises(OSError, match=r"cannot listen on") as info:
                    await shmsock.start_server(echo, host, 7000, node=b)
                assert info.value.errno == errno.EADDRNOTAVAIL

    run(main())


def test_names_that_nobody_has(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="vm-a") as a, shmsock.attach(region, name="vm-b") as b:
            await shmsock.start_server(echo, None, 7000, node=b)
            for host in ("vm-c", "x" * 63, "x" * 64, "with space", "ünïcode", "a..", 9, 15, 16, -1, 10**30):
                with pytest.raises(socket.gaierror) as info:
                    await ask(host, 7000, a)
                assert info.value.errno == socket.EAI_NONAME
            with pytest.raises(socket.gaierror, match="did you mean 'vm-b'"):
                await ask("vmb", 7000, a)
            with pytest.raises(ConnectionRefusedError, match="port 7001"):
                await ask("vm-b", 7001, a)
            with pytest.raises(ConnectionRefusedError):
                await ask(b.section, 7001, a)
            with pytest.raises(ConnectionRefusedError):
                await ask(None, 7001, a)
            assert await ask("VM-B.shm.", 7000, a) == b"ping"
            assert held(a)["connections"] == 0

    run(main())


@pytest.mark.parametrize(
    ("port", "error"),
    [
        (-1, OverflowError),
        (65536, OverflowError),
        (10**20, OverflowError),
        ("no-such-service", socket.gaierror),
        ([80], TypeError),
        (7.5, TypeError),
        (None, None),
    ],
)
def test_ports(run: Run, region: str, port: Any, error: Any) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            with pytest.raises(error or ValueError):
                await shmsock.open_connection("a", port, node=a)
            if error:
                with pytest.raises(error):
                    await shmsock.start_server(echo, None, port, node=a)
            with pytest.raises(error or ConnectionRefusedError):
                await shmsock.open_connection("a", 7000, node=a, local_addr=(None, port))

    run(main())


def test_the_clients_port_can_be_chosen(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            accepted: asyncio.Future[End] = asyncio.get_running_loop().create_future()
            server = await shmsock.start_server(
                lambda r, w: accepted.set_result(End(r, w, b)), None, 7000, node=b
            )
            _, writer = await shmsock.open_connection(b.name, 7000, local_addr=(None, 1234), node=a)
            end = await accepted
            assert end.writer.get_extra_info("peername") == (a.name, 1234)
            writer.close()
            await end.close()
            server.close()

    run(main())


@pytest.mark.parametrize("limit", [0, -5])
def test_limits(run: Run, world: World, limit: int) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b):
            server = await shmsock.start_server(echo, None, 7000, node=b)
            with pytest.raises(ValueError, match="Limit"):
                await shmsock.open_connection(b.name, 7000, limit=limit, node=a)
            server.close()

    run(main())


def test_bad_attachments(
    run: Run, region: str, make: Callable[..., str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an attach() of asyncio users gets to see; more of it in tests/region."""

    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await shmsock.attach(str(tmp_path / "missing"))
        with pytest.raises(shmsock.RegionNotFoundError):
            await shmsock.open_connection("x", 1, region=str(tmp_path / "missing"))
        short = tmp_path / "short"
        short.write_bytes(b"x" * 100)
        with pytest.raises(shmsock.RegionFormatError):
            await shmsock.attach(str(short))
        other = tmp_path / "other"
        other.write_bytes(b"something else entirely" * 100000)
        with pytest.raises(shmsock.RegionFormatError, match="magic"):
            await shmsock.attach(str(other))
        with pytest.raises(shmsock.RegionUrlError):
            await shmsock.attach("carrier-pigeon:1")
        for name in ("", "x" * 64, "two words", "12", "localhost", "ä", "a\n"):
            with pytest.raises(ValueError, match=r"peer name|named"):
                await shmsock.attach(region, name=name)
        monkeypatch.setenv("SHMSOCK_NAME", "two words")
        with pytest.raises(ValueError, match="SHMSOCK_NAME"):
            await shmsock.attach(region)
        full = make(peers=2, size=8 << 20)
        async with shmsock.attach(full, name="one"), shmsock.attach(full, name="two"):
            with pytest.raises(OSError, match="all 2 sections") as info:
                await shmsock.attach(full, name="three")
            assert info.value.errno == errno.ENOSPC
        async with shmsock.attach(full, name="three"):
            pass

    run(main())


def test_default_arguments(run: Run) -> None:
    assert list(inspect.signature(shmsock.attach).parameters) == ["region", "name", "settings", "section"]
