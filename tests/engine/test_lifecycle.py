"""The life-cycle table (engine/connection.py), row by row, through Engine, Connection and Listener alone."""

from __future__ import annotations

import errno

import pytest

from shmsock.engine.connection import CLOSED, EMPTY, EOF, RESET, State
from tests.engine.world import Node, World, send


def test_connect_accept_and_talk(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    assert c.state is s.state is State.OPEN
    assert (c.local, c.remote) == (("a", 40000), ("b", 7000))
    assert (s.local, s.remote) == (("b", 7000), ("a", 40000))
    assert a.write(c, b"ping") == 4
    world.quiet()
    assert s in [e.target for e in b.take("ready")]
    assert b.read_all(s) == (b"ping", EMPTY)
    assert b.write(s, b"pong") == 4
    world.quiet()
    assert a.read_all(c) == (b"pong", EMPTY)


def test_refused_without_listener(world: World) -> None:
    a, b = world.pair()
    c = a.connect(b, 1)
    world.quiet()
    assert isinstance(a.failed(c), ConnectionRefusedError)
    assert c.state is State.FREE
    assert b.statistic("refused") == 1


def test_refused_when_the_listener_was_closed(world: World) -> None:
    a, b = world.pair()
    listener = b.listen()
    b.call(listener.close)
    c = a.connect(b)
    world.quiet()
    assert isinstance(a.failed(c), ConnectionRefusedError)


def test_a_full_backlog_is_waited_for(world: World) -> None:
    a, b = world.pair()
    listener, other = b.listen(backlog=2), b.listen(7001)
    tries = [a.connect(b) for _ in range(7)]
    world.quiet()
    assert (listener.pending, a.asks(b.section)) == (2, (5, 0, 0))
    there = a.connect(b, 7001)  # is not kept waiting
    world.quiet()
    assert there.state is State.OPEN
    assert b.accepted(other).state is State.OPEN
    world.advance(1.0)
    assert sum(c.state is State.OPEN for c in tries) == 2
    waiting = [c for c in tries if c.state is State.OPENING]
    a.close(waiting.pop())
    for left in (4, 3, 2, 1):
        assert sum(c.state is State.OPENING for c in tries) == left
        b.accepted(listener)
        world.advance(0.8)
    b.accepted(listener)
    assert {c.state for c in waiting} == {State.OPEN}
    assert a.take("failed") == []
    assert a.statistic("refused") == 0


def test_who_waits_for_a_backlog_is_told_when_nobody_listens_any_more(world: World) -> None:
    a, b = world.pair()
    listener = b.listen(backlog=1)
    a.connect(b)
    world.quiet()
    tries = [a.connect(b) for _ in range(3)]
    world.quiet()
    b.call(listener.close)
    world.advance(0.5)
    assert {type(a.failed(c)) for c in tries} == {ConnectionRefusedError}


def test_a_peer_that_dies_while_it_is_waited_for(world: World) -> None:
    a, b = world.pair()
    b.listen(backlog=1)
    tries = [a.connect(b) for _ in range(3)]
    world.quiet()
    world.kill(b)
    world.advance(0.3)
    assert {c.state for c in tries[1:]} == {State.FREE}
    assert {type(a.failed(c)) for c in tries[1:]} == {ConnectionResetError}


def test_refused_for_want_of_a_slot(world: World) -> None:
    """One peer gets seven of eight slots; who holds little may have the last ones, but not all of them."""
    a, b, c, d = (world.attach(name) for name in "abcd")
    world.advance(1.2)  # each knows of the others
    b.listen(backlog=1000)
    kept = world.layout.slots // 8
    for node in a, d:
        node.listen(7001)
        world.open(b, node, 7001)
    most = world.layout.slots - kept - 2
    mine = [a.connect(b) for _ in range(most)]
    world.quiet()
    assert {x.state for x in mine} == {State.OPEN}
    more = a.connect(b)
    world.quiet()
    assert a.failed(more).errno == errno.ENOBUFS
    theirs = [c.connect(b) for _ in range(kept)]
    world.quiet()
    got = sum(x.state is State.OPEN for x in theirs)
    assert got == -(-kept // 4)  # of which each of the four has a part
    assert [c.failed(x).errno for x in theirs[got:]] == [errno.ENOBUFS] * (kept - got)
    last = d.connect(b)
    world.quiet()
    assert last.state is State.OPEN


def test_own_slots_exhausted(world: World) -> None:
    a, b = world.pair()
    b.listen(backlog=1000)
    for _ in range(world.layout.slots * 7 // 8):
        a.connect(b)
    with pytest.raises(OSError, match=r"connection slots.*8 MiB") as info:
        a.connect(b)
    assert info.value.errno == errno.ENOBUFS


def test_no_memory(world: World) -> None:
    """Whose it is says the error. (Each free slot keeps a claim to a ring: it takes another to use it up.)"""
    a, b = world.pair()
    b.listen(backlog=1000)
    taken = []
    for node in b, a:
        while (block := node.take_memory(1 << 20)) is not None:
            taken.append((node, block))
        if node is b:
            c = a.connect(b)
            world.quiet()
            assert a.failed(c).errno == errno.ENOBUFS
    with pytest.raises(OSError, match="ring memory") as info:
        a.connect(b)
    assert info.value.errno == errno.ENOBUFS
    for node, block in taken:
        node.give_memory(block)
    world.open(a, b)


# -- OPENING


def test_cancel_before_the_answer(world: World) -> None:
    a, b = world.pair()
    listener = b.listen()
    c = a.connect(b)
    a.close(c)
    assert c.state is State.FREE
    world.quiet()
    assert a.take("failed") == a.take("connected") == []
    assert listener.pending == 0 or b.accepted().state is State.FREE


def test_cancel_with_accept_on_its_way(world: World) -> None:
    a, b = world.pair()
    b.listen()
    c = a.connect(b)
    world.drain()
    b.pump()
    s = b.accepted()
    assert s.state is State.OPEN or world.how == "nested"
    a.abort(c)
    world.quiet()
    assert s.state is State.FREE
    assert b.read(s) == EOF  # it wrote nothing, and ended
    assert a.asks(b.section) == (0, 0, 0)


def test_cancel_with_refuse_on_its_way(world: World) -> None:
    a, b = world.pair()
    c = a.connect(b)
    world.drain()
    b.pump()
    a.close(c)
    world.quiet()
    assert c.state is State.FREE
    assert a.take("failed", c) == [] or world.how == "nested"


def test_cancelled_slot_is_taken_anew_before_the_answer(world: World) -> None:
    """Same slot, next generation, both CONNECTs on their way: the first is stale whenever it is looked at."""
    a, b = world.pair()
    b.listen()
    first = a.connect(b)
    generation = first.gen
    a.close(first)
    second = a.connect(b)
    assert (second.slot, second.gen) == (first.slot, generation + 1)
    world.quiet()
    assert second.state is State.OPEN
    ends = [e.arg for e in b.take("accepted")]
    assert [e.state for e in ends if e.state is State.OPEN] == [State.OPEN]
    assert a.write(second, b"x") == 1
    world.quiet()
    assert b.read(ends[-1]) == b"x"


def test_accepted_slot_is_cancelled_and_taken_anew(world: World) -> None:
    a, b = world.pair()
    b.listen()
    first = a.connect(b)
    world.drain()
    b.pump()
    stale = b.accepted()
    a.close(first)
    second = a.connect(b)
    world.quiet()
    assert stale.state is State.FREE
    assert second.state is State.OPEN
    assert b.accepted().state is State.OPEN


def test_more_connects_than_credits(world: World) -> None:
    a, b = world.pair()
    b.listen(backlog=1000)
    tries = [a.connect(b) for _ in range(50)]
    assert a.asks(b.section) == (18, 0, 32) or world.how == "nested"
    world.quiet()
    assert {c.state for c in tries} == {State.OPEN}
    assert a.asks(b.section) == (0, 0, 0)


def test_waiting_connects_that_are_cancelled_cost_no_credit(world: World) -> None:
    a, b = world.pair()
    world.stop(b)
    tries = [a.connect(b) for _ in range(40)]
    assert a.asks(b.section) == (8, 0, 32)
    for c in tries[30:]:
        a.close(c)
    world.resume(b)
    world.quiet()
    assert len(a.take("failed")) == 30
    assert a.asks(b.section) == (0, 0, 0)


def test_both_connect_to_each_other_all_at_once(world: World) -> None:
    """Requests and answers of both directions share the message rings: none is lost, none overflows."""
    a, b = world.pair()
    a.listen(backlog=1000)
    b.listen(backlog=1000)
    there = [a.connect(b) for _ in range(28)]
    back = [b.connect(a) for _ in range(28)]
    world.quiet()
    assert {c.state for c in there + back} == {State.OPEN}
    assert len(a.take("accepted")) == len(b.take("accepted")) == 28


def test_release_is_seen_before_the_slot_is_accepted_again(world: World) -> None:
    """The peer's slot is handed to a new connection before we looked at the end of the old one."""
    a, b = world.pair()
    c, s = world.open(a, b)
    b.write(s, b"x")
    world.drain()
    a.pump()
    assert a.read(c) == b"x"  # its toggle stays unacknowledged until the next pump
    a.close(c)
    d = a.connect(b)
    world.drain()
    b.pump()
    assert b.read(s) == EOF
    b.pump()
    world.quiet()
    assert d.state is State.OPEN
    assert a.statistic("violations") == 0


# -- OPEN, CLOSING


def held(node: Node) -> int:
    """Slots that are in use, those that close included."""
    return node.engine.layout.slots - node.statistic("free_slots")


def test_one_closes_the_other_reads_to_the_end(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"the last words")
    a.close(c)
    assert c.state is State.FREE
    world.quiet()
    assert held(a) == 1  # until the other says so, too
    assert b.write(s, b"x") == CLOSED
    assert b.connections == [s]
    assert b.read_all(s) == (b"the last words", EOF)
    assert s.state is State.FREE
    assert b.read(s) == EOF
    world.quiet()
    assert (held(a), held(b)) == (0, 0)


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_one_closes_and_the_other_is_gone(world: World, how: str) -> None:
    a, b = world.pair()
    c, _ = world.open(a, b)
    a.write(c, b"nobody reads it")
    a.close(c)
    world.quiet()
    assert held(a) == 1
    getattr(world, how)(b)
    world.advance(10)
    world.quiet()
    assert held(a) == 0


def test_one_closes_the_other_has_nothing_to_read(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.close(c)
    world.quiet()
    assert s.state is c.state is State.FREE
    assert b.read(s) == EOF
    assert s.error is None


def test_both_close_at_once(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"unread")
    b.write(s, b"unread too")
    a.close(c)
    b.close(s)
    world.quiet()
    assert c.state is s.state is State.FREE
    assert (c.error, s.error) == (None, None)


def test_half_close(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"request")
    a.finish(c)
    assert a.write(c, b"more") == CLOSED
    world.quiet()
    assert b.read_all(s) == (b"request", EOF)
    assert b.read(s) == EOF
    assert s in b.connections
    answer = b"answer " * 5000
    assert send(world, b, s, answer, a, c) == answer
    b.close(s)
    world.quiet()
    assert a.read_all(c) == (b"", EOF)
    world.quiet()
    assert c.state is s.state is State.FREE


def test_finish_on_both_sides_keeps_the_connection_until_close(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.finish(c)
    b.finish(s)
    world.quiet()
    assert (a.read(c), b.read(s)) == (EOF, EOF)
    assert {c.state, s.state} == {State.OPEN}
    a.close(c)
    world.quiet()
    b.close(s)
    world.quiet()
    assert c.state is s.state is State.FREE


def test_close_with_unread_data_still_delivers_what_was_written(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    b.write(s, b"never read")
    a.write(c, b"bye")
    world.quiet()
    a.close(c)
    world.quiet()
    assert b.read_all(s) == (b"bye", EOF)


@pytest.mark.parametrize("opener", [True, False])
def test_abort(world: World, opener: bool) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    here, this, there, that = (a, c, b, s) if opener else (b, s, a, c)
    here.write(this, b"unread")
    here.abort(this)
    world.quiet()
    assert this.state is that.state is State.FREE
    assert there.read(that) == RESET
    assert isinstance(that.error, ConnectionResetError)
    assert there.write(that, b"x") == CLOSED


def test_abort_after_close(world: World) -> None:
    """It is too late: what was written before close arrives."""
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"unread")
    a.close(c)
    world.quiet()
    a.abort(c)
    world.quiet()
    assert b.read_all(s) == (b"unread", EOF)
    world.quiet()
    assert (held(a), held(b)) == (0, 0)


def test_close_is_harmless_twice_and_at_the_end(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    for _ in range(2):
        a.close(c)
        world.quiet()
    b.close(s)
    b.abort(s)
    b.finish(s)
    world.quiet()
    assert c.state is s.state is State.FREE


def test_a_stale_handle_does_not_touch_the_slots_next_owner(world: World) -> None:
    a, b = world.pair()
    old, s = world.open(a, b)
    a.close(old)
    b.close(s)
    world.quiet()
    new, t = world.open(a, b)
    assert new.slot == old.slot
    a.close(old)
    a.abort(old)
    assert a.write(old, b"x") == CLOSED
    assert a.read(old) == EOF
    world.quiet()
    assert new.state is t.state is State.OPEN


def test_generations_wrap(world: World) -> None:
    """24 bits: the section's last owner left its generations at the end of their range."""
    slots = int(world.layout.geometry.slot_off)
    for section in range(2):
        for slot in range(world.layout.slots):
            world.poke(world.layout.section(section) + slots + 192 * slot + 0x40, 0xFFFFFD << 40)
    a, b = world.pair()
    seen = set()
    for _ in range(4):
        c, s = world.open(a, b)
        seen.add(c.gen)
        a.write(c, b"x")
        a.close(c)
        world.quiet()
        assert b.read_all(s) == (b"x", EOF)
        world.quiet()
    assert seen == {0xFFFFFE, 0xFFFFFF, 0, 1}


# -- bytes


def test_a_full_ring_and_the_space_event(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    data = bytes(range(256)) * 1000
    taken = a.write(c, data)
    assert taken == c.ring[1] or world.how == "nested"
    world.quiet()
    a.take("ready")
    got = b.read(s, 100)
    world.quiet()
    assert [e.target for e in a.take("ready")] == [c]
    more = a.write(c, data[taken:])
    assert more == 100
    assert got == data[:100]


def test_rings_wrap(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    data = world.rng.randbytes(5 * c.ring[1] + 77)
    assert send(world, a, c, data, b, s) == data
    back = world.rng.randbytes(3 * s.ring[1] + 1)
    assert send(world, b, s, back, a, c) == back


def test_connection_to_oneself(world: World) -> None:
    a, _ = world.pair()
    c, s = world.open(a, a)
    data = world.rng.randbytes(50000)
    got, at = b"", 0
    while len(got) < len(data):
        at += a.write(c, data[at:])
        a.pump()
        got += a.read_all(s)[0]
    assert got == data
    a.write(c, b"end")
    a.close(c)
    world.quiet()
    assert a.read_all(s) == (b"end", EOF)
    world.quiet()
    assert c.state is s.state is State.FREE


def test_many_connections(world: World) -> None:
    a, b = world.pair()
    pairs = [world.open(a, b) for _ in range(30)]
    for i, (c, _) in enumerate(pairs):
        a.write(c, b"%d" % i)
    world.quiet()
    assert {e.target for e in b.take("ready")} == {s for _, s in pairs}
    for i, (_, s) in enumerate(pairs):
        assert b.read(s) == b"%d" % i
    for c, s in pairs[::2]:
        a.close(c)
        b.close(s)
    world.quiet()
    assert len(a.connections) == len(b.connections) == 15


def test_more_ready_slots_than_one_pass_reports() -> None:
    world = World(size=16 << 20, peers=2)
    a, b = world.pair()
    b.listen(backlog=1000)
    assert world.layout.slots >= 512
    conns = [a.connect(b) for _ in range(200)]
    world.quiet()
    for c in conns:
        a.write(c, b"x")
    b.take("ready")
    passes = 0
    while sum(e.kind == "ready" for e in b.events) < 200:
        b.pump()
        passes += 1
    assert passes >= 3
    world.check()


def test_sixteen_peers() -> None:
    world = World("lazy", 5, size=16 << 20, peers=16)
    nodes = [world.attach(f"n{i}") for i in range(16)]
    for node in nodes:
        node.listen(backlog=100)
    conns = [(x, y, x.connect(y)) for x in nodes for y in nodes]
    world.quiet()
    for x, _, c in conns:
        assert c.state is State.OPEN
        x.write(c, c.local[0].encode())
    world.quiet()
    for node in nodes:
        heard = {node.read(e.arg) for e in node.take("accepted")}
        assert heard == {other.who.name.encode() for other in nodes}
    world.check()
