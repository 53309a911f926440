"""Servers: asyncio.Server's surface, of each version of Python."""

from __future__ import annotations

import asyncio
import errno
import gc
import sys
from typing import Any

import pytest

from tests.conformance.networks import (
    PATIENCE,
    TRANSPORTS,
    Recorder,
    TransportNetwork,
    fixture_for,
    pattern,
    port_of,
    turns,
    until,
)

net = fixture_for(TRANSPORTS)


class Oops(Exception):
    """Raised by handlers of these tests."""


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def ask(net: TransportNetwork, port: int, text: bytes = b"ping") -> bytes:
    reader, writer = await net.open_connection(port)
    writer.write(text)
    writer.write_eof()
    answer: bytes = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


class Accepting:
    """A protocol factory that keeps what it made."""

    def __init__(self, kind: Any = Recorder) -> None:
        self.made: list[Any] = []
        self.kind = kind

    def __call__(self) -> Any:
        self.made.append(self.kind())
        return self.made[-1]

    async def wait(self, n: int = 1) -> Any:
        await until(lambda: len(self.made) >= n)
        for one in self.made:
            await one.made()
        return self.made[n - 1]


# -- the surface


async def test_surface(net: TransportNetwork) -> None:
    server = await net.serve(Recorder)
    assert server.get_loop() is asyncio.get_running_loop()
    assert server.is_serving()
    (sock,) = server.sockets
    name, port = sock.getsockname()
    assert isinstance(name, str)
    assert 0 < port < 65536
    assert sock.type == 1  # SOCK_STREAM
    assert isinstance(sock.family, int)
    assert repr(server)
    server.close()
    server.close()
    assert not server.is_serving()
    assert list(server.sockets) == []
    await server.wait_closed()
    await server.wait_closed()
    assert repr(server)


async def test_async_with(net: TransportNetwork) -> None:
    async with await net.start_server(echo) as one, await net.start_server(echo) as two:
        ports = [port_of(one), port_of(two)]
        assert ports[0] != ports[1]
        for port in ports:
            assert await ask(net, port) == b"ping"
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            await ask(net, port)


async def test_not_serving_yet(net: TransportNetwork) -> None:
    """The port is taken, and whoever connects is refused."""
    server = await net.start_server(echo, start_serving=False)
    port = port_of(server)
    assert not server.is_serving()
    with pytest.raises(ConnectionRefusedError):
        await ask(net, port)
    await server.start_serving()
    await server.start_serving()
    assert server.is_serving()
    assert await ask(net, port) == b"ping"
    server.close()


async def test_serve_forever(net: TransportNetwork) -> None:
    server = await net.start_server(echo, start_serving=False)
    port = port_of(server)
    forever = asyncio.ensure_future(server.serve_forever())
    await until(server.is_serving)
    assert await ask(net, port) == b"ping"
    with pytest.raises(RuntimeError, match="already being awaited"):
        await server.serve_forever()
    forever.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forever
    assert not server.is_serving()
    with pytest.raises(RuntimeError, match="is closed"):
        await server.serve_forever()
    with pytest.raises(ConnectionRefusedError):
        await ask(net, port)


async def test_serve_forever_ended_by_close(net: TransportNetwork) -> None:
    if net.is_uvloop_itself:
        return  # it goes on waiting
    server = await net.start_server(echo)
    forever = asyncio.ensure_future(server.serve_forever())
    await turns()
    server.close()
    with pytest.raises(asyncio.CancelledError):
        await forever


async def test_serving_a_closed_server(net: TransportNetwork) -> None:
    server = await net.start_server(echo)
    server.close()
    with pytest.raises(RuntimeError, match="is closed"):
        await server.serve_forever()


# -- waiting for the end


async def test_wait_closed_before_close(net: TransportNetwork) -> None:
    """Waits for close(), and then for the last connection."""
    accept = Accepting()
    server = await net.serve(accept)
    _, c = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    waiting = asyncio.ensure_future(server.wait_closed())
    await turns(20)
    assert not waiting.done()
    server.close()
    await turns(20)
    assert not waiting.done()
    c.transport.close()
    await s.lost()
    await asyncio.wait_for(waiting, PATIENCE)


