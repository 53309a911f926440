"""TLS on all ways in, with certificates made here."""

from __future__ import annotations

import asyncio
import ssl
import sys
from typing import Any

import pytest

from tests.aio.processes import pattern as endless
from tests.conformance import networks
from tests.conformance.certificates import Contexts
from tests.conformance.networks import (
    PATIENCE,
    TRANSPORTS,
    TransportNetwork,
    fixture_for,
    pattern,
    port_of,
    turns,
    until,
)

net = fixture_for(TRANSPORTS)
BIG = 3 << 20
OLD = sys.version_info < (3, 11)
"""asyncio had another TLS then, on its own loop."""


class Recorder(networks.Recorder):
    """Closes what was closed: asyncio's TLS of 3.10 complains of what the program did not close itself."""

    def connection_lost(self, error: BaseException | None) -> None:
        super().connection_lost(error)
        if self.transport is not None:
            self.transport.close()


class Accepting:
    def __init__(self, kind: Any = Recorder) -> None:
        self.made: list[Any] = []
        self.kind = kind

    def __call__(self) -> Any:
        self.made.append(self.kind())
        return self.made[-1]

    async def wait(self) -> Any:
        await until(lambda: self.made)
        await self.made[-1].made()
        return self.made[-1]


async def both(
    net: TransportNetwork, tls: Contexts, client: Any = Recorder, server: Any = Recorder, **kwargs: Any
) -> tuple[Any, Any, Any]:
    """(client, server, the listening one), hands shaken."""
    accept = Accepting(server)
    listening = await net.serve(accept, ssl=tls.server, **kwargs)
    _, protocol = await net.connect(client, port_of(listening), ssl=tls.client, **kwargs)
    return protocol, await accept.wait(), listening


async def end(c: Any, s: Any, listening: Any) -> None:
    c.transport.close()
    await c.lost()
    await s.lost()
    listening.close()
    await listening.wait_closed()


# -- it works


async def test_echo(net: TransportNetwork, tls: Contexts) -> None:
    c, s, listening = await both(net, tls)
    c.transport.write(b"ping")
    assert await s.got(4) == b"ping"
    s.transport.write(b"pong")
    assert await c.got(4) == b"pong"
    await end(c, s, listening)
    assert c.error is None
    assert s.error is None
    assert s.events[-1] == "lost"


async def test_what_the_transport_tells(net: TransportNetwork, tls: Contexts) -> None:
    c, s, listening = await both(net, tls)
    for one, context in ((c, tls.client), (s, tls.server)):
        info = one.transport.get_extra_info
        assert info("ssl_object").version() == "TLSv1.3"
        assert info("sslcontext") is context
        assert info("cipher")[1] == "TLSv1.3"
        assert info("compression") is None
        assert info("socket").fileno() >= 0
        assert info("nonsense", 5) == 5
        assert isinstance(one.transport, asyncio.Transport) or net.is_uvloop_itself
        assert not one.transport.is_closing()
        assert repr(one.transport)
    assert c.transport.get_extra_info("peercert")["subjectAltName"]
    assert not s.transport.get_extra_info("peercert")
    assert c.transport.get_extra_info("peername") == s.transport.get_extra_info("sockname")
    assert s.transport.get_extra_info("peername") == c.transport.get_extra_info("sockname")
    await end(c, s, listening)


async def test_streams(net: TransportNetwork, tls: Contexts) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await net.start_server(echo, ssl=tls.server)
    reader, writer = await net.open_connection(port_of(server), ssl=tls.client)
    assert writer.get_extra_info("ssl_object") is not None
    writer.write(b"line\nmore")
    await writer.drain()
    assert await reader.readline() == b"line\n"
    assert await reader.readexactly(4) == b"more"
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    server.close()


async def exchange(net: TransportNetwork, tls: Contexts, size: int) -> None:
    """`size` bytes each way at once, over streams."""
    step = 1 << 18

    async def both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mine: int) -> None:
        async def send() -> None:
            for at in range(0, size, step):
                writer.write(endless(mine, at, min(step, size - at)))
                await writer.drain()

        sending = asyncio.ensure_future(send())
        at = 0
        while at < size:
            data = await reader.read(step)
            assert data == endless(3 - mine, at, len(data))
            assert data
            at += len(data)
        await sending

    done = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await both_ways(reader, writer, 1)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    server = await net.start_server(handler, ssl=tls.server)
    reader, writer = await net.open_connection(port_of(server), ssl=tls.client)
    await both_ways(reader, writer, 2)
    writer.close()
    await writer.wait_closed()
    await done
    server.close()
    await server.wait_closed()


