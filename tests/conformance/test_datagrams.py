"""Datagram endpoints of asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import gc
import logging
import socket
import sys
from typing import Any

import pytest

from shmsock.aio.datagram import ShmDatagramTransport
from tests.conformance.datagram_networks import DATAGRAMS, DatagramNetwork, Datagrams
from tests.conformance.networks import PATIENCE, fixture_for, pattern, turns, until

net = fixture_for(DATAGRAMS)
MAX = 65507


def forgets(test: Any) -> Any:
    """The control leaves a socket to the collector: uvloop's always, asyncio's when a factory raises."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.filterwarnings("ignore::ResourceWarning")(ignored(test))


class Oops(Exception):
    """Raised by protocols of these tests."""


def port(endpoint: Any) -> int:
    number: int = endpoint.address()[1]
    return number


async def end(*endpoints: Any) -> None:
    for one in endpoints:
        one.transport.close()
    for one in endpoints:
        await one.lost()


# -- datagrams


async def test_each_network_is_what_it_says(net: DatagramNetwork) -> None:
    """Nothing goes over UDP unseen, and the control over nothing else."""
    s = await net.serve()
    c = await net.connect(port(s))
    for one in (c, s):
        assert isinstance(one.transport, ShmDatagramTransport) is not net.control
    await end(c, s)


@pytest.mark.parametrize("size", [1, 100, 1472, 1473, 9000, MAX - 1, MAX])
async def test_boundaries(net: DatagramNetwork, size: int) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    for n in range(3):
        data = pattern(n, size)
        c.transport.sendto(data)
        assert await s.next() == (data, c.address())
        s.transport.sendto(data, c.address())
        assert await c.next() == (data, s.address())
    await end(c, s)


async def test_empty(net: DatagramNetwork) -> None:
    """Sent by asyncio from 3.13 on; by shared memory always."""
    s = await net.serve()
    c = await net.connect(port(s))
    c.transport.sendto(b"")
    c.transport.sendto(b"after")
    if not net.control or (net.loop == "asyncio" and sys.version_info >= (3, 13)):
        assert await s.next() == (b"", c.address())
    assert await s.next() == (b"after", c.address())
    await end(c, s)


async def test_too_large(net: DatagramNetwork) -> None:
    """UDP tells it by error_received(); shared memory raises it. Nothing else changes."""
    s = await net.serve()
    c = await net.connect(port(s))
    for one, addr in ((c, None), (s, c.address())):
        if net.control:
            one.transport.sendto(bytes(MAX + 1), addr)
            assert one.errors.pop().errno == errno.EMSGSIZE
        else:
            with pytest.raises(OSError) as info:
                one.transport.sendto(bytes(MAX + 1), addr)
            assert info.value.errno == errno.EMSGSIZE
            assert one.errors == []
    c.transport.sendto(b"fine")
    assert await s.next() == (b"fine", c.address())
    await end(c, s)


async def test_order(net: DatagramNetwork) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    for at in range(0, 2000, 50):
        for n in range(at, at + 50):
            c.transport.sendto(b"%d" % n)
        for n in range(at, at + 50):
            assert await s.next() == (b"%d" % n, c.address())
    await end(c, s)


async def test_kinds_of_bytes(net: DatagramNetwork) -> None:
    """What is sent is what it was when it was sent."""
    s = await net.serve()
    c = await net.connect(port(s))
    changing = bytearray(b"before")
    c.transport.sendto(changing)
    changing[:] = b"after!"
    c.transport.sendto(memoryview(b"_memoryview_")[1:-1])
    assert [(await s.next())[0] for _ in range(2)] == [b"before", b"memoryview"]
    await end(c, s)


@pytest.mark.parametrize("wrong", ["text", 5, ["list"], object()], ids=lambda x: type(x).__name__)
async def test_what_is_no_bytes(net: DatagramNetwork, wrong: Any) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    for one, addr in ((c, None), (s, c.address())):
        with pytest.raises(TypeError):
            one.transport.sendto(wrong, addr)
    c.transport.sendto(b"fine")
    assert (await s.next())[0] == b"fine"
    await end(c, s)


# -- who gets what


