"""Addresses on a loop that knows `.shm` hosts: each stands for a name, looked up again when it is used."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

import shmsock
from shmsock.aio import names
from shmsock.testing import make_region
from tests.aio.conftest import until
from tests.aio.processes import Child
from tests.aio.roles import echo
from tests.aio.test_names import spellings

Run = Callable[[Any], Any]
BASES: dict[str, Any] = {"asyncio": None, "uvloop": uvloop.Loop}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Any:
    return BASES[request.param]


@pytest.fixture
def run_shm(base: Any, shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a coroutine on such a loop, a new one each time; the implicit node is "me"."""
    monkeypatch.setenv("SHMSOCK_NAME", "me")

    def run(main: Any) -> Any:
        loop = shmsock.loop_factory(base)()
        try:
            return loop.run_until_complete(asyncio.wait_for(main, 60))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run


async def resolve(host: str, port: int = 7000, kind: int = socket.SOCK_STREAM, **how: Any) -> Any:
    """The first address as getaddrinfo tells it."""
    return (await asyncio.get_running_loop().getaddrinfo(host, port, type=kind, **how))[0][4]


async def asked(host: str, port: int = 7000, **how: Any) -> bytes:
    reader, writer = await asyncio.open_connection(host, port, **how)
    writer.write(b"x")
    got = await reader.read(1)
    writer.close()
    await writer.wait_closed()
    return got