async def test_both_ways_at_once(net: TransportNetwork, tls: Contexts) -> None:
    await exchange(net, tls, BIG)


@pytest.mark.slow
def test_100_mb_both_ways_at_once(net: TransportNetwork, tls: Contexts) -> None:
    net.run(lambda: exchange(net, tls, 100_000_000), timeout=90)


async def test_many_at_once(net: TransportNetwork, tls: Contexts) -> None:
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.server)
    clients = await asyncio.gather(
        *(net.connect(Recorder, port_of(server), ssl=tls.client) for _ in range(10))
    )
    for n, (transport, _) in enumerate(clients):
        transport.write(b"%d" % n)
    await until(lambda: len(accept.made) == 10 and all(s.data for s in accept.made))
    assert sorted(bytes(s.data) for s in accept.made) == [b"%d" % n for n in range(10)]
    for transport, protocol in clients:
        transport.close()
        await protocol.lost()
    for s in accept.made:
        await s.lost()
    server.close()


async def test_server_hostname(net: TransportNetwork, tls: Contexts) -> None:
    server = await net.serve(Recorder, ssl=tls.wrong_name)
    transport, protocol = await net.connect(
        Recorder, port_of(server), ssl=tls.client, server_hostname="somebody.else"
    )
    transport.close()
    await protocol.lost()
    server.close()


async def test_client_certificates(net: TransportNetwork, tls: Contexts) -> None:
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.asking)
    transport, protocol = await net.connect(Recorder, port_of(server), ssl=tls.known_client)
    s = await accept.wait()
    assert s.transport.get_extra_info("peercert")["subjectAltName"] == (("email", "client@example.org"),)
    transport.close()
    await protocol.lost()
    await s.lost()
    server.close()


# -- it fails as it must


@pytest.mark.parametrize("which", ["wrong_name", "stranger"])
async def test_wrong_certificate(net: TransportNetwork, tls: Contexts, which: str) -> None:
    """The client says why; the server never saw a connection."""
    accept = Accepting()
    server = await net.serve(accept, ssl=getattr(tls, which))
    with pytest.raises(ssl.SSLCertVerificationError):
        await net.connect(Recorder, port_of(server), ssl=tls.client)
    with pytest.raises(ssl.SSLCertVerificationError):
        await net.open_connection(port_of(server), ssl=tls.client)
    await turns(20)
    assert all(s.events == [] for s in accept.made)
    server.close()
    await asyncio.wait_for(server.wait_closed(), PATIENCE)


async def test_default_context_trusts_nobody(net: TransportNetwork, tls: Contexts) -> None:
    server = await net.serve(Recorder, ssl=tls.server)
    with pytest.raises(ssl.SSLCertVerificationError):
        await net.connect(Recorder, port_of(server), ssl=True)
    server.close()


async def test_client_without_certificate(net: TransportNetwork, tls: Contexts) -> None:
    """In TLS 1.3 it learns so after its hands were shaken."""
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.asking)
    _, c = await net.connect(Recorder, port_of(server), ssl=tls.client)
    error = await c.lost()
    assert error is None or isinstance(error, OSError)  # (ssl.SSLError is one)
    assert all(s.events == [] for s in accept.made)
    server.close()


async def test_client_without_tls(net: TransportNetwork, tls: Contexts) -> None:
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.server)
    _, c = await net.connect(Recorder, port_of(server))
    c.transport.write(b"GET / HTTP/1.0\r\n\r\n")
    await c.lost()
    assert all(s.events == [] for s in accept.made)
    server.close()


async def test_server_without_tls(net: TransportNetwork, tls: Contexts) -> None:
    class Greeter(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"220 hello, this is no TLS\r\n")

    accept = Accepting(Greeter)
    server = await net.serve(accept)
    with pytest.raises(ssl.SSLError):
        await net.connect(Recorder, port_of(server), ssl=tls.client)
    for s in accept.made:
        await s.lost()
    server.close()


async def test_hung_up_while_shaking_hands(net: TransportNetwork, tls: Contexts) -> None:
    class HangsUp(Recorder):
        def data_received(self, data: bytes) -> None:
            self.transport.close()

    server = await net.serve(HangsUp)
    with pytest.raises(ConnectionResetError):
        await net.connect(Recorder, port_of(server), ssl=tls.client)
    server.close()


