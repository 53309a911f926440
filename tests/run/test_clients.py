"""Clients as they are: connections to a mapped address, or to one that a peer publishes, go through memory.
Nobody answers at these addresses over TCP, unless a test says so."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

import shmsock
from tests.run.programs import PATIENCE, free_port, program, result

PEER = "10.255.255.5"  # nobody's
LOOPS = ["asyncio", "uvloop"]
SAY = """
async def say(host, port, **kwds):
    reader, writer = await asyncio.open_connection(host, port, **kwds)
    writer.write(b"GET / HTTP/1.1\\r\\n\\r\\n")
    peer = writer.get_extra_info("peername")[0]
    print((await reader.read())[-6:].decode(), peer, type(writer.transport).__name__)
    writer.close()
"""


@pytest.fixture(autouse=True)
def _name(shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_NAME", "server")


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests with "memory"."""
    if b"\r\n\r\n" in await reader.read(4096):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nmemory")
    writer.close()


async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)
    writer.write(b"tcp:ip")
    writer.close()


def serve(main: Callable[[], Awaitable[Any]], port: int, **kwds: Any) -> Any:
    """Run `main()` while a server in shared memory has the port."""

    async def both() -> Any:
        async with await shmsock.start_server(http, port=port, **kwds):
            return await main()

    return asyncio.run(asyncio.wait_for(both(), PATIENCE))


def client(options: list[str], code: str, **env: str) -> Callable[[], Awaitable[str]]:
    """Return what runs a client, and returns what it prints."""
    script = f"import asyncio\n{code}\nasyncio.run(main())\n"
    env = {"SHMSOCK_NAME": "client", **env}
    return lambda: asyncio.to_thread(result, options, "-c", script, env=env)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_by_address_is_led_to_the_peer(loop: str) -> None:
    code = SAY + f"async def main(): await say('{PEER}', 7000)"
    said = serve(client(["--loop", loop, "--map", f"{PEER}=server"], code), 7000)
    assert said == f"memory {PEER} ShmTransport"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("extra", ["", ", happy_eyeballs_delay=0.1", ", family=2"])