async def test_wait_closed_after_close(net: TransportNetwork) -> None:
    """Waits for the last connection from Python 3.12 on. (uvloop's own does not.)"""
    accept = Accepting()
    server = await net.serve(accept)
    _, c = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    server.close()
    waiting = asyncio.ensure_future(server.wait_closed())
    await turns(20)
    if net.loop == "asyncio":
        assert waiting.done() is (sys.version_info < (3, 12))
    assert not s.is_lost
    c.transport.close()
    await s.lost()
    await asyncio.wait_for(waiting, PATIENCE)


async def test_wait_closed_when_the_last_is_gone(net: TransportNetwork) -> None:
    accept = Accepting()
    server = await net.serve(accept)
    _, c = await net.connect(Recorder, port_of(server))
    c.transport.close()
    await (await accept.wait()).lost()
    waiting = asyncio.ensure_future(server.wait_closed())
    await turns(20)
    assert not waiting.done()
    server.close()
    await asyncio.wait_for(waiting, PATIENCE)


async def test_wait_closed_cancelled(net: TransportNetwork) -> None:
    server = await net.serve(Recorder)
    waiting = asyncio.ensure_future(server.wait_closed())
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_ending_the_clients(net: TransportNetwork, how: str) -> None:
    if net.is_uvloop_itself or (net.control and sys.version_info < (3, 13)):
        return  # they have not got it
    accept = Accepting()
    server = await net.serve(accept)
    clients = [(await net.connect(Recorder, port_of(server)))[1] for _ in range(3)]
    await accept.wait(3)
    for one in accept.made:
        one.transport.write(b"bye")
    server.close()
    getattr(server, how)()
    assert all(one.transport.is_closing() for one in accept.made)
    await asyncio.wait_for(server.wait_closed(), PATIENCE)
    for one in [*clients, *accept.made]:
        assert await one.lost() is None
    assert all(one.data == b"bye" for one in clients)
    getattr(server, how)()


async def test_ending_clients_that_do_not_read(net: TransportNetwork) -> None:
    """close_clients() waits for them, abort_clients() does not."""
    if net.is_uvloop_itself or (net.control and sys.version_info < (3, 13)):
        return
    accept = Accepting()
    server = await net.serve(accept)
    transport, c = await net.connect(Recorder, port_of(server))
    transport.pause_reading()
    s = await accept.wait()
    s.transport.write(pattern(1, 16 << 20))
    server.close()
    server.close_clients()
    await turns(20)
    assert not s.is_lost
    server.abort_clients()
    assert await s.lost() is None
    await asyncio.wait_for(server.wait_closed(), PATIENCE)
    transport.resume_reading()
    await c.lost()
    assert len(c.data) < 16 << 20


async def test_connections_outlive_their_server(net: TransportNetwork) -> None:
    accept = Accepting()
    server = await net.serve(accept)
    _, c = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    server.close()
    del server
    gc.collect()
    c.transport.write(b"still here")
    assert await s.got(10) == b"still here"
    s.transport.write(b"as am I")
    assert await c.got(7) == b"as am I"
    c.transport.close()
    await c.lost()
    await s.lost()


# -- ports and hosts


async def test_port_taken(net: TransportNetwork) -> None:
    server = await net.serve(Recorder)
    with pytest.raises(OSError) as info:
        await net.serve(Recorder, port_of(server))
    assert info.value.errno == errno.EADDRINUSE
    server.close()


async def test_port_taken_again(net: TransportNetwork) -> None:
    """At once, also after connections."""
    server = await net.start_server(echo)
    port = port_of(server)
    for _ in range(3):
        assert await ask(net, port) == b"ping"
        server.close()
        await server.wait_closed()
        server = await net.start_server(echo, port)
        assert port_of(server) == port
    server.close()


async def test_reuse_port(net: TransportNetwork) -> None:
    first = await net.start_server(echo, reuse_port=True)
    port = port_of(first)
    second = await net.start_server(echo, port, reuse_port=True)
    for _ in range(5):
        assert await ask(net, port) == b"ping"
    first.close()
    await first.wait_closed()
    for _ in range(5):
        assert await ask(net, port) == b"ping"
    second.close()
    await second.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await ask(net, port)


