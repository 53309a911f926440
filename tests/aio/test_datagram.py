"""create_datagram_endpoint(), as asyncio's UDP has it: on asyncio and uvloop, in one node, between two, and
between processes."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import gc
import itertools
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import shmsock
from shmsock import Settings
from shmsock.aio import names
from shmsock.aio.datagram import DATAGRAM_MAX, ShmDatagramTransport, create_datagram_endpoint
from shmsock.engine.datagram_links import OVERHEAD, Incoming, Outgoing
from tests.aio.conftest import Run, World, held, until
from tests.aio.processes import Child

PORT = 9
COUNTS = ("unreachable", "dropped_full", "dropped_unsent", "lost_unread")


class Protocol(asyncio.DatagramProtocol):
    """Writes down what happens."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.got: list[bytes] = []
        self.sources: list[Any] = []
        self.errors: list[Exception] = []

    def connection_made(self, transport: Any) -> None:
        self.log.append("made")

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.append(exc if exc is None else type(exc))

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.append(data)
        self.sources.append(addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.log.append("pause")

    def resume_writing(self) -> None:
        self.log.append("resume")


class End:
    def __init__(self, transport: ShmDatagramTransport, protocol: Any) -> None:
        self.transport, self.protocol = transport, protocol
        self.sendto, self.close = transport.sendto, transport.close

    async def got(self, *data: bytes) -> None:
        await until(lambda: self.protocol.got == list(data), f"{self.protocol.got} is {data}")

    async def logged(self, *what: Any) -> None:
        await until(lambda: self.protocol.log == list(what), f"{self.protocol.log} is {what}")

    @property
    def address(self) -> Any:
        return self.transport.get_extra_info("sockname")


async def bind(node: shmsock.Node, port: int = 0, remote: Any = None, **how: Any) -> End:
    factory = how.pop("factory", Protocol)
    local = (how.pop("host", None), port) if port else None
    return End(*await create_datagram_endpoint(factory, local, remote, node=node, **how))


@asynccontextmanager
async def nodes(world: World, **how: Any) -> AsyncIterator[tuple[shmsock.Node, shmsock.Node]]:
    """(sender's, receiver's). At the end no transport is left, only links, and no wakeup was lost."""
    one, other = (shmsock.attach(world.region, name=name, **how) for name in "ab")
    async with one as a, other as b:
        yield a, (a if world.how == "self" else b)
        for node in (a, b):
            assert node.transports == set()
            assert node.statistics()["healed"] == 0
            assert not [
                c for c in node.engine.connections.values() if not isinstance(c.handler, (Incoming, Outgoing))
            ]
            assert not list(node.engine.datagrams)


def counts(*of: shmsock.Node) -> dict[str, int]:
    total = {name: sum(n.statistics()[f"datagrams_{name}"] for n in set(of)) for name in COUNTS}
    return {name: n for name, n in total.items() if n}


# -- what arrives


def test_there_and_back(run: Run, world: World) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):
            server, client = await bind(b, PORT), await bind(a)
            sent: list[Any] = [
                b"",
                b"x",
                bytes(1000),
                bytes(DATAGRAM_MAX),
                bytearray(b"ba"),
                memoryview(b"mv"),
            ]
            sent += [memoryview(bytearray(8)).cast("I"), memoryview(b"abcdef")[::2]]
            for data in sent:
                client.sendto(data, (b.name, PORT))
            whole = [bytes(data) for data in sent]
            await until(lambda: server.protocol.got == whole)
            assert set(server.protocol.sources) == {client.address} == {("a", client.address[1])}
            for data in whole:
                server.sendto(data, client.address)
            await until(lambda: client.protocol.got == whole)
            assert set(client.protocol.sources) == {(b.name, PORT)}
            assert client.protocol.log[0] == "made"
            assert counts(a, b) == {}
            server.close()
            client.close()

    run(main())


