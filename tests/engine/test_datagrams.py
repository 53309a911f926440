"""Datagrams between engines: whole, in order, lost only by the rule, and nobody sleeps while one waits."""

from __future__ import annotations

import errno
import random
import re
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from shmsock.engine import layout as lay
from shmsock.engine import slots
from shmsock.engine.connection import State
from shmsock.engine.datagram_links import OVERHEAD, REMEMBERED, Incoming, Outgoing
from shmsock.engine.datagrams import DATAGRAM_MAX, Endpoint
from shmsock.engine.settings import Settings
from shmsock.errors import NodeClosedError
from shmsock.region.sizes import parse_size
from tests.engine.world import Node, World

PORT = 9
BOUND = 1 << 18
SMALLEST = 256 << 10  # for 4 peers
LEAN = Settings(ring_bytes=4096, datagram_queue_bytes=BOUND)
COUNTS = ("unreachable", "dropped_full", "dropped_unsent", "lost_unread")


class DatagramIn:
    """An endpoint and what it was told."""

    def __init__(self, node: Node, port: int = PORT, **how: Any) -> None:
        self.node = node
        self.endpoint: Endpoint = node.call(node.engine.datagrams.bind, port, **how)
        node.world.drain()  # who sends finds it
        self.endpoint.handler = self
        self.got: list[bytes] = []
        self.sources: set[tuple[str, int]] = set()
        self.errors: list[OSError] = []
        self.spaces = 0

    def datagram(self, data: bytes, source: tuple[str, int]) -> None:
        self.got.append(data)
        self.sources.add(source)

    def space(self) -> None:
        self.spaces += 1

    def refused(self, error: OSError) -> None:
        self.errors.append(error)

    def send(self, data: Any, to: Any = None) -> None:
        self.node.call(self.endpoint.send, data, to)

    def close(self) -> None:
        self.node.call(self.endpoint.close)


def counts(*nodes: Node) -> dict[str, int]:
    """What was lost, by reason; 0 is left out."""
    total = {name: sum(n.statistic(f"datagrams_{name}") for n in nodes) for name in COUNTS}
    return {name: n for name, n in total.items() if n}


def link(node: Node, kind: Any = Outgoing) -> Any:
    """The one link of that kind."""
    (found,) = (c.handler for c in node.connections if isinstance(c.handler, kind))
    return found


