"""A peer that writes anything anywhere: `python -m tests.engine.scribbler FIRST LAST ROUNDS`, seed after
seed.

Two honest nodes (a, b) talk, over a connection and in datagrams, and a third (x) has connections with both
while a hand scribbles over words: of x's section (and then a and b must go on as if nothing had happened), or
of all of the region (and then there must be no crash, no hang and no surprising exception). A process of its
own, so that a crash is seen as one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

from shmsock.engine import layout as lay
from shmsock.engine.connection import CLOSED, EOF, RESET, STALE, VIOLATION, State
from shmsock.engine.datagram_links import Incoming, Outgoing
from shmsock.engine.datagrams import DATAGRAM_MAX
from tests.engine.world import Node, World

EVENTS = 64 * 3 + 80 * 2
"""More than a pass can report: slots, links, answers, and the ends of connections."""


def words(world: World, section: int, hot: bool) -> Iterator[int]:
    """Offsets of the words that the section's owner writes; `hot`: only those that others read
    all the time."""
    layout, g = world.layout, world.layout.geometry
    at = layout.section(section)
    for j in range(layout.peers):
        pair = layout.pair(section, j)
        yield from (pair, pair + 0x40, pair + 0x80, pair + 0xC0, pair + g.toggle_off, pair + g.ack_off)
        yield from (pair + g.message_off + 64 * m + 8 * w for m in range(4) for w in range(4))
    for slot in range(6):
        yield from (at + g.slot_off + 192 * slot + where for where in (0, 8, 0x40, 0x80))
    if not hot:
        yield from range(at, at + 0x190, 8)
        yield from range(at + lay.LISTENER, at + lay.LISTENER + 64, 8)
        yield from range(at + layout.arena_off, at + layout.arena_off + 256, 8)


def garbage(rng: random.Random, old: int) -> int:
    one = 1 << rng.randrange(64)
    return rng.choice(
        (
            rng.getrandbits(64), (1 << 64) - 1, 0, old + 1, old - 1, old ^ one, old ^ one, old + (1 << 32),
            old ^ 0xFFFFFFFF, old ^ (1 << rng.randrange(32, 36)), (old & ~0xFFFFFFFF) | rng.getrandbits(32),
            old + (1 << 40),
        )
    ) % (1 << 64)  # fmt: skip


class DatagramIn:
    """What an endpoint belongs to. `order`: numbered datagrams of one source must come without a gap."""

    def __init__(self, node: Node, source: str = "") -> None:
        self.endpoint = node.call(node.engine.datagrams.bind, 0 if source else 9, remote=None)
        self.endpoint.handler = self
        self.source, self.next = source, 0

    def datagram(self, data: bytes, source: tuple[str, int]) -> None:
        assert len(data) <= DATAGRAM_MAX
        if source[0] == self.source:
            assert data == b"%d" % self.next, (data, self.next)
            self.next += 1

    def space(self) -> None:
        assert self.endpoint.unsent >= 0

    def refused(self, error: OSError) -> None:
        assert isinstance(error, OSError)


class Scene:
    def __init__(self, seed: int, how: str, everywhere: bool) -> None:
        self.world = World(how, seed, peers=3, size=3 << 20)
        self.rng, self.everywhere = random.Random(seed), everywhere
        self.a, self.b, self.x = (self.world.attach(n, kernel=n.encode() * 16) for n in "abx")
        self.world.quiet()
        for node in (self.a, self.b, self.x):
            node.listen(backlog=1000)
        self.sent, self.got = bytearray(), bytearray()
        self.out, self.into = self.world.open(self.a, self.b)
        self.boxes = {node: DatagramIn(node) for node in (self.a, self.b, self.x)}
        self.ordered, self.numbered = DatagramIn(self.b, "a"), 0
        self.world.drain()

    def scribble(self) -> None:
        world, rng = self.world, self.rng
        section = rng.randrange(3) if self.everywhere else self.x.section
        if self.everywhere and rng.random() < 0.05:
            at = rng.choice((lay.H_MAGIC, lay.H_VERSION, lay.H_ID, lay.H_BYTES))
        else:
            at = rng.choice(list(words(world, section, hot=rng.random() < 0.8)))
            if self.everywhere and at == world.layout.section(section) and rng.random() < 0.9:
                return  # the claim word ends a node: not every time
        world.poke(at, garbage(rng, world.word(at)))

    def step(self, node: Node) -> None:
        """Something that a program might do, with the exceptions that it must expect."""
        rng, engine = self.rng, node.engine
        act = rng.randrange(12)
        kept = [self.out, self.into]
        if node is not self.x:  # which may do with the links of its datagrams whatever it likes
            kept += [c for c in node.connections if isinstance(c.handler, (Incoming, Outgoing))]
        conns = [c for c in node.connections if c not in kept]
        try:
            if act == 0:
                node.connect(rng.choice([n for n in (self.a, self.b, self.x) if n.state == "running"]))
            elif act == 1:
                node.call(engine.listeners.elsewhere, rng.choice(("a", "x", None)), 7000)
            elif act == 2 and len(list(engine.listeners)) < 5:
                node.listen(0)
            elif act > 9:
                size, to = rng.choice((0, 1, 100, 20000)), rng.choice(("a", "b", "x", "*"))
                if not (node is self.a and to in "b*"):  # it numbers what it sends there
                    node.call(self.boxes[node].endpoint.send, rng.randbytes(size), (to, 9))
            elif conns:
                conn = rng.choice(conns)
                if act < 5:
                    taken = node.write(conn, rng.randbytes(rng.choice((1, 100, 20000))))
                    assert taken >= 0 or taken in (CLOSED, STALE, VIOLATION), taken
                elif act < 8:
                    data = node.read(conn)
                    assert isinstance(data, bytes) or data in (-1, EOF, RESET, STALE), data
                    if isinstance(data, bytes):
                        assert len(data) <= 1 << 20
                elif act == 8:
                    node.call(rng.choice((conn.close, conn.abort, conn.finish)))
                else:
                    node.call(self.world.lib.sh_arm, conn.ep)
        except OSError:
            pass  # ENOBUFS, refused, reset, EADDRINUSE, node closed: all of them documented

    def pump(self, node: Node) -> None:
        events = node.pump()
        assert len(events) <= EVENTS, len(events)
        for event in events:
            if event.kind == "accepted":
                event.target.taken()
            if event.kind in ("failed", "down"):
                assert isinstance(event.arg, OSError)
        node.events.clear()

    def talk(self) -> None:
        """The two honest ones."""
        data = self.rng.randbytes(self.rng.choice((1, 50, 3000)))
        taken = self.a.write(self.out, data)
        assert taken >= 0, (taken, self.out)
        self.sent += data[:taken]
        to = (self.b.section, self.ordered.endpoint.local[1])
        self.a.call(self.boxes[self.a].endpoint.send, b"%d" % self.numbered, to)
        self.numbered += 1
        found = self.b.read(self.into)
        if isinstance(found, bytes):
            self.got += found
        else:
            assert found == -1, (found, self.into, self.into.error)

    def run(self, rounds: int) -> None:
        world, rng = self.world, self.rng
        for _ in range(rounds):
            if rng.random() < 0.3:
                self.scribble()
            node = rng.choice((self.a, self.b, self.x))
            if node.engine.alive:
                self.step(node)
            self.pump(node)
            if not self.everywhere and rng.random() < 0.3:
                self.talk()
            if rng.random() < 0.05:
                world.advance(rng.choice((0.1, 0.5, 1.5)))
        if self.everywhere:
            return
        self.honest_end()

    def honest_end(self) -> None:
        """x falls silent at last: a and b lost no byte, and hold nothing of its any more."""
        world, (a, b) = self.world, (self.a, self.b)
        world.freeze(self.x)
        world.drain()
        world.advance(8)
        world.quiet()
        for _ in range(100):
            if len(self.got) < len(self.sent):
                self.talk()
                world.quiet()
        found, _ = b.read_all(self.into)
        self.got += found
        assert self.got == self.sent
        assert self.ordered.next == self.numbered
        assert self.out.state is self.into.state is State.OPEN
        conn, end = world.open(a, b, 9)
        a.write(conn, b"still well")
        world.quiet()
        assert b.read(end) == b"still well"
        for node in (a, b):
            for conn in node.connections:
                node.abort(conn)
        world.advance(70)  # linger_s
        for node in (a, b):
            assert not node.connections, node.connections
            assert node.engine.slots.free_slots == world.layout.slots
            assert node.engine.slots.free_bytes == world.layout.arena_bytes


def main(seed: int, rounds: int) -> None:
    for how in ("eager", "nested"):
        for everywhere in (False, True):
            Scene(seed, how, everywhere).run(rounds)


if __name__ == "__main__":
    first, last, rounds = map(int, sys.argv[1:])
    for seed in range(first, last):
        try:
            main(seed, rounds)
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