def test_what_it_says_about_itself(run: Run, world: World) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):
            server = await bind(b, PORT, host="")
            client = await bind(a, 0, (b.name.upper() + ".shm", PORT))
            info = client.transport.get_extra_info
            assert info("peername") == (b.name, PORT)
            assert info("sockname")[0] == a.name
            assert info("socket").getpeername() == info("peername")
            assert info("socket").type == socket.SOCK_DGRAM
            assert server.transport.get_extra_info("peername") is None
            assert server.address == (b.name, PORT)
            assert info("nonsense", 5) == 5
            assert isinstance(client.transport, asyncio.DatagramTransport)
            assert client.transport.get_write_buffer_limits() == (16384, 65536)
            assert not client.transport.is_closing()
            client.sendto(b"1")
            client.sendto(b"2", (b.name, PORT))
            with pytest.raises(ValueError, match=r"Invalid address: must be None or \('"):
                client.sendto(b"3", (b.name, PORT + 1))
            await until(lambda: server.protocol.got == [b"1", b"2"])
            other = Protocol()
            client.transport.set_protocol(other)
            assert client.transport.get_protocol() is other
            server.sendto(b"4", client.address)
            await until(lambda: other.got == [b"4"])
            server.close()
            client.close()
            assert client.transport.is_closing()
            assert "clos" in repr(client.transport)
            await asyncio.sleep(0)
            await until(lambda: other.log == [None])

    run(main())


def test_internet_addresses(run: Run, world: World) -> None:
    """For loops whose programs take addresses apart."""

    async def main() -> None:
        async with nodes(world) as (a, b):
            server = await bind(b, PORT, numeric=True)
            client = await bind(a, 0, (b.name, PORT), numeric=True)
            stranger = await bind(a, numeric=True)
            host = server.address[0]
            assert names.is_address(host)
            assert host == names.names_of(asyncio.get_running_loop()).address(b.region.url, b.name)
            assert client.transport.get_extra_info("peername") == (host, PORT)
            client.sendto(b"1")
            client.sendto(b"2", (host, PORT))
            stranger.sendto(b"3", (host, PORT))
            stranger.sendto(b"4", ("*.shm", PORT))
            await until(lambda: len(server.protocol.got) == 4)
            assert server.protocol.sources == [client.address] * 2 + [stranger.address] * 2
            server.sendto(b"back", server.protocol.sources[0])
            await until(lambda: client.protocol.got == [b"back"])
            assert client.protocol.sources == [(host, PORT)]
            for end in (server, client, stranger):
                end.close()

    run(main())


def test_hosts_as_programs_spell_them(run: Run, world: World) -> None:
    """On a loop that knows .shm hosts, sendto() takes what create_connection() there takes."""

    async def main() -> None:
        async with nodes(world) as (a, b):
            servers = [await bind(b, PORT, numeric=True), await bind(a, PORT + 1, numeric=True)]
            client = await bind(b, numeric=True)
            hosts: list[Any] = ["localhost.shm", "LOCALHOST.SHM", "localhost.shm.", "LocalHost.shm."]
            hosts += ["*.shm", "*.SHM", "*.shm.", "*", f"{a.name}.shm", f"{a.name.upper()}.SHM."]
            hosts += [servers[1].address[0], "localhost", a.name]
            hosts += [kind(host.encode()) for host in hosts for kind in (bytes, bytearray)]
            for i, host in enumerate(hosts):
                client.sendto(b"%d" % i, (host, PORT + 1))
            await servers[1].got(*(b"%d" % i for i in range(len(hosts))))
            assert client.protocol.errors == []
            client.sendto(b"", (b"nobody.shm", PORT))
            client.sendto(b"", (b"nobody", PORT))
            assert [type(e) for e in client.protocol.errors] == [socket.gaierror] * 2
            client.sendto(b"", (names.Names().address("file:/r", a.name), PORT))  # another loop's
            client.sendto(b"", ("127.0.0.1", PORT))  # the kernel's
            client.sendto(b"", ("2001:db8::1", PORT, 0, 0))
            assert [e.errno for e in client.protocol.errors[2:]] == [
                errno.EADDRNOTAVAIL,
                errno.ENETUNREACH,
                errno.ENETUNREACH,
            ]
            to_all = await bind(a, 0, ("*", PORT), numeric=True)
            assert to_all.transport.get_extra_info("peername") == ("*", PORT)
            to_all.sendto(b"all")
            to_all.sendto(b"of you", (b"*", PORT))
            await servers[0].got(b"all", b"of you")
            assert counts(a, b) == {}
            for end in (*servers, client, to_all):
                assert not end.transport.is_closing()
                end.close()

    run(main())