@pytest.fixture
def tiny_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 KiB, so that they are full soon."""
    monkeypatch.setattr(slots, "DATAGRAM_RING", 4096)


# -- what arrives


def test_whole_and_in_order(world: World) -> None:
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    rng = random.Random(world.seed)
    sizes = [0, 1, 7, 8, 9, 4096, DATAGRAM_MAX - 1, DATAGRAM_MAX, 0, 0]
    sent = [rng.randbytes(n) for n in sizes + rng.choices(sizes, k=30) + rng.choices(range(3000), k=200)]
    for i, data in enumerate(sent):
        source.send(data, ("b", PORT))
        if i % 20 == 0:
            world.pump_all()
    world.quiet()
    assert sink.got == sent
    assert sink.sources == {source.endpoint.local}
    assert counts(a, b) == {}
    assert a.statistic("datagrams_out") == b.statistic("datagrams_in") == len(sent)
    assert source.endpoint.unsent == 0


def test_one_ring_for_all_ports_of_a_pair(world: World) -> None:
    a, b = world.pair()
    log: list[bytes] = []
    sinks = [DatagramIn(b, port) for port in (PORT, PORT + 1)]
    for sink in sinks:
        sink.got = log
    sources = [DatagramIn(a, 0), DatagramIn(a, 0)]
    sent = [b"%d" % i for i in range(100)]
    for i, data in enumerate(sent):
        sources[i % 2].send(data, ("b", PORT + i // 2 % 2))
    world.quiet()
    assert log == sent
    assert len(a.connections) == len(b.connections) == 1


def test_answers_take_a_ring_of_their_own(world: World) -> None:
    a, b = world.pair()
    client, server = DatagramIn(a, 0, remote=("b", PORT)), DatagramIn(b)
    client.send(b"question")
    world.quiet()
    server.send(b"answer", client.endpoint.local)
    world.quiet()
    assert (server.got, client.got) == ([b"question"], [b"answer"])
    assert client.endpoint.remote == ("b", PORT)
    assert len(link(a).conn.handler.conn.ring) == 2
    assert link(b).conn.ring[1] >= 1 << 16
    assert link(b, Incoming).conn.ring[1] == 512


def test_to_the_own_node(world: World) -> None:
    a = world.attach("a")
    one, other = DatagramIn(a), DatagramIn(a, 0)
    other.send(b"to my neighbour", ("a", PORT))
    one.send(b"to myself", (a.section, PORT))
    one.send(b"to this machine", (None, PORT))
    world.quiet()
    assert one.got == [b"to my neighbour", b"to myself", b"to this machine"]
    assert one.sources == {other.endpoint.local, one.endpoint.local}


def test_connected_takes_only_its_remote(world: World) -> None:
    a, b = world.pair()
    peer, stranger = DatagramIn(b), DatagramIn(b, 0)
    client = DatagramIn(a, 0, remote=("B.shm", PORT))
    stranger.send(b"not for you", client.endpoint.local)
    peer.send(b"for you", client.endpoint.local)
    world.quiet()
    assert client.got == [b"for you"]
    assert counts(b) == {}
    assert counts(a) == {"unreachable": 1}
    with pytest.raises(ValueError, match="Invalid address: must be None or"):
        client.send(b"x", ("b", PORT + 1))
    client.send(b"both", ("b", PORT))
    client.send(b"ways")
    world.quiet()
    assert peer.got == [b"both", b"ways"]


# -- what does not


def test_bad_arguments() -> None:
    world = World()
    a, b = world.pair()
    DatagramIn(b)
    source = DatagramIn(a, 0)
    for data in (bytes(DATAGRAM_MAX + 1), bytearray(1 << 20)):
        for _ in range(2):
            with pytest.raises(OSError, match=f"{len(data)} .*65507") as info:
                source.send(data, ("b", PORT))
            assert info.value.errno == errno.EMSGSIZE
            source.send(b"in between", ("b", PORT))
    with pytest.raises(socket.gaierror, match="'c'"):
        source.send(b"", ("c", PORT))
    with pytest.raises(socket.gaierror):
        source.send(b"", (3, PORT))
    with pytest.raises(socket.gaierror):
        DatagramIn(a, 0, remote=("c", PORT))
    with pytest.raises(TypeError, match="bytes-like"):
        source.send("text", ("b", PORT))
    with pytest.raises(TypeError, match="address"):
        source.send(b"")
    with pytest.raises(OverflowError):
        source.send(b"", ("b", 65536))
    source.close()
    source.close()
    with pytest.raises(OSError, match="closed"):
        source.send(b"", ("b", PORT))
    with pytest.raises(ValueError, match="datagram_queue_bytes"):
        Settings(datagram_queue_bytes=BOUND - 1)
    world.check()


def test_a_closed_port(world: World) -> None:
    a, b = world.pair()
    plain, connected = DatagramIn(a, 0), DatagramIn(a, 0, remote=("b", PORT))
    for source in (plain, connected):
        for _ in range(3):
            source.send(b"x", ("b", PORT))
        assert not source.errors  # never from within send
    world.quiet()
    assert [type(e) for e in connected.errors] == [ConnectionRefusedError]
    assert plain.errors == []
    assert counts(a) == {"unreachable": 6}
    assert a.connections == []
    sink = DatagramIn(b)
    world.drain()
    connected.send(b"now")
    world.quiet()
    assert sink.got == [b"now"]


def test_a_port_that_is_closed_while_something_is_on_its_way() -> None:
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0, remote=("b", PORT)), DatagramIn(b)
    source.send(b"1")
    world.quiet()
    source.send(b"2")
    sink.close()
    source.send(b"3")
    world.quiet()
    assert sink.got == [b"1"]
    assert counts(b) == {"unreachable": 1}
    assert counts(a) == {"unreachable": 1}
    assert len(source.errors) == 1
    world.check()


def test_a_port_that_moves_within_its_node(world: World) -> None:
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"1", ("b", PORT))
    world.quiet()
    sink.close()
    DatagramIn(b, PORT + 1)  # takes the entry
    again = DatagramIn(b)
    world.drain()
    source.send(b"2", ("b", PORT))
    world.quiet()
    assert (sink.got, again.got) == ([b"1"], [b"2"])
    assert counts(a, b) == {}


def test_ports_of_streams_are_others() -> None:
    world = World()
    a, b = world.pair()
    c, d = world.attach("b"), world.attach("far", kernel=b"kernel-of-host-B")
    world.quiet()
    sink = DatagramIn(b)
    refused = a.connect(b, PORT)
    world.quiet()
    assert isinstance(a.failed(refused), ConnectionRefusedError)
    world.open(a, b, PORT)
    for node in (b, c):
        with pytest.raises(OSError, match="in use"):
            DatagramIn(node)
    near = DatagramIn(b, PORT + 1, local_only=True)
    for node in (a, d):
        source = DatagramIn(node, 0)
        source.send(b"x", ("b", PORT))
        source.send(b"y", ("b", PORT + 1))
    world.quiet()
    assert (sink.got, near.got) == ([b"x", b"x"], [b"y"])
    assert counts(d) == {"unreachable": 1}
    assert len({DatagramIn(b, 0).endpoint.local[1] for _ in range(20)}) == 20
    world.check()


def test_what_a_paused_endpoint_cannot_keep() -> None:
    """The newest go, are counted, and no other endpoint notices."""
    world = World()
    a, b = world.pair(settings=LEAN)
    source, paused, other = DatagramIn(a, 0), DatagramIn(b), DatagramIn(b, PORT + 1)
    paused.endpoint.pause()
    sent = [i.to_bytes(2, "little") * 500 for i in range(300)]
    for data in sent:
        source.send(data, ("b", PORT))
        source.send(data, ("b", PORT + 1))
        world.quiet()
    assert other.got == sent
    assert paused.got == []
    kept = BOUND // (1000 + OVERHEAD)
    assert counts(a, b) == {"dropped_full": 300 - kept}
    paused.endpoint.resume()
    source.send(b"later", ("b", PORT))
    world.quiet()
    assert paused.got == [*sent[:kept], b"later"]
    paused.endpoint.pause()
    source.send(b"never", ("b", PORT))
    world.quiet()
    paused.close()
    assert counts(b) == {"dropped_full": 300 - kept, "unreachable": 1}
    world.check()


def test_paused_and_resumed_from_the_inside() -> None:
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)

    def datagram(data: bytes, source: Any) -> None:
        sink.got.append(data)
        sink.endpoint.pause()

    sink.datagram = datagram  # type: ignore[method-assign]
    sent = [b"%d" % i for i in range(10)]
    for i, data in enumerate(sent):
        source.send(data, ("b", PORT))
        world.quiet()
        assert len(sink.got) == (i + 2) // 2
        if i % 2:
            sink.endpoint.resume()
            sink.endpoint.resume()
            world.quiet()
    for _ in sent:
        sink.endpoint.resume()
        world.quiet()
    assert sink.got == sent
    world.check()


def test_what_a_sender_cannot_keep() -> None:
    """For a peer that does not run: what fits the ring, then the bound, then the newest go."""
    world = World()
    a, b = world.pair(settings=LEAN)
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"first", ("b", PORT))
    world.quiet()
    world.stop(b)
    sent = [i.to_bytes(2, "little") * 500 for i in range(600)]
    for data in sent:
        source.send(data, ("b", PORT))
    in_ring = link(a).conn.ring[1] // 1008
    kept = BOUND // (1000 + OVERHEAD)
    assert source.endpoint.unsent == kept * (1000 + OVERHEAD)
    assert counts(a) == {"dropped_unsent": 600 - in_ring - kept}
    world.resume(b)
    world.quiet()
    assert sink.got == [b"first", *sent[: in_ring + kept]]
    assert source.endpoint.unsent == 0
    assert source.spaces > 0
    world.check()


def test_closing_drops_what_waits() -> None:
    world = World()
    a, b = world.pair(settings=LEAN)
    source, other, sink = DatagramIn(a, 0), DatagramIn(a, 0), DatagramIn(b)
    for i in range(3):
        source.send(b"s%d" % i, ("b", PORT))  # the link is not open yet
        other.send(b"o%d" % i, ("b", PORT))
    source.close()
    world.quiet()
    assert sink.got == [b"o0", b"o1", b"o2"]
    assert counts(a, b) == {"dropped_unsent": 3}
    world.check()


def test_after_a_full_ring_lost_its_queue(tiny_rings: None) -> None:
    """Space comes when nothing waits any more: what is sent next goes out all the same."""
    world = World()
    a, b = world.pair(settings=LEAN)
    source, other, sink = DatagramIn(a, 0), DatagramIn(a, 0), DatagramIn(b)
    source.send(b"", ("b", PORT))
    world.quiet()
    for _ in range(10):
        source.send(bytes(1000), ("b", PORT))
    assert source.endpoint.unsent
    source.close()
    world.quiet()
    other.send(b"on", ("b", PORT))
    world.quiet()
    assert sink.got[-1] == b"on"
    world.check()


def test_no_memory_for_a_link() -> None:
    world = World(peers=4, size=SMALLEST)
    a, b = world.pair()
    DatagramIn(b)
    source = DatagramIn(a, 0)
    held = []
    while (ring := a.take_memory(4096)) is not None:
        held.append(ring)
    with pytest.raises(OSError, match="ring memory") as info:
        source.send(b"", ("b", PORT))
    assert info.value.errno == errno.ENOBUFS
    source.send(b"", ("*", PORT))
    assert counts(a) == {"dropped_unsent": 1}
    for ring in held:
        a.give_memory(ring)
    world.check()


def test_the_smallest_region_has_datagrams() -> None:
    """Of the size that its links have rings for. What never fits is refused at once, whether the link is open
    already or not, and a region of the size that is named then has it."""
    world = World(peers=4, size=SMALLEST)
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    sizes = []
    for _ in range(2):
        with pytest.raises(
            OSError, match=f"datagram of {DATAGRAM_MAX} bytes to 'b', whose link has 2048"
        ) as info:
            source.send(bytes(DATAGRAM_MAX), ("b", PORT))
        assert info.value.errno == errno.ENOBUFS
        sizes += re.findall(r"make a region of (.+) \(", str(info.value))
        source.send(bytes(2048 - 8), ("b", PORT))
        with pytest.raises(OSError, match="datagram of 2041 bytes"):
            source.send(bytes(2048 - 7), ("b", PORT))
        assert link(a).conn.ring[1] == 2048
        world.quiet()
    assert sink.got == [bytes(2048 - 8)] * 2
    assert counts(a, b) == {}
    source.send(bytes(2048 - 7), ("*", PORT))
    assert counts(a, b) == {"dropped_unsent": 1}
    assert source.endpoint.unsent == 0
    assert source.errors == []
    world.check()
    assert sizes[0] == sizes[1]
    world = World(peers=4, size=parse_size(sizes[0]))
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(bytes(DATAGRAM_MAX), ("b", PORT))
    world.quiet()
    assert sink.got == [bytes(DATAGRAM_MAX)]
    world.check()


def test_links_leave_memory_for_streams() -> None:
    """A broadcast to many: every free slot keeps its claim, and large rings are not all gone."""
    world = World(peers=16, size=16 << 20)
    nodes = [world.attach(f"n{i}") for i in range(13)]
    world.quiet()
    source, sinks = DatagramIn(nodes[0], 0), [DatagramIn(node) for node in nodes[1:]]
    source.send(b"all", ("*", PORT))
    world.quiet()
    assert [sink.got for sink in sinks] == [[b"all"]] * 12
    engine = nodes[0].engine
    assert engine.slots.free_bytes - 512 * engine.slots.free_slots > engine.layout.arena_bytes // 8
    conn, _ = world.open(nodes[0], nodes[1])
    assert nodes[0].write(conn, bytes(1 << 20)) >= 16384


# -- several at once


def test_broadcast(world: World) -> None:
    nodes = [world.attach(name) for name in "abc"]
    world.quiet()
    source = DatagramIn(nodes[0])
    source.send(b"nobody", ("*", PORT))
    sinks = [DatagramIn(node) for node in nodes[1:]]
    neighbour = DatagramIn(nodes[0], PORT + 1)
    world.drain()
    for _ in range(2):
        source.send(b"all", ("*", PORT))
        neighbour.send(b"and me", ("*", PORT))
        world.quiet()
    both = [b"all", b"and me"] * 2
    assert [sorted(s.got) for s in sinks] == [sorted(both)] * 2
    assert source.got == [b"and me"] * 2
    assert neighbour.got == []
    assert counts(*nodes) == {}


def test_broadcast_to_a_port_that_is_shared_with_the_sender() -> None:
    world = World()
    a = world.attach("a")
    first, second = (DatagramIn(a, reuse_port=True) for _ in range(2))
    first.send(b"1", ("*", PORT))
    second.send(b"2", ("*", PORT))
    world.quiet()
    assert sorted(first.got + second.got) == [b"1", b"2"]
    assert first.got != [b"1"]
    world.check()


def test_reuse_port_over_processes(world: World) -> None:
    """A sender stays with one receiver as long as that lives."""
    a, first, second = world.attach("a"), world.attach("host"), world.attach("host")
    world.quiet()
    sinks = {n: DatagramIn(n, reuse_port=True) for n in (first, second)}
    world.drain()
    source = DatagramIn(a, 0)
    for _ in range(20):
        source.send(b"x", ("host", PORT))
        world.pump_all()
    world.quiet()
    (taken,) = (n for n in sinks if sinks[n].got)
    other = second if taken is first else first
    assert len(sinks[taken].got) == 20
    world.kill(taken)
    world.drain()
    world.advance(0.3)
    for _ in range(5):
        source.send(b"y", ("host", PORT))
    world.quiet()
    assert sinks[other].got == [b"y"] * 5


def test_reuse_port_within_a_node(world: World) -> None:
    a, b = world.pair()
    first = DatagramIn(b, reuse_port=True)
    old = DatagramIn(a, 0)
    old.send(b"old", ("b", PORT))
    world.quiet()
    second = DatagramIn(b, reuse_port=True)
    sources = [DatagramIn(a, 0) for _ in range(8)]
    for _ in range(5):
        for source in (old, *sources):
            source.send(b"%d" % source.endpoint.local[1], ("b", PORT))
    world.quiet()
    assert len(first.got) + len(second.got) == 46
    assert first.sources & second.sources == set()
    assert len(first.sources) == 5
    assert old.endpoint.local in first.sources
    first.close()
    world.drain()
    old.send(b"moved", ("b", PORT))
    world.quiet()
    assert second.got[-1] == b"moved"
    assert counts(a, b) == {}


def test_more_addresses_than_are_remembered() -> None:
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    for i in range(REMEMBERED + 50):
        source.send(b"x", ("b", 10000 + i))  # closed: not remembered
        source.endpoint.routes[i] = source.endpoint.routes.get(i - 1)  # type: ignore[assignment]
    source.send(b"x", ("b", PORT))
    assert len(source.endpoint.routes) == REMEMBERED + 50
    world.quiet()
    (incoming,) = (c.handler for c in b.connections)
    for port in range(REMEMBERED + 50):
        incoming._flow(port << 16 | PORT)
    assert len(incoming._flows) == REMEMBERED
    assert sink.got == [b"x"]
    world.check()


# -- ends


def test_what_was_sent_before_leaving_arrives(world: World) -> None:
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"0", ("b", PORT))
    world.quiet()
    for i in range(1, 100):
        source.send(b"%d" % i, ("b", PORT))
    world.leave(a)
    world.drain()
    world.quiet()
    assert sink.got == [b"%d" % i for i in range(100)]
    assert b.connections == []


@pytest.mark.parametrize("how", ["kill", "freeze", "leave"])
def test_a_receiver_that_is_gone(how: str) -> None:
    """What waits and what was not read is counted; who is connected is told; a restarted one is found."""
    world = World()
    a, b = world.pair(settings=LEAN)
    connected, plain = DatagramIn(a, 0, remote=("b", PORT)), DatagramIn(a, 0)
    DatagramIn(b)
    connected.send(b"read")
    world.quiet()
    world.stop(b)
    for _ in range(200):
        plain.send(bytes(1000), ("b", PORT))
    for _ in range(5):
        connected.send(bytes(1000))
    in_ring = link(a).conn.ring[1] // 1008
    world.resume(b)
    getattr(world, how)(b)
    world.drain()
    world.advance(5)
    world.quiet()
    assert [type(e) for e in connected.errors] == [ConnectionRefusedError]
    assert plain.errors == []
    assert counts(a) == {"lost_unread": in_ring, "dropped_unsent": 205 - in_ring}
    assert connected.endpoint.unsent == plain.endpoint.unsent == 0
    again = world.attach("b")
    world.advance(5)  # it, too, finds out that its former life is over
    world.quiet()
    sink = DatagramIn(again)
    world.drain()
    plain.send(b"1", ("b", PORT))
    connected.send(b"2")
    world.quiet()
    assert sink.got == [b"1", b"2"]
    world.check()


def test_gone_without_anything_unread_says_nothing() -> None:
    """As over UDP: only who sends again hears of it."""
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0, remote=("b", PORT)), DatagramIn(b)
    source.send(b"x")
    world.quiet()
    assert sink.got == [b"x"]
    world.leave(b)
    world.drain()
    world.advance(1)
    world.quiet()
    assert (source.errors, counts(a)) == ([], {})
    with pytest.raises(socket.gaierror):
        source.send(b"y")
    world.check()


@pytest.mark.parametrize("how", ["eager", "lazy"])
def test_a_sender_dies_at_any_step(how: str) -> None:
    """What arrives is a beginning of what was sent, whole datagrams of it."""
    seen, deaths = set(), set()
    for steps in range(1, 300):
        world = World(how, steps, peers=2, size=2 << 20)
        a, b = world.pair()
        source, sink = DatagramIn(a, 0), DatagramIn(b)
        sent = [bytes([i]) * size for i, size in enumerate((3, 300, 0, 9, 5000))]

        def talk(world: World = world, source: DatagramIn = source, sent: list[bytes] = sent) -> None:
            for data in sent:
                source.send(data, ("b", PORT))
                world.pump_all()

        died = world.run_and_die(a, steps, talk)
        world.drain()
        world.advance(0.3)
        world.quiet()
        assert sink.got == sent[: len(sink.got)], steps
        assert died or sink.got == sent
        seen.add(len(sink.got))
        deaths.add(died)
        world.check()
    assert seen == {0, 1, 2, 3, 4, 5}
    assert deaths == {True, False}


@pytest.mark.parametrize("how", ["eager", "lazy"])
def test_a_receiver_dies_at_any_step(how: str) -> None:
    for steps in range(1, 400):
        world = World(how, steps, peers=2, size=2 << 20)
        a, b = world.pair()
        source, sink = DatagramIn(a, 0, remote=("b", PORT) if steps % 2 else None), DatagramIn(b)

        def talk(world: World = world, source: DatagramIn = source) -> None:
            for i in range(5):
                source.send(b"%d" % i, ("b", PORT))
                world.pump_all()
            world.quiet()

        died = world.run_and_die(b, steps, talk)
        if not died:
            assert sink.got == [b"%d" % i for i in range(5)]
            world.check()
            break
        world.drain()
        world.advance(0.3)
        world.quiet()
        again = world.attach("b")
        world.quiet()
        late = DatagramIn(again)
        world.drain()
        source.send(b"late", ("b", PORT))
        world.quiet()
        assert late.got == [b"late"], steps
        world.check()
    else:
        raise AssertionError("never got to the end")


def test_a_peer_that_was_stopped_too_long(world: World) -> None:
    """Links have a new life with the peer's."""
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    back = DatagramIn(b, 0)
    source.send(b"1", ("b", PORT))
    back.send(b"<1", source.endpoint.local)
    world.quiet()
    world.stop(b)
    world.advance(5)
    world.resume(b)
    world.advance(1)
    world.quiet()
    source.send(b"2", ("b", PORT))
    back.send(b"<2", source.endpoint.local)
    world.quiet()
    assert sink.got[-1] == b"2"
    assert source.got[-1] == b"<2"