async def test_somebody_elses_address(net: TransportNetwork) -> None:
    with pytest.raises(OSError) as info:
        await net.create_server(Recorder, net.foreign, 0)
    assert info.value.errno == errno.EADDRNOTAVAIL or net.control  # (3.13's has none)


async def test_several_hosts(net: TransportNetwork) -> None:
    server = await net.create_server(Recorder, [net.bind], 0)
    _, c = await net.connect(Recorder, port_of(server))
    c.transport.close()
    await c.lost()
    server.close()


async def test_addresses_of_server_and_connection(net: TransportNetwork) -> None:
    accept = Accepting()
    server = await net.serve(accept)
    _, c = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    assert s.transport.get_extra_info("sockname") == server.sockets[0].getsockname()
    assert c.transport.get_extra_info("peername") == server.sockets[0].getsockname()
    c.transport.close()
    await s.lost()
    server.close()


async def test_local_addr(net: TransportNetwork) -> None:
    """The client's own port can be chosen."""
    accept = Accepting()
    server = await net.serve(accept)
    free = await net.serve(Recorder)
    port = port_of(free)
    free.close()
    await free.wait_closed()
    local = net.host if net.kind == "tcp" else None
    _, c = await net.connect(Recorder, port_of(server), local_addr=(local, port))
    s = await accept.wait()
    assert c.transport.get_extra_info("sockname")[1] == port
    assert s.transport.get_extra_info("peername")[1] == port
    s.transport.close()  # first: the client's port shall not have to wait
    await s.lost()
    await c.lost()
    server.close()


# -- who connects


async def test_one_protocol_for_each(net: TransportNetwork) -> None:
    accept = Accepting()
    server = await net.serve(accept)
    clients = await asyncio.gather(*(net.connect(Recorder, port_of(server)) for _ in range(50)))
    for n, (transport, _) in enumerate(clients):
        transport.write(b"%02d" % n)
    await accept.wait(50)
    for one in accept.made:
        await one.until(lambda: len(one.data) == 2)  # noqa: B023
        one.transport.write(one.data)
    assert sorted(bytes(one.data) for one in accept.made) == [b"%02d" % n for n in range(50)]
    for n, (transport, protocol) in enumerate(clients):
        assert await protocol.got(2) == b"%02d" % n
        transport.close()
    for one in accept.made:
        assert await one.lost() is None
    assert len(accept.made) == 50
    server.close()


async def test_who_comes_and_goes(net: TransportNetwork) -> None:
    """Without a word, or with one."""
    accept = Accepting()
    server = await net.serve(accept)
    for n in range(20):
        transport, protocol = await net.connect(Recorder, port_of(server))
        if n % 2:
            transport.write(b"hello")
        transport.close()
        await protocol.lost()
    await accept.wait(20)
    for n, one in enumerate(accept.made):
        assert await one.lost() is None
        assert one.events == (["made", "data", "eof", "lost"] if n % 2 else ["made", "eof", "lost"])
        assert one.data == (b"hello" if n % 2 else b"")
    server.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_factory_that_raises(net: TransportNetwork) -> None:
    """That client's connection ends, the server goes on. (asyncio tells it in debug mode only.)"""
    failing = True

    class Sometimes(Accepting):
        def __call__(self) -> Any:
            if failing:
                raise Oops
            return super().__call__()

    accept = Sometimes()
    server = await net.serve(accept)
    _, c = await net.connect(Recorder, port_of(server))
    gc.collect()
    for _ in range(100):
        if c.is_lost:
            break
        gc.collect()  # asyncio's own leaves the socket to the collector
        await asyncio.sleep(0.001)
    if net.is_uvloop_itself:
        c.transport.abort()  # nobody else ends it, and its server accepts no more
    await c.lost()
    assert all(isinstance(e, Oops) for e in net.reported())
    failing = False
    if net.is_uvloop_itself:
        server.close()
        return
    _, c = await net.connect(Recorder, port_of(server))
    s = await accept.wait()
    c.transport.write(b"fine")
    assert await s.got(4) == b"fine"
    c.transport.close()
    await s.lost()
    server.close()