def test_numbers_of_another_region(run: Run, make: Callable[..., str]) -> None:
    """Nobody who is at that place in the own one gets what is sent there."""

    async def main() -> None:
        async with shmsock.attach(make(), name="a") as a, shmsock.attach(make(), name="b") as b:
            server, other = await bind(a, PORT, numeric=True), await bind(b, PORT, numeric=True)
            server.sendto(b"x", other.address)
            (error,) = server.protocol.errors
            assert isinstance(error, socket.gaierror)
            server.close()
            other.close()

    run(main())


def test_to_all(run: Run, world: World) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):
            ends = [await bind(a, PORT), await bind(b, PORT + 1)]
            ends.append(await bind(a, 0, ("*", PORT), allow_broadcast=True))
            ends[0].sendto(b"none", ("*", PORT + 2))
            ends[0].sendto(b"not to me", ("*", PORT))
            ends[1].sendto(b"one", ("*", PORT))
            ends[2].sendto(b"two")
            await until(lambda: sorted(ends[0].protocol.got) == [b"one", b"two"])
            ends[0].sendto(b"back", ends[2].address)
            await until(lambda: ends[2].protocol.got == [b"back"])
            for end in ends:
                end.close()

    run(main())


# -- what is wrong


def test_parameters(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            wrong: list[tuple[type[BaseException], Any, dict[str, Any]]] = [
                (ValueError, None, {"sock": object()}),
                (ValueError, None, {"family": socket.AF_UNIX}),
                (ValueError, None, {"proto": socket.IPPROTO_TCP}),
                (TypeError, "a", {}),
                (TypeError, ("a", 1, 2), {}),
                (OverflowError, (None, 65536), {}),
                (socket.gaierror, None, {"remote_addr": ("b", 1)}),
            ]
            for kind, local, how in wrong:
                with pytest.raises(kind):
                    await create_datagram_endpoint(Protocol, local, node=node, **how)
            with pytest.raises(OSError, match="goes by") as info:
                await create_datagram_endpoint(Protocol, ("b", 1), node=node)
            assert info.value.errno == errno.EADDRNOTAVAIL
            end = await bind(node, PORT)
            with pytest.raises(OSError, match="in use") as info:
                await bind(node, PORT)
            assert info.value.errno == errno.EADDRINUSE
            for data in ("text", None, 5, [b"x"]):
                with pytest.raises(TypeError, match="bytes-like"):
                    end.sendto(data, ("a", PORT))
            for _ in range(2):
                with pytest.raises(OSError, match=r"65508 .*65507") as info:
                    end.sendto(bytes(DATAGRAM_MAX + 1), ("a", PORT))
                assert info.value.errno == errno.EMSGSIZE
                end.sendto(b"", ("a", PORT))
            assert end.protocol.errors == []
            end.close()
            await until(lambda: end.protocol.log == ["made", None])
            ends = [await bind(node, PORT, reuse_port=True) for _ in range(2)]
            for end in ends:
                end.close()

            def refuse() -> Protocol:
                raise LookupError("no protocol today")

            with pytest.raises(LookupError):
                await bind(node, PORT, factory=refuse)
            assert not list(node.engine.datagrams)

    run(main())


def test_no_address(run: Run, region: str) -> None:
    """asyncio ends the transport with a TypeError, and so do we."""

    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            for to in (None, ("a", "9"), ["a", 9]):
                end = await bind(node)
                end.sendto(b"x", to)
                await end.logged("made", TypeError)

    run(main())
    assert [r["message"] for r in run.reports] == ["Fatal write error on datagram transport"] * 3
    run.reports.clear()


def test_closed_ports_and_unknown_names(run: Run, world: World) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):
            plain, connected = await bind(a), await bind(a, 0, (b.name, PORT))
            plain.sendto(b"x", (b.name, PORT))
            connected.sendto(b"x")
            assert connected.protocol.errors == []
            await until(lambda: connected.protocol.errors)
            assert [type(e) for e in connected.protocol.errors] == [ConnectionRefusedError]
            assert plain.protocol.errors == []
            assert counts(a) == {"unreachable": 2}
            plain.sendto(b"x", ("nobody", PORT))
            assert [type(e) for e in plain.protocol.errors] == [socket.gaierror]
            server = await bind(b, PORT)
            connected.sendto(b"y")
            await until(lambda: server.protocol.got == [b"y"])
            for end in (plain, connected, server):
                end.close()
            assert connected.protocol.log == plain.protocol.log == ["made"]

    run(main())


