"""Whatever one end does, the other hears of it within a few turns of the loop, also when both are of one
node, which sleeps: nobody rings itself, so that what a node does is followed by a pass of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import shmsock
import shmsock.anyio
from shmsock.aio.pseudosocket import NO_LINGER
from tests.aio.conftest import Run, World, until

TURNS = 30
"""Of a loop that turns all the time: a beat of the heartbeat takes thousands."""


class Ends:
    """One connection of protocols, accepted by a server; what its client has heard is counted."""

    def __init__(self) -> None:
        self.heard = 0
        self.server: Any = None
        self.client: Any = None

    def client_protocol(self) -> asyncio.Protocol:
        ends = self

        class Client(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                ends.heard += 1

            def eof_received(self) -> bool:
                ends.heard += 1
                return True

            def connection_lost(self, exc: Exception | None) -> None:
                ends.heard += 1

            def resume_writing(self) -> None:
                ends.heard += 1

        return Client()

    def server_protocol(self) -> asyncio.Protocol:
        ends = self

        class Serving(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                ends.server = transport

        return Serving()


async def hears(node: shmsock.Node, act: Callable[[], Any], heard: Callable[[], Any]) -> int:
    """So many turns of the loop from `act`, done while the node sleeps, until it is heard."""
    passes = -1
    while node.pump.scheduled or node.statistics()["pumps"] != passes:  # its heartbeat looks often, at first
        passes = node.statistics()["pumps"]
        await asyncio.sleep(0.02)
    act()
    for turns in range(100_000):
        if heard():
            return turns
        await asyncio.sleep(0)
    raise AssertionError("nobody hears of it")


def linger_and_abort(transport: Any) -> None:
    transport.get_extra_info("socket").setsockopt(1, 13, NO_LINGER)
    transport.abort()


ACTS: dict[str, Callable[[Any], Any]] = {
    "write": lambda t: t.write(b"x"),
    "write a bytearray": lambda t: t.write(bytearray(b"x")),
    "writelines": lambda t: t.writelines([b"x", b"y"]),
    "write_eof": lambda t: t.write_eof(),
    "close": lambda t: t.close(),
    "abort": lambda t: t.abort(),
    "reset": linger_and_abort,
    "write and close": lambda t: (t.write(b"x"), t.close()),
    "the connection's finish": lambda t: t.conn.finish(),
    "the connection's close": lambda t: t.conn.close(),
    "the connection's abort": lambda t: t.conn.abort(),
    "the connection's cut": lambda t: t.conn.cut(),
    "the connection's write": lambda t: t.conn.write(b"x", 1),
    "a violation": lambda t: t.conn.violated("made up"),
}


@pytest.mark.parametrize("act", ACTS)
def test_an_act_on_a_transport(run: Run, world: World, act: str) -> None:
    async def main() -> None:
        ends = Ends()
        async with world.nodes() as (a, b):
            server = await shmsock.create_server(ends.server_protocol, None, 7000, node=b)
            client, _ = await shmsock.create_connection(ends.client_protocol, b.name, 7000, node=a)
            await until(lambda: ends.server)
            limit = TURNS if a is b else 100_000  # another node is rung, which is a matter of its loop
            assert await hears(b, lambda: ACTS[act](ends.server), lambda: ends.heard) <= limit
            client.abort()
            ends.server.abort()
            server.close()

    run(main())


@pytest.mark.parametrize("stock", [False, True])
def test_space_for_who_waits_to_write(run: Run, region: str, stock: bool) -> None:
    async def main() -> None:
        async with World("self", region).pair(settings=shmsock.Settings(ring_bytes=4096)) as (c, s):
            c.transport.set_write_buffer_limits(0)
            c.writer.write(bytes(6000))
            waiting = asyncio.ensure_future(c.writer.drain())
            reader: Any = s.reader
            reading: list[Any] = []

            def act() -> None:
                if stock:
                    s.transport.conn.read(6000)
                else:
                    part = reader.readexactly(4096 - len(reader._buffer))
                    reading.append(asyncio.ensure_future(part))

            await asyncio.sleep(0)
            assert await hears(s.node, act, waiting.done) <= TURNS

    run(main())


@pytest.mark.parametrize("what", ["server", "refused"])
def test_an_act_on_a_listener(run: Run, region: str, what: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            server = await shmsock.create_server(asyncio.Protocol, None, 7000, node=node, start_serving=False)
            asking: list[asyncio.Future[Any]] = []

            def act() -> None:
                if what == "server":
                    server.close()
                asking.append(
                    asyncio.ensure_future(shmsock.create_connection(asyncio.Protocol, "a", 7000, node=node))
                )

            assert await hears(node, act, lambda: asking[0].done()) <= TURNS
            with pytest.raises(ConnectionRefusedError):
                await asking[0]
            server.close()

    run(main())


def test_connections_that_nobody_accepts(run: Run, region: str) -> None:
    """Those of an anyio listener that is closed."""

    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            listener = await shmsock.anyio.create_shm_listener(local_port=7000, node=node)
            ends = Ends()
            client, _ = await shmsock.create_connection(ends.client_protocol, "a", 7000, node=node)
            closing: list[Any] = []
            act = lambda: closing.append(asyncio.ensure_future(listener.aclose()))  # noqa: E731
            assert await hears(node, act, lambda: ends.heard) <= TURNS
            await closing[0]
            client.abort()

    run(main())


@pytest.mark.parametrize("how", ["first", "again", "slowly", "engine", "resumed"])
def test_datagrams(run: Run, region: str, how: str) -> None:
    async def main() -> None:
        got: list[bytes] = []

        class Receiver(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                got.append(data)

        async with shmsock.attach(region, name="a") as node:
            create = shmsock.create_datagram_endpoint
            into, _ = await create(Receiver, ("a", 9), node=node)
            out, _ = await create(asyncio.DatagramProtocol, remote_addr=("a", 9), node=node)
            if how != "first":
                for _ in range(2):
                    out.sendto(b"before")
                await until(lambda: len(got) == 2)
                got.clear()
            if how == "resumed":
                into.pause_reading()
                out.sendto(b"x")
                await until(lambda: into.endpoint._kept)
            acts: dict[str, Callable[[], Any]] = {
                "slowly": lambda: out.sendto(bytearray(b"x")),
                "engine": lambda: out.endpoint.send(b"x"),
                "resumed": into.resume_reading,
            }
            act = acts.get(how, lambda: out.sendto(b"x"))
            assert await hears(node, act, lambda: got) <= TURNS
            assert got == [b"x"]
            into.close()
            out.close()

    run(main())


@pytest.mark.parametrize("how", ["send", "send_eof", "aclose"])
def test_an_anyio_stream(run: Run, region: str, how: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as node:
            listener = await shmsock.anyio.create_shm_listener(local_port=7000, node=node)
            ends = Ends()
            client, _ = await shmsock.create_connection(ends.client_protocol, "a", 7000, node=node)
            stream = await listener.accept()
            doing: list[Any] = []

            def act() -> None:
                call: Any = getattr(stream, how)
                doing.append(asyncio.ensure_future(call(b"x") if how == "send" else call()))

            assert await hears(node, act, lambda: ends.heard) <= TURNS
            await doing[0]
            await stream.aclose()
            await listener.aclose()
            client.abort()

    run(main())