def test_a_node_that_lost_its_section_tells_its_endpoints() -> None:
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"1", ("b", PORT))
    world.quiet()
    world.poke(world.layout.section(a.section), 12345)
    with pytest.raises(NodeClosedError):
        source.send(b"2", ("b", PORT))
    a.pump()
    assert [type(e) for e in source.errors] == [NodeClosedError]
    world.advance(5)
    assert sink.got == [b"1"]
    source.close()


# -- hostile peers


def ring(world: World, node: Node) -> int:
    """Where the ring of its one outgoing link begins, in the region."""
    return int(world.layout.section(node.section) + link(node).conn.ring[0])


def slot_word(world: World, conn: Any, which: int) -> int:
    at = world.layout.section(conn.home.section) + int(world.layout.geometry.slot_off)
    return int(at + 192 * conn.slot + which)


@pytest.mark.parametrize("length", [DATAGRAM_MAX + 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 8, 101, 4096])
def test_an_impossible_length(length: int) -> None:
    """The link is reset, which is an offence; the peer that sent it finds out, and its next link works."""
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"fine", ("b", PORT))
    world.quiet()
    world.stop(b)
    source.send(bytes(100), ("b", PORT))
    world.drain()
    world.map[ring(world, a) + 12 : ring(world, a) + 16] = struct.pack("<I", length)
    world.resume(b)
    world.quiet()
    assert sink.got == [b"fine"]
    assert b.statistic("violations") == 1
    assert link_states(a, b) == []
    source.send(b"fine again", ("b", PORT))
    world.quiet()
    assert sink.got == [b"fine", b"fine again"]
    world.check()


