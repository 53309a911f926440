"""Peers that leave, die, are stopped, come back: what was published is read, nobody hangs, nothing leaks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from shmsock.engine import layout as lay
from shmsock.engine.attach import claim_section
from shmsock.engine.connection import CLOSED, EOF, RESET, STALE, Connection, State
from shmsock.engine.settings import Settings
from shmsock.errors import NodeClosedError
from tests.engine.world import KERNEL, MACHINE, SECOND, Node, World, send

End = Callable[[World, Node], None]
OTHER = b"kernel-of-host-B"


def lost_at_once(world: World, node: Node) -> None:
    """Its lock fell, and the heartbeat of this kernel has seen it."""
    world.kill(node)
    world.drain()
    world.advance(0.1)


def lost_after_a_while(world: World, node: Node) -> None:
    """Dead under another kernel: only its beat tells."""
    world.freeze(node)
    world.drain()
    world.advance(2.5)
    assert all(n.engine.peers[node.section].live for n in world.running())
    world.advance(1.0)


def left(world: World, node: Node) -> None:
    world.leave(node)
    world.drain()
    world.advance(0.2)


@pytest.fixture(params=[lost_at_once, lost_after_a_while])
def die(request: pytest.FixtureRequest) -> End:
    end: End = request.param
    return end


def gone(world: World, node: Node, peer: Node) -> None:
    assert not node.peer(peer).live
    assert node.statistic("peers_lost") == 1


def test_bytes_of_the_dead_are_read_then_reset(world: World, die: End) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    data = world.rng.randbytes(c.ring[1])
    a.write(c, data)
    die(world, a)
    gone(world, b, a)
    assert s in [e.target for e in b.take("ready")]
    assert b.write(s, b"x") == CLOSED
    assert b.read_all(s) == (data, RESET)
    assert isinstance(s.error, ConnectionResetError)
    assert s.state is State.FREE


def test_a_successor_tells_that_its_forerunner_was_killed(world: World) -> None:
    """Who waits for the dead is to look for the living, and not only at the next beat."""
    a, b = world.pair()
    c, _ = world.open(a, b)
    world.kill(b)
    world.drain()
    successor = world.process("b")
    steps = claim_section(world.layout, successor.locks, KERNEL, MACHINE, world.rng, device=False)
    with pytest.raises(StopIteration) as done:
        successor.call(next, steps)
    world.start(successor, claim=done.value.value)
    world.quiet()  # (no time passes)
    assert a.read_all(c) == (b"", RESET)
    gone(world, a, b)


@pytest.mark.parametrize("how", ["close", "finish"])
def test_bytes_of_the_dead_are_read_then_eof(world: World, die: End, how: str) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"the will")
    a.call(getattr(c, how))
    die(world, a)
    gone(world, b, a)
    assert b.read_all(s) == (b"the will", EOF)
    assert s.error is None
    assert s.state is State.FREE
    assert b.read(s) == EOF


def test_bytes_of_who_left_are_read_then_eof(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"the will")
    left(world, a)
    assert b.read_all(s) == (b"the will", EOF)


def test_reading_goes_on_over_the_death(world: World, die: End) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"0123456789")
    world.quiet()
    assert b.read(s, 4) == b"0123"
    die(world, a)
    assert b.read(s, 4) == b"4567"
    assert world.users(b, a.section) == 1
    assert b.read_all(s) == (b"89", RESET)
    assert world.users(b, a.section) == 0


def test_who_waits_is_told(world: World, die: End) -> None:
    """A reader with nothing to read, a writer without space, a CONNECT without answer, a close half done."""
    a, b = world.pair()
    a.listen(7001)
    _, s = world.open(a, b)
    _, t = world.open(a, b)
    _, u = world.open(a, b)
    b.write(t, bytes(1 << 20))
    b.write(u, b"unread")
    b.close(u)
    world.quiet()
    b.take("ready")
    world.stop(a)
    q = b.connect(a, 7001)
    world.resume(a)
    die(world, a)
    assert {s, t} <= {e.target for e in b.take("ready")}
    assert isinstance(b.failed(q), ConnectionResetError) or q.state is State.FREE
    assert (b.read(s), b.read(t), u.state, q.state) == (RESET, RESET, State.FREE, State.FREE)
    assert b.connections == []


def test_connect_to_the_gone_is_refused_at_once(world: World, die: End) -> None:
    a, b = world.pair()
    world.advance(0.3)  # they beat
    section = a.section
    die(world, a)
    with pytest.raises(ConnectionRefusedError):
        b.connect(section)
    with pytest.raises(ConnectionRefusedError):
        b.connect(3)


def test_peer_that_left_is_noticed_by_a_look_at_the_names_first(world: World) -> None:
    """refresh() finds it gone before sample() does: the CONNECT fails nevertheless."""
    a, b = world.pair()
    c = b.connect(a)
    assert a.engine.alive
    world.leave(a)
    world.drain()
    found, _ = b.call(b.engine.listeners.elsewhere, "a", 7000)
    assert found == []
    world.advance(0.2)
    assert isinstance(b.failed(c), ConnectionResetError | ConnectionRefusedError)


def test_unread_bytes_of_the_dead_are_kept_for_linger_s(world: World) -> None:
    a = world.attach("a")
    b = world.attach("b", settings=Settings(ring_bytes=16384, linger_s=10))
    c, s = world.open(a, b)
    a.write(c, b"x")
    world.kill(a)
    world.drain()
    world.advance(9)
    assert b.connections == [s]
    world.advance(2)
    assert s.state is State.FREE
    assert b.read(s) == RESET


def test_stopped_and_continued_within_the_time_is_nothing(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    world.stop(a)
    world.advance(2.5)
    world.resume(a)
    world.advance(2.0)
    assert b.statistic("peers_lost") == a.statistic("peers_lost") == 0
    assert send(world, a, c, b"still here", b, s) == b"still here"


def test_stopped_for_long_and_continued(world: World) -> None:
    """One side dropped the link, the other lives and never knew: both see a reset, and both can
    start anew."""
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"before")
    world.drain()
    world.stop(a)
    world.advance(6.0)
    gone(world, b, a)
    assert b.read_all(s) == (b"before", RESET)
    world.resume(a)
    a.write(c, b"late")
    world.advance(0.5)
    world.quiet()
    assert a.read_all(c)[1] == RESET
    assert a.statistic("peers_lost") == 0
    assert b.peer(a).live
    c, s = world.open(a, b)
    assert send(world, a, c, b"again", b, s) == b"again"


def test_who_was_stopped_for_long_connects_before_it_beats(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop may be quicker than its heartbeat: what it says counts as a beat."""
    a, b = world.pair()
    world.open(a, b)
    world.stop(a)
    world.advance(6.0)
    gone(world, b, a)
    beat = world._beat
    with monkeypatch.context() as silent:
        silent.setattr(world, "_beat", lambda node: None if node is a else beat(node))
        world.resume(a)
        world.quiet()
        c, s = world.open(a, b)
        assert b.peer(a).live
        world.advance(2.0)
        assert send(world, a, c, b"again", b, s) == b"again"
    world.advance(6.0)
    assert send(world, b, s, b"and again", a, c) == b"and again"