async def test_handshake_that_never_ends(net: TransportNetwork, tls: Contexts) -> None:
    """The server says nothing."""
    accept = Accepting()
    server = await net.serve(accept)
    with pytest.raises(ConnectionAbortedError):
        await net.connect(Recorder, port_of(server), ssl=tls.client, ssl_handshake_timeout=0.05)
    await (await accept.wait()).lost()
    server.close()


async def test_handshake_that_never_begins(net: TransportNetwork, tls: Contexts) -> None:
    """The client says nothing."""
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.server, ssl_handshake_timeout=0.05)
    _, silent = await net.connect(Recorder, port_of(server))
    await silent.lost()
    assert [s.events for s in accept.made] == [[]]
    server.close()
    await asyncio.wait_for(server.wait_closed(), PATIENCE)


async def test_others_are_served_while_one_is_silent(net: TransportNetwork, tls: Contexts) -> None:
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.server)
    _, silent = await net.connect(Recorder, port_of(server))
    _, c = await net.connect(Recorder, port_of(server), ssl=tls.client)
    c.transport.write(b"data")
    await until(lambda: [bytes(s.data) for s in accept.made if s.events] == [b"data"])
    assert not silent.is_lost
    for one in (c, silent):
        one.transport.close()
        await one.lost()
    await asyncio.gather(*(s.lost() for s in accept.made if s.events))
    server.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # asyncio's own forgets the socket then
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("timeout", [0, -1])
async def test_timeouts_that_are_none(net: TransportNetwork, tls: Contexts, timeout: float) -> None:
    server = await net.serve(Recorder, ssl=tls.server)
    with pytest.raises(ValueError, match="positive"):
        await net.connect(Recorder, port_of(server), ssl=tls.client, ssl_handshake_timeout=timeout)
    server.close()


# -- the contract


async def test_there_is_no_half_close(net: TransportNetwork, tls: Contexts) -> None:
    c, s, listening = await both(net, tls)
    assert c.transport.can_write_eof() is False
    with pytest.raises(NotImplementedError):
        c.transport.write_eof()
    await end(c, s, listening)


async def test_what_is_no_bytes(net: TransportNetwork, tls: Contexts) -> None:
    c, s, listening = await both(net, tls)
    for wrong in ("text", 5, [1]):
        with pytest.raises(TypeError):
            c.transport.write(wrong)
    c.transport.write(b"")
    c.transport.writelines([b"fi", bytearray(b"n"), memoryview(b"e")])
    assert await s.got(4) == b"fine"
    await end(c, s, listening)


async def test_close_flushes(net: TransportNetwork, tls: Contexts) -> None:
    c, s, listening = await both(net, tls)
    s.transport.pause_reading()
    data = pattern(1, BIG)
    c.transport.write(data)
    c.transport.close()
    assert c.transport.is_closing()
    await turns(20)
    s.transport.resume_reading()
    await s.lost()
    assert s.data == data
    await c.lost()
    assert c.events.count("lost") == s.events.count("lost") == 1
    listening.close()


async def test_abort(net: TransportNetwork, tls: Contexts) -> None:
    c, s, listening = await both(net, tls)
    c.transport.abort()
    assert await c.lost() is None or OLD
    await s.lost()
    assert c.events[-1] == "lost"
    listening.close()


async def test_pause_and_resume(net: TransportNetwork, tls: Contexts) -> None:
    """Both of reading and of writing. (Recorder looks that they alternate.)"""
    c, s, listening = await both(net, tls)
    s.transport.pause_reading()
    sent = 0
    while not c.paused:
        c.transport.write(endless(2, sent, 100_000))
        sent += 100_000
        assert sent < 64 << 20
        await turns(1)
    await turns(50)
    assert not s.data
    s.transport.resume_reading()
    await c.until(lambda: not c.paused)
    assert await s.got(sent) == pattern(2, sent)
    await end(c, s, listening)


@pytest.mark.skipif(OLD, reason="ssl_shutdown_timeout is of 3.11")
async def test_shutdown_that_never_ends(net: TransportNetwork, tls: Contexts) -> None:
    """The other side does not read, hence does not answer."""
    accept = Accepting()
    listening = await net.serve(accept, ssl=tls.server)
    _, c = await net.connect(
        Recorder,
        port_of(listening),
        ssl=tls.client,
        ssl_shutdown_timeout=0.05,
        ssl_handshake_timeout=PATIENCE,
    )
    s = await accept.wait()
    c.transport.write(b"first")
    assert await s.got(5) == b"first"
    s.transport.pause_reading()
    c.transport.write(pattern(3, 16 << 20))
    c.transport.close()
    error = await c.lost()
    assert isinstance(error, (TimeoutError, asyncio.TimeoutError))
    s.transport.abort()
    await s.lost()
    listening.close()


