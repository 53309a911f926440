"""A pump that goes on in the same turn of the loop: who has something to run does not wait for it."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections import defaultdict
from typing import Any

import pytest
import uvloop

import shmsock
from shmsock.aio.pump import ready_queue
from shmsock.aio.trio_loop import TrioLoop
from tests.aio.conftest import Run, until
from tests.aio.processes import Child

ENOUGH = 300_000


class PingPong(asyncio.Protocol):
    """Keeps one byte going to and fro, so that the pump has no reason to stop."""

    def __init__(self) -> None:
        self.count, self.on = 0, True

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(b"x")

    def data_received(self, data: bytes) -> None:
        self.count += 1
        if self.on and self.count < ENOUGH:
            self.transport.write(data)


class Wakes(PingPong):
    """And somebody, now and then."""

    waiter: asyncio.Future[int] | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.waiter is not None and self.count % 100 == 0:
            self.waiter.set_result(self.count)
            self.waiter = None


class Derived(uvloop.Loop):
    __slots__ = ("other",)


FACTORIES = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
    "derived": Derived,
    "shm": shmsock.new_event_loop,
    "shm-uvloop": shmsock.loop_factory(uvloop.Loop),
}


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_the_queue_of_a_loop_is_found(factory: Any, debug: bool, region: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with shmsock.attach(region) as node:
            queue = ready_queue(loop)
            assert queue is node.pump.queue is getattr(loop, "_ready", queue)
            before = len(queue)
            handle = loop.call_soon(int)
            assert len(queue) == before + 1
            assert queue[-1] is handle

    loop = factory()
    try:
        loop.set_debug(debug)
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_of_other_loops_nothing_is_known() -> None:
    assert ready_queue(TrioLoop.__new__(TrioLoop)) is None


def test_who_is_woken_by_bytes_runs_before_more_of_them_are_taken(run: Run, region: str) -> None:
    async def main() -> None:
        async with Child("serve", region, "peer", loop=run.loop) as child, shmsock.attach(region) as node:
            await child.says("ready")
            transport, protocol = await shmsock.create_connection(Wakes, "peer", 7000, node=node)
            for _ in range(100):
                protocol.waiter = asyncio.get_running_loop().create_future()
                assert await protocol.waiter == protocol.count
            protocol.on = False
            transport.close()

    run(main())


class NeverEmpty(asyncio.Protocol):
    """While it is given a byte, its peer, in this very loop, writes another one."""

    def __init__(self) -> None:
        self.count, self.woken = 0, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.taken()

    def taken(self) -> None:
        self.count += 1
        if self.count < 1000:
            self.write()
        if not self.woken.done():
            self.woken.set_result(self.count)

    def write(self) -> None:
        self.peer.write(b"x")

    peer: asyncio.Transport


class NeverEmptyBuffer(NeverEmpty, asyncio.BufferedProtocol):
    def get_buffer(self, sizehint: int) -> bytearray:
        self.write()
        return bytearray(64)

    def buffer_updated(self, nbytes: int) -> None:
        self.taken()


class NeverEmptyPort(NeverEmpty, asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.taken()

    def write(self) -> None:
        self.sender.sendto(b"x")

    sender: asyncio.DatagramTransport


async def is_woken_at_once(protocol: NeverEmpty) -> None:
    protocol.count, protocol.woken = 0, asyncio.get_running_loop().create_future()
    assert await protocol.woken == 1
    assert protocol.count <= 2  # a pass that was scheduled before may have come first
    await until(lambda: protocol.count >= 1000)


@pytest.mark.parametrize("kind", [NeverEmpty, NeverEmptyBuffer])
def test_so_it_is_however_bytes_are_delivered(run: Run, region: str, kind: type[NeverEmpty]) -> None:
    """The first ones, those after a pause, and those of a transport whose descriptor somebody has."""

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a, shmsock.attach(region, name="b") as b:
            accepted = asyncio.get_running_loop().create_future()

            class Accepts(asyncio.Protocol):
                def connection_made(self, transport: Any) -> None:
                    transport.write(b"x")
                    accepted.set_result(transport)

            await shmsock.create_server(Accepts, None, 7000, node=b)
            transport, protocol = await shmsock.create_connection(kind, "b", 7000, node=a)
            transport.pause_reading()
            protocol.peer = await accepted
            transport.resume_reading()
            await is_woken_at_once(protocol)
            protocol.write()
            await is_woken_at_once(protocol)
            assert transport.get_extra_info("socket").fileno() >= 0
            protocol.write()
            await is_woken_at_once(protocol)
            transport.abort()
            protocol.peer.abort()

    run(main())


def test_so_it_is_with_datagrams(run: Run, region: str) -> None:
    """The first one of a sender, and those that follow."""

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a, shmsock.attach(region, name="b") as b:
            receiver, protocol = await shmsock.create_datagram_endpoint(
                NeverEmptyPort, local_addr=(None, 9), node=a
            )
            protocol.sender, _ = await shmsock.create_datagram_endpoint(
                asyncio.DatagramProtocol, remote_addr=("a", 9), node=b
            )
            protocol.write()
            await is_woken_at_once(protocol)
            protocol.write()
            await is_woken_at_once(protocol)
            protocol.sender.abort()
            receiver.abort()

    run(main())


def test_a_hot_pump_leaves_timers_their_turns(run: Run, region: str) -> None:
    """Were it not for the budget of a turn, they would wait until nothing comes any more."""

    async def main() -> None:
        async with Child("serve", region, "peer", loop=run.loop) as child, shmsock.attach(region) as node:
            await child.says("ready")
            transport, protocol = await shmsock.create_connection(PingPong, "peer", 7000, node=node)
            await until(lambda: protocol.count > 1000)
            before = protocol.count
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert protocol.count - before < ENOUGH / 2
            protocol.on = False
            transport.close()

    run(main())


def test_a_descriptor_ends_a_turn_long_before_its_budget(run: Run, region: str) -> None:
    """Counted in round trips: without that they are hundreds of thousands."""

    async def main() -> None:
        loop, settings = asyncio.get_running_loop(), shmsock.Settings(hold_us=60_000_000)
        near, far = os.pipe()
        async with (
            Child("serve", region, "peer", loop=run.loop) as child,
            shmsock.attach(region, settings=settings) as node,
        ):
            await child.says("ready")
            reader, writer = await shmsock.open_connection("peer", 7000, node=node)
            heard = bytearray()
            loop.add_reader(near, lambda: heard.extend(os.read(near, 1)))
            for number in range(10):
                os.write(far, b"x")
                count = 0
                while len(heard) == number:
                    writer.write(b"x")
                    await writer.drain()
                    await reader.readexactly(1)
                    count += 1
                    assert count < 10_000
            loop.remove_reader(near)
            writer.close()
        os.close(near)
        os.close(far)

    run(main())


def test_two_streams_that_are_never_empty_share_each_turn(run: Run, region: str) -> None:
    turns: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])  # reads of each, by turn

    async def take(node: shmsock.Node, i: int) -> None:
        reader, writer = await shmsock.open_connection("peer", 7000, node=node)
        for _ in range(5_000):
            assert await reader.read(64)
            turns[node.statistics()["pumps"]][i] += 1
        writer.close()

    async def main() -> None:
        async with Child("source", region, "peer", loop=run.loop) as child, shmsock.attach(region) as node:
            await child.says("ready")
            await asyncio.gather(take(node, 0), take(node, 1))

    run(main())
    assert sum(map(max, turns.values())) < 8 * sum(map(min, turns.values()))


class Ends(asyncio.BaseProtocol):
    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set_result(None)


@pytest.mark.parametrize("kind", ["stream", "datagrams"])
def test_a_closed_transport_is_not_left_to_the_collector(run: Run, region: str, kind: str) -> None:
    """As over TCP and UDP, though protocol and transport know each other."""

    async def main() -> None:
        async with Child("serve", region, "peer", loop=run.loop) as child, shmsock.attach(region) as node:
            await child.says("ready")
            gc.disable()
            try:
                transport: Any
                if kind == "stream":
                    transport, protocol = await shmsock.create_connection(Ends, "peer", 7000, node=node)
                else:
                    transport, protocol = await shmsock.create_datagram_endpoint(Ends, node=node)
                transport.close()
                await protocol.lost
                gone = weakref.ref(transport), weakref.ref(protocol)
                del transport, protocol
                await until(lambda: [one() for one in gone] == [None, None])
            finally:
                gc.enable()

    run(main())
