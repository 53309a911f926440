"""TLS on what is going away: a handshake that either side ends, before it began or in the middle of it, ends
for the other side too, and is an error for both."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
from collections.abc import Awaitable
from typing import Any

import pytest

import shmsock
from shmsock.aio.attach import current_node
from tests.aio.processes import reset
from tests.conformance.certificates import Contexts
from tests.conformance.networks import (
    PATIENCE,
    SERVER,
    TRANSPORTS,
    KeepsOpen,
    TransportNetwork,
    fixture_for,
    port_of,
    turns,
    until,
)

net = fixture_for(TRANSPORTS)
HELLO = b"\x16\x03\x01"  # how a handshake begins
BROKEN = (ConnectionError, ssl.SSLError)
PEERS = ["close", "abort", "reset", "hello_close", "hello_abort", "cancelled"]


async def fails(handshake: Awaitable[Any]) -> BaseException:
    """What it raises; it has no time to hang."""
    try:
        made = await asyncio.wait_for(handshake, PATIENCE / 4)
    except asyncio.TimeoutError:
        raise AssertionError("it hangs") from None
    except Exception as error:
        return error
    raise AssertionError(f"it gave {made!r}")


async def end(how: str, writer: Any, tls: Contexts, server_side: bool) -> None:
    """What the other side does."""
    if how.startswith("hello"):
        writer.write(HELLO)
    if how == "cancelled":
        context = tls.server if server_side else tls.client
        transport = writer.transport
        shaking = asyncio.ensure_future(
            asyncio.get_running_loop().start_tls(
                transport,
                transport.get_protocol(),
                context,
                server_side=server_side,
                server_hostname=None if server_side else "x",
            )
            if not hasattr(writer, "start_tls")
            else writer.start_tls(context, server_hostname=None if server_side else "x")
        )
        await turns(1)
        shaking.cancel()
        with contextlib.suppress(asyncio.CancelledError, *BROKEN):
            await shaking
    elif how == "reset":
        reset(writer.transport)
    elif how.endswith("abort"):
        writer.transport.abort()
    else:
        writer.close()


def stock_start_tls(net: TransportNetwork) -> bool:
    """Is there a StreamWriter.start_tls()?"""
    return net.kind == "shm" or sys.version_info >= (3, 11)


async def two_streams(net: TransportNetwork) -> tuple[Any, Any, Any]:
    """(client's reader and writer, server's, the server)."""
    accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result((reader, writer))
        await done.wait()

    done = asyncio.Event()
    server = await net.start_server(handler)
    client = await net.open_connection(port_of(server))
    client[1].write(b"x")
    other = await accepted
    assert await other[0].read(1) == b"x"
    other[1].write(b"x")
    assert await client[0].read(1) == b"x"
    done.set()
    return client, other, server


def over(reader: asyncio.StreamReader) -> bool:
    return bool(reader._eof) or reader.exception() is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("how", PEERS)
async def test_the_peer_ends(
    net: TransportNetwork, tls: Contexts, how: str, when: str, server_side: bool
) -> None:
    if not stock_start_tls(net):
        return
    if how == "cancelled" and when == "during" and not server_side and sys.version_info >= (3, 15):
        return  # start_tls() answers at once what its reader has: the client's is done by then
    client, other, server = await two_streams(net)
    (reader, writer), peer = (other, client) if server_side else (client, other)
    context = tls.server if server_side else tls.client
    keys = {} if server_side else {"server_hostname": net.host}
    if when == "before":
        await end(how, peer[1], tls, not server_side)
        await until(lambda: over(reader))
        error = await fails(writer.start_tls(context, **keys))
    else:
        shaking = asyncio.ensure_future(fails(writer.start_tls(context, **keys)))
        await turns()
        await end(how, peer[1], tls, not server_side)
        error = await shaking
    assert isinstance(error, BROKEN), repr(error)
    assert writer.is_closing()
    server.close()
    net.reported()


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("when", ["before", "during"])
async def test_this_side_ends(
    net: TransportNetwork, tls: Contexts, how: str, when: str, server_side: bool
) -> None:
    """asyncio over TCP hangs before, and gives a writer that has no transport during it."""
    if net.control or not stock_start_tls(net):
        return
    client, other, server = await two_streams(net)
    (_, writer), peer = (other, client) if server_side else (client, other)
    context = tls.server if server_side else tls.client
    keys = {} if server_side else {"server_hostname": net.host}

    if when == "during":
        shaking = asyncio.ensure_future(fails(writer.start_tls(context, **keys)))
        await turns()
    transport = writer.transport
    (transport.close if how == "close" else transport.abort)()
    if when == "before":
        shaking = asyncio.ensure_future(fails(writer.start_tls(context, **keys)))
    error = await shaking
    assert isinstance(error, ConnectionResetError), repr(error)
    assert writer.transport is transport
    peer[1].close()
    server.close()
    net.reported()


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("how", ["close", "abort", "cancel", "timeout"])
async def test_streams_end_with_their_handshake(
    net: TransportNetwork, tls: Contexts, how: str, server_side: bool
) -> None:
    """Who reads, or waits until it is closed, hears of it. (asyncio over TCP lets them wait.)"""
    if net.control or not stock_start_tls(net):
        return
    client, other, server = await two_streams(net)
    (reader, writer), peer = (other, client) if server_side else (client, other)
    keys: dict[str, Any] = {} if server_side else {"server_hostname": net.host}
    if how == "timeout":
        keys["ssl_handshake_timeout"] = 0.05
    context, transport = tls.server if server_side else tls.client, writer.transport
    shaking = asyncio.ensure_future(writer.start_tls(context, **keys))
    await turns()
    {"close": transport.close, "abort": transport.abort, "cancel": shaking.cancel}.get(how, int)()
    with pytest.raises((asyncio.CancelledError, ConnectionError)):
        await asyncio.wait_for(shaking, PATIENCE / 4)
    for end in (reader.read(), writer.wait_closed()):
        with contextlib.suppress(ConnectionError):
            assert not await asyncio.wait_for(end, PATIENCE / 4)
    peer[1].close()
    server.close()
    net.reported()


@pytest.mark.parametrize("how", ["close", "abort", "hello_close"])
@pytest.mark.parametrize("when", ["before", "during"])
async def test_start_tls_of_the_loop(net: TransportNetwork, tls: Contexts, how: str, when: str) -> None:
    if net.kind == "shm" and net.loop == "uvloop":
        return  # uvloop's own start_tls takes uvloop's transports alone
    loop = asyncio.get_running_loop()
    made: list[KeepsOpen] = []

    def factory() -> KeepsOpen:
        made.append(KeepsOpen())
        return made[-1]

    server = await net.serve(factory)
    _, writer = await net.open_connection(port_of(server))
    await until(lambda: made)
    await made[0].made()
    transport: Any = made[0].transport
    shaking = None
    if when == "during":
        shaking = asyncio.ensure_future(
            fails(loop.start_tls(transport, KeepsOpen(), tls.server, server_side=True))
        )
        await turns()
    await end(how, writer, tls, False)
    if shaking is None:
        await made[0].eof()
        shaking = asyncio.ensure_future(
            fails(loop.start_tls(transport, KeepsOpen(), tls.server, server_side=True))
        )
    error = await shaking
    assert isinstance(error, BROKEN), repr(error)
    assert transport.is_closing()
    server.close()
    net.reported()


async def test_another_protocol_is_told_of_an_end_that_came_before_it(net: TransportNetwork) -> None:
    accepted: list[KeepsOpen] = []

    def factory() -> KeepsOpen:
        accepted.append(KeepsOpen())
        return accepted[-1]

    server = await net.serve(factory)
    _, writer = await net.open_connection(port_of(server))
    writer.close()
    await until(lambda: accepted)
    await accepted[0].eof()
    transport: Any = accepted[0].transport
    after = KeepsOpen()
    after.happened("made")
    transport.pause_reading()
    transport.set_protocol(after)
    transport.resume_reading()
    if not net.is_uvloop_itself:  # it closes the handle's reading side for good
        await after.eof()
    transport.close()
    server.close()


async def closed(net: TransportNetwork, handshake: Awaitable[Any], node: Any, how: str) -> None:
    """What is in the middle of a handshake is told why; nothing succeeds without a transport."""
    shaking = asyncio.ensure_future(fails(handshake))
    await until(lambda: [t for t in node.transports if "SSL" in type(t.get_protocol()).__name__])
    await turns()
    if how == "aclose":
        await node.aclose()
    else:
        node.close()
    error = await shaking
    assert isinstance(error, shmsock.NodeClosedError), repr(error)
    net.reported()


@pytest.mark.parametrize("how", ["close", "aclose"])
@pytest.mark.parametrize("way", ["open_connection", "create_connection"])
async def test_the_node_is_closed_under_a_connect(
    net: TransportNetwork, tls: Contexts, way: str, how: str
) -> None:
    if net.control:
        return
    server = await net.serve(asyncio.Protocol)  # shakes no hands
    node = await current_node()
    if way == "open_connection":
        connecting = net.open_connection(port_of(server), ssl=tls.client)
    else:
        connecting = net.connect(asyncio.Protocol, port_of(server), ssl=tls.client)
    await closed(net, connecting, node, how)
    server.close()


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("how", ["close", "aclose"])
async def test_the_node_is_closed_under_start_tls(
    net: TransportNetwork, tls: Contexts, how: str, server_side: bool
) -> None:
    if net.control or not stock_start_tls(net):
        return
    client, other, server = await two_streams(net)
    _, writer = other if server_side else client
    keys = {} if server_side else {"server_hostname": net.host}
    shaking = writer.start_tls(tls.server if server_side else tls.client, **keys)
    await closed(net, shaking, writer.get_extra_info("shmsock_node"), how)
    assert writer.transport is not None
    client[1].close()
    other[1].close()
    server.close()


async def test_a_node_waits_for_what_its_closed_writers_hold(net: TransportNetwork, tls: Contexts) -> None:
    if net.control:
        return
    reading: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reading.set_result(len(await reader.read()))
        writer.close()

    node = await current_node()
    async with shmsock.attach(node.region.url, name="c") as other:
        server = await shmsock.start_server(handler, port=7000, ssl=tls.server, node=other)
        async with shmsock.attach(node.region.url, name="d") as own:
            _, writer = await shmsock.open_connection(
                "c", 7000, ssl=tls.client, server_hostname=SERVER, node=own
            )
            writer.write(bytes(5 << 20))
            writer.close()
        assert await asyncio.wait_for(reading, PATIENCE) == 5 << 20
        server.close()
    net.reported()


@pytest.mark.parametrize("unread", [False, True], ids=["all read", "tickets unread"])
@pytest.mark.parametrize("writes", [0, 3])
async def test_what_was_written_arrives_though_its_writer_is_gone(
    net: TransportNetwork, tls: Contexts, writes: int, unread: bool
) -> None:
    """What the server says meanwhile (session tickets, its close_notify) is read by nobody: what had come
    before is read all the same."""
    if net.control:
        return
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    shaken, gone = asyncio.Event(), asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shaken.set()
        await gone.wait()
        for _ in range(writes):
            writer.write(b"too late")
            await turns()
        got.set_result(await reader.read())
        writer.close()

    node = await current_node()
    async with shmsock.attach(node.region.url, name="c") as other:
        server = await shmsock.start_server(handler, port=7000, ssl=tls.server, node=other)
        own = await shmsock.attach(node.region.url, name="d")
        connecting = asyncio.ensure_future(
            shmsock.open_connection("c", 7000, ssl=tls.client, server_hostname=SERVER, node=own)
        )
        connecting.add_done_callback(lambda _: unread and [t.pause_reading() for t in own.transports])
        _, writer = await connecting
        await shaken.wait()
        await turns()
        writer.write(b"precious")
        writer.close()
        own.close()
        await turns()
        gone.set()
        assert await asyncio.wait_for(got, PATIENCE) == b"precious"
        server.close()
    net.reported()