async def test_connected(net: DatagramNetwork) -> None:
    """To its address, said or not; to another, ValueError."""
    s, other = await net.serve(), await net.serve()
    c = await net.connect(port(s))
    to = c.transport.get_extra_info("peername")
    assert to == s.address()
    c.transport.sendto(b"one")
    c.transport.sendto(b"two", None)
    c.transport.sendto(b"three", to)
    assert [(await s.next())[0] for _ in range(3)] == [b"one", b"two", b"three"]
    for wrong in (other.address(), ("", 1)):
        with pytest.raises(ValueError, match="Invalid address: must be None or"):
            c.transport.sendto(b"four", wrong)
    await turns(20)
    assert not other.received
    assert not s.received
    await end(c, s, other)


async def test_connected_hears_nobody_else(net: DatagramNetwork) -> None:
    s, other = await net.serve(), await net.serve()
    c = await net.connect(port(s))
    other.transport.sendto(b"psst", c.address())
    other.transport.sendto(b"psst", s.address())
    assert await s.next() == (b"psst", other.address())
    s.transport.sendto(b"hello", c.address())
    assert await c.next() == (b"hello", s.address())
    await turns(20)
    assert not c.received
    await end(c, s, other)


async def test_unconnected(net: DatagramNetwork) -> None:
    """Each to each, itself included."""
    ends = [await net.serve() for _ in range(4)]
    for one in ends:
        for to in ends:
            one.transport.sendto(b"from %d" % port(one), to.address())
    for to in ends:
        got = [await to.next() for _ in ends]
        assert sorted(got) == sorted((b"from %d" % port(one), one.address()) for one in ends)
    await end(*ends)


async def test_unconnected_without_address(net: DatagramNetwork) -> None:
    """A fatal TypeError on asyncio; uvloop tells the kernel's error."""
    s = await net.serve()
    s.transport.sendto(b"to whom?")
    if net.loop == "asyncio":
        error = await s.lost()
        assert isinstance(error, TypeError)
        assert net.reported() == [error]
        return
    await s.until(lambda: s.errors or s.events[-1] == "lost")
    net.reported()
    if s.events[-1] != "lost":
        await end(s)


async def test_nobody_there_and_connected(net: DatagramNetwork) -> None:
    """Told by error_received(); the endpoint lives on, and whoever comes then is reached."""
    s = await net.serve()
    number = port(s)
    await end(s)
    c = await net.connect(number)
    for n in range(1, 3):
        c.transport.sendto(b"anybody?")
        await c.until(lambda: len(c.errors) == n)  # noqa: B023
        assert type(c.errors[-1]) is ConnectionRefusedError
    s = await net.serve(number)
    c.transport.sendto(b"hello")
    assert (await s.next())[0] == b"hello"
    s.transport.sendto(b"hello yourself", c.address())
    assert (await c.next())[0] == b"hello yourself"
    assert not c.transport.is_closing()
    await end(c, s)


async def test_nobody_there_and_unconnected(net: DatagramNetwork) -> None:
    """Silence."""
    s, gone = await net.serve(), await net.serve()
    address = gone.address()
    await end(gone)
    for _ in range(3):
        s.transport.sendto(b"anybody?", address)
    s.transport.sendto(b"to myself", s.address())
    assert await s.next() == (b"to myself", s.address())
    await turns(50)
    assert s.errors == []
    await end(s)


# -- the contract


async def test_what_create_returns(net: DatagramNetwork) -> None:
    made: list[Datagrams] = []

    def factory() -> Datagrams:
        made.append(Datagrams())
        return made[-1]

    transport, protocol = await net.endpoint(factory, local_addr=(net.bind, 0))
    assert [protocol] == made
    assert protocol.events == ["made"]
    assert protocol.transport is transport
    assert isinstance(transport, asyncio.DatagramTransport) or net.control
    assert repr(transport)
    await end(protocol)
    assert protocol.events == ["made", "lost"]


async def test_nothing_is_called_from_within_a_call(net: DatagramNetwork) -> None:
    s = await net.serve()
    s.transport.sendto(b"to myself", s.address())
    assert s.events == ["made"]
    s.transport.close()
    s.transport.abort()
    assert s.events == ["made"]
    assert await s.lost() is None


@pytest.mark.parametrize("how", ["close close", "abort abort", "close abort", "abort close"])
async def test_the_end_comes_once(net: DatagramNetwork, how: str) -> None:
    s = await net.serve()
    for step in how.split():
        getattr(s.transport, step)()
    assert s.transport.is_closing()
    assert await s.lost() is None
    await turns(20)
    assert s.events == ["made", "lost"]
    s.transport.close()
    assert s.transport.is_closing()
    assert repr(s.transport)


