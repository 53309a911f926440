"""TLS over anyio's streams: TLSStream.wrap, and connecting with tls=True."""

from __future__ import annotations

import ssl
from typing import Any

import anyio
import pytest
from anyio.streams.tls import TLSAttribute, TLSStream

from tests.aio.processes import pattern as endless
from tests.conformance.certificates import Contexts
from tests.conformance.networks import PATIENCE, fixture_for
from tests.conformance.stream_networks import ANYIO_STREAMS, AnyioStreams

net = fixture_for(ANYIO_STREAMS)
STEP = 1 << 18


async def both_ways(stream: Any, mine: int, size: int) -> None:
    async def send() -> None:
        for at in range(0, size, STEP):
            await stream.send(endless(mine, at, min(STEP, size - at)))

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        at = 0
        while at < size:
            data = await stream.receive(STEP)
            assert data == endless(3 - mine, at, len(data))
            at += len(data)


async def exchange(net: AnyioStreams, tls: Contexts, size: int) -> None:
    """`size` bytes each way at once."""
    served = anyio.Event()

    async def handler(end: Any) -> None:
        stream = await TLSStream.wrap(end.stream, server_side=True, ssl_context=tls.server)
        assert stream.extra(TLSAttribute.tls_version) == "TLSv1.3"
        await both_ways(stream, 1, size)
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        await stream.aclose()
        served.set()

    async with net.listen(handler) as port:
        stream = await net.connect_tls(port, ssl_context=tls.client)
        assert stream.extra(TLSAttribute.tls_version) == "TLSv1.3"
        await both_ways(stream, 2, size)
        await stream.aclose()
        await served.wait()


async def test_both_ways_at_once(net: AnyioStreams, tls: Contexts) -> None:
    await exchange(net, tls, 3 << 20)


@pytest.mark.slow
def test_100_mb_both_ways_at_once(net: AnyioStreams, tls: Contexts) -> None:
    net.run(lambda: exchange(net, tls, 100_000_000), timeout=90)


@pytest.mark.parametrize("which", ["wrong_name", "stranger"])
async def test_wrong_certificate(net: AnyioStreams, tls: Contexts, which: str) -> None:
    """The client says why; so does the server, in its own way."""
    failed: list[Exception] = []
    done = anyio.Event()

    async def handler(end: Any) -> None:
        try:
            await TLSStream.wrap(end.stream, server_side=True, ssl_context=getattr(tls, which))
        except Exception as error:
            failed.append(error)
        done.set()

    async with net.listen(handler) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            await net.connect_tls(port, ssl_context=tls.client)
        await done.wait()
    assert isinstance(failed[0], (ssl.SSLError, anyio.BrokenResourceError))


async def test_hostname(net: AnyioStreams, tls: Contexts) -> None:
    async def handler(end: Any) -> None:
        stream = await TLSStream.wrap(end.stream, server_side=True, ssl_context=tls.wrong_name)
        await stream.send(b"hello")
        await stream.aclose()

    async with net.listen(handler) as port:
        stream = await net.connect_tls(port, ssl_context=tls.client, tls_hostname="somebody.else")
        assert await stream.receive() == b"hello"
        await stream.aclose()


async def test_cut_off(net: AnyioStreams, tls: Contexts) -> None:
    """An end without TLS's own is no end."""

    async def handler(end: Any) -> None:
        await TLSStream.wrap(end.stream, server_side=True, ssl_context=tls.server)

    async with net.listen(handler) as port:
        stream = await net.connect_tls(port, ssl_context=tls.client)
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
        await anyio.aclose_forcefully(stream)


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("how", ["aclose", "forcefully", "own"])
async def test_a_handshake_that_somebody_ends(
    net: AnyioStreams, tls: Contexts, how: str, when: str, server_side: bool
) -> None:
    errors: list[BaseException] = []

    async def shake(stream: Any) -> None:
        context, name = (tls.server, None) if server_side else (tls.client, "server")
        try:
            with anyio.fail_after(PATIENCE / 4):
                await TLSStream.wrap(stream, server_side=server_side, hostname=name, ssl_context=context)
        except Exception as error:
            errors.append(error)

    async with net.pair() as (client, server):
        mine, other = (server.stream, client.stream) if server_side else (client.stream, server.stream)
        async with anyio.create_task_group() as group:
            if when == "during":
                group.start_soon(shake, mine)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
            if how == "forcefully":
                await anyio.aclose_forcefully(other)
            else:
                await (mine if how == "own" else other).aclose()
            if when == "before":
                await shake(mine)
    (error,) = errors
    ended = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, ssl.SSLError)
    assert isinstance(error, ended), repr(error)
