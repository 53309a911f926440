"""The loop on which hosts that end in `.shm` are peers: names, numbers, and what goes elsewhere. (What its
connections do is in tests/conformance.)"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvloop

import shmsock
from shmsock.aio import attach, names
from shmsock.aio.pseudosocket import PseudoSocket
from shmsock.aio.streams import ShmStreamReader
from shmsock.aio.transport import ShmTransport
from tests.aio.roles import echo

Run = Callable[[Any], Any]


BASES = {"asyncio": None, "uvloop.Loop": uvloop.Loop, "uvloop.new_event_loop": uvloop.new_event_loop}


@pytest.fixture(params=BASES)
def run_shm(request: pytest.FixtureRequest, shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a coroutine on such a loop; the implicit node is "me"."""
    monkeypatch.setenv("SHMSOCK_NAME", "me")
    factory = shmsock.loop_factory(BASES[request.param])

    def run(main: Any) -> Any:
        loop = factory()
        try:
            return loop.run_until_complete(asyncio.wait_for(main, 60))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run


def nodes() -> list[shmsock.Node]:
    loop = asyncio.get_running_loop()
    return [node for node in attach._all_nodes() if node.loop is loop and not node.closed]


async def ask(host: Any, port: int) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    kind = type(writer.transport).__name__
    writer.close()
    await writer.wait_closed()
    return kind


@pytest.mark.parametrize("host", ["me.shm", "ME.shm.", "*.shm", "localhost.shm", ["me.shm", "localhost.shm"]])
def test_to_listen(run_shm: Run, host: Any) -> None:
    async def main() -> None:
        async with await asyncio.start_server(echo, host, 7000):
            for to in ("me.shm", "Me.SHM.", "localhost.shm"):
                assert await ask(to, 7000) == "ShmTransport"
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("me.shm", 7001)
            with pytest.raises(socket.gaierror, match=r"no peer named 'you\.shm'"):
                await asyncio.open_connection("you.shm", 7000)

    run_shm(main())


def test_stock_streams_are_adopted(run_shm: Run) -> None:
    async def main() -> None:
        async with await asyncio.start_server(echo, "me.shm", 7000):
            reader, writer = await asyncio.open_connection("me.shm", 7000)
            assert type(reader) is ShmStreamReader
            assert type(writer.transport) is ShmTransport
            assert writer.transport.fast_path.can_read
            writer.close()
            await writer.wait_closed()

    run_shm(main())


def test_others_are_what_they_were(run_shm: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            assert await ask("127.0.0.1", port) != "ShmTransport"
        async with await asyncio.start_server(echo, None, 0):
            pass
        found = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        assert found[0][4] == ("127.0.0.1", 80)
        assert await loop.getnameinfo(("127.0.0.1", 80), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV) == (
            "127.0.0.1",
            "80",
        )
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0))
        assert transport.get_extra_info("shmsock_node") is None
        transport.close()
        assert nodes() == []  # nobody attached for any of that

    run_shm(main())


def test_a_mixture_is_refused(run_shm: Run) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="make a server of each kind"):
            await asyncio.start_server(echo, ["me.shm", "127.0.0.1"], 0)

    run_shm(main())


