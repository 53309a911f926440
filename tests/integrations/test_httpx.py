"""The transport for httpx, on plain loops and on trio."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import trustme
from anyio.streams.tls import TLSListener

import shmsock
import shmsock.anyio
from shmsock.integrations.httpx import AsyncShmTransport

BODY = bytes(range(256)) * 40960  # 10 MiB
LIMITS = httpx.Limits(max_keepalive_connections=100)  # by default it closes what is idle beyond 20
SHORT = httpx.Timeout(30, read=0.05)
Main = Callable[[shmsock.Node], Awaitable[None]]


async def http(stream: Any) -> None:
    """Answer requests with what they bring, and close after "bye"."""
    async with stream:
        buffered = b""
        while True:
            while b"\r\n\r\n" not in buffered:
                try:
                    buffered += await stream.receive()
                except anyio.EndOfStream:
                    return
            head, _, body = buffered.partition(b"\r\n\r\n")
            size = next(
                int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:")
            )
            parts, got = [body], len(body)
            while got < size:
                parts.append(await stream.receive(1 << 20))
                got += len(parts[-1])
            body = b"".join(parts)
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            await stream.send(body)
            if body == b"bye":
                return
            buffered = b""


@pytest.fixture(params=["asyncio", "asyncio+uvloop", "trio"])
def run(request: pytest.FixtureRequest, shm_region: Path) -> Callable[..., None]:
    backend, _, uvloop = request.param.partition("+")

    def start(main: Main, **tls: Any) -> None:
        async def both() -> None:
            with anyio.fail_after(60):
                async with (
                    shmsock.anyio.attach(name="client") as node,
                    await shmsock.anyio.create_shm_listener(local_port=8000, node=node) as listener,
                    anyio.create_task_group() as group,
                ):
                    serving: Any = listener
                    if tls:
                        serving = TLSListener(listener, **tls)
                    group.start_soon(serving.serve, http)
                    await main(node)
                    group.cancel_scope.cancel()

        anyio.run(both, backend=backend, backend_options={"use_uvloop": True} if uvloop else {})

    return start


def client(node: shmsock.Node, verify: Any = True) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=AsyncShmTransport(verify, node=node, limits=LIMITS), timeout=30)


def test_connections_are_kept_and_reused(run: Any) -> None:
    async def main(node: shmsock.Node) -> None:
        async with client(node) as http:
            for data in (b"hello", BODY, b"x" * 100):
                answer = await http.post("http://localhost:8000/", content=data)
                assert answer.content == data
            assert node.statistics()["connected"] == 1

            async def one(number: int) -> None:
                for _ in range(3):
                    answer = await http.post("http://client.shm:8000/", content=str(number))
                    assert answer.text == str(number)

            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(one, number)
            assert node.statistics()["connected"] <= 51

    run(main)


def test_a_connection_that_the_server_closed_is_not_used_again(run: Any) -> None:
    async def main(node: shmsock.Node) -> None:
        async with client(node) as http:
            for number in range(1, 4):
                answer = await http.post("http://localhost:8000/", content=b"bye")
                stream = answer.extensions["network_stream"]
                while not stream.get_extra_info("is_readable"):  # its end is seen
                    await anyio.lowlevel.checkpoint()
                assert node.statistics()["connected"] == number

    run(main)


def test_errors_are_those_of_tcp(run: Any) -> None:
    async def main(node: shmsock.Node) -> None:
        async with client(node) as http:
            for url in (
                "http://nobody:8000/",
                "http://localhost:8001/",
                "http://example.com/",
                "http://10.1.2.3/",
            ):
                with pytest.raises(httpx.ConnectError):
                    await http.get(url)

    run(main)


def test_tls(run: Any) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("client.shm").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def main(node: shmsock.Node) -> None:
        async with client(node, trusting) as http:
            for data in (b"hello", BODY):
                answer = await http.post("https://client.shm:8000/", content=data)
                assert answer.content == data
            assert node.statistics()["connected"] == 1
            with pytest.raises(httpx.ConnectError):
                await http.get("https://localhost:8000/")

    run(main, ssl_context=context, standard_compatible=False)


def test_other_hosts_by_another_transport(run: Any) -> None:
    async def main(node: shmsock.Node) -> None:
        def elsewhere(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, text="elsewhere")

        mounts = {"all://*.shm": AsyncShmTransport(node=node)}
        async with httpx.AsyncClient(mounts=mounts, transport=httpx.MockTransport(elsewhere)) as http:
            assert (await http.post("http://client.shm:8000/", content=b"here")).text == "here"
            assert (await http.post("http://example.com/", content=b"here")).text == "elsewhere"

    run(main)


def test_who_does_not_answer_is_waited_for_as_long_as_asked(shm_region: Path) -> None:
    async def main() -> None:
        stopped = await shmsock.attach(name="stopped")
        server = await shmsock.create_server(asyncio.Protocol, port=8000, node=stopped)
        async with httpx.AsyncClient(transport=AsyncShmTransport(), timeout=SHORT) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.get("http://stopped:8000/")
        server.close()
        await stopped.aclose()

    asyncio.run(main())