def test_another_thread(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            end = await bind(node, PORT)
            end.sendto(b"x", ("a", PORT))
            await until(lambda: end.protocol.got)
            for call in (lambda: end.sendto(b"x", ("a", PORT)), end.close, end.transport.abort):
                with pytest.raises(RuntimeError, match="thread"):
                    await asyncio.get_running_loop().run_in_executor(None, call)
            end.close()

    run(main())


# -- callbacks


def test_order_of_callbacks(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            source = await bind(node)
            log: list[str] = []

            class Chatty(Protocol):
                def __init__(self) -> None:
                    super().__init__()
                    asyncio.get_running_loop().call_soon(log.append, "soon")

                def connection_made(self, transport: Any) -> None:
                    log.append("made")
                    transport.sendto(b"self", ("a", PORT))

                def datagram_received(self, data: bytes, addr: Any) -> None:
                    log.append(data.decode())

            creating = asyncio.create_task(bind(node, PORT, factory=Chatty))
            creating.add_done_callback(lambda _: log.append("created"))
            while not log:
                await asyncio.sleep(0)
                source.sendto(b"early", ("a", PORT))
            end = await creating
            await until(lambda: "self" in log)
            assert log[:2] == ["soon", "made"]
            assert set(log[2:]) == {"created", "early", "self"}
            end.close()
            end.close()
            assert end.protocol.log == []
            source.transport.abort()
            source.transport.abort()
            source.close()
            await until(lambda: source.protocol.log == ["made", None] and end.protocol.log == [None])

    run(main())


def test_callbacks_that_raise_are_reported(run: Run, world: World) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):

            class Clumsy(Protocol):
                def connection_made(self, transport: Any) -> None:
                    raise LookupError("made")

                def datagram_received(self, data: bytes, addr: Any) -> None:
                    super().datagram_received(data, addr)
                    raise LookupError("received")

                def error_received(self, exc: Exception) -> None:
                    super().error_received(exc)
                    raise LookupError("error")

                def pause_writing(self) -> None:
                    super().pause_writing()
                    raise LookupError("pause")

                def resume_writing(self) -> None:
                    super().resume_writing()
                    raise LookupError("resume")

                def connection_lost(self, exc: Exception | None) -> None:
                    super().connection_lost(exc)
                    raise LookupError("lost")

            server, client = await bind(b, PORT), await bind(a, 0, (b.name, PORT), factory=Clumsy)
            client.sendto(b"hello")
            await until(lambda: server.protocol.got)
            for data in (b"1", b"2"):
                server.sendto(data, client.address)
            await until(lambda: client.protocol.got == [b"1", b"2"])
            while "pause" not in client.protocol.log:
                client.sendto(bytes(5000))
            await until(lambda: "resume" in client.protocol.log)
            server.close()
            client.sendto(b"refused")
            await until(lambda: client.protocol.errors)
            client.close()
            await until(lambda: client.protocol.log[-1] is None)

    run(main())
    raised = [str(r["exception"]) for r in run.reports]
    assert raised == ["made", "received", "received", "pause", "resume", "error", "lost"]
    assert all(isinstance(r["exception"], LookupError) for r in run.reports)
    run.reports.clear()


def test_callbacks_run_in_the_context_of_the_creator(run: Run, world: World) -> None:
    var = contextvars.ContextVar("var", default="nobody's")
    seen: list[tuple[str, str]] = []

    class Curious(Protocol):
        def __getattribute__(self, name: str) -> Any:
            if name in (
                "datagram_received",
                "error_received",
                "connection_lost",
                "resume_writing",
                "connection_made",
            ):
                seen.append((name, var.get()))
            return super().__getattribute__(name)

        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            seen.append(("inside", var.get()))

    async def main() -> None:
        async with nodes(world) as (a, b):
            server = await bind(b, PORT)

            async def create(name: str) -> End:
                var.set(name)
                return await bind(a, 0, (b.name, PORT), factory=Curious)

            ends = [await asyncio.create_task(create(name)) for name in ("one", "other")]
            seen.clear()
            for end in ends:
                server.sendto(b"x", end.address)
                await end.got(b"x")
            assert [value for name, value in seen if name == "inside"] == ["one", "other"]
            for end in ends:
                end.close()
            server.close()

    run(main())


def test_reading_can_be_paused(run: Run, world: World) -> None:
    """A paused endpoint keeps what arrives, and stands in nobody's way."""

    async def main() -> None:
        async with nodes(world) as (a, b):
            paused, other, client = await bind(b, PORT), await bind(b, PORT + 1), await bind(a)
            paused.transport.pause_reading()
            paused.transport.pause_reading()
            assert not paused.transport.is_reading()
            sent = [b"%d" % i for i in range(500)]
            for data in sent:
                client.sendto(data, (b.name, PORT))
                client.sendto(data, (b.name, PORT + 1))
            await until(lambda: other.protocol.got == sent)
            assert paused.protocol.got == []
            paused.transport.resume_reading()
            paused.transport.resume_reading()
            assert paused.protocol.got == []  # never from within a call
            client.sendto(b"last", (b.name, PORT))
            await until(lambda: paused.protocol.got == [*sent, b"last"])
            assert paused.transport.is_reading()
            assert counts(a, b) == {}
            for end in (paused, other, client):
                end.close()
            assert not paused.transport.is_reading()
            paused.transport.resume_reading()

    run(main())


# -- how much


@pytest.mark.parametrize("kept", [False, True])
def test_slow_callbacks_do_not_hold_the_loop(run: Run, world: World, kept: bool) -> None:
    """The loop turns in between: a few datagrams in a turn, not 64."""

    async def main() -> None:
        async with nodes(world) as (a, b):
            turns: list[int] = []
            loop = asyncio.get_running_loop()
            sink, client = await bind(b, PORT), await bind(a, 0, (b.name, PORT))
            client.sendto(b"")
            await sink.got(b"")

            def datagram_received(data: bytes, addr: Any) -> None:
                turns[-1] += 1
                end = time.perf_counter() + 0.0005
                while time.perf_counter() < end:
                    pass

            def turn() -> None:
                turns.append(0)
                if sum(turns) < 200:
                    loop.call_soon(turn)

            sink.protocol.datagram_received = datagram_received
            if kept:
                sink.transport.pause_reading()
            for _ in range(200):
                client.sendto(b"x")
            if kept:
                await until(lambda: b.statistics()["datagrams_in"] == 201)
                sink.transport.resume_reading()
            turn()
            await until(lambda: sum(turns) == 200)
            assert max(turns) <= 4
            assert counts(a, b) == {}
            client.close()
            sink.close()

    run(main())


def test_what_never_fits_is_told(run: Run, make: Callable[..., str]) -> None:
    """In a small region; and nothing waits for it."""

    async def main() -> None:
        async with nodes(World("nodes", make(size=1 << 18, peers=4))) as (a, b):
            sink, client = await bind(b, PORT), await bind(a, 0, (b.name, PORT))
            client.sendto(bytes(5000))
            client.sendto(b"fits")
            await sink.got(b"fits")
            (error,) = client.protocol.errors
            assert error.errno == errno.ENOBUFS
            assert client.transport.get_write_buffer_size() == 0
            client.close()
            sink.close()

    run(main())


def test_an_overrun_loses_by_the_rule(run: Run, world: World) -> None:
    """The newest beyond the receiver's bound; every one is accounted for."""

    async def main() -> None:
        bound = 1 << 18
        async with nodes(world, settings=Settings(datagram_queue_bytes=bound)) as (a, b):
            sink, client = await bind(b, PORT), await bind(a)
            sink.transport.pause_reading()
            sent = [i.to_bytes(4, "little") * 200 for i in range(1000)]
            for i, data in enumerate(sent):
                client.sendto(data, (b.name, PORT))
                if not i % 50:
                    await until(lambda: client.transport.get_write_buffer_size() == 0)
            await until(lambda: b.statistics()["datagrams_in"] == 1000)
            kept = bound // (800 + OVERHEAD)
            assert counts(a, b) == {"dropped_full": 1000 - kept}
            sink.transport.resume_reading()
            await until(lambda: sink.protocol.got == sent[:kept])
            client.close()
            sink.close()

    run(main())


def test_writing_pauses_and_resumes(run: Run, world: World) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):
            sink, client = await bind(b, PORT), await bind(a, 0, (b.name, PORT))
            transport, log, at = client.transport, client.protocol.log, 0
            for size in (0, 100, 60000):
                for _ in range(3):
                    log.clear()
                    while not log:
                        client.sendto(at.to_bytes(4, "little") + bytes(size))
                        at += 1
                        assert transport.get_write_buffer_size() <= 65536 or log == ["pause"]
                    assert transport.get_write_buffer_size() > 65536
                    client.sendto(at.to_bytes(4, "little"))  # pause_writing is a request
                    at += 1
                    await until(lambda: len(log) > 1)
                    assert log == ["pause", "resume"]
                    assert transport.get_write_buffer_size() <= 16384
            await until(lambda: len(sink.protocol.got) == at)
            assert [int.from_bytes(d[:4], "little") for d in sink.protocol.got] == list(range(at))
            log.clear()
            transport.set_write_buffer_limits(0)
            assert transport.get_write_buffer_limits() == (0, 0)
            while not log:
                client.sendto(bytes(60000))
            await until(lambda: log == ["pause", "resume"])
            assert transport.get_write_buffer_size() == 0
            assert counts(a, b) == {}
            client.close()
            sink.close()

    run(main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_the_end_with_something_unsent(run: Run, world: World, how: str) -> None:
    async def main() -> None:
        async with nodes(world) as (a, b):
            sink, client = await bind(b, PORT), await bind(a, 0, (b.name, PORT))
            for i in range(200):
                client.sendto(i.to_bytes(4, "little") + bytes(10000))
            assert client.transport.get_write_buffer_size() > 1 << 20
            getattr(client.transport, how)()
            client.sendto(b"too late")
            log = client.protocol.log
            assert log == ["made", "pause"]
            await until(lambda: log[-1] is None)
            assert log in (["made", "pause", "resume", None], ["made", "pause", None])
            lost = counts(a, b).get("dropped_unsent", 0)
            await until(lambda: len(sink.protocol.got) == 200 - lost)
            assert [int.from_bytes(d[:4], "little") for d in sink.protocol.got] == list(range(200 - lost))
            assert (lost == 0) == (how == "close")
            assert client.transport.get_write_buffer_size() == 0
            sink.close()

    run(main())


def test_sends_after_the_end(run: Run, region: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            end = await bind(node, 0, ("a", PORT))
            end.close()
            for i in range(6):
                end.sendto(b"x")
                assert len(caplog.records) == max(0, i - 3)
            with pytest.raises(TypeError):
                end.sendto("x")
            await until(lambda: end.protocol.log == ["made", None])

    with caplog.at_level(logging.WARNING, "asyncio"):
        run(main())


def test_what_was_sent_before_a_node_detached_arrives(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="b") as b:
            sink = await bind(b, PORT)
            for count in (1, 300):
                sink.protocol.got.clear()
                async with shmsock.attach(region, name="a") as a:
                    client = await bind(a, 0, ("b", PORT))
                    for i in range(count):
                        client.sendto(i.to_bytes(4, "little") + bytes(5000))
                    client.close()
                await asyncio.sleep(0)
                assert client.protocol.log[-1] is None
                await sink.got(*(i.to_bytes(4, "little") + bytes(5000) for i in range(count)))
                await until(lambda: not b.engine.connections)
            open_one = await bind(b)
            sink.close()
        await until(lambda: open_one.protocol.log == ["made", None])

    run(main())


def test_a_node_that_lost_its_section(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            ends = [await bind(node, PORT + i) for i in range(2)]
            ends[0].sendto(b"x", ("a", PORT))
            await until(lambda: ends[0].protocol.got)
            node.engine.memory.store(node.engine.layout.section(node.section), 12345)
            ends[0].sendto(b"x", ("a", PORT))
            for end in ends:
                await end.logged("made", shmsock.NodeClosedError)

    run(main())
    assert [type(r["exception"]) for r in run.reports] == [shmsock.NodeClosedError]
    run.reports.clear()


# -- leaks


def test_cancelled_at_every_step(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            before = held(node)
            for turns in itertools.count():
                task = asyncio.create_task(bind(node, PORT))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result().close()
                    break
                await until(lambda: not node.transports and not list(node.engine.datagrams))
            assert turns > 1
            await until(lambda: held(node) == before)
            assert not node.transports

    run(main())


def test_the_implicit_node(run: Run, region: str) -> None:
    async def main() -> None:
        made = [
            await create_datagram_endpoint(Protocol, ("localhost", PORT), region=region, name="me"),
            await create_datagram_endpoint(Protocol, None, (None, PORT), region=region),
        ]
        made[1][0].sendto(b"x")
        await until(lambda: made[0][1].got == [b"x"])
        assert made[0][1].sources == [made[1][0].get_extra_info("sockname")]

    for _ in range(2):
        run(main())  # left open: they end with their node
        gc.collect()


# -- two processes


@pytest.mark.slow
def test_a_million(run: Run, region: str, loop_name: str) -> None:
    """Nobody overruns: none is lost, none overtakes another."""
    count = 1_000_000 if loop_name == "uvloop" else 100_000

    class Sink(Protocol):
        seen = 0

        def datagram_received(self, data: bytes, addr: Any) -> None:
            if int.from_bytes(data, "little") == self.seen:
                self.seen += 1
            else:
                self.errors.append(AssertionError(data))

    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            sink = await bind(node, PORT, factory=Sink)
            async with Child("datagram_source", region, count, 16, loop=loop_name) as child:
                await until(lambda: sink.protocol.seen == count or sink.protocol.errors)
                assert sink.protocol.errors == []
                child.tell()
                told = json.loads(await child.line())
                assert {k: v for k, v in told.items() if v} == {"datagrams_out": count}
                assert await child.ended() == 0
            assert node.statistics()["datagrams_in"] == count
            assert counts(node) == {}
            assert node.statistics()["healed"] == 0
            sink.close()

    run(main())


def test_a_peer_that_is_killed_and_comes_back(run: Run, region: str, loop_name: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            async with Child("datagram_echo", region, "peer", PORT, loop=loop_name) as child:
                await child.says("ready")
                connected, plain = await bind(node, 0, ("peer", PORT)), await bind(node)
                for end in (connected, plain):
                    end.sendto(b"1", ("peer", PORT))
                    await end.got(b"1")
                child.stop()
                connected.sendto(b"unread")
                plain.sendto(b"unread", ("peer", PORT))
                child.kill()
                await until(lambda: connected.protocol.errors)
                assert [type(e) for e in connected.protocol.errors] == [ConnectionRefusedError]
                assert counts(node) == {"lost_unread": 2}
                plain.sendto(b"x", ("peer", PORT))
                assert [type(e) for e in plain.protocol.errors] == [socket.gaierror]
            async with Child("datagram_echo", region, "peer", PORT, loop=loop_name) as child:
                await child.says("ready")
                for end in (connected, plain):
                    end.sendto(b"2", ("peer", PORT))
                    await end.got(b"1", b"2")
                child.tell()
                assert await child.ended() == 0
            connected.close()
            plain.close()

    run(main())


def test_processes_that_share_a_port(run: Run, region: str, loop_name: str) -> None:
    """A sender stays with one as long as that lives, and then goes to the other."""

    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            children = [Child("datagram_echo", region, "peer", PORT, loop=loop_name) for _ in range(2)]
            for child in children:
                await child.says("ready")
            end = await bind(node)
            for i in range(20):
                end.sendto(b"%d" % i, ("peer", PORT))
                await end.got(*(b"%d" % k for k in range(i + 1)))
            (section,) = {c.peer for c in node.engine.connections.values()}
            pid = node.engine.peers[section].who.pid  # type: ignore[union-attr]
            (taken,) = (c for c in children if c.pid == pid)
            taken.kill()
            await until(lambda: not node.engine.connections)
            end.sendto(b"again", ("peer", PORT))
            await until(lambda: end.protocol.got[-1] == b"again")
            end.close()
            for child in children:
                child.close()

    run(main())
