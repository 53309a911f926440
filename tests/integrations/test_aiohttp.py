"""The connector and the site for aiohttp, on plain loops."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import uvloop
from aiohttp import web

import shmsock
from shmsock.integrations.aiohttp import ShmConnector, ShmSite

BODY = bytes(range(256)) * 40960  # 10 MiB


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, shm_region: Path) -> Any:
    factory: Any = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop

    def start(main: Coroutine[Any, Any, None]) -> None:
        loop = factory()
        try:
            loop.run_until_complete(asyncio.wait_for(main, 60))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    return start


async def echo(request: web.Request) -> web.StreamResponse:
    if request.path == "/file":
        return web.FileResponse(request.query["path"])
    if request.path == "/ws":
        ws = web.WebSocketResponse(max_msg_size=0)
        await ws.prepare(request)
        async for message in ws:
            await ws.send_bytes(message.data)
        return ws
    if request.path == "/away":
        raise web.HTTPFound("http://example.invalid/")
    return web.Response(body=await request.read(), headers={"X-Remote": str(request.remote)})


async def serving(port: int = 8000, **kwds: Any) -> tuple[web.AppRunner, ShmSite]:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{name:.*}", echo)
    runner = web.AppRunner(app)
    await runner.setup()
    site = ShmSite(runner, port=port, **kwds)
    await site.start()
    return runner, site


def test_requests_files_and_websockets(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)

    async def main() -> None:
        runner, site = await serving(0)
        url = f"http://localhost:{site.port}"
        node = await shmsock.attach(name="client")
        async with aiohttp.ClientSession(url, connector=ShmConnector(node=node)) as session:
            async with session.post("/", data=BytesIO(BODY)) as answer:
                assert await answer.read() == BODY
                assert answer.headers["X-Remote"] == "client"
            for _ in range(10):
                async with session.get("/file", params={"path": str(tmp_path / "file")}) as answer:
                    assert await answer.read() == BODY
            assert node.statistics()["connected"] == 1  # one connection for all

            async def one(number: int) -> None:
                for _ in range(3):
                    async with session.post("/", data=str(number)) as answer:
                        assert await answer.text() == str(number)

            await asyncio.gather(*map(one, range(50)))
            assert node.statistics()["connected"] <= 50
            async with session.ws_connect("/ws", max_msg_size=0) as ws:
                for data in (b"hello", BODY):
                    await ws.send_bytes(data)
                    assert await ws.receive_bytes() == data
        await node.aclose()
        await runner.cleanup()

    run(main())


def test_errors_are_those_of_tcp(run: Any) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession(connector=ShmConnector()) as session:
            for url, kind in (
                ("http://nobody:8000/", aiohttp.ClientConnectorDNSError),
                ("http://example.com/", aiohttp.ClientConnectorDNSError),
                ("http://10.1.2.3/", aiohttp.ClientConnectorError),
                ("http://localhost:8001/", aiohttp.ClientConnectorError),
            ):
                with pytest.raises(kind) as caught:
                    await session.get(url)
                assert isinstance(caught.value.os_error, OSError)
            with pytest.raises(aiohttp.ClientConnectorError) as caught:
                await session.get("http://localhost:8001/")
            assert isinstance(caught.value.os_error, ConnectionRefusedError)

    run(main())


def test_a_redirect_does_not_leave_the_region(run: Any) -> None:
    async def main() -> None:
        runner, _ = await serving()
        async with aiohttp.ClientSession(connector=ShmConnector()) as session:
            with pytest.raises(aiohttp.ClientConnectorDNSError, match=r"example\.invalid"):
                await session.get("http://localhost:8000/away")
        await runner.cleanup()

    run(main())


def test_tls_and_fingerprints(run: Any) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("server.shm").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def main() -> None:
        server = await shmsock.attach(name="server")
        runner, site = await serving(8443, ssl_context=context, node=server)
        assert site.name == "https://server.shm:8443"
        url = "https://server.shm:8443/"
        async with aiohttp.ClientSession(connector=ShmConnector()) as session:
            async with session.post(url, data=BytesIO(BODY), ssl=trusting) as answer:
                assert await answer.read() == BODY
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get("https://localhost:8443/", ssl=trusting)
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(url)
            with pytest.raises(aiohttp.ServerFingerprintMismatch):
                await session.get(url, ssl=aiohttp.Fingerprint(b"0" * 32))
        await runner.cleanup()
        await server.aclose()

    run(main())


def test_a_peer_that_does_not_answer_is_waited_for_as_long_as_asked(run: Any) -> None:
    async def main() -> None:
        stopped = await shmsock.attach(name="stopped")
        server = await shmsock.create_server(asyncio.Protocol, port=8000, node=stopped)
        async with aiohttp.ClientSession(connector=ShmConnector()) as session:
            timeout = aiohttp.ClientTimeout(sock_connect=0.05, sock_read=0.05)
            with pytest.raises(asyncio.TimeoutError):
                await session.get("http://stopped:8000/", timeout=timeout)
        server.close()
        await stopped.aclose()

    run(main())


def test_a_server_that_comes_back_is_found(run: Any) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession(connector=ShmConnector()) as session:
            for _ in range(3):
                node = await shmsock.attach(name="server")
                runner, _ = await serving(node=node)
                async with session.get("http://server:8000/") as answer:
                    assert answer.status == 200
                await runner.cleanup()
                await node.aclose()

    run(main())


def test_a_hosts_file_says_where_else(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 server\n")
    monkeypatch.setenv("SHMSOCK_HOSTS", str(tmp_path / "hosts"))

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/", echo)
        runner = web.AppRunner(app)
        await runner.setup()
        sock = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(runner, sock).start()
        async with aiohttp.ClientSession(connector=ShmConnector()) as session:
            url = f"http://server:{sock.getsockname()[1]}/"
            async with session.post(url, data=b"tcp") as answer:
                assert await answer.read() == b"tcp"
        await runner.cleanup()

    run(main())