def test_a_connection_by_name_is_led_to_the_peer(loop: str, extra: str) -> None:
    port = free_port()
    code = SAY + f"async def main(): await say('localhost', {port}{extra})"
    said = serve(client(["--loop", loop, "--map", f"127.0.0.1:{port}=server"], code), port)
    assert said == "memory 127.0.0.1 ShmTransport"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_other_hosts_and_ports_are_reached_as_ever(loop: str, host: str) -> None:
    async def main() -> Any:
        server = await asyncio.start_server(tcp, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        code = SAY + f"async def main(): await say('{host}', {port}); await say('{host}', '{port}')"
        options = ["--loop", loop, "--map", f"{PEER}=server,127.0.0.1:1=server", "--auto", "10.0.0.0/8"]
        async with server:
            return await client(options, code)()

    said = serve(main, 7000).splitlines()
    kind = "_SelectorSocketTransport" if loop == "asyncio" else "TCPTransport"
    assert said == [f"tcp:ip 127.0.0.1 {kind}"] * 2


@pytest.mark.parametrize("loop", LOOPS)
def test_nobody_at_a_name_is_an_error_as_ever(loop: str) -> None:
    code = """
async def main():
    for args in (("localhost", PORT), ("nobody.invalid", 1)):
        try:
            await asyncio.open_connection(*args)
        except OSError as error:
            print(type(error).__name__)
""".replace("PORT", str(free_port()))
    said = serve(client(["--loop", loop, "--map", f"{PEER}=server"], code), 7000)
    assert said.split()[-1] == "gaierror"
    assert said.split()[0] in ("ConnectionRefusedError", "OSError")  # of several addresses


@pytest.mark.parametrize("loop", LOOPS)
def test_tls_asks_for_the_name_that_the_program_asked_for(loop: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    port = free_port()
    code = f"""
import ssl
{SAY}
async def main():
    context = ssl.create_default_context(cafile={str(tmp_path / "ca.pem")!r})
    await say("localhost", {port}, ssl=context)
"""
    said = serve(client(["--loop", loop, "--map", f"127.0.0.1:{port}=server"], code), port, ssl=context)
    assert said.startswith("memory 127.0.0.1")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("library", ["aiohttp", "httpx", "anyio"])
def test_libraries_are_led_to_the_peer(library: str, loop: str) -> None:
    port = free_port()
    url = f"http://localhost:{port}/"
    code = {
        "aiohttp": f"""
import aiohttp
async def main():
    async with aiohttp.ClientSession() as session, session.get("{url}") as answer:
        print(await answer.text())
""",
        "httpx": f"""
import httpx
async def main():
    async with httpx.AsyncClient(trust_env=False) as client:
        print((await client.get("{url}")).text)
""",
        "anyio": f"""
import anyio
async def main():
    async with await anyio.connect_tcp("localhost", {port}) as stream:
        await stream.send(b"GET / HTTP/1.1\\r\\n\\r\\n")
        print(b"".join([part async for part in stream])[-6:].decode())
""",
    }[library]
    options = ["--loop", loop, "--map", f"127.0.0.1:{port}=server", "--map", f"[::1]:{port}=server"]
    assert serve(client(options, code), port) == "memory"


def test_aiohttp_asks_the_loop_where_aiodns_is_installed(tmp_path: Path) -> None:
    (tmp_path / "aiodns.py").write_text("""
class DNSResolver:
    def __init__(self, **kwds): pass
    async def getaddrinfo(self, *args, **kwds): raise AssertionError("a name server is asked")
    query = gethostbyname = getaddrinfo
""")
    code = """
import aiodns, aiohttp
async def main():
    async with aiohttp.ClientSession() as session, session.get("http://server.shm:7000/") as answer:
        print(await answer.text())
"""
    assert serve(client([], code, PYTHONPATH=str(tmp_path)), 7000) == "memory"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_socket_that_stays_without_transport_is_connected_over_tcp(loop: str) -> None:
    async def main() -> Any:
        async with await asyncio.start_server(tcp, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with await shmsock.start_server(http, port=port):
                code = f"""
import socket
async def main():
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", {port}))
        await loop.sock_sendall(sock, b"x")
        print((await loop.sock_recv(sock, 100)).decode())
"""
                return await client(["--loop", loop, "--map", f"127.0.0.1:{port}=server"], code)()

    assert serve(main, 7000) == "tcp:ip"


def test_a_peer_that_is_not_there_is_said(shm_region: Path) -> None:
    code = """
async def main():
    for port in (1, 7001):
        try:
            await asyncio.open_connection("HOST", port)
        except OSError as error:
            print(type(error).__name__, error.errno, error)
    print(await asyncio.get_running_loop().getaddrinfo("HOST", 80, type=1))
""".replace("HOST", PEER)
    said = serve(client(["--map", f"{PEER}=server", "--map", f"{PEER}:1=nobody"], code), 7000).splitlines()
    assert said[0].startswith(f"OSError 113 [Errno 113] {PEER} is mapped to nobody: no peer named 'nobody'")
    assert said[1].startswith("ConnectionRefusedError 111")
    assert "7001" in said[1]
    assert f"'{PEER}', 80" in said[2]


@pytest.mark.parametrize("loop", LOOPS)
def test_connected_datagrams_are_led_to_the_peer(loop: str) -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data, addr)

    code = """
class Client(asyncio.DatagramProtocol):
    def datagram_received(self, data, addr):
        came.set_result((data, addr))
async def main():
    global came
    loop = asyncio.get_running_loop()
    for to in (None, ("HOST", 7000)):
        came = loop.create_future()
        transport, _ = await loop.create_datagram_endpoint(Client, remote_addr=("HOST", 7000))
        transport.sendto(b"hello", to)
        print(await came, transport.get_extra_info("peername"))
        transport.close()
""".replace("HOST", PEER)

    async def main() -> Any:
        transport, _ = await shmsock.create_datagram_endpoint(Echo, (None, 7000))
        said = await client(["--loop", loop, "--map", f"{PEER}=server"], code)()
        transport.close()
        return said

    assert serve(main, 7001).splitlines() == [f"(b'hello', ('{PEER}', 7000)) ('{PEER}', 7000)"] * 2


AUTO_SERVER = """
import asyncio, sys
async def serve(reader, writer):
    writer.write(writer.get_extra_info("peername")[0].encode())
    writer.close()
async def main():
    server = await asyncio.start_server(serve, None, int(sys.argv[1]))
    print("serving", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_published_addresses_lead_to_the_peer_as_long_as_it_is_there(loop: str) -> None:
    async def published() -> list[str]:
        async with shmsock.attach(name="looker") as node:
            found: list[str] = node.statistics()["published"]
            return found

    os.environ["SHMSOCK_PUBLISH"] = "0.0.0.0/0"
    try:
        own = asyncio.run(published())
    finally:
        del os.environ["SHMSOCK_PUBLISH"]
    if not own:
        pytest.skip("this machine has no address of a network")
    port = free_port()
    both = {"SHMSOCK_PUBLISH": f"{own[0]}/32", "SHMSOCK_AUTO": f"{own[0]}/32"}
    code = f"""
async def main():
    for _ in range(2):
        reader, writer = await asyncio.open_connection("{own[0]}", {port})
        seen = (await reader.read()).decode()
        print(seen, writer.get_extra_info("peername"), type(writer.transport).__name__)
        writer.close()
        input()
"""
    script = f"import asyncio\n{code}\nasyncio.run(main())\n"
    in_memory = AUTO_SERVER.replace("None", "'*.shm'")
    with (
        program(["--name", "server"], "-c", AUTO_SERVER, str(port), env=both) as over_tcp,
        program(["--name", "other"], "-c", in_memory, str(port), env=both) as server,
    ):
        over_tcp.wait_for("serving")
        server.wait_for("serving")
        with program(["--name", "client", "--loop", loop], "-c", script, env=both) as asks:
            assert asks.wait_for(own[0]) == f"{own[0]} ('{own[0]}', {port}) ShmTransport"
            server.stop()
            asks.tell()
            second = asks.wait_for(own[0], 2)
            assert second.startswith(f"{own[0]} ('{own[0]}', {port})")
            assert "ShmTransport" not in second
            asks.tell()
            assert asks.ends() == 0