async def test_connect_cancelled_at_every_step(net: TransportNetwork, tls: Contexts) -> None:
    accept = Accepting()
    server = await net.serve(accept, ssl=tls.server)
    _, first = await net.connect(Recorder, port_of(server), ssl=tls.client)
    first.transport.close()
    await first.lost()
    for k in range(0, 60, 3):
        task = asyncio.ensure_future(net.connect(Recorder, port_of(server), ssl=tls.client))
        await turns(k)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            transport, protocol = task.result()
            transport.abort()
            await protocol.lost()
    transport, _ = await net.connect(Recorder, port_of(server), ssl=tls.client)
    transport.write(b"last")
    await until(lambda: accept.made[-1].data == b"last")
    transport.close()
    for s in accept.made:
        if s.events:
            await s.lost()
    server.close()
    await asyncio.wait_for(server.wait_closed(), PATIENCE)


# -- start_tls


async def test_start_tls_of_the_loop(net: TransportNetwork, tls: Contexts) -> None:
    if net.kind == "shm" and net.loop == "uvloop":
        return  # uvloop's own start_tls takes uvloop's transports alone
    loop = asyncio.get_running_loop()
    accept = Accepting()
    server = await net.serve(accept)
    plain, first = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    plain.write(b"STARTTLS")
    assert await s.got(8) == b"STARTTLS"
    upgraded_c, upgraded_s = Recorder(), Recorder()
    for one in (upgraded_c, upgraded_s):
        one.happened("made")
    upgraded_s.transport, upgraded_c.transport = await asyncio.gather(
        loop.start_tls(s.transport, upgraded_s, tls.server, server_side=True),
        loop.start_tls(plain, upgraded_c, tls.client, server_hostname=net.host),
    )
    upgraded_c.transport.write(b"secret")
    assert await upgraded_s.got(6) == b"secret"
    assert upgraded_c.transport.get_extra_info("ssl_object").version() == "TLSv1.3"
    upgraded_s.transport.write(pattern(4, BIG))
    assert await upgraded_c.got(BIG) == pattern(4, BIG)
    upgraded_c.transport.close()
    await upgraded_c.lost()
    await upgraded_s.lost()
    assert first.events == ["made"]
    server.close()


@pytest.mark.skipif(OLD, reason="StreamWriter.start_tls is of 3.11")
@pytest.mark.parametrize("size", [10, BIG])
async def test_start_tls_of_a_writer(net: TransportNetwork, tls: Contexts, size: int) -> None:
    answer = pattern(5, size)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        await writer.start_tls(tls.server)  # type: ignore[attr-defined]
        assert await reader.readline() == b"secret\n"
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await net.start_server(handler)
    reader, writer = await net.open_connection(port_of(server))
    writer.write(b"STARTTLS\n")
    assert await reader.readline() == b"go\n"
    await writer.start_tls(tls.client, server_hostname=net.host)
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    writer.write(b"secret\n")
    assert await asyncio.wait_for(reader.read(), PATIENCE) == answer
    writer.close()
    await writer.wait_closed()
    server.close()


async def test_start_tls_with_a_wrong_certificate(net: TransportNetwork, tls: Contexts) -> None:
    if net.kind == "shm" and net.loop == "uvloop":
        return
    loop = asyncio.get_running_loop()
    accept = Accepting()
    server = await net.serve(accept)
    plain, _ = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    upgraded = Recorder(), Recorder()
    for one in upgraded:
        one.happened("made")
    serving = asyncio.ensure_future(loop.start_tls(s.transport, upgraded[1], tls.stranger, server_side=True))
    with pytest.raises(ssl.SSLCertVerificationError):
        await loop.start_tls(plain, upgraded[0], tls.client, server_hostname=net.host)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await serving
    server.close()


async def test_start_tls_of_nonsense(net: TransportNetwork, tls: Contexts) -> None:
    if net.kind == "shm" and net.loop == "uvloop":
        return
    loop = asyncio.get_running_loop()
    accept = Accepting()
    server = await net.serve(accept)
    plain, c = await net.connect(Recorder, port_of(server))
    with pytest.raises(TypeError):
        await loop.start_tls(plain, Recorder(), "context")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await loop.start_tls(object(), Recorder(), tls.client)  # type: ignore[arg-type]
    s = await accept.wait()
    plain.close()
    await c.lost()
    await s.lost()
    server.close()