async def test_what_was_sent_before_close_arrives(net: DatagramNetwork) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    for n in range(20):
        c.transport.sendto(b"%d" % n)
    c.transport.close()
    assert await c.lost() is None
    assert [(await s.next())[0] for _ in range(20)] == [b"%d" % n for n in range(20)]
    await end(s)


async def test_nothing_comes_after_close(net: DatagramNetwork) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    c.transport.sendto(b"first")
    await s.next()
    c.transport.sendto(b"late")
    s.transport.close()
    await s.lost()
    assert s.events == ["made", "datagram", "lost"]
    await end(c)


async def test_closed_from_within(net: DatagramNetwork) -> None:
    class Once(Datagrams):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.close()

    s = await net.serve(factory=Once)
    c = await net.connect(port(s))
    for _ in range(10):
        c.transport.sendto(b"data")
    assert await s.lost() is None
    assert s.events == ["made", "datagram", "lost"]
    await end(c)


async def test_late_sends(net: DatagramNetwork, caplog: pytest.LogCaptureFixture) -> None:
    """Dropped, with a warning from the fifth on."""
    s = await net.serve()
    c = await net.connect(port(s))
    c.transport.close()
    with caplog.at_level(logging.WARNING, "asyncio"):
        for n in range(1, 11):
            c.transport.sendto(b"late")
            assert len(caplog.records) == max(0, n - 4)
    assert await c.lost() is None
    await turns(20)
    assert not s.received
    await end(s)


async def test_limits(net: DatagramNetwork) -> None:
    s = await net.serve()
    low, high = s.transport.get_write_buffer_limits()
    assert (low, high) == (16 if net.is_uvloop_itself else 16384, 65536)
    assert s.transport.get_write_buffer_size() == 0
    s.transport.set_write_buffer_limits(high=1000)
    assert s.transport.get_write_buffer_limits() == (250, 1000)
    s.transport.set_write_buffer_limits(0)
    assert s.transport.get_write_buffer_limits() == (0, 0)
    with pytest.raises(ValueError):
        s.transport.set_write_buffer_limits(high=1, low=2)
    await end(s)


async def test_extra_info(net: DatagramNetwork) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    for one, peer in ((s, None), (c, s.address())):
        info = one.transport.get_extra_info
        assert info("peername") == peer
        name, number = info("sockname")
        assert isinstance(name, str)
        assert 0 < number < 65536
        sock = info("socket")
        assert sock.type == socket.SOCK_DGRAM
        assert sock.family in (socket.AF_INET, socket.AF_INET6)
        assert sock.getsockname() == info("sockname")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert info("nonsense") is None
        assert info("nonsense", 5) == 5
    await end(c, s)


async def test_protocol_can_be_changed(net: DatagramNetwork) -> None:
    s = await net.serve()
    c = await net.connect(port(s))
    assert s.transport.get_protocol() is s
    second = Datagrams()
    second.connection_made(s.transport)
    s.transport.set_protocol(second)
    assert s.transport.get_protocol() is second
    c.transport.sendto(b"data")
    assert (await second.next())[0] == b"data"
    await end(c, second)


@pytest.mark.parametrize("where", ["datagram_received", "error_received"])
async def test_callback_that_raises(net: DatagramNetwork, where: str) -> None:
    """Reported, and nothing else."""
    if net.is_uvloop_itself and where == "error_received":
        return  # it tells sys.unraisablehook

    class Bad(Datagrams):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            if data == b"bad":
                raise Oops

        def error_received(self, exc: Exception) -> None:
            super().error_received(exc)
            raise Oops

    s = await net.serve(factory=Bad)
    c = await net.connect(port(s), factory=Bad)
    if where == "datagram_received":
        c.transport.sendto(b"bad")
        await s.next()
    else:
        gone = s.address()[1]
        await end(s)
        c.transport.sendto(b"nobody")
        await c.until(lambda: c.errors)
        s = await net.serve(gone)
    await until(lambda: net.reports)
    assert [type(e) for e in net.reported()] == [Oops]
    c.transport.sendto(b"fine")
    assert (await s.next())[0] == b"fine"
    await end(c, s)


var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="nobody's")