def link_states(*nodes: Node) -> list[State]:
    return [c.state for n in nodes for c in n.connections]


@pytest.mark.parametrize("tail", [1, 7, 1 << 20])
def test_a_tail_that_is_no_end_of_a_record(tail: int) -> None:
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"fine", ("b", PORT))
    world.quiet()
    at = slot_word(world, link(a).conn, 0x40)
    world.poke(at, world.word(at) + tail)
    a.call(world.lib.sh_notify, a.engine.nd, b.section, link(b, Incoming).conn.slot)
    b.pump()
    assert sink.got == [b"fine"]
    assert b.statistic("violations") == 1
    assert State.OPEN not in link_states(b)
    world.quiet()
    source.send(b"again", ("b", PORT))
    world.quiet()
    world.check()


def test_any_port_may_stand_in_a_record(world: World) -> None:
    """It is looked up, and shown."""
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"fine", ("b", PORT))
    world.quiet()
    world.stop(b)
    source.send(b"one", ("b", PORT))
    source.send(b"two", ("b", PORT))
    world.drain()
    at = ring(world, a) + 12
    world.map[at + 4 : at + 8] = struct.pack("<HH", 1, PORT)
    world.map[at + 11 + 4 : at + 11 + 8] = struct.pack("<HH", 2, 65535)
    world.resume(b)
    world.quiet()
    assert sink.got == [b"fine", b"one"]
    assert sink.sources == {source.endpoint.local, ("a", 1)}
    assert counts(b) == {"unreachable": 1}


