"""Falling back to TCP: when, with what, and how it is told."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import shmsock
from shmsock.aio.attach import current_node
from shmsock.aio.fallback import targets
from shmsock.aio.node import Node
from tests.aio.conftest import Run, until
from tests.aio.networks import Change, network_of_its_own
from tests.aio.processes import Child

ADDRESS, SECOND = "10.77.0.5", "10.77.0.6"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def network(region: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Change]:
    monkeypatch.setenv("SHMSOCK_REGION", region)
    monkeypatch.setenv("SHMSOCK_NAME", "a")
    with network_of_its_own() as change:
        change("add", f"{ADDRESS}/32")
        yield change


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hosts"
    path.write_text(f"# where they are\n\n{SECOND} c b.shm\n  {ADDRESS}\tB  # the second\nfd77::9 six\n")
    monkeypatch.setenv("SHMSOCK_HOSTS", str(path))
    return path


def path_of(where: Any) -> Any:
    return where.get_extra_info("shmsock_path", "tcp")


async def way_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Which way the server says that it was, if the client says the same."""
    writer.write(b"hello\n")
    await writer.drain()
    answer = (await reader.readline()).decode()
    way = answer.split()[0]
    assert answer == f"{way} hello\n"
    assert path_of(writer) == path_of(writer.transport) == way
    writer.close()
    await writer.wait_closed()
    return way


async def way_to(host: Any, port: int = 7000, **kwds: Any) -> str:
    return await way_of(*await shmsock.open_connection(host, port, **kwds))


class Client(asyncio.Protocol):
    made = 0

    def __init__(self) -> None:
        Client.made += 1
        self.line: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.line.set_result(data)