async def asked_by_socket(address: Any) -> bytes:
    """As aiohttp does."""
    sock = socket.socket(socket.AF_INET6)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except OSError:
        assert sock.fileno() >= 0  # as asyncio leaves it
        sock.close()
        raise
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"x")
    got = await reader.read(1)
    writer.close()
    await writer.wait_closed()
    return got


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.got: list[tuple[bytes, Any]] = []
        self.errors: list[Any] = []
        self.log: list[Any] = []

    def connection_made(self, transport: Any) -> None:
        self.log.append("made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.append((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.append("lost")

    def pause_writing(self) -> None:
        self.log.append("pause")

    def resume_writing(self) -> None:
        self.log.append("resume")


async def datagrams(**how: Any) -> tuple[Any, Datagrams]:
    made: tuple[Any, Datagrams] = await asyncio.get_running_loop().create_datagram_endpoint(Datagrams, **how)
    return made


async def received(protocol: Datagrams, *expected: Any) -> None:
    await until(lambda: protocol.got == list(expected), f"{protocol.got} is {expected}")


def test_every_spelling(run_shm: Run) -> None:
    async def main() -> None:
        async with await asyncio.start_server(echo, "me.shm", 7000):
            address = (await resolve("me.shm"))[0]
            receiving, inbox = await datagrams(local_addr=("me.shm", 9))
            sending, _ = await datagrams(local_addr=("me.shm", 0))
            connected, _ = await datagrams(remote_addr=(address, 9))
            loop = asyncio.get_running_loop()
            for i, host in enumerate(spellings(address)):
                assert await asked(host) == b"x"
                for tail in ((), (0, 0), (0, names.SCOPE)):
                    assert await asked_by_socket((host, 7000, *tail)) == b"x"
                    sending.sendto(b"%d" % i, (host, 9, *tail))
                    connected.sendto(b"%d" % i, (host, 9, *tail))
                assert await resolve(host) == (address, 7000, 0, names.SCOPE)
                assert await loop.getnameinfo((host, 80, 0, 0)) == ("me.shm", "http")
                assert await loop.getnameinfo((host, 80), socket.NI_NUMERICHOST) == (address, "80")
                server = await asyncio.start_server(echo, host, 7100 + i)
                assert server.sockets[0].getsockname() == (address, 7100 + i)
                server.close()
                other, _ = await datagrams(local_addr=(host, 100 + i))
                assert other.get_extra_info("sockname") == (address, 100 + i)
                other.close()
            await until(lambda: len(inbox.got) == 6 * len(spellings(address)))
            with pytest.raises(ValueError, match="Invalid address"):
                connected.sendto(b"", (address, 10))
            for transport in (receiving, sending, connected):
                transport.close()

    run_shm(main())


def test_a_name_moves(run_shm: Run, shm_region: Path) -> None:
    """A cached address finds a server that was started again, and never who came into its section."""
    path = make_region(peers=2)
    os.replace(path, shm_region)

    async def main() -> None:
        region = str(shm_region)
        async with Child("serve", region, "srv") as first:
            await first.says("ready")
            address = await resolve("srv.shm")
            assert await asked(*address[:2]) == b"x"
            first.kill()
        async with Child("serve", region, "other") as other:
            await other.says("ready")
            for ask in (asked(*address[:2]), asked_by_socket(address)):
                with pytest.raises(socket.gaierror, match="no peer named 'srv'"):
                    await ask
            with pytest.raises(socket.gaierror):
                await resolve("srv.shm")
            assert await asked("other.shm") == b"x"
            other.kill()
        async with Child("serve", region, "srv") as again:
            await again.says("ready")
            assert await asked(*address[:2]) == b"x"
            assert await asked_by_socket(address) == b"x"
            assert await resolve("srv.shm") == address

    run_shm(main())


def test_datagrams_follow_a_name(run_shm: Run, shm_region: Path) -> None:
    path = make_region(peers=2)
    os.replace(path, shm_region)

    async def main() -> None:
        region = str(shm_region)
        for local in (("me.shm", 0), ("127.0.0.1", 0)):  # bound in shared memory, and the kernel's
            async with Child("datagram_echo", region, "srv", 9) as first:
                await first.says("ready")
                address = await resolve("srv.shm", 9, socket.SOCK_DGRAM)
                transport, protocol = await datagrams(local_addr=local)
                transport.sendto(b"1", address)
                await received(protocol, (b"1", address))
                first.kill()
            async with Child("datagram_echo", region, "other", 9) as other:
                await other.says("ready")
                transport.sendto(b"2", address)
                (error,) = protocol.errors
                assert isinstance(error, socket.gaierror)
                other.kill()
            async with Child("datagram_echo", region, "srv", 9) as again:
                await again.says("ready")
                transport.sendto(b"3", address)
                await received(protocol, (b"1", address), (b"3", address))
                transport.close()

    run_shm(main())


def test_only_the_loop_that_gave_it_out(run_shm: Run) -> None:
    """An older process's, or another loop's, leads nowhere, and never to the kernel."""

    async def older() -> Any:
        return await resolve("me.shm")

    async def main(address: Any) -> None:
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(echo, "me.shm", 7000):
            refused: list[Any] = [
                asked(*address[:2]),
                asked_by_socket(address),
                asyncio.start_server(echo, address[0], 7001),
                datagrams(local_addr=address[:2]),
                datagrams(remote_addr=address[:2]),
                loop.getaddrinfo(*address[:2]),
                loop.getnameinfo(address),
            ]
            for attempt in refused:
                with pytest.raises(OSError, match="look the name up again") as info:
                    await attempt
                assert info.value.errno == errno.EADDRNOTAVAIL
            for local in (("me.shm", 0), ("127.0.0.1", 0)):
                transport, protocol = await datagrams(local_addr=local)
                transport.sendto(b"x", address)
                assert [e.errno for e in protocol.errors] == [errno.EADDRNOTAVAIL]
                transport.close()

    address = run_shm(older())
    run_shm(main(address))


@pytest.mark.parametrize("host", ["localhost.shm", "me.shm", "*.shm"])
def test_resolved_to_listen_on(run_shm: Run, shm_region: Path, host: str) -> None:
    """While another process of this machine, of the same name or another, is attached."""

    async def main(name: str) -> None:
        async with Child("serve", str(shm_region), name, 7009) as other:
            await other.says("ready")
            for flags in (0, socket.AI_PASSIVE):
                address = await resolve(host, 7000, flags=flags)
                loop = asyncio.get_running_loop()
                async with await loop.create_server(asyncio.Protocol, *address):
                    pass
                async with await asyncio.start_server(echo, address[0], 7000) as server:
                    assert await asked(*server.sockets[0].getsockname()) == b"x"
                    assert await asked(*address[:2]) == b"x"
                transport, inbox = await datagrams(local_addr=address[:2])
                transport.sendto(b"x", address)
                transport.sendto(b"y", transport.get_extra_info("sockname"))
                await received(inbox, (b"x", address), (b"y", address))
                transport.close()

    for name in ("me", "other"):
        run_shm(main(name))


def test_for_this_machine_only(run_shm: Run) -> None:
    """What was resolved from localhost.shm is listened on as that."""

    async def main() -> None:
        server = await asyncio.start_server(echo, (await resolve("localhost.shm"))[0], 7000)
        (node,) = node_of_this_loop()
        (listener,) = node.engine.listeners
        assert listener.flags & 4  # LOCAL
        server.close()

    run_shm(main())


def node_of_this_loop() -> list[shmsock.Node]:
    from shmsock.aio import attach

    loop = asyncio.get_running_loop()
    return [node for node in attach._all_nodes() if node.loop is loop and not node.closed]


def test_sockets_without_a_transport(run_shm: Run, tmp_path: Path) -> None:
    """sock_connect() is for sockets that are given to create_connection()."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(echo, "me.shm", 7000):
            address = await resolve("me.shm")
            for where in (address, address[:2], ("me.shm", 7000)):
                with socket.socket(socket.AF_INET6) as sock, (tmp_path / "file").open("w+b") as file:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, where)
                    for attempt in (
                        loop.sock_sendall(sock, b"x"),
                        loop.sock_recv(sock, 1),
                        loop.sock_recv_into(sock, bytearray(1)),
                        loop.sock_sendfile(sock, file),
                    ):
                        with pytest.raises(OSError, match="open_connection") as info:
                            await attempt
                        assert info.value.errno == errno.EOPNOTSUPP
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                send: Any = getattr(loop, "sock_sendto")  # noqa: B009  # asyncio's from 3.11 on
                for attempt in (loop.sock_connect(sock, address), send(sock, b"x", address)):
                    with pytest.raises(OSError, match="create_datagram_endpoint") as info:
                        await attempt
                    assert info.value.errno == errno.EOPNOTSUPP
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            with socket.socket() as sock:  # one that is connected elsewhere afterwards
                sock.setblocking(False)
                for _ in range(2):
                    with pytest.raises(ConnectionRefusedError):
                        await loop.sock_connect(sock, (address[0], 7000))
                await loop.sock_connect(sock, server.sockets[0].getsockname())
                await loop.sock_sendall(sock, b"x")
                assert await loop.sock_recv(sock, 1) == b"x"

    run_shm(main())


def test_a_connect_that_fails_closes_its_socket(run_shm: Run) -> None:
    """As asyncio's does, whether the peer or the protocol is to blame."""

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def broken() -> asyncio.Protocol:
            raise ZeroDivisionError

        cases: list[Any] = [
            (ConnectionRefusedError, asyncio.Protocol, {}),
            (ZeroDivisionError, broken, {}),
            (ValueError, asyncio.Protocol, {"ssl": True}),
        ]
        for fails, factory, how in cases:
            async with await asyncio.start_server(echo, "me.shm", 7000) as server:
                sock = socket.socket(socket.AF_INET6)
                sock.setblocking(False)
                await loop.sock_connect(sock, await resolve("me.shm"))
                if fails is ConnectionRefusedError:
                    server.close()
                with pytest.raises(fails):
                    await loop.create_connection(factory, sock=sock, **how)
                assert sock.fileno() == -1

    run_shm(main())


@pytest.mark.parametrize("host", ["me.shm", "127.0.0.1"])
def test_a_closed_socket_leads_nowhere(run_shm: Run, host: str) -> None:
    """Neither to be connected, nor when it was connected before: as over TCP."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(echo, host, 0) as server:
            port = server.sockets[0].getsockname()[1]
            [*_, address] = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            family = socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET
            sock = socket.socket(family)
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            sock.close()
            with pytest.raises((OSError, ValueError)):
                await loop.create_connection(asyncio.Protocol, sock=sock)
            with pytest.raises(OSError) as info:
                await loop.sock_connect(sock, address)
            assert info.value.errno == errno.EBADF

    run_shm(main())


def test_debug_mode_checks_the_socket(run_shm: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(echo, "me.shm", 7000):
            loop.set_debug(True)
            with socket.socket(socket.AF_INET6) as sock, pytest.raises(ValueError, match="non-blocking"):
                await loop.sock_connect(sock, await resolve("me.shm"))
            loop.set_debug(False)

    run_shm(main())


def test_endpoints_of_two_kinds_at_once(run_shm: Run) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="make an endpoint of each kind"):
            await datagrams(local_addr=("me.shm", 0), remote_addr=("127.0.0.1", 9))
        receiving, inbox = await datagrams(local_addr=("me.shm", 9))
        for local in (("0.0.0.0", 0), ("127.0.0.1", 0), ("::", 0)):  # what is given by habit
            transport, _ = await datagrams(local_addr=local, remote_addr=("me.shm", 9))
            transport.sendto(b"x")
            transport.close()
        await until(lambda: len(inbox.got) == 3)
        transport, protocol = await datagrams(local_addr=("me.shm", 0))
        for host in ("127.0.0.1", "198.18.0.1", "::1", "2001:db8::1"):
            transport.sendto(b"x", (host, 9))
        assert [e.errno for e in protocol.errors] == [errno.ENETUNREACH] * 4
        assert not transport.is_closing()
        for one in (receiving, transport):
            one.close()

    run_shm(main())