def test_bytes_in_the_ring_that_has_no_use() -> None:
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"fine", ("b", PORT))
    world.quiet()
    b.write(link(b, Incoming).conn, b"surprise")
    world.quiet()
    assert a.statistic("violations") == 1
    source.send(b"fine again", ("b", PORT))
    world.quiet()
    assert sink.got == [b"fine", b"fine again"]
    world.check()


def test_links_that_are_never_used_are_limited_like_connections() -> None:
    """A peer that opens one after the other leaves an eighth of the slots."""
    world = World()
    a, b = world.pair()
    for _ in range(world.layout.slots):
        try:
            a.call(a.engine.connect, b.section, 0, local=("a", 0), remote="b")
        except OSError:
            break
    world.quiet()
    assert len(b.connections) == world.layout.slots * 7 // 8
    a.take("failed")
    world.check()


# -- wakeups


class Hung(AssertionError):
    pass


class Side:
    """A process that sleeps as a driver does. It sends while there is room, or asks and waits for the
    answer."""

    def __init__(self, world: World, node: Node, peer: Node, rng: random.Random, asks: bool) -> None:
        self.world, self.node, self.rng, self.asks = world, node, rng, asks
        self.inbox, self.to = DatagramIn(node, node.section + 100), (peer.who.name, peer.section + 100)
        self.left = [
            rng.randbytes(rng.choice((0, 5, 100, 1000, 3000))) for _ in range(rng.choice((5, 20, 60)))
        ]
        self.sent: list[bytes] = []
        self.lull = rng.choice((0, 0.5, 0.9))
        self.asleep = False
        self.other: Side = self

    @property
    def may_send(self) -> bool:
        if self.asks:
            return len(self.inbox.got) >= len(self.sent)
        return self.inbox.endpoint.unsent < 2000

    @property
    def done(self) -> bool:
        return not self.left and self.inbox.got == self.other.sent

    def step(self) -> bool:
        """One turn of the loop. False: asleep, and nothing rang."""
        node = self.node
        if self.asleep and not self.world.lib.sh_fake_any_notified(node.engine.nd):
            return False
        self.asleep = False
        node.pump()
        while self.left and self.may_send and self.rng.random() >= self.lull:
            self.sent.append(self.left.pop(0))
            self.inbox.send(self.sent[-1], self.to)
        self.asleep = node.engine.quiet and not (self.left and self.may_send)
        return True


