"""Two nodes against a model: per connection two byte streams, who has ended what, and who has died."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmsock.engine.connection import CLOSED, EMPTY, EOF, RESET, STALE, Connection, State
from tests.engine.world import Node, World

EXAMPLES = int(os.environ.get("SHMSOCK_PROPERTY_EXAMPLES", "250"))


@dataclass
class Half:
    """What one side of a connection did, and what the other may find."""

    name: str
    conn: Connection | None = None
    sent: bytearray = field(default_factory=bytearray)
    got: bytearray = field(default_factory=bytearray)
    finished: bool = False
    closed: bool = False
    ended: int = 0


@dataclass
class Link:
    halves: tuple[Half, Half]
    spoilt: bool = False
    """Aborted by somebody, or somebody died: a reset is allowed, and lost bytes with it."""

    def other(self, half: Half) -> Half:
        return self.halves[1 - self.halves.index(half)]


class TwoNodes(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 1 << 30), how=st.sampled_from(("eager", "lazy", "nested")))
    def begin(self, seed: int, how: str) -> None:
        self.world = World(how, seed, peers=3, size=3 << 20)
        self.nodes: dict[str, Node] = {}
        for name in ("a", "b"):
            self.start(name)
        self.world.quiet()
        self.links: list[Link] = []

    def start(self, name: str) -> None:
        self.nodes[name] = self.world.attach(name)
        self.nodes[name].listen(backlog=1000)

    def live(self) -> list[tuple[Link, Half]]:
        return [
            (link, half)
            for link in self.links
            for half in link.halves
            if half.conn is not None and not half.ended
            if half.conn.home is self.nodes[half.name].engine.home
        ]

    # -- what users do

    @rule(from_a=st.booleans())
    def connect(self, from_a: bool) -> None:
        me, it = ("a", "b") if from_a else ("b", "a")
        self.world.quiet()
        for node in self.nodes.values():
            node.events.clear()
        conn = self.nodes[me].connect(self.nodes[it])
        self.world.quiet()
        assert conn.state is State.OPEN, conn
        self.links.append(Link((Half(me, conn), Half(it, self.nodes[it].accepted()))))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), size=st.sampled_from((1, 100, 5000, 40000)))
    def write(self, data: st.DataObject, size: int) -> None:
        link, half = data.draw(st.sampled_from(self.live()))
        assert half.conn is not None
        node = self.nodes[half.name]
        piece = self.world.rng.randbytes(size)
        taken = node.write(half.conn, piece)
        if taken >= 0:
            assert not half.finished
            assert not half.closed
            half.sent += piece[:taken]
        else:
            assert taken in (CLOSED, STALE)
            assert half.finished or half.closed or link.other(half).closed or link.spoilt

    @precondition(lambda self: self.live())
    @rule(data=st.data(), want=st.sampled_from((1, 777, 1 << 20)))
    def read(self, data: st.DataObject, want: int) -> None:
        link, half = data.draw(st.sampled_from(self.live()))
        if not half.closed:
            self.read_once(link, half, want)

    def read_once(self, link: Link, half: Half, want: int) -> bool:
        assert half.conn is not None
        found = self.nodes[half.name].read(half.conn, want)
        other = link.other(half)
        if isinstance(found, bytes):
            assert 0 < len(found) <= want
            half.got += found
            assert other.sent.startswith(half.got), "bytes that were never written, or in another order"
            return True
        if found == EOF:
            assert other.finished or other.closed
            if not half.closed:
                assert half.got == other.sent, "EOF before the last byte"
            half.ended = EOF if half.conn.state is State.FREE else 0
        elif found == RESET:
            assert link.spoilt, half.conn.error
            half.ended = RESET
        else:
            assert found == EMPTY
        return False

    @precondition(lambda self: self.live())
    @rule(data=st.data(), how=st.sampled_from(("finish", "close", "close", "abort")))
    def shut(self, data: st.DataObject, how: str) -> None:
        link, half = data.draw(st.sampled_from(self.live()))
        assert half.conn is not None
        if how == "finish":
            half.finished = True
        elif how == "close":
            half.closed = True
        else:
            half.closed = link.spoilt = True
        self.nodes[half.name].call(getattr(half.conn, how))

    # -- what happens to processes

    def spoil(self, name: str) -> None:
        for link in self.links:
            if any(h.name == name and h.conn is not None for h in link.halves):
                link.spoilt = True

    @rule(victim=st.sampled_from("ab"), politely=st.booleans())
    def restart(self, victim: str, politely: bool) -> None:
        world, node = self.world, self.nodes[victim]
        readers = [
            (link, half)
            for link, half in self.live()
            if half.name != victim and not link.spoilt and not half.closed
        ]
        (world.leave if politely else world.kill)(node)
        world.drain()
        self.spoil(victim)
        if politely:  # leaving closes all
            for half in (half for link in self.links for half in link.halves if half.name == victim):
                half.closed = True
        # what was published is there, before anything else of the victim's link is used
        world.advance(0.3)
        for link, half in readers:
            other = link.other(half)
            if (
                not half.ended
                and half.conn is not None
                and half.conn.state is State.OPEN
                and other.conn is not None
            ):
                while self.read_once(link, half, 1 << 20):
                    pass
                assert half.got == other.sent, "published bytes died with their writer"
                assert half.ended == (EOF if other.finished or other.closed else RESET)
        survivor = next(n for n in self.nodes.values() if n is not node)
        for conn in survivor.connections:
            survivor.abort(conn)
        world.quiet()
        self.start(victim)
        world.quiet()
        for link in self.links:
            for half in link.halves:
                half.closed = True
                if half.name == victim:
                    half.conn = None

    @rule(dropper=st.sampled_from("ab"))
    def drop(self, dropper: str) -> None:
        node, other = self.nodes[dropper], self.nodes["b" if dropper == "a" else "a"]
        self.spoil(dropper)
        node.call(node.engine.links.drop, other.section, self.world.now)
        self.world.advance(1.1)  # adoptions are limited to ten a second

    @rule(ms=st.sampled_from((100, 1100)))
    def time_passes(self, ms: int) -> None:
        self.world.advance(ms / 1000)

    @rule(name=st.sampled_from("ab"))
    def pump(self, name: str) -> None:
        self.nodes[name].pump()

    @rule()
    def all_is_said(self) -> None:
        self.world.quiet()

    @invariant()
    def counters(self) -> None:
        for node in getattr(self, "nodes", {}).values():
            assert node.statistic("violations") == 0
            assert node.statistic("healed") == 0

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.quiet()
        for link, half in self.live():
            if not half.closed and half.conn is not None and half.conn.state is State.OPEN:
                while self.read_once(link, half, 1 << 20):
                    self.world.quiet()
                if not link.spoilt and not half.ended:
                    assert half.got == link.other(half).sent
        self.world.check()


TestTwoNodes = TwoNodes.TestCase
TestTwoNodes.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