async def test_contexts(net: DatagramNetwork) -> None:
    """Callbacks see the context in which their endpoint was made."""

    class Knows(Datagrams):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def happened(self, what: str) -> None:
            if what != "lost":
                self.seen.add(var.get())
            super().happened(what)

    async def serve(who: str) -> Any:
        var.set(who)
        return await net.serve(factory=Knows)

    a, b = await asyncio.gather(serve("a's"), serve("b's"))
    var.set("test's")
    a.transport.sendto(b"data", b.address())
    b.transport.sendto(b"data", a.address())
    await a.next()
    await b.next()
    assert (a.seen, b.seen) == ({"a's"}, {"b's"})
    await end(a, b)


# -- making one


@forgets
async def test_port_taken(net: DatagramNetwork) -> None:
    s = await net.serve()
    with pytest.raises(OSError) as info:
        await net.serve(port(s))
    assert info.value.errno == errno.EADDRINUSE or net.is_uvloop_itself
    number = port(s)
    await end(s)
    again = await net.serve(number)
    assert port(again) == number
    await end(again)


async def test_reuse_port(net: DatagramNetwork) -> None:
    """One of them gets it."""
    first = await net.serve(reuse_port=True)
    second = await net.serve(port(first), reuse_port=True)
    c = await net.connect(port(first))
    for n in range(10):
        c.transport.sendto(b"%d" % n)
    await until(lambda: len(first.received) + len(second.received) == 10)
    got = [data for data, _ in first.received or second.received]
    assert got == [b"%d" % n for n in range(10)]  # a sender stays with one
    await end(c, first, second)


async def test_both_addresses(net: DatagramNetwork) -> None:
    s = await net.serve()
    free = await net.serve()
    number = port(free)
    await end(free)
    local = "127.0.0.1" if net.control else None
    if net.kind == "dotshm":
        local = net.bind
    c = await net.connect(port(s), local_addr=(local, number))
    c.transport.sendto(b"data")
    assert await s.next() == (b"data", c.address())
    assert port(c) == number
    await end(c, s)


@forgets
async def test_somebody_elses_address(net: DatagramNetwork) -> None:
    with pytest.raises(OSError) as info:
        await net.endpoint(Datagrams, local_addr=(net.foreign, 0))
    assert info.value.errno == errno.EADDRNOTAVAIL or net.is_uvloop_itself


async def test_nobody_has_the_name(net: DatagramNetwork) -> None:
    with pytest.raises(socket.gaierror):
        await net.endpoint(Datagrams, remote_addr=(net.nobody, 7000))


@forgets
async def test_factory_that_raises(net: DatagramNetwork) -> None:
    def factory() -> Datagrams:
        raise Oops

    s = await net.serve()
    number = port(s)
    await end(s)
    with pytest.raises(Oops):
        await net.serve(number, factory)
    with pytest.raises(TypeError):
        await net.endpoint(None, local_addr=(net.bind, number))
    gc.collect()
    if not net.is_uvloop_itself:
        await end(await net.serve(number))  # the port is free


@forgets
@pytest.mark.parametrize("wrong", [("one",), ("one", 2, 3), "name", 5], ids=repr)
async def test_addresses_that_are_none(net: DatagramNetwork, wrong: Any) -> None:
    if net.kind == "dotshm":
        return  # these go to kernel sockets
    errors = (TypeError, ValueError, OSError, AssertionError)  # (the last is 3.10's)
    with pytest.raises(errors):
        await net.endpoint(Datagrams, local_addr=wrong)
    with pytest.raises(errors):
        await net.endpoint(Datagrams, remote_addr=wrong)


@forgets
async def test_created_and_cancelled_at_every_step(net: DatagramNetwork) -> None:
    s = await net.serve()
    await end(await net.connect(port(s)))  # what is made at first use is there now
    for k in range(20):
        task = asyncio.ensure_future(net.connect(port(s)))
        await turns(k)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            await end(task.result())
    c = await net.connect(port(s))
    c.transport.sendto(b"last")
    assert await s.next() == (b"last", c.address())
    await end(c, s)


async def test_many_endpoints(net: DatagramNetwork) -> None:
    s = await net.serve()
    clients = [await net.connect(port(s)) for _ in range(30)]
    for n, c in enumerate(clients):
        c.transport.sendto(b"%d" % n)
    for _ in clients:
        data, address = await asyncio.wait_for(s.next(), PATIENCE)
        assert address == clients[int(data)].address()
        s.transport.sendto(data, address)
    for n, c in enumerate(clients):
        assert await c.next() == (b"%d" % n, s.address())
    await end(s, *clients)