def test_an_observer_that_was_stopped_kills_nobody(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    world.stop(b)
    world.stop(a)
    for _ in range(100):
        world.advance(0.1)
    world.resume(a)  # the whole machine slept
    world.resume(b)
    world.advance(2.0)
    assert b.statistic("peers_lost") == a.statistic("peers_lost") == 0
    assert send(world, b, s, b"good morning", a, c) == b"good morning"


def test_restart_of_either_side(world: World) -> None:
    for name in ("a", "b", "a"):
        nodes = {n.who.name: n for n in world.nodes}
        a = nodes.get("a") or world.attach("a")
        b = nodes.get("b") or world.attach("b")
        world.quiet()
        c, s = world.open(a, b)
        assert send(world, a, c, b"hello", b, s) == b"hello"
        dead, survivor, conn = (a, b, s) if name == "a" else (b, a, c)
        world.kill(dead)
        again = world.attach(name)
        world.quiet()
        world.advance(0.2)
        assert survivor.read_all(conn)[1] == RESET
        assert again.engine.peers[survivor.section].live


def test_restart_in_the_same_section() -> None:
    """No other section is free: the dead one is reused, at once where its lock fell."""
    world = World(peers=2)
    a, b = world.pair()
    _, s = world.open(a, b)
    world.kill(a)
    world.advance(0.1)
    assert b.read_all(s) == (b"", RESET)
    a2 = world.attach("a")
    assert a2.section == a.section
    world.quiet()
    c, s = world.open(a2, b)
    assert send(world, a2, c, b"hello", b, s) == b"hello"
    world.check()


def test_both_restart_at_once(world: World) -> None:
    a, b = world.pair()
    world.open(a, b)
    world.kill(a)
    world.kill(b)
    a, b = world.attach("a"), world.attach("b")
    world.advance(1)
    c, s = world.open(a, b)
    d, t = world.open(b, a, 7001)
    assert send(world, a, c, b"hello", b, s) == b"hello"
    assert send(world, b, d, b"hello", a, t) == b"hello"


@pytest.mark.parametrize("both", [False, True])
def test_a_link_is_dropped_between_the_living(world: World, both: bool) -> None:
    """What is published is still read on both sides."""
    a, b = world.pair()
    c, s = world.open(a, b)
    d, t = world.open(a, b)
    a.write(c, b"to b")
    b.write(s, b"to a")
    b.finish(s)
    world.quiet()
    a.call(a.engine.links.drop, b.section, world.now)
    if both:
        b.call(b.engine.links.drop, a.section, world.now)
    world.quiet()
    assert a.read(c) == b"to a"
    assert b.read_all(s) == (b"to b", RESET)
    assert a.read(c) in (EOF, RESET)  # EOF if it looks before the other side has let go
    assert (a.read(d), b.read(t)) == (RESET, RESET)
    c, s = world.open(a, b)
    assert send(world, a, c, b"again", b, s) == b"again"


def test_many_drops_are_slowed_down(world: World) -> None:
    """At most ten adoptions per second and peer; afterwards all is well."""
    a, b = world.pair()
    before = b.statistic("adoptions")
    for _ in range(30):
        a.call(a.engine.links.drop, b.section, world.now)
        world.drain()
        b.pump()
    assert b.statistic("adoptions") - before <= 10
    world.advance(1.5)
    world.quiet()
    c, s = world.open(a, b)
    assert send(world, a, c, b"again", b, s) == b"again"


ACTS: dict[str, Callable[[Node, Node, Connection], object]] = {
    "connect": lambda a, b, c: a.connect(b),
    "accept": lambda a, b, c: a.pump(),
    "write": lambda a, b, c: a.write(c, b"x" * 100),
    "read": lambda a, b, c: a.read(c),
    "close": lambda a, b, c: a.close(c),
    "leave": lambda a, b, c: a.call(a.engine.leave),
}


@pytest.mark.parametrize("act", ACTS)
def test_dying_between_any_two_accesses(act: str) -> None:
    """Killed after each access to shared memory in turn: the survivor reads what was published,
    all goes on."""
    for step in range(1, 400):
        world = World(seed=step, peers=2, size=400 << 10)
        a, b = world.pair()
        c, s = world.open(a, b)
        a.listen(7001)
        b.write(s, b"y" * 5000)
        q = b.connect(a, 7001)
        died = world.run_and_die(a, step, lambda a=a, b=b, c=c: ACTS[act](a, b, c))  # type: ignore[misc]
        if not died:
            world.kill(a)
        world.drain()
        world.advance(1.5)
        if q.state is State.OPEN:
            assert b.read(q) == RESET, step
        data, status = b.read_all(s)
        assert data in (b"", b"x" * 100), step
        assert status in (EOF, RESET), step
        for conn in b.connections:
            b.abort(conn)  # as long as somebody may read what the dead one wrote, its section is not reused
        b.events.clear()
        a = world.attach("a")
        world.quiet()
        again, end = world.open(a, b)
        assert send(world, b, end, b"hello", a, again) == b"hello", step
        world.check()
        if not died:
            assert step > 5
            return
    raise AssertionError(f"{act} never ended")


def test_dying_while_attaching() -> None:
    """Whoever comes next finds a section, and who was there before is not harmed."""
    for step in range(1, 2000, 3):
        world = World(seed=step, peers=3, size=400 << 10)
        b = world.attach("b")
        world.quiet()
        a = world.process("a")
        if not world.run_and_die(a, step, lambda world=world, a=a: world.start(a)):  # type: ignore[misc]
            assert step > 100
            return
        if a in world.nodes:
            world.nodes.remove(a)
        world.advance(1.0)
        c = world.attach("c")
        world.quiet()
        conn, end = world.open(c, b)
        assert send(world, b, end, b"hello", c, conn) == b"hello", step
        world.check()
    raise AssertionError("it never attached")


# -- zombies


def test_a_zombie_in_the_middle_of_a_long_write_stores_no_further_piece() -> None:
    """Its section is taken while it copies: it finds out before the next piece, of 1 MiB."""
    world = World(size=128 << 20, peers=2)
    large = Settings(ring_bytes=4 << 20, first_ring_bytes=4 << 20)
    a, b = world.attach("a", settings=large), world.attach("b", settings=large)
    world.quiet()
    c, _ = world.open(a, b)
    assert c.ring[1] == 4 << 20
    at = world.layout.section(a.section)
    tail = at + int(world.layout.geometry.slot_off) + 192 * c.slot + 0x40
    taken = world.ffi.callback("void(void)", lambda: world.poke(at + lay.CLAIM, 12345))
    world.lib.sh_fake_hook(taken, 4)
    assert a.write(c, bytes(3 << 20)) == STALE
    world.drain()
    assert world.word(tail) & 0xFFFFFFFF <= 1 << 20
    with pytest.raises(NodeClosedError):
        a.engine.check()


def test_a_lost_claim_stops_the_node_and_it_stores_nothing_more(world: World) -> None:
    a, b = world.pair()
    b.listen()
    a.listen(7001)
    c, s = world.open(a, b)
    d, _ = world.open(a, b)
    e, t = world.open(a, b)
    b.write(s, b"hello")
    world.quiet()
    b.abort(t)
    world.drain()
    at = world.layout.section(a.section)
    world.poke(at + lay.CLAIM, 12345)
    before = bytes(world.map[at : at + world.layout.section_bytes])
    assert a.write(c, b"x") == STALE
    assert a.read(c) == RESET
    a.finish(c)
    a.close(d)
    a.close(e)  # finds the reset, and releases
    with pytest.raises(NodeClosedError, match="taken by another"):
        a.connect(b)
    with pytest.raises(NodeClosedError):
        a.listen(7002)
    for listener in list(a.engine.listeners):
        a.call(listener.close)
    a.pump()
    (down,) = a.take("down")
    assert isinstance(down.arg, NodeClosedError)
    assert c in [e.target for e in a.take("ready")]
    assert not a.engine.alive
    a.call(a.engine.leave)
    world.drain()
    assert bytes(world.map[at : at + world.layout.section_bytes]) == before
    assert a.connections == []
    world.freeze(a)
    world.advance(5)
    assert b.read_all(s)[1] in (RESET, EOF)


@pytest.mark.parametrize("first", ["pump", "leave"])
def test_a_zeroed_region_brings_the_node_down(world: World, first: str) -> None:
    a, b = world.pair()
    c, _ = world.open(a, b)
    opening = a.connect(b, 9)
    world.drain()
    zeros = bytes(len(world.map))
    world.map[:] = zeros
    if first == "pump":
        a.pump()
        b.pump()
        assert a.take("down")
        assert b.take("down")
        assert opening.state is State.FREE
        assert a.read(c) == RESET
    a.call(a.engine.leave)
    b.call(b.engine.leave)
    world.advance(0.5)
    world.drain()
    assert world.map[:] == zeros


def test_after_leave_every_call_says_so(world: World) -> None:
    a, b = world.pair()
    c, _ = world.open(a, b)
    listener = a.listen(7001)
    a.call(a.engine.leave)
    world.drain()
    with pytest.raises(NodeClosedError):
        a.connect(b)
    with pytest.raises(NodeClosedError):
        a.listen(7002)
    assert a.write(c, b"x") in (CLOSED, STALE)
    assert a.read(c) in (EOF, RESET)
    assert a.pump() == []
    a.call(listener.close)
    a.call(a.engine.leave)
    world.leave(a)
    assert isinstance(a.engine.statistics(), dict)


def test_a_silent_section_is_freed_after_reap_after_s() -> None:
    world = World(peers=3)
    settings = Settings(ring_bytes=16384, reap_after_s=30)
    a = world.attach("a", kernel=b"kernel of vm one", settings=settings)
    b = world.attach("b", settings=settings)
    c = world.attach("c", kernel=b"kernel of vm two", settings=Settings(ring_bytes=16384, reap_after_s=None))
    world.quiet()
    claim = world.layout.section(a.section) + lay.CLAIM
    world.stop(a)
    world.advance(32)
    assert world.word(claim)
    world.advance(2)
    assert not world.word(claim)
    world.resume(a)  # not dead at all: it notices, and stores nothing more
    world.advance(0.2)
    assert a.take("down")
    world.stop(b)
    world.advance(600)
    assert world.word(world.layout.section(b.section) + lay.CLAIM)  # c reaps nobody
    assert c.engine.alive
    world.resume(b)
    world.advance(1)
    world.check()


def test_nobody_waits_for_a_peer_that_dies_during_the_handshake(world: World, die: End) -> None:
    a, b = world.pair()
    b.listen()
    world.advance(0.3)  # it beats
    c = a.connect(b)
    die(world, b)
    world.quiet()
    assert (c.state is State.OPEN and a.read(c) == RESET) or isinstance(a.failed(c), ConnectionResetError)


def restarted(world: World, **how: Any) -> tuple[Node, Node]:
    """A service in another kernel that was killed, and is there again under its name; nobody was watching."""
    former = world.attach("service", kernel=OTHER, **how)
    former.listen()
    world.quiet()
    world.kill(former)
    again = world.attach("service", kernel=OTHER, **how)
    if again.engine.peers.me.flags & lay.FLAG_LOCKED:  # else the former has the port, as far as can be known
        again.listen()
    return former, again


def found(node: Node, name: str = "service", port: int = 7000, exclude: tuple[int, ...] = ()) -> int:
    return node.call(node.engine.listeners.find, name, port, exclude=exclude).section


def test_who_is_under_the_same_kernel_tells_others_that_a_peer_is_dead(world: World) -> None:
    """To others its beat stands still, and that alone takes seconds to believe."""
    former, again = restarted(world)
    assert former.section != again.section
    claim = world.layout.section(former.section) + lay.CLAIM
    world.advance(0.7)
    assert world.word(claim) == 0
    newcomer = world.attach("newcomer")
    for _ in range(20):
        assert found(newcomer) == again.section
    world.check()


@pytest.mark.parametrize("why", ["it beats", "somebody is just claiming its section", "it cannot be locked"])
def test_nobody_is_buried_alive(world: World, why: str) -> None:
    """Two VMs of one snapshot share the boot id, and their locks are in two kernels."""
    former, again = restarted(world, locked=why != "it cannot be locked")
    at = world.layout.section(former.section)
    if why == "somebody is just claiming its section":
        world.poke(at + lay.CLAIM, 4711)
    claim = world.word(at + lay.CLAIM)
    for _ in range(20):
        if why == "it beats":
            world.poke(at + lay.BEAT, world.word(at + lay.BEAT) + 1)
        world.advance(0.1)
        assert world.word(at + lay.CLAIM) == claim
    assert again.engine.alive


def test_who_waits_for_the_silent_hears_of_another_of_its_name(world: World) -> None:
    """One who comes just now cannot know which of two namesakes lives, and nobody can tell."""
    silent, live = world.attach("service", kernel=OTHER), world.attach("service", kernel=b"a third kernel!!")
    for node in (silent, live):
        node.listen()
    world.freeze(silent)
    newcomer = world.attach("newcomer")
    conn = newcomer.connect(silent)
    other = newcomer.connect(live)
    before = world.now
    while not (told := newcomer.take("silent")):
        world.advance(0.05)
        assert world.now - before < SECOND
    assert [event.target for event in told] == [conn]
    assert newcomer.take("connected", other)
    newcomer.close(conn)
    assert found(newcomer, exclude=(silent.section,)) == live.section
    world.advance(5)
    assert not [event for event in newcomer.take("failed") if event.target is other]


def test_a_vm_that_is_back_without_its_program_is_not_waited_for_long(world: World) -> None:
    """What is left of it says that it is there; nobody who comes later has ever seen it beat."""
    gone_before = world.attach("vm-b", kernel=OTHER)
    gone_before.listen()
    world.quiet()
    world.freeze(gone_before)
    newcomer = world.attach("newcomer")
    conn = newcomer.connect(gone_before)
    before = world.now
    while not newcomer.events:
        world.advance(0.05)
    error = newcomer.failed(conn)
    assert isinstance(error, ConnectionRefusedError)
    assert "has not shown a sign of life" in str(error)
    assert world.now - before < 1.5 * SECOND
    world.check()


def test_who_is_silent_alone_is_waited_for(world: World) -> None:
    silent = world.attach("service", kernel=OTHER)
    silent.listen()
    world.quiet()
    newcomer = world.attach("newcomer")
    world.advance(0.3)  # it beats
    conn = newcomer.connect(silent)
    world.stop(silent)
    world.advance(2.0)
    assert not newcomer.take("silent")
    world.resume(silent)
    world.quiet()
    assert newcomer.take("connected", conn)


def test_who_was_stopped_is_found_again_with_its_first_beat(world: World) -> None:
    a, b = world.pair()
    b.listen()
    world.stop(b)
    world.advance(6.0)
    with pytest.raises(socket.gaierror):
        found(a, "b")
    world.resume(b)
    world._beat(b)
    world.drain()
    assert found(a, "b") == b.section


def test_the_killed_are_not_named(world: World) -> None:
    a, b = world.pair()
    world.kill(b)
    world.drain()
    with pytest.raises(socket.gaierror, match="this process is alone") as info:
        found(a, "b")
    assert "did you mean" not in str(info.value)