def play(how: str, kind: str, seed: int, omit: str = "") -> World:
    world = World(how, seed, peers=2, size=2 << 20)
    world.lib.sh_fake_omit(omit.encode())
    a, b = world.pair(settings=LEAN)
    for i in range(4):
        rng = random.Random(f"{how} {kind} {seed} {i}")
        one, two = (Side(world, x, y, rng, kind == "echo") for x, y in ((a, b), (b, a)))
        one.other, two.other = two, one
        if kind == "echo":
            two.left = list(map(bytes, one.left))
        elif kind == "one way":
            two.left = []
        sides = {a: one, b: two}
        world.meanwhile = lambda node, sides=sides: sides[node].step()  # type: ignore[misc]
        world.drain()
        for _ in range(20000):
            if one.done and two.done:
                break
            if not rng.choice((one, two)).step() and not (one.step() | two.step()):
                world.drain()
                if not (one.step() | two.step()):
                    raise Hung(f"{world!r} {kind}: asleep with {len(one.left)} and {len(two.left)} left")
        else:
            raise Hung(f"{world!r} {kind}: no end")
        world.meanwhile = Node.pump
        one.inbox.close()
        two.inbox.close()
        world.quiet()
    assert counts(a, b) == {}
    assert a.statistic("healed") == b.statistic("healed") == 0
    return world