def test_numbers(run_shm: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(echo, "me.shm", 7000)
        address = server.sockets[0].getsockname()
        both = await loop.getaddrinfo(b"me.shm", "7000")
        assert both == [
            (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (*address, 0, names.SCOPE)),
            (socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_UDP, "", (*address, 0, names.SCOPE)),
        ]
        assert await loop.getaddrinfo("me.shm", 7000, family=socket.AF_INET, proto=socket.IPPROTO_UDP) == [
            (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP, "", address)
        ]
        assert await loop.getaddrinfo("me.shm", 7000, family=socket.AF_INET6) == both
        assert await loop.getaddrinfo("me.shm", 7000, type=socket.SOCK_STREAM) == both[:1]
        (named, other) = await loop.getaddrinfo("ME.shm.", 7000, flags=socket.AI_CANONNAME)
        assert (named[3], other[3]) == ("me.shm", "")
        assert (await loop.getaddrinfo("me.shm", "http"))[0][4][:2] == (address[0], 80)
        assert (await loop.getaddrinfo("me.shm", None))[0][4][:2] == (address[0], 0)
        assert await loop.getnameinfo(address, socket.NI_NUMERICSERV) == ("me.shm", "7000")
        assert await loop.getnameinfo((address[0], 80)) == ("me.shm", "http")
        assert await loop.getnameinfo((address[0], 514), socket.NI_DGRAM) == ("me.shm", "syslog")
        assert await loop.getnameinfo((address[0], 65001)) == ("me.shm", "65001")
        assert await loop.getnameinfo(address, socket.NI_NUMERICHOST) == (address[0], "7000")
        with pytest.raises(socket.gaierror, match="internet addresses stand for it"):
            await loop.getaddrinfo("me.shm", 7000, family=socket.AF_UNIX)
        with pytest.raises(socket.gaierror, match="AI_NUMERICHOST"):
            await loop.getaddrinfo("me.shm", 7000, flags=socket.AI_NUMERICHOST)
        with pytest.raises(socket.gaierror, match="name of a service"):
            await loop.getaddrinfo("me.shm", "no-such-service")
        with pytest.raises(socket.gaierror, match=r"no peer named 'you\.shm'"):
            await loop.getaddrinfo("you.shm", 7000)
        assert await ask(*address) == "ShmTransport"
        _, writer = await asyncio.open_connection("me.shm", 7000)
        assert writer.get_extra_info("peername") == address
        assert writer.get_extra_info("socket").getpeername() == address
        writer.close()
        assert len(nodes()) == 1  # the address means the region that we are attached to
        server.close()

    run_shm(main())


def test_a_program_that_connects_a_socket_of_its_own(run_shm: Run) -> None:
    """As aiohttp's client does, which looks the name up, connects, and gives the socket to the loop."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(echo, "me.shm", 7000):
            (*_, address), *_ = await loop.getaddrinfo("me.shm", 7000, type=socket.SOCK_STREAM)
            sock = socket.socket(socket.AF_INET6)
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            reader, writer = await asyncio.open_connection(sock=sock)
            assert sock.fileno() == -1
            assert type(writer.transport) is ShmTransport
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()
            await writer.wait_closed()
            with socket.socket() as other:
                other.setblocking(False)
                with pytest.raises(ConnectionRefusedError):
                    await loop.sock_connect(other, (address[0], 7001))
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, server.sockets[0].getsockname())
            _, writer = await asyncio.open_connection(sock=sock)
            assert type(writer.transport) is not ShmTransport
            writer.close()
            await writer.wait_closed()

    run_shm(main())


def test_hosts_from_a_generator(run_shm: Run) -> None:
    async def main() -> None:
        for host, kind in (("127.0.0.1", False), ("me.shm", True)):
            server = await asyncio.start_server(echo, (h for h in [host]), 0)  # type: ignore[arg-type]
            (sock,) = server.sockets
            assert isinstance(sock, PseudoSocket) is kind
            server.close()

    run_shm(main())


def test_sendfile_begins_at_the_offset(run_shm: Run, tmp_path: Path) -> None:
    """Wherever the file stands."""

    async def main() -> None:
        loop, got = asyncio.get_running_loop(), asyncio.Queue[bytes]()

        async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.put_nowait(await reader.read())
            writer.close()

        async with await asyncio.start_server(sink, "me.shm", 7000):
            for offset in (0, 5):
                _, writer = await asyncio.open_connection("me.shm", 7000)
                with (tmp_path / "file").open("w+b") as file:
                    file.write(b"0123456789")
                    assert await loop.sendfile(writer.transport, file, offset) == 10 - offset
                writer.close()
                await writer.wait_closed()
                assert await got.get() == b"0123456789"[offset:]

    run_shm(main())


def test_anyio_over_it(run_shm: Run) -> None:
    async def main() -> None:
        async with await asyncio.start_server(echo, "me.shm", 7000):
            async with await anyio.connect_tcp("me.shm", 7000) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                assert stream.extra(anyio.abc.SocketAttribute.remote_port) == 7000
            assert len(nodes()) == 1

    run_shm(main())


@pytest.mark.parametrize("base", [int, dict, 5, "uvloop", lambda: 5])
def test_what_makes_no_loop(base: Any) -> None:
    with pytest.raises(TypeError, match="makes no event loop"):
        shmsock.loop_factory(base)


def test_new_event_loop() -> None:
    loop = shmsock.new_event_loop()
    assert isinstance(loop, asyncio.SelectorEventLoop)
    assert shmsock.loop_factory() is shmsock.loop_factory(asyncio.SelectorEventLoop)
    loop.close()