@pytest.mark.parametrize("fallback", [ADDRESS, (ADDRESS, 7000)])
def test_only_when_the_peer_is_not_there(
    run: Run, region: str, network: Change, fallback: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shmsock")

    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to("b", fallback=fallback) == "shm"
            assert await way_to("nobody.shm", fallback=fallback) == "tcp"
            assert await way_to(5, fallback=fallback) == "tcp"  # nobody has that section
            child.tell()
            await child.says("left")
            assert await way_to("b", fallback=fallback) == "tcp"
            with pytest.raises(socket.gaierror):
                await way_to("b")

    run(main())
    ways = [r.getMessage().partition(",")[0] for r in caplog.records if "goes" in r.getMessage()]
    assert ways == ["'b' goes through memory", *(f"{x!r} goes over TCP" for x in ("nobody.shm", 5, "b"))]


def test_a_refusal_is_an_answer(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        async def unexpected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raise AssertionError("it went over TCP")

        async with Child("serve", region, "b", loop=run.loop) as child:
            await child.says("ready")
            async with await asyncio.start_server(unexpected, ADDRESS, 7001):
                for host in ("b", (await current_node()).find("b", 7000, ()).section, None):
                    with pytest.raises(ConnectionRefusedError, match="nobody there listens"):
                        await shmsock.open_connection(host, 7001, fallback=ADDRESS)

    run(main())


def test_killed_stopped_and_restarted(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as tcp:
            await tcp.says("ready")
            tcp.tell()
            await tcp.says("left")  # and answers over TCP
            async with Child("serve", region, "b", loop=run.loop) as child:
                await child.says("ready")
                _, writer = await shmsock.open_connection("b", 7000, fallback=ADDRESS)
                assert path_of(writer) == "shm"
                writer.close()
                child.stop()
                assert await way_to("b", fallback=ADDRESS) == "tcp"
                assert (await current_node()).statistics()["peers"] == 2  # not taken for dead yet
                child.kill()
                assert await way_to("b", fallback=ADDRESS) == "tcp"
            async with Child("serve", region, "b", loop=run.loop) as child:
                await child.says("ready")
                _, writer = await shmsock.open_connection("b", 7000, fallback=ADDRESS)
                assert path_of(writer) == "shm"
                writer.close()

    run(main())


@pytest.mark.parametrize("how", ["missing", "full"])
def test_without_a_region(
    run: Run,
    make: Callable[..., str],
    network: Change,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    region = make(peers=1)
    there = f"{region}-not"
    monkeypatch.setenv("SHMSOCK_REGION", region if how == "full" else there)

    async def main() -> None:
        async with Child("both", region, "c", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            for _ in range(2):
                assert await way_to("b", fallback=ADDRESS) == "tcp"
            assert not os.path.exists(there)

    run(main())
    assert caplog.text.count("TCP is used") == 1


def test_a_name_that_is_pinned_elsewhere(
    run: Run, region: str, network: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMSOCK_PIN", "b=9")

    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to("b", fallback=ADDRESS) == "tcp"

    run(main())


def test_a_node_that_is_closed_is_no_reason(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        node: Node = await shmsock.attach(region)
        await node.aclose()
        with pytest.raises(shmsock.NodeClosedError):
            await way_to("b", fallback=ADDRESS, node=node)

    run(main())


def test_both_fail(run: Run, network: Change) -> None:
    async def main() -> None:
        with pytest.raises(ConnectionRefusedError) as told:
            await shmsock.open_connection("b", 7000, fallback=ADDRESS)
        assert isinstance(told.value.__cause__, socket.gaierror)

    run(main())


@pytest.mark.parametrize(
    ("fallback", "error"),
    [("b.shm", ValueError), (("b.SHM.", 1), ValueError), (5, TypeError), ((ADDRESS, "x"), TypeError)],
)
def test_no_such_fallback(run: Run, network: Change, fallback: Any, error: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(error, match="fallback is"):
            await shmsock.open_connection("b", 7000, fallback=fallback)

    run(main())


def test_what_is_given_goes_along(run: Run, network: Change) -> None:
    """limit, local_addr, and a protocol that is made once."""
    network("add", f"{SECOND}/32")

    async def main() -> None:
        def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"x" * 1000 + b"\n")
            writer.close()

        async with await asyncio.start_server(answer, ADDRESS, 7000):
            reader, writer = await shmsock.open_connection(
                "b", 7000, fallback=ADDRESS, limit=100, local_addr=(SECOND, 0)
            )
            assert writer.get_extra_info("sockname")[0] == SECOND
            with pytest.raises(ValueError, match="limit"):
                await reader.readline()
            writer.close()
            for own in (None, "a.shm"):
                Client.made = 0
                transport, protocol = await shmsock.create_connection(
                    Client, "b", 7000, fallback=ADDRESS, local_addr=(own, 0)
                )
                assert Client.made == 1
                assert await protocol.line
                assert path_of(transport) == "tcp"
                transport.close()

    run(main())


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's); the certificate is of the peer's name."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("b.shm").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


def test_tls(run: Run, network: Change, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """The certificate is that of the name which was asked for."""
    server, client = contexts

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"tcp " + await reader.readline())
            writer.close()

        async with await asyncio.start_server(answer, ADDRESS, 7000, ssl=server):
            assert await way_to("b.shm", fallback=ADDRESS, ssl=client) == "tcp"
            with pytest.raises(ssl.SSLCertVerificationError):
                await way_to("c.shm", fallback=ADDRESS, ssl=client)

    run(main())


def test_start_tls(run: Run, network: Change, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            await writer.drain()
            await start_tls(writer, server)
            writer.write(b"tcp " + await reader.readline())
            writer.close()

        async def start_tls(writer: asyncio.StreamWriter, context: Any, **kwds: Any) -> None:
            if hasattr(writer, "start_tls"):
                await writer.start_tls(context, **kwds)

        async with await asyncio.start_server(answer, ADDRESS, 7000):
            reader, writer = await shmsock.open_connection("b", 7000, fallback=ADDRESS)
            if not hasattr(writer, "start_tls"):
                pytest.skip("StreamWriter.start_tls is of 3.11")
            writer.write(b"plain\n")
            assert await reader.readline() == b"plain\n"
            await start_tls(writer, client, server_hostname="b.shm")
            assert writer.get_extra_info("ssl_object") is not None
            assert await way_of(reader, writer) == "tcp"

    run(main())


# -- the hosts file


def test_hosts(run: Run, region: str, network: Change, hosts: Path) -> None:
    """Several addresses of a name are tried in their order."""

    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to("b") == "shm"
            child.tell()
            await child.says("left")
            assert await way_to("b") == await way_to("B.shm") == "tcp"
            with pytest.raises(OSError, match=r"10\.77\.0\.6|unreachable"):
                await way_to("c")
            with pytest.raises(socket.gaierror):
                await way_to("d")
            assert await way_to("d", fallback=ADDRESS) == "tcp"
            hosts.write_text(f"{ADDRESS} d\n")
            assert await way_to("d") == "tcp"

    run(main())


def test_hosts_are_read_as_etc_hosts(hosts: Path) -> None:
    assert targets("b", 1, None) == [(SECOND, 1), (ADDRESS, 1)]
    assert targets("six.shm", 2, None) == [("fd77::9", 2)]
    for host in ("d", None, "", "localhost", 3, "no name", "::1"):
        assert targets(host, 1, None) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("10.0.0.5 b\n10.0.0.5000 c\n", "line 2: '10.0.0.5000'"),
        ("b 10.0.0.5\n", "line 1: 'b'"),
        ("\n\n10.0.0.5\n", "line 3: '10.0.0.5' stands alone"),
        ("10.0.0.5 b c/d\n", "line 1: 'c/d'"),
        ("\xff\x00 b", "line 1: "),
    ],
)
def test_hosts_that_make_no_sense(run: Run, network: Change, hosts: Path, text: str, told: str) -> None:
    hosts.write_bytes(text.encode("latin-1"))

    async def main() -> None:
        with pytest.raises(ValueError, match="SHMSOCK_HOSTS") as seen:
            await shmsock.open_connection("b", 7000)
        assert told in str(seen.value)
        assert str(hosts) in str(seen.value)

    run(main())


def test_hosts_that_are_not_there(run: Run, network: Change, hosts: Path) -> None:
    hosts.unlink()

    async def main() -> None:
        with pytest.raises(ValueError, match=r"SHMSOCK_HOSTS: .*No such file"):
            await shmsock.open_connection("b", 7000)

    run(main())


def test_hosts_that_are_being_written(hosts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who could read them once goes on with that, and is told once of each mistake."""
    before = targets("b", 1, None)
    for mistake in (lambda: hosts.write_text("10.0.0."), hosts.unlink):
        caplog.clear()
        mistake()
        assert [targets("b", 1, None) for _ in range(3)] == [before] * 3
        assert [str(hosts) in record.getMessage() for record in caplog.records] == [True]
    hosts.write_text("10.0.0.9 b\n")
    assert targets("b", 1, None) == [("10.0.0.9", 1)]


# -- programs that know nothing of it


@pytest.fixture
def shm_loop(run: Run) -> Callable[[Any], Any]:
    """run(coroutine) on the `.shm` loop of that kind."""
    import uvloop

    def call(main: Any) -> Any:
        loop = shmsock.loop_factory(uvloop.Loop if run.loop == "uvloop" else None)()
        try:
            return loop.run_until_complete(asyncio.wait_for(main, 100))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return call


def test_a_shm_loop(
    run: Run, shm_loop: Callable[[Any], Any], region: str, network: Change, hosts: Path
) -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_of(*await asyncio.open_connection("b.shm", 7000)) == "shm"
            stand_in = (await loop.getaddrinfo("b.shm", 7000, type=socket.SOCK_STREAM))[0][4][0]
            assert stand_in.startswith("ff01:")
            child.tell()
            await child.says("left")
            calls: list[tuple[str, Any]] = [("b.shm", {}), (stand_in, {}), ("d.shm", {"fallback": ADDRESS})]
            for host, kwds in calls:
                reader, writer = await asyncio.open_connection(host, 7000, **kwds)
                assert writer.get_extra_info("peername") == (ADDRESS, 7000)
                assert await way_of(reader, writer) == "tcp"
            with pytest.raises(socket.gaierror):
                await asyncio.open_connection("d.shm", 7000)
            infos = await loop.getaddrinfo("b.shm", 7000, type=socket.SOCK_STREAM)
            assert [info[4][0] for info in infos] == [SECOND, ADDRESS]
            assert await loop.getaddrinfo("b.shm", 7000, family=socket.AF_INET6) == []
            with socket.socket() as sock:  # as aiohttp connects
                sock.setblocking(False)
                await loop.sock_connect(sock, infos[1][4])
                await loop.sock_sendall(sock, b"hello\n")
                assert await loop.sock_recv(sock, 100) == b"tcp hello\n"

    shm_loop(main())


def test_cancelled_on_its_way(run: Run, region: str, network: Change) -> None:
    """While it waits for a peer that stands still."""

    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child:
            await child.says("ready")
            node = await current_node()
            _, writer = await shmsock.open_connection("b", 7000, node=node)
            writer.close()
            await writer.wait_closed()
            child.stop()
            going = asyncio.create_task(way_to("b", fallback=ADDRESS))
            await until(lambda: node.engine.impatient)
            going.cancel()
            with pytest.raises(asyncio.CancelledError):
                await going
            assert not node.engine.impatient
            child.resume()
            await until(lambda: node.statistics()["connections"] == 0)

    run(main())
