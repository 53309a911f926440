"""Transports and protocols: every clause of asyncio's contract."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import io
import logging
import select
import socket
import sys
import threading
import warnings
from typing import Any

import pytest
import uvloop

from shmsock.aio.transport import ShmTransport
from tests.conformance.networks import (
    PATIENCE,
    TRANSPORTS,
    Happenings,
    KeepsOpen,
    Recorder,
    TransportNetwork,
    fixture_for,
    pair,
    pattern,
    port_of,
    turns,
    until,
)

net = fixture_for(TRANSPORTS)
BIG = 3 << 20
"""More than any buffer between two ends holds."""


class Oops(Exception):
    """Raised by protocols of these tests."""


# -- the order of things


async def test_connect_returns_what_the_factory_made(net: TransportNetwork) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    server = await net.serve(Recorder)
    transport, protocol = await net.connect(factory, port_of(server))
    assert [protocol] == made
    assert protocol.transport is transport
    assert isinstance(transport, asyncio.Transport) or net.is_uvloop_itself
    assert protocol.events == ["made"]
    transport.abort()
    await protocol.lost()
    server.close()


async def test_each_network_is_what_it_says(net: TransportNetwork) -> None:
    """Nothing goes over TCP unseen, and the control over nothing else."""
    async with pair(net) as (c, s):
        for end in (c, s):
            is_shm = isinstance(end.transport, ShmTransport)
            assert is_shm is not net.control
        running = asyncio.get_running_loop()
        assert isinstance(running, uvloop.Loop) is (net.loop == "uvloop")


async def test_connection_made_comes_before_data(net: TransportNetwork) -> None:
    """Also when the other side speaks and leaves at once."""

    class Greeter(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"hello")
            transport.close()

    server = await net.serve(Greeter)
    _, protocol = await net.connect(Recorder, port_of(server))
    assert protocol.events[0] == "made"
    assert await protocol.lost() is None
    assert protocol.events == ["made", "data", "eof", "lost"]
    assert protocol.data == b"hello"
    server.close()


async def test_all_of_a_life(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.write(b"ping")
        assert await s.got(4) == b"ping"
        s.transport.write(b"pong")
        assert await c.got(4) == b"pong"
        c.transport.close()
        assert await c.lost() is None
        assert await s.lost() is None
        assert c.events == ["made", "data", "lost"]
        assert s.events == ["made", "data", "eof", "lost"]


async def test_nothing_is_called_from_within_a_call(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        s.transport.write(b"for you")
        c.transport.write(b"x" * 10)
        assert s.events == c.events == ["made"]
        c.transport.write_eof()
        c.transport.close()
        assert c.events == ["made"]
        s.transport.abort()
        assert s.events == ["made"]
        await c.lost()
        await s.lost()


@pytest.mark.parametrize("size", [1, 1000, 65536, 300_001, BIG])
async def test_bytes_arrive_in_order(net: TransportNetwork, size: int) -> None:
    async with pair(net) as (c, s):
        data = pattern(size, size)
        c.transport.write(data)
        assert await s.got(size) == data


async def test_both_ways_at_once(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        there, back = pattern(1, BIG), pattern(2, BIG)
        c.transport.write(there)
        s.transport.write(back)
        assert await s.got(BIG) == there
        assert await c.got(BIG) == back


async def test_many_small_writes_keep_their_order(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        data = pattern(3, 100_000)
        for at in range(0, len(data), 97):
            c.transport.write(data[at : at + 97])
        assert await s.got(len(data)) == data


# -- writing


async def test_kinds_of_bytes(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.write(b"bytes ")
        c.transport.write(bytearray(b"bytearray "))
        c.transport.write(memoryview(b"_memoryview_")[1:-1])
        c.transport.write(b"")
        c.transport.write(bytearray())
        c.transport.write(memoryview(b""))
        assert await s.got(26) == b"bytes bytearray memoryview"


@pytest.mark.parametrize("wrong", ["text", 5, ["list"], 1.5, object()], ids=lambda x: type(x).__name__)
async def test_what_is_no_bytes(net: TransportNetwork, wrong: Any) -> None:
    async with pair(net) as (c, s):
        with pytest.raises(TypeError):
            c.transport.write(wrong)
        c.transport.write(b"fine")
        assert await s.got(4) == b"fine"
        assert c.events == ["made"]


async def test_writelines(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.writelines([b"one", bytearray(b"two"), memoryview(b"three")])
        c.transport.writelines(iter([b"four", b"five"]))
        c.transport.writelines([])
        c.transport.writelines([b"", b"six"])
        assert await s.got(22) == b"onetwothreefourfivesix"


def mends(net: TransportNetwork, *fixed: tuple[int, ...]) -> bool:
    """Is this none of the CPythons whose own writelines() is broken (gh-127655 and gh-129903)?"""
    version = sys.version_info[:3]
    if not net.control or net.loop == "uvloop" or version < (3, 12):
        return True
    return any(version[:2] == mended[:2] and version >= mended for mended in fixed)


async def test_writelines_with_an_empty_end(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.writelines([b"one", b""])
        assert await s.got(3) == b"one"
        if mends(net, (3, 12, 9), (3, 13, 2)):
            assert c.transport.get_write_buffer_size() == 0
            c.transport.close()
            assert await c.lost() is None


async def test_writelines_pauses_the_protocol(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        lines = [pattern(4, BIG), pattern(5, BIG)]
        c.transport.writelines(lines)
        if mends(net, (3, 12, 9), (3, 13, 2)):
            assert c.events == ["made", "pause"]
        s.transport.resume_reading()
        assert await s.got(2 * BIG) == b"".join(lines)


async def test_writing_after_write_eof(net: TransportNetwork) -> None:
    async with pair(net, server=KeepsOpen) as (c, s):
        c.transport.write_eof()
        with pytest.raises(RuntimeError, match="after write_eof"):
            c.transport.write(b"late")
        with pytest.raises(RuntimeError, match="after write_eof"):
            c.transport.writelines([b"late"])
        await s.eof()
        assert not s.data


async def test_write_eof(net: TransportNetwork) -> None:
    """The other way stays open, for as long as the protocol that got EOF wants."""
    async with pair(net, server=KeepsOpen) as (c, s):
        assert c.transport.can_write_eof() is True
        data = pattern(6, BIG)
        c.transport.write(data)
        c.transport.write_eof()  # behind what is still waiting
        c.transport.write_eof()
        assert not c.transport.is_closing()
        await s.eof()
        assert s.data == data
        assert not s.transport.is_closing()
        s.transport.write(data)
        assert await c.got(BIG) == data
        assert not c.is_lost
        s.transport.close()
        assert await s.lost() is None
        assert await c.lost() is None
        assert c.events[-2:] == ["eof", "lost"]


async def test_both_ends_write_eof(net: TransportNetwork) -> None:
    async with pair(net, KeepsOpen, KeepsOpen) as (c, s):
        c.transport.write_eof()
        s.transport.write_eof()
        await c.eof()
        await s.eof()
        await turns()
        assert not c.transport.is_closing()
        assert not s.transport.is_closing()
        c.transport.close()
        s.transport.close()
        assert await c.lost() is None
        assert await s.lost() is None


async def test_eof_closes_when_the_protocol_says_nothing(net: TransportNetwork) -> None:
    """And what was written before gets out."""
    async with pair(net, client=KeepsOpen) as (c, s):
        data = pattern(7, 16 << 20)
        c.transport.pause_reading()
        s.transport.write(data)
        c.transport.write_eof()
        await s.eof()
        await until(s.transport.is_closing)
        assert not s.is_lost  # nobody has read it
        c.transport.resume_reading()
        assert await s.lost() is None
        await c.eof()
        assert c.data == data


# -- limits


async def test_default_limits(net: TransportNetwork) -> None:
    async with pair(net) as (c, _):
        low, high = c.transport.get_write_buffer_limits()
        assert high == 65536
        assert low == (16 if net.is_uvloop_itself else 16384)
        assert c.transport.get_write_buffer_size() == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"high": 1000}, (250, 1000)),
        ({"low": 1000}, (1000, 4000)),
        ({"high": 1000, "low": 10}, (10, 1000)),
        ({"high": 1000, "low": 1000}, (1000, 1000)),
        ({"high": 0}, (0, 0)),
        ({"high": 0, "low": 0}, (0, 0)),
    ],
)
async def test_limits(net: TransportNetwork, given: dict[str, int], expected: tuple[int, int]) -> None:
    async with pair(net) as (c, _):
        c.transport.set_write_buffer_limits(**given)
        assert c.transport.get_write_buffer_limits() == expected


@pytest.mark.parametrize(
    "given", [{"high": 10, "low": 11}, {"high": -1}, {"low": -1}, {"high": 1, "low": -1}]
)
async def test_limits_that_are_none(net: TransportNetwork, given: dict[str, int]) -> None:
    async with pair(net) as (c, _):
        before = c.transport.get_write_buffer_limits()
        with pytest.raises(ValueError):
            c.transport.set_write_buffer_limits(**given)
        assert c.transport.get_write_buffer_limits() == before


class Measures(Recorder):
    """Notes the size of the buffer at each pause and resume."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def pause_writing(self) -> None:
        super().pause_writing()
        self.sizes.append(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self.sizes.append(self.transport.get_write_buffer_size())


async def test_pause_and_resume_alternate(net: TransportNetwork) -> None:
    """(Recorder looks that they do.)"""
    async with pair(net, client=Measures) as (c, s):
        low, high = c.transport.get_write_buffer_limits()
        for round_ in range(3):
            s.transport.pause_reading()
            sent = 0
            while not c.paused:
                c.transport.write(pattern(round_, 40_000))
                sent += 40_000
                assert sent < 64 << 20
                await turns(1)
            c.transport.write(b"more")
            c.transport.write(b"and more")
            assert c.paused
            s.transport.resume_reading()
            await c.until(lambda: not c.paused)
            assert await s.got(sent + 12)
        assert [e for e in c.events if e in ("pause", "resume")] == ["pause", "resume"] * 3
        assert all(size > high for size in c.sizes[::2])
        assert all(size <= low for size in c.sizes[1::2])


async def test_new_limits_are_looked_at_once(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.set_write_buffer_limits(high=1 << 30)
        s.transport.pause_reading()
        c.transport.write(pattern(8, 8 << 20))
        assert c.transport.get_write_buffer_size() > 0
        assert not c.paused
        c.transport.set_write_buffer_limits(high=0)
        assert c.paused
        s.transport.resume_reading()
        await c.until(lambda: not c.paused)
        assert c.transport.get_write_buffer_size() == 0


async def test_nothing_is_paused_while_all_is_taken(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.set_write_buffer_limits(high=0)
        for _ in range(20):
            c.transport.write(b"small")
            assert await s.got(5) == b"small"
        assert c.events == ["made"]


async def test_closed_while_paused(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        c.transport.write(pattern(9, 8 << 20))
        assert c.paused
        c.transport.abort()
        assert await c.lost() is None
        assert c.events == ["made", "pause", "lost"]


# -- reading


async def test_pause_and_resume_reading(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        assert s.transport.is_reading()
        s.transport.pause_reading()
        s.transport.pause_reading()
        assert not s.transport.is_reading()
        c.transport.write(pattern(10, BIG))
        c.transport.write(pattern(11, BIG))
        c.transport.write_eof()
        await c.until(lambda: c.paused)
        await turns(20)
        assert s.events == ["made"]
        s.transport.resume_reading()
        s.transport.resume_reading()
        assert s.transport.is_reading()
        await s.eof()
        assert s.data == pattern(10, BIG) + pattern(11, BIG)
        assert await s.lost() is None


async def test_paused_from_within(net: TransportNetwork) -> None:
    class OneAtATime(Recorder):
        calls = 0

        def data_received(self, data: bytes) -> None:
            assert self.transport.is_reading()
            super().data_received(data)
            self.calls += 1
            self.transport.pause_reading()

    async with pair(net, server=OneAtATime) as (c, s):
        data = pattern(12, 2 << 20)
        c.transport.write(data)
        c.transport.close()
        seen = 0
        while len(s.data) < len(data):
            await s.until(lambda: s.calls > seen)  # noqa: B023
            seen += 1
            await turns()
            assert s.calls == seen
            assert "eof" not in s.events
            s.transport.resume_reading()
        await s.eof()
        assert s.data == data


async def test_eof_waits_while_paused(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        c.transport.close()
        assert await c.lost() is None
        await turns(20)
        assert s.events == ["made"]
        s.transport.resume_reading()
        assert await s.lost() is None
        assert s.events == ["made", "eof", "lost"]


@pytest.mark.parametrize("does", ["nothing", "close", "abort", "pause", "raise", "keep"])
async def test_last_bytes_that_come_with_the_end(net: TransportNetwork, does: str) -> None:
    """Whatever their protocol does about them, the end comes behind them, or not at all."""
    raised: list[Any] = []

    class Last(KeepsOpen if does == "keep" else Recorder):  # type: ignore[misc]
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if does in ("close", "abort"):
                getattr(self.transport, does)()
            elif does == "pause":
                self.transport.pause_reading()
            elif does == "raise":
                raise ZeroDivisionError

    async with pair(net, server=Last) as (c, s):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: raised.append(what["exception"]))
        s.transport.write(b"first")  # nothing is new to either end
        assert await c.got(5) == b"first"
        c.transport.write(b"last")
        c.transport.close()
        assert await s.got(4) == b"last"
        if does == "pause":
            await turns(20)
            assert s.events == ["made", "data"]
            s.transport.resume_reading()
        if does == "keep":
            await s.eof()
            assert not s.transport.is_closing()
            s.transport.close()
        error = await s.lost()
        assert isinstance(error, ZeroDivisionError) if does == "raise" else error is None
        assert [type(x) for x in raised] == [ZeroDivisionError] * (does == "raise")
        told = [] if does in ("close", "abort", "raise") else ["eof"]
        assert s.events == ["made", "data", *told, "lost"]
        assert await c.lost() is None


async def test_closing_ends_reading(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.close()
        s.transport.write(b"too late")
        assert not c.transport.is_reading()
        c.transport.pause_reading()
        c.transport.resume_reading()
        assert not c.transport.is_reading()
        await c.lost()
        assert c.events == ["made", "lost"]


async def test_paused_in_connection_made(net: TransportNetwork) -> None:
    if net.control and (net.loop == "uvloop" or sys.version_info < (3, 11)):
        return  # they start reading all the same

    class Paused(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()

    async with pair(net, server=Paused) as (c, s):
        c.transport.write(b"data")
        await turns(20)
        assert s.events == ["made"]
        s.transport.resume_reading()
        assert await s.got(4) == b"data"


# -- the end


async def test_close_flushes(net: TransportNetwork) -> None:
    async with pair(net, server=KeepsOpen) as (c, s):
        s.transport.pause_reading()
        data = pattern(13, 8 << 20)
        c.transport.write(data)
        c.transport.close()
        c.transport.close()
        assert c.transport.is_closing()
        await turns(20)
        assert not c.is_lost
        s.transport.resume_reading()
        await s.eof()
        assert s.data == data
        assert await c.lost() is None
        assert c.events.count("lost") == 1


async def test_abort_discards(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        c.transport.write(pattern(14, 16 << 20))
        c.transport.abort()
        assert c.transport.is_closing()
        assert await c.lost() is None
        assert c.events == ["made", "pause", "lost"]
        s.transport.resume_reading()
        await s.lost()
        assert len(s.data) < 16 << 20
        assert s.data == pattern(14, len(s.data))


async def test_abort_keeps_what_was_sent(net: TransportNetwork) -> None:
    """Nothing was waiting in the transport: the other side cannot tell it from close()."""
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        c.transport.write(b"sent")
        assert c.transport.get_write_buffer_size() == 0
        c.transport.abort()
        assert await c.lost() is None
        s.transport.resume_reading()
        assert await s.lost() is None
        assert s.data == b"sent"
        assert s.events == ["made", "data", "eof", "lost"]


@pytest.mark.parametrize(
    "how", ["close close", "abort abort", "close abort", "abort close", "write_eof close"]
)
async def test_the_end_comes_once(net: TransportNetwork, how: str) -> None:
    async with pair(net) as (c, s):
        for step in how.split():
            getattr(c.transport, step)()
        assert c.transport.is_closing()
        assert await c.lost() is None
        assert await s.lost() is None
        await turns(20)
        assert c.events == ["made", "lost"]
        assert s.events == ["made", "eof", "lost"]
        c.transport.close()
        c.transport.abort()
        assert c.transport.is_closing()
        await turns()
        assert c.events == ["made", "lost"]


async def test_close_and_then_abort_with_bytes_waiting(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        c.transport.write(pattern(15, 16 << 20))
        c.transport.close()
        await turns()
        assert not c.is_lost
        c.transport.abort()
        assert await c.lost() is None
        s.transport.resume_reading()
        await s.lost()
        assert len(s.data) < 16 << 20


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("where", ["connection_made", "data_received", "eof_received"])
@pytest.mark.parametrize("side", ["client", "server"])
async def test_ended_from_within(net: TransportNetwork, how: str, where: str, side: str) -> None:
    class Ends(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if where == "connection_made":
                getattr(transport, how)()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if where == "data_received":
                getattr(self.transport, how)()

        def eof_received(self) -> bool:
            super().eof_received()
            if where == "eof_received":
                getattr(self.transport, how)()
            return True

    kinds = {"client": Recorder, "server": Recorder, side: Ends}
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(kinds["server"]())
        return made[-1]

    server = await net.serve(factory)
    client: list[Recorder] = []

    def client_factory() -> Recorder:
        client.append(kinds["client"]())
        return client[-1]

    try:
        await net.connect(client_factory, port_of(server))
    except RuntimeError:
        # uvloop's own says that its handle was closed in connection_made
        assert net.is_uvloop_itself
        assert (where, side, how) == ("connection_made", "client", "abort")
    await until(lambda: made)
    c, s = client[0], made[0]
    await s.made()
    ends, other = (c, s) if side == "client" else (s, c)
    if where == "data_received":
        other.transport.write(b"data")
    elif where == "eof_received":
        other.transport.write_eof()
    assert await ends.lost() is None
    other.transport.close()
    await other.lost()
    await turns()
    assert ends.events.count("lost") == other.events.count("lost") == 1
    server.close()


async def test_is_closing(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        assert c.transport.is_closing() is False or c.transport.is_closing() == 0
        c.transport.close()
        assert c.transport.is_closing()
        await s.lost()
        assert s.transport.is_closing()


async def test_late_writes(net: TransportNetwork, caplog: pytest.LogCaptureFixture) -> None:
    """Dropped; asyncio warns from the fifth."""
    async with pair(net) as (c, s):
        c.transport.abort()
        with caplog.at_level(logging.WARNING, "asyncio"):
            for n in range(1, 11):
                c.transport.write(b"late")
                if net.loop == "asyncio":
                    assert len(caplog.records) == max(0, n - 4)
        assert await c.lost() is None
        assert await s.lost() is None
        assert not s.data
        caplog.clear()
        if net.is_uvloop_itself:
            with pytest.raises(RuntimeError, match="closed"):
                c.transport.write(b"late")
        else:
            c.transport.write(b"late")
            c.transport.write(b"")
        assert c.events == ["made", "lost"]


async def test_writes_after_close_are_dropped(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        c.transport.write(b"before")
        c.transport.close()
        c.transport.write(b"after")
        assert await s.lost() is None
        assert s.data == b"before"


async def test_the_other_side_left(net: TransportNetwork) -> None:
    """Writing to it ends in connection_lost() with one of these, and writing on is harmless until then."""
    async with pair(net, client=KeepsOpen) as (c, s):
        s.transport.abort()
        await c.eof()
        assert not c.transport.is_closing()
        for _ in range(1000):
            if c.is_lost:
                break
            c.transport.write(b"anybody there?")
            await asyncio.sleep(0.001)
        assert isinstance(c.error, (BrokenPipeError, ConnectionResetError))
        assert c.events[-1] == "lost"


async def test_unread_bytes_at_the_end(net: TransportNetwork) -> None:
    """Closed with bytes that nobody read: the other side is told that they were lost."""
    async with pair(net, client=KeepsOpen) as (c, s):
        s.transport.pause_reading()
        c.transport.write(b"never read")
        await until(lambda: pollin(s.transport.get_extra_info("socket").fileno()))
        s.transport.close()
        assert await s.lost() is None
        assert isinstance(await c.lost(), ConnectionResetError)


# -- protocols


async def test_set_protocol(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        assert s.transport.get_protocol() is s
        c.transport.write(b"first")
        assert await s.got(5) == b"first"
        second = Recorder()
        second.happened("made")
        s.transport.set_protocol(second)
        assert s.transport.get_protocol() is second
        c.transport.write(b"second")
        assert await second.got(6) == b"second"
        c.transport.close()
        assert await second.lost() is None
        assert s.events == ["made", "data"]
        assert second.events == ["made", "data", "eof", "lost"]
        s.events.append("lost")  # for pair()


async def test_set_protocol_from_within(net: TransportNetwork) -> None:
    second = Recorder()
    second.happened("made")

    class First(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if b"." in self.data:
                self.transport.set_protocol(second)

    async with pair(net, server=First) as (c, s):
        c.transport.write(b"first.")
        await s.got(6)
        c.transport.write(b"second")
        assert await second.got(6) == b"second"
        c.transport.close()
        assert await second.lost() is None
        s.events.append("lost")


class Buffered(Happenings, asyncio.BufferedProtocol):
    """As Recorder, through a buffer of its own, of `size` bytes."""

    size = 1000

    def get_buffer(self, sizehint: int) -> Any:
        assert isinstance(sizehint, int)
        self.buffer = bytearray(self.size)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert 0 < nbytes <= self.size
        self.data += self.buffer[:nbytes]
        self.happened("data")


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
async def test_buffered_protocol(net: TransportNetwork, size: int) -> None:
    class Sized(Buffered):
        pass

    Sized.size = size
    async with pair(net, server=Sized) as (c, s):
        data = pattern(16, min(size * 1000, BIG))
        c.transport.write(data)
        assert await s.got(len(data)) == data
        c.transport.close()
        assert await s.lost() is None
        assert s.events[-2:] == ["eof", "lost"]


async def test_buffered_protocol_paused(net: TransportNetwork) -> None:
    class Pausing(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            assert self.transport.is_reading()
            super().buffer_updated(nbytes)
            self.transport.pause_reading()

    async with pair(net, server=Pausing) as (c, s):
        data = pattern(17, 10_000)
        c.transport.write(data)
        for n in range(1, 11):
            await s.until(lambda: len(s.data) == n * 1000)  # noqa: B023
            await turns()
            assert len(s.data) == n * 1000
            s.transport.resume_reading()
        assert s.data == data


async def test_from_one_kind_of_protocol_to_the_other(net: TransportNetwork) -> None:
    """And back, from within the callbacks (start_tls does it)."""

    class First(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.set_protocol(buffered)

    class Second(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            if len(self.data) >= 5:
                self.transport.set_protocol(third)

    buffered, third = Second(), Recorder()
    async with pair(net, server=First) as (c, s):
        buffered.connection_made(s.transport)
        third.connection_made(s.transport)
        for n, (text, to) in enumerate([(b"first", s), (b"second", buffered), (b"third", third)]):
            c.transport.write(text)
            assert await to.got(len(text)) == text, n
        c.transport.close()
        assert await third.lost() is None
        s.events.append("lost")


@pytest.mark.parametrize("how", ["raises", "empty", "updated"])
async def test_buffered_protocol_that_fails(net: TransportNetwork, how: str) -> None:
    class Bad(Buffered):
        def get_buffer(self, sizehint: int) -> Any:
            if how == "raises":
                raise Oops
            return bytearray() if how == "empty" else super().get_buffer(sizehint)

        def buffer_updated(self, nbytes: int) -> None:
            raise Oops

    async with pair(net, server=Bad) as (c, s):
        c.transport.write(b"data")
        error = await s.lost()
        # (uvloop's own says RuntimeError of both failures of get_buffer())
        assert isinstance(error, RuntimeError if how == "empty" else Oops) or net.is_uvloop_itself
        assert net.reported() == [error]
        await c.lost()


@pytest.mark.parametrize("where", ["data_received", "eof_received"])
async def test_callback_that_raises(net: TransportNetwork, where: str) -> None:
    """Reported, and the connection is lost by it."""

    class Bad(Recorder):
        def data_received(self, data: bytes) -> None:
            raise Oops

    def eof_received(self: Any) -> None:
        raise Oops

    Bad.eof_received = eof_received  # type: ignore[method-assign]
    async with pair(net, server=Bad) as (c, s):
        if where == "data_received":
            c.transport.write(b"data")
        else:
            c.transport.write_eof()
        error = await s.lost()
        assert isinstance(error, Oops)
        assert net.reported() == [error]
        await c.lost()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_connection_made_that_raises(net: TransportNetwork, side: str) -> None:
    """Reported; the connection is there nevertheless."""

    class Bad(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            raise Oops

    kinds = {"client": Recorder, "server": Recorder, side: Bad}
    async with pair(net, kinds["client"], kinds["server"]) as (c, s):
        await until(lambda: net.reports)
        (error,) = net.reported()
        assert isinstance(error, Oops)
        ends, other = (c, s) if side == "client" else (s, c)
        assert not ends.transport.is_closing()
        ends.transport.write(b"still here")
        assert await other.got(10) == b"still here"


async def test_connection_lost_that_raises(net: TransportNetwork) -> None:
    class Bad(Recorder):
        def connection_lost(self, error: BaseException | None) -> None:
            super().connection_lost(error)
            raise Oops

    async with pair(net, server=Bad) as (c, s):
        s.transport.close()
        await s.lost()
        assert await c.lost() is None
        await until(lambda: net.reports)
        (error,) = net.reported()
        assert isinstance(error, Oops)


async def test_pause_writing_that_raises(net: TransportNetwork) -> None:
    class Bad(Recorder):
        def pause_writing(self) -> None:
            super().pause_writing()
            raise Oops

        def resume_writing(self) -> None:
            super().resume_writing()
            raise Oops

    async with pair(net, client=Bad) as (c, s):
        s.transport.pause_reading()
        data = pattern(18, 8 << 20)
        c.transport.write(data)
        assert [type(e) for e in net.reported()] == [Oops]
        s.transport.resume_reading()
        assert await s.got(len(data)) == data
        await c.until(lambda: not c.paused)
        assert [type(e) for e in net.reported()] == [Oops]
        assert not c.transport.is_closing()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_client_factory_that_raises(net: TransportNetwork) -> None:
    """(asyncio's own forgets the socket then; the collector closes it.)"""

    def factory() -> Recorder:
        raise Oops

    server_side: list[Recorder] = []

    def accept() -> Recorder:
        server_side.append(Recorder())
        return server_side[-1]

    server = await net.serve(accept)
    with pytest.raises(Oops):
        await net.connect(factory, port_of(server))
    with pytest.raises(TypeError):
        await net.connect(None, port_of(server))
    gc.collect()
    await until(lambda: all(s.transport for s in server_side))
    for one in server_side:
        await one.lost()
    server.close()


# -- what a transport tells of itself


async def test_addresses(net: TransportNetwork) -> None:
    async with pair(net) as (c, s):
        theirs, ours = c.transport.get_extra_info, s.transport.get_extra_info
        assert theirs("peername") == ours("sockname")
        assert theirs("sockname") == ours("peername")
        assert isinstance(theirs("peername"), tuple)
        _, port = theirs("sockname")
        assert isinstance(port, int)
        assert port != theirs("peername")[1]


async def test_extra_info(net: TransportNetwork) -> None:
    async with pair(net) as (c, _):
        info = c.transport.get_extra_info
        for name in ("sslcontext", "ssl_object", "cipher", "peercert", "compression", "nonsense"):
            assert info(name) is None
            assert info(name, 5) == 5
        assert info("peername", 5) != 5
        assert repr(c.transport)
        c.transport.close()
        assert repr(c.transport)
        await c.lost()
        assert repr(c.transport)


def pollin(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


async def test_the_socket(net: TransportNetwork) -> None:
    """As libraries use it."""
    async with pair(net) as (c, s):
        for end in (c, s):
            sock = end.transport.get_extra_info("socket")
            assert sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
            assert sock.type == socket.SOCK_STREAM
            assert isinstance(sock.proto, int)
            assert sock.getsockname() == end.transport.get_extra_info("sockname")
            assert sock.getpeername() == end.transport.get_extra_info("peername")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            assert sock.fileno() >= 0
            assert repr(sock)


async def test_the_socket_can_be_polled(net: TransportNetwork) -> None:
    """Readable means: there is data, or EOF (pools of connections ask this)."""
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        fd = s.transport.get_extra_info("socket").fileno()
        assert fd == s.transport.get_extra_info("socket").fileno()
        await turns(20)
        assert not pollin(fd)
        c.transport.write(b"data")
        await until(lambda: pollin(fd))
        s.transport.resume_reading()
        assert await s.got(4) == b"data"
        await until(lambda: not pollin(fd))
        s.transport.pause_reading()
        assert not pollin(fd)
        c.transport.close()
        await until(lambda: pollin(fd))
        assert s.events == ["made", "data"]


async def test_the_socket_of_an_idle_connection_that_ended(net: TransportNetwork) -> None:
    """The transport reads, and sees EOF; whoever polls sees it as well, for as long as it is not closed."""
    async with pair(net, server=KeepsOpen) as (c, s):
        fd = s.transport.get_extra_info("socket").fileno()
        assert not pollin(fd)
        c.transport.close()
        await s.eof()
        assert pollin(fd)


# -- files


@pytest.mark.parametrize(("offset", "count"), [(0, None), (1000, None), (0, 5000), (123, 456), (0, BIG * 2)])
async def test_sendfile(net: TransportNetwork, offset: int, count: int | None, tmp_path: Any) -> None:
    data = pattern(19, BIG)
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = data[offset:][:count]
    async with pair(net) as (c, s):
        with path.open("rb") as file:
            c.transport.write(b"before ")
            sending = asyncio.get_running_loop().sendfile(c.transport, file, offset, count)
            if net.loop == "uvloop" and net.kind != "dotshm":
                with pytest.raises(NotImplementedError):
                    await sending
                return
            assert await sending == len(expected)
            assert file.tell() == offset + len(expected)
            c.transport.write(b" after")
        assert await s.got(len(expected) + 13) == b"before " + expected + b" after"


async def test_sendfile_of_what_is_no_real_file(net: TransportNetwork) -> None:
    if net.loop == "uvloop" and net.kind != "dotshm":
        return
    async with pair(net) as (c, s):
        loop = asyncio.get_running_loop()
        assert await loop.sendfile(c.transport, io.BytesIO(b"0123456789"), 3, 4) == 4
        assert await s.got(4) == b"3456"
        c.transport.close()
        with pytest.raises(RuntimeError, match="closing"):
            await loop.sendfile(c.transport, io.BytesIO(b"0123456789"))


async def test_sendfile_to_one_who_leaves(net: TransportNetwork, tmp_path: Any) -> None:
    if net.loop == "uvloop" and net.kind != "dotshm":
        return
    path = tmp_path / "file"
    path.write_bytes(pattern(20, 16 << 20))
    async with pair(net) as (c, s):
        s.transport.pause_reading()
        with path.open("rb") as file:
            sending = asyncio.ensure_future(asyncio.get_running_loop().sendfile(c.transport, file))
            await turns(20)
            s.transport.abort()
            with pytest.raises(ConnectionError):
                await sending
        await c.lost()


# -- contexts and tasks

var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="nobody's")


class Knows(Recorder):
    """Notes in whose context it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def happened(self, what: str) -> None:
        if what != "lost":  # asyncio calls this one in the context of who closed it
            self.seen.append(var.get())
        super().happened(what)


async def test_contexts(net: TransportNetwork) -> None:
    """Callbacks see the context in which their connection, or their server, was made."""
    accepted: list[Knows] = []

    def accept() -> Knows:
        accepted.append(Knows())
        return accepted[-1]

    async def client(who: str) -> Knows:
        var.set(who)
        _, protocol = await net.connect(Knows, port_of(server))
        return protocol  # type: ignore[no-any-return]

    var.set("server's")
    server = await net.serve(accept)
    var.set("test's")
    clients = await asyncio.gather(client("a's"), client("b's"))
    await until(lambda: len(accepted) == 2 and all(s.transport for s in accepted))
    for one in clients:
        one.transport.write(b"data")
    for other in accepted:
        await other.got(4)
        other.transport.write(b"data")
    for one in clients:
        await one.got(4)
        one.transport.close()
    for other in accepted:
        await other.lost()
        assert set(other.seen) == {"server's"}
    assert [set(one.seen) for one in clients] == [{"a's"}, {"b's"}]
    assert var.get() == "test's"
    server.close()


async def test_no_task_is_current_in_callbacks(net: TransportNetwork) -> None:
    """Not even the one that connects."""
    tasks: set[Any] = set()

    class Asks(Recorder):
        def happened(self, what: str) -> None:
            tasks.add(asyncio.current_task())
            super().happened(what)

    me = asyncio.current_task()
    async with pair(net, Asks, Asks) as (c, s):
        assert asyncio.current_task() is me
        c.transport.write(b"data")
        await s.got(4)
        s.transport.write(b"data")
        await c.got(4)
        c.transport.close()
        await asyncio.gather(c.lost(), s.lost())
    assert tasks == {None}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are of 3.12")
async def test_eager_tasks(net: TransportNetwork) -> None:
    """The handler begins within connection_made(), and may write, read and close there."""
    if net.loop == "uvloop" and (3, 13) <= sys.version_info < (3, 13, 3):
        return  # uvloop calls the factory as later ones want it
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello ")
        assert writer.get_extra_info("peername")
        writer.write(await reader.readline())
        writer.close()
        await writer.wait_closed()

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.close()

    for handler, expected in [(greet, b"hello you\n"), (leave, b"bye")]:
        server = await net.start_server(handler)
        reader, writer = await net.open_connection(port_of(server))
        writer.write(b"you\n")
        assert await reader.read() == expected
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            assert handler is leave  # which has read nothing
        server.close()
        await server.wait_closed()


# -- wrong arguments


async def test_nobody_listens(net: TransportNetwork) -> None:
    server = await net.serve(Recorder)
    port = port_of(server)
    server.close()
    await server.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await net.connect(Recorder, port)


async def test_nobody_has_the_name(net: TransportNetwork) -> None:
    with pytest.raises(socket.gaierror):
        await net.create_connection(Recorder, net.nobody, 7000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"server_hostname": "name"},
        {"ssl_handshake_timeout": 1.0},
        {"ssl_shutdown_timeout": 1.0},
    ],
    ids=str,
)
async def test_tls_options_without_tls(net: TransportNetwork, wrong: dict[str, Any]) -> None:
    if "ssl_shutdown_timeout" in wrong and sys.version_info < (3, 11):
        return
    server = await net.serve(Recorder)
    with pytest.raises(ValueError, match="only meaningful with ssl"):
        await net.connect(Recorder, port_of(server), **wrong)
    if "server_hostname" not in wrong:
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await net.serve(Recorder, **wrong)
    server.close()


async def test_wrong_arguments(net: TransportNetwork) -> None:
    with pytest.raises(TypeError):
        await net.create_connection(Recorder, net.host, 7000, nonsense=True)
    with pytest.raises(TypeError):
        await net.serve(Recorder, nonsense=True)
    with pytest.raises(TypeError):
        await net.serve(Recorder, ssl=True)


@pytest.mark.parametrize("port", [-1, 65536, 1 << 40])
async def test_ports_that_are_none(net: TransportNetwork, port: int) -> None:
    if net.is_uvloop_itself:
        return  # it takes the lower 16 bits
    with pytest.raises(OverflowError):
        await net.connect(Recorder, port)
    with pytest.raises(OverflowError):
        await net.serve(Recorder, port)


# -- cancelling


async def test_connect_cancelled_at_every_step(net: TransportNetwork) -> None:
    """However far it is: it was cancelled, or it was not; nothing is left, and the server goes on."""
    accepted: list[Recorder] = []

    def accept() -> Recorder:
        accepted.append(Recorder())
        return accepted[-1]

    server = await net.serve(accept)
    _, first = await net.connect(Recorder, port_of(server))  # what is made at first use is there now
    first.transport.close()
    await first.lost()
    outcomes = []
    for k in range(40):
        task = asyncio.ensure_future(net.connect(Recorder, port_of(server)))
        await turns(k)
        task.cancel()
        await asyncio.wait([task])
        outcomes.append(task.cancelled())
        if not task.cancelled():
            transport, protocol = task.result()
            transport.abort()
            await protocol.lost()
    assert outcomes[0]
    _, last = await net.connect(Recorder, port_of(server))
    last.transport.write(b"last")
    await until(lambda: accepted and accepted[-1].data == b"last")
    last.transport.close()
    for one in accepted:
        if one.transport is not None:
            await one.lost()
    server.close()
    await server.wait_closed()


async def test_serve_cancelled_at_every_step(net: TransportNetwork) -> None:
    first = await net.serve(Recorder)
    port = port_of(first)
    first.close()
    await first.wait_closed()
    # asyncio's own forgets a server that serves already when it is cancelled at its last await
    for k in range(1 if net.control and net.loop == "asyncio" else 20):
        task = asyncio.ensure_future(net.serve(Recorder, port))
        await turns(k)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            server = task.result()
            server.close()
            await server.wait_closed()
        del task
    again = await net.serve(Recorder, port)
    _, protocol = await net.connect(Recorder, port)
    protocol.transport.close()
    await protocol.lost()
    again.close()


# -- loops


async def in_a_thread(work: Any) -> Any:
    """work() in a thread of its own."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def test_closing_the_loop_with_connections_open(net: TransportNetwork) -> None:
    """The other side, in another loop and thread, sees them end."""
    ready, port = threading.Event(), [0]
    ended: list[BaseException | None] = []

    async def serve() -> None:
        accepted: list[Recorder] = []
        come = asyncio.Event()

        def accept() -> Recorder:
            accepted.append(Recorder())
            come.set()
            return accepted[-1]

        server = await net.serve(accept)
        port[0] = port_of(server)
        ready.set()
        await asyncio.wait_for(come.wait(), PATIENCE)
        for one in accepted:
            assert await one.got(2) == b"hi"
            one.transport.write(b"hi")
            ended.append(await one.lost())
        server.close()

    async def leave_open() -> None:
        _, protocol = await client.connect(Recorder, port[0])
        protocol.transport.write(b"hi")
        assert await protocol.got(2) == b"hi"

    client = _beside(net)
    failed: list[BaseException] = []

    def run_server() -> None:
        try:
            net.run(serve)
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run_server, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a transport that nobody closed
        client.run(leave_open)
        gc.collect()
    thread.join(PATIENCE)
    assert failed == []
    assert len(ended) == 1
    assert ended[0] is None or isinstance(ended[0], ConnectionError)
    assert client.reports == []


def _beside(net: TransportNetwork) -> TransportNetwork:
    """A second of the kind that makes no server node; it finds the first one's."""
    other = type(net)(net.loop)
    if net.kind == "shm":

        async def nothing() -> None:
            pass

        other.open = nothing  # type: ignore[method-assign]
    return other


def test_two_loops_in_two_threads(net: TransportNetwork) -> None:
    ready, done, port = threading.Event(), threading.Event(), [0]
    data = pattern(21, BIG)
    got: list[bytes] = []
    failed: list[BaseException] = []

    async def serve() -> None:
        class Echo(Recorder):
            def data_received(self, chunk: bytes) -> None:
                self.transport.write(chunk)

        server = await net.serve(Echo)
        port[0] = port_of(server)
        ready.set()
        await in_a_thread(done.wait)
        server.close()

    def run_server() -> None:
        try:
            net.run(serve)
        except BaseException as error:
            failed.append(error)
            ready.set()

    async def ask() -> None:
        _, protocol = await client.connect(Recorder, port[0])
        protocol.transport.write(data)
        got.append(await protocol.got(len(data)))
        protocol.transport.close()
        await protocol.lost()

    client = _beside(net)
    thread = threading.Thread(target=run_server, daemon=True)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        client.run(ask)
    finally:
        done.set()
        thread.join(PATIENCE)
    assert failed == []
    assert got == [data]


def test_loop_after_loop(net: TransportNetwork) -> None:
    async def once() -> None:
        async with pair(net) as (c, s):
            c.transport.write(b"data")
            assert await s.got(4) == b"data"

    for _ in range(3):
        net.run(once)