CASES = [(how, kind) for how in ("lazy", "nested") for kind in ("one way", "both ways", "echo")]


@pytest.mark.parametrize(("how", "kind"), CASES)
def test_nobody_sleeps_forever(tiny_rings: None, how: str, kind: str) -> None:
    for seed in range(15):
        play(how, kind, seed).check()


@pytest.mark.parametrize("function", ["sh_notify_slot", "want_space", "sh_arm"])
def test_each_fence_is_needed(tiny_rings: None, function: str) -> None:
    """Without it somebody sleeps forever: so the test above would notice. (Those in sh_collect, sh_read_end
    and sh_rearm_touched are the streams': a link is armed whenever it was drained.)"""
    for seed in range(60):
        for how, kind in CASES:
            try:
                play(how, kind, seed, function)
            except Hung:
                return
    raise AssertionError(f"the fence in {function} was never missed")


def test_a_flood_does_not_hold_the_pump() -> None:
    """A pass hands over a bounded number, owes the rest, and comes to it."""
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"", ("b", PORT))
    world.quiet()
    world.stop(b)
    for _ in range(1000):
        source.send(b"x", ("b", PORT))
    world.drain()
    world.resume(b)
    passes: list[int] = []
    hand: Callable[[], Any] = b.pump
    while len(sink.got) < 1001:
        before = len(sink.got)
        hand()
        passes.append(len(sink.got) - before)
        assert not b.engine.quiet or len(sink.got) == 1001
    assert max(passes) == 64
    world.check()


