"""Who makes others look for nothing is not looked at, whatever word it changes; who moves something is."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from shmsock.engine import layout as lay
from tests.engine.world import Node, World, send

ROUNDS = 3000
WANT, EPOCH = 1 << 35, 1 << 36


class Liar:
    """A peer of "victim" that has a connection with it, and keeps to no rules from then on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.victim, self.node = world.pair("victim", "liar")
        self.conn, self.end = world.open(self.node, self.victim)
        send(world, self.node, self.conn, b"hello", self.victim, self.end)
        world.quiet()
        world.stop(self.node)
        layout, g = world.layout, world.layout.geometry
        self.at = layout.section(self.node.section)
        self.pair = layout.pair(self.node.section, self.victim.section)
        self.t = self.pair + int(g.toggle_off)
        self.messages = self.pair + int(g.message_off)
        self.p = self.at + int(g.slot_off) + 192 * self.conn.slot + 0x40
        self.tail = self.word(self.pair + lay.OUTBOX) & 0xFFFFFFFF

    def word(self, at: int) -> int:
        return self.world.word(at)

    def flip(self, at: int, bits: int) -> None:
        self.world.poke(at, self.word(at) ^ bits)

    def bell(self) -> None:
        bell = self.word(self.pair)
        self.world.poke(self.pair, bell >> 32 << 32 | (bell + 1) & 0xFFFFFFFF)

    def toggle(self, slot: int) -> None:
        self.flip(self.t + slot // 64 * 8, 1 << slot % 64)
        self.bell()

    def say(self, kind: int) -> None:
        """A message that is in order, about a slot that is not."""
        box = self.word(self.pair + lay.OUTBOX)
        fields = (self.word(self.pair) >> 32, box >> 32, self.tail, kind, 1, 0, 15, 15, 7, 7, 0, 0)
        message = struct.pack("<IIIBBHHHIIHH", *fields).ljust(64, b"\0")
        for i in range(8):
            word = int.from_bytes(message[8 * i : 8 * i + 8], "little")
            self.world.poke(self.messages + self.tail % 64 * 64 + 8 * i, word)
        self.tail = (self.tail + 1) & 0xFFFFFFFF
        self.world.poke(self.pair + lay.OUTBOX, box >> 32 << 32 | self.tail)
        self.bell()

    def rename(self) -> None:
        """In a new life, and somebody asks who is there."""
        self.flip(self.at + lay.INCARNATION, 1 << 20)
        self.flip(self.at + lay.NAME, 1)
        self.victim.call(self.victim.engine.peers.refresh_all, self.world.now)

    def changed(self, at: int, bits: int) -> None:
        """That word, and what tells the victim to look at the open connection."""
        self.flip(at, bits)
        self.toggle(self.end.slot)


LIES: dict[str, Callable[[Liar], None]] = {
    "bell": Liar.bell,
    "new tags": lambda x: x.world.poke(x.pair, x.world.rng.getrandbits(64)),
    "two tags": lambda x: x.flip(x.pair, 1 << 40),
    "no tag": lambda x: x.flip(x.pair, x.word(x.pair) or 1 << 40),
    "toggle of a closed slot": lambda x: x.toggle(15),
    "toggle of an open slot": lambda x: x.toggle(x.end.slot),
    "want": lambda x: x.changed(x.p, WANT),
    "epoch": lambda x: x.changed(x.p, EPOCH),
    "inbox of another life": lambda x: x.changed(x.pair + lay.INBOX, 1 << 40),
    "outbox of another life": lambda x: x.changed(x.pair + lay.OUTBOX, 1 << 40),
    "users": lambda x: x.changed(x.pair + lay.USERS, 1),
    "accepts of nothing": lambda x: x.say(2),
    "refusals of nothing": lambda x: x.say(3),
    "names": Liar.rename,
}


def is_woken(node: Node) -> bool:
    return bool(node.world.lib.sh_fake_any_notified(node.engine.nd)) or not node.engine.quiet


@pytest.mark.parametrize("lie", LIES)
def test_a_thousand_lies_within_a_second_are_enough(lie: str) -> None:
    world = World("eager", 0)
    liar = Liar(world)
    honest = world.attach("honest")
    world.quiet()
    for _ in range(3):  # for a second each
        muted = liar.victim.statistic("rate_limited")
        for _ in range(ROUNDS):
            LIES[lie](liar)
            liar.victim.pump()
        assert liar.victim.statistic("rate_limited") == muted + 1
        LIES[lie](liar)
        assert not is_woken(liar.victim)
        conn, end = world.open(honest, liar.victim, 7001)
        assert send(world, honest, conn, b"truth", liar.victim, end) == b"truth"
        world.advance(1.1)


def test_what_moves_something_is_no_lie(world: World) -> None:
    """As fast as can be, at one moment of the clock."""
    a, b = world.pair()
    conn, end = world.open(a, b)
    for i in range(ROUNDS):
        assert send(world, a, conn, b"%d" % i, b, end) == b"%d" % i
        assert send(world, b, end, b"%d" % i, a, conn) == b"%d" % i
    assert a.statistic("rate_limited") == b.statistic("rate_limited") == 0


def test_many_slots_at_once_are_no_lie(world: World) -> None:
    """More than a pass can report, and each of them counts when it was looked at."""
    a, b = world.pair()
    pairs = [world.open(a, b) for _ in range(12)]
    for i in range(ROUNDS // 10):
        for conn, _ in pairs:
            assert a.write(conn, b"%d" % i) > 0
        for _, end in pairs:
            b.pump()
            got, _status = b.read_all(end)
            while got != b"%d" % i:
                world.drain()
                b.pump()
                more, _status = b.read_all(end)
                got += more
    assert a.statistic("rate_limited") == b.statistic("rate_limited") == 0


def test_slots_that_were_read_count_no_more(world: World) -> None:
    """Their toggles stay until the turn ends, and are seen whenever so many others notify that all are looked
    at."""
    a, b = world.pair()
    read, told = ([world.open(a, b) for _ in range(count)] for count in (70, 20))
    b.pump()
    for conn, end in read:
        assert a.write(conn, b"read") > 0
        world.drain()
        assert b.read_all(end)[0] == b"read"
    for _ in range(100):
        for conn, _ in told:
            assert a.write(conn, b"?") > 0
        world.drain()
        b.pump_on()
        assert b.statistic("rate_limited") == 0


def test_answers_that_nobody_waits_for_any_more_are_no_lie(world: World) -> None:
    """Who asked has given up meanwhile; and each question was answered once, which is all that counts."""
    a, b = world.pair()
    listener = b.call(b.engine.listen, 7000)
    for i in range(ROUNDS):
        conn = a.call(a.engine.connect, b.section, 7000, local=(a.who.name, 40000), remote=b.who.name)
        if i % 2:  # else it is refused
            world.drain()
            b.pump()
        a.close(conn)
        for _ in range(4):
            world.drain()
            b.pump()
            a.pump()
        for end in b.connections:
            b.close(end)
        while listener.pending:
            listener.taken()
    assert a.statistic("rate_limited") == b.statistic("rate_limited") == 0
    assert b.engine.counts["accepted"] + b.statistic("refused") == ROUNDS
    assert b.engine.counts["accepted"] >= ROUNDS // 2