async def test_handler_that_raises(net: TransportNetwork) -> None:
    """It is reported, and others are served."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line == b"fail\n":
            writer.close()
            raise Oops
        writer.write(line)
        writer.close()

    server = await net.start_server(handler)
    port = port_of(server)
    assert await ask(net, port, b"one\n") == b"one\n"
    assert await ask(net, port, b"fail\n") == b""
    for _ in range(100):
        if net.reports:
            break
        gc.collect()  # where nobody looks at the task, before 3.12
        await asyncio.sleep(0.001)
    (error,) = net.reported()
    assert isinstance(error, Oops)
    assert await ask(net, port, b"two\n") == b"two\n"
    server.close()


async def test_handler_that_is_a_function(net: TransportNetwork) -> None:
    ends: list[Any] = []
    server = await net.start_server(lambda reader, writer: ends.append((reader, writer)))
    reader, writer = await net.open_connection(port_of(server))
    await until(lambda: ends)
    ends[0][1].write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    for one in (writer, ends[0][1]):
        one.close()
        await one.wait_closed()
    server.close()


async def test_handler_that_never_reads(net: TransportNetwork) -> None:
    """Its client waits, with a bounded buffer; others do not."""
    stuck: list[Any] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not stuck:
            stuck.append(writer)
        else:
            await echo(reader, writer)

    server = await net.start_server(handler)
    port = port_of(server)
    _, writer = await net.open_connection(port)
    await until(lambda: stuck)

    async def fill() -> None:
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()

    filling = asyncio.ensure_future(fill())
    await until(lambda: writer.transport.get_write_buffer_size() > 65536)
    for n in range(20):
        assert await ask(net, port, b"%d" % n) == b"%d" % n
    assert not filling.done()
    assert writer.transport.get_write_buffer_size() < 1 << 20
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling
    writer.transport.abort()
    stuck[0].transport.abort()
    await turns()
    server.close()


@pytest.mark.parametrize("what", ["read", "readexactly", "drain", "wait_closed"])
async def test_streams_cancelled_at_every_step(net: TransportNetwork, what: str) -> None:
    """Nothing is lost: what one read did not return, the next does."""
    ends: list[Any] = []
    server = await net.start_server(lambda reader, writer: ends.append((reader, writer)))
    reader, writer = await net.open_connection(port_of(server))
    await until(lambda: ends)
    other_reader, other_writer = ends[0]
    total, got, sent = 400, b"", 0
    data = pattern(2, 1 << 20)
    for k in range(20):
        if what in ("read", "readexactly"):
            size = total // 20
            task = asyncio.ensure_future(reader.read(7) if what == "read" else reader.readexactly(size))
            await turns(k // 2)
            other_writer.write(data[sent : sent + size])
            sent += size
            await turns(k % 7)
        elif what == "drain":
            writer.write(data[sent : sent + 50_000])
            sent += 50_000
            task = asyncio.ensure_future(writer.drain())
            await turns(k)
        else:
            writer.close()
            task = asyncio.ensure_future(writer.wait_closed())
            await turns(k)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and what in ("read", "readexactly"):
            got += task.result()
    if what in ("read", "readexactly"):
        while len(got) < sent:
            got += await asyncio.wait_for(reader.read(100), PATIENCE)
        assert got == data[:sent]
    elif what == "drain":
        assert await asyncio.wait_for(other_reader.readexactly(sent), PATIENCE) == data[:sent]
    for one in (writer, other_writer):
        one.close()
        await one.wait_closed()
    server.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(
    sys.version_info < (3, 13), reason="asyncio's writer closes what was dropped from 3.13 on"
)
async def test_writer_dropped(net: TransportNetwork) -> None:
    """Nobody has it any more: the other side sees the end."""
    server = await net.start_server(echo)
    accept = Accepting()
    other = await net.serve(accept)
    reader, writer = await net.open_connection(port_of(other))
    s = await accept.wait()
    writer.write(b"data")
    await s.got(4)
    del reader, writer
    for _ in range(100):
        if s.is_lost:
            break
        gc.collect()
        await asyncio.sleep(0.001)
    assert await s.lost() is None
    other.close()
    server.close()