@pytest.mark.parametrize("kept", [False, True])
def test_slow_receivers_do_not_hold_the_pump(kept: bool) -> None:
    """A pass hands over one for each link, or endpoint that kept some, and more only within its budget."""
    world = World()
    nodes = [world.attach(name) for name in "abc"]
    world.quiet()
    sources, sink = [DatagramIn(node, 0) for node in nodes[:2]], DatagramIn(nodes[2])
    at: list[int] = []

    def datagram(data: bytes, source: Any) -> None:
        world.now += 300_000  # hold_us is 500
        world.lib.sh_fake_time(world.now)
        sink.got.append(data)

    sink.datagram = datagram  # type: ignore[method-assign]
    if kept:
        sink.endpoint.pause()
    for source in sources:
        source.send(b"", ("c", PORT))
    world.quiet()
    if not kept:
        world.stop(nodes[2])
    for i in range(20):
        for source in sources:
            source.send(b"%d" % i, ("c", PORT))
    world.quiet()
    world.drain()
    if kept:
        sink.endpoint.resume()
    else:
        world.resume(nodes[2])
    while len(sink.got) < 42:
        before = len(sink.got)
        nodes[2].pump()
        at.append(len(sink.got) - before)
        assert not nodes[2].engine.quiet or len(sink.got) == 42
    assert max(at) == (2 if kept else 3)  # the second link comes when the first used all up
    assert min(at) > 0
    world.check()


def test_a_broadcast_that_meets_nobody_is_counted(tiny_rings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port is closed while it waits for room, or between the look and the send."""
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"", ("b", PORT))
    world.quiet()
    world.stop(b)
    for _ in range(10):
        source.send(bytes(1000), ("*", PORT))
    waiting = source.endpoint.unsent // (1000 + OVERHEAD)
    assert waiting
    world.resume(b)
    entry = a.call(a.engine.listeners.entry, a.peer(b), PORT, True)
    sink.close()
    world.quiet()
    assert source.endpoint.unsent == 0
    assert counts(a, b) == {"unreachable": 10}  # some of them when they arrived
    peer = a.peer(b)
    monkeypatch.setattr(a.engine.listeners, "reachable", lambda p, *_, **__: entry if p is peer else 0)
    source.send(b"", ("*", PORT))
    assert counts(a, b) == {"unreachable": 11}
    world.check()


def test_a_port_that_moved_to_nobody_while_something_waited(tiny_rings: None) -> None:
    """What waits is looked up again when its turn comes: another process of the name may have the port."""
    world = World()
    a, first, second = world.attach("a", settings=LEAN), world.attach("host"), world.attach("host")
    world.quiet()
    old = DatagramIn(first)
    source, sent = DatagramIn(a, 0), [b"%d" % i * 500 for i in range(30)]
    source.send(b"", ("host", PORT))
    world.quiet()
    world.stop(first)
    for data in sent:
        source.send(data, ("host", PORT))
    assert source.endpoint.unsent
    world.resume(first)
    old.close()
    new = DatagramIn(second)
    world.quiet()
    assert new.got == sent[-len(new.got) :]
    assert counts(a, first, second) == {"unreachable": 30 - len(new.got)}
    world.stop(second)
    for data in sent:
        source.send(data, ("host", PORT))
    world.resume(second)
    new.close()
    world.quiet()
    assert source.endpoint.unsent == 0
    assert counts(a, first, second)["unreachable"] == 60 - len(new.got)
    world.check()


def test_a_restart_while_something_waited(tiny_rings: None) -> None:
    """Nobody has the name at the moment when its turn comes."""
    world = World()
    a, b = world.pair(settings=LEAN)
    source, sink = DatagramIn(a, 0, remote=("b", PORT)), DatagramIn(b)
    source.send(b"")
    world.quiet()
    world.stop(b)
    for _ in range(10):
        source.send(bytes(1000))
    unsent = source.endpoint.unsent // (1000 + OVERHEAD)
    world.resume(b)
    world.drain()
    lost = world.layout.section(b.section) + lay.STATE
    world.poke(lost, lay.GONE)  # it says so, and reads on
    sink.close()
    b.pump()
    world.drain()
    world.quiet()
    assert source.endpoint.unsent == 0
    assert sum(counts(a, b).values()) == 10
    assert unsent
    assert source.errors
    world.check()


def test_bells_that_come_late_are_no_offence() -> None:
    """What a link that is being drained takes and acknowledges by itself has its bell heard afterwards: a
    thousand such bells in a second do not make their peer one that rings for nothing."""
    world = World()
    a, b = world.pair()
    source, sink = DatagramIn(a, 0), DatagramIn(b)
    source.send(b"", ("b", PORT))
    world.quiet()
    for i in range(1, 1500):
        source.send(b"x", ("b", PORT))
        b.call(link(b, Incoming).ready, 0)
        assert len(sink.got) == i + 1
        b.pump()
    source.send(b"heard", ("b", PORT))
    b.pump()
    assert sink.got[-1] == b"heard"
    world.check()
