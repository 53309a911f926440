"""Who has a port, and who is found under a name."""

from __future__ import annotations

import errno

import pytest

from shmsock.engine import layout as lay
from shmsock.engine import listeners
from shmsock.engine.connection import Connection, State
from shmsock.engine.layout import LISTENERS
from tests.engine.world import MS, Node, World


def sections(node: Node, name: str | None, port: int, exclude: tuple[int, ...] = ()) -> list[int]:
    found, _ = node.call(node.engine.listeners.elsewhere, name, port, exclude=exclude)
    return [p.section for p in found]


def test_a_port_belongs_to_one_process_of_a_name(world: World) -> None:
    a = world.attach("host")
    b = world.attach("host")
    c = world.attach("other")
    listener = a.listen(80)
    world.drain()
    for node in (a, b):
        with pytest.raises(OSError, match="in use") as info:
            node.listen(80)
        assert info.value.errno == errno.EADDRINUSE
    c.listen(80)
    world.drain()
    assert sections(c, "host", 80) == [a.section]
    a.call(listener.close)
    world.drain()
    b.listen(80)
    world.drain()
    assert sections(c, "host", 80) == [b.section]


def test_a_dead_process_has_no_port(world: World) -> None:
    a = world.attach("host")
    a.listen(80)
    b = world.attach("host")
    world.quiet()
    world.kill(a)
    world.drain()
    world.advance(0.2)
    b.listen(80)


def test_reuse_port(world: World) -> None:
    a = world.attach("host")
    b = world.attach("host")
    c = world.attach("other")
    world.quiet()
    first = a.listen(80, reuse_port=True)
    second = a.listen(80, reuse_port=True)
    world.drain()
    b.listen(80, reuse_port=True)
    world.drain()
    with pytest.raises(OSError):
        b.listen(80)
    assert sections(c, "host", 80) == [a.section, b.section]
    assert sections(c, "host", 80, exclude=(a.section,)) == [b.section]
    for _ in range(4):
        c.connect(a, 80)
    world.quiet()
    assert (first.pending, second.pending) == (2, 2)


def test_those_who_share_a_port_take_turns(world: World) -> None:
    names = ["host", "host", "host", "client"]
    *servers, client = (world.attach(name) for name in names)
    world.quiet()
    for server in servers:
        for port in (80, 81):
            server.listen(port, reuse_port=True)
            world.drain()

    def find(port: int, *exclude: int) -> int:
        return client.call(client.engine.listeners.find, "host", port, exclude=exclude).section

    turns = [(find(80), find(81)) for _ in range(6)]  # of each port apart
    for port in (0, 1):
        asked = [turn[port] for turn in turns]
        assert asked[:3] == asked[3:]
        assert set(asked) == {s.section for s in servers}
    first = find(80)
    assert find(80, first) == turns[1][0]  # one that refused is passed over, and its turn comes again
    assert {find(80) for _ in range(3)} == {s.section for s in servers}
    client.call(client.engine.listeners.find, "host", 81, takes_turn=False)
    assert find(81) == turns[0][1]


def test_of_listeners_that_share_a_port_a_full_one_is_passed_over(world: World) -> None:
    a, b = world.pair()
    first, second = (b.listen(80, reuse_port=True, backlog=n) for n in (1, 9))
    conns = [a.connect(b, 80) for _ in range(6)]
    world.quiet()
    assert (first.pending, second.pending) == (1, 5)
    assert {conn.state for conn in conns} == {State.OPEN}


def test_reuse_needs_both(world: World) -> None:
    a = world.attach("host")
    b = world.attach("host")
    world.quiet()
    a.listen(80)
    world.drain()
    with pytest.raises(OSError):
        b.listen(80, reuse_port=True)


def test_ephemeral_ports_differ(world: World) -> None:
    a, b = world.attach("host"), world.attach("host")
    world.quiet()
    ports = [n.listen(0).port for n in (a, b) for _ in range(20)]
    assert len(set(ports)) == 40
    assert all(32768 <= p < 65536 for p in ports)


def test_ports_are_not_shared_any_more_once_others_are_unused() -> None:
    world = World(peers=1)
    a = world.attach("a")
    a.engine.listeners._slice = range(40000, 40004)

    def connect() -> Connection:
        local = ("a", a.engine.listeners.ephemeral())
        return a.call(a.engine.connect, a.section, 80, local=local, remote="a")

    made = [connect() for _ in range(5)]  # one more than there are
    kept = made.pop(1)
    for conn in made:
        a.close(conn)
    assert {connect().local[1] for _ in range(3)} == set(range(40000, 40004)) - {kept.local[1]}


def test_local_listeners(world: World) -> None:
    a = world.attach("host")
    b = world.attach("neighbour")
    far = world.attach("far", kernel=b"kernel-of-host-B")
    world.quiet()
    a.listen(80, local_only=True)
    world.drain()
    assert sections(b, "host", 80) == [a.section]
    assert sections(b, None, 80) == [a.section]
    assert sections(far, "host", 80) == []
    near, away = b.connect(a, 80), far.connect(a, 80)
    world.quiet()
    assert near.state is State.OPEN
    assert isinstance(far.failed(away), ConnectionRefusedError)


def test_a_local_backlog_keeps_no_place_for_who_was_killed(world: World) -> None:
    """Its lock has fallen, so nothing proves that it is of this machine: what it asked for is ended."""
    a = world.attach("host")
    listener = a.listen(80, local_only=True, backlog=1)
    b = world.attach("neighbour")
    world.quiet()
    b.connect(a, 80)
    world.drain()
    world.kill(b)
    world.quiet()
    assert not [event for event in a.events if event.kind == "accepted"]
    assert listener.pending == 0
    c = world.attach("other")
    world.quiet()
    conn = c.connect(a, 80)
    world.quiet()
    assert conn.state is State.OPEN


def test_who_was_found_is_found_again_only_as_long_as_it_has_the_port(world: World) -> None:
    a, b, c = (world.attach(name) for name in ("a", "host", "host"))
    world.quiet()

    def found() -> int:
        world.drain()
        return a.call(a.engine.listeners.find, "host", 80).section

    listener = b.listen(80)
    assert [found(), found()] == [b.section] * 2
    b.call(listener.close)
    world.drain()
    c.listen(80)
    assert [found(), found()] == [c.section] * 2
    world.kill(c)  # its lock tells, before any beat
    with pytest.raises(ConnectionRefusedError):
        found()
    world.drain()
    b.listen(80, reuse_port=True)
    assert [found(), found()] == [b.section] * 2
    d = world.attach("host")
    world.quiet()
    d.listen(80, reuse_port=True)
    assert {found() for _ in range(40)} == {b.section, d.section}


def test_who_was_found_is_not_asked_while_its_beat_stands_and_a_namesake_is_there() -> None:
    world = World()
    a = world.attach("a")
    b = world.attach("host", kernel=b"kernel-of-host-B")  # of its lock nobody else is told
    world.quiet()
    b.listen(80)
    world.drain()
    assert a.call(a.engine.listeners.find, "host", 80).section == b.section
    world.kill(b)
    c = world.attach("host", kernel=b"kernel-of-host-C")
    c.listen(80)
    world.advance(1.5)
    assert a.peer(b).live  # as far as is known
    assert {a.call(a.engine.listeners.find, "host", 80).section for _ in range(9)} == {c.section}


def test_who_was_found_is_known_while_its_beat_is_merely_not_due() -> None:
    """Samples may follow each other faster than beats: one that finds nothing new says nothing yet."""
    world = World()
    a = world.attach("a")
    b = world.attach("host", kernel=b"kernel-of-host-B")
    world.quiet()
    b.listen(80)
    world.drain()
    a.call(a.engine.listeners.find, "host", 80)
    world.kill(b)
    known = {}
    while a.peer(b).samples < 4:
        world.advance(0.01)
        known[a.peer(b).samples] = a.engine.listeners.known("host", 80) is not None
    assert known == {0: True, 1: True, 2: True, 3: False, 4: False}


def test_names(world: World) -> None:
    a, b = world.pair()
    found, known = a.call(a.engine.listeners.elsewhere, "b", 80)
    assert (found, known) == ([], True)
    assert a.call(a.engine.listeners.elsewhere, "nobody", 80) == ([], False)
    assert set(a.engine.peers.names()) == {"a", "b"}
    a.listen(80)
    assert sections(a, "a", 80) == [a.section]
    world.leave(b)
    world.drain()
    assert a.call(a.engine.listeners.elsewhere, "b", 80) == ([], False)


def test_what_is_suggested_when_nobody_is_found(world: World) -> None:
    a, b = world.pair()
    unknown, refused = a.engine.listeners.unknown, a.engine.listeners.refused
    assert "(attached: b)" in str(a.call(unknown, "c"))  # not the own name
    assert f"(attached: {b.section})" in str(a.call(unknown, 63))
    assert "alone" not in str(a.call(refused, "b", 80))
    world.kill(b)
    assert a.call(lambda: set(a.engine.peers.names())) == {"a"}  # proven by its lock, before its beat tells
    a.engine.home.url, a.engine.home.hint = "file:/r", lambda: "that is why"
    for error in (a.call(unknown, "b"), a.call(unknown, b.section), a.call(refused, "a", 80)):
        assert "(this process is alone on file:/r)" in str(error)
        assert str(error).endswith("; that is why")
        assert "did you mean" not in str(error)


def test_a_table_full_of_listeners() -> None:
    world = World(peers=1)
    a = world.attach("a")
    for port in range(1, LISTENERS + 1):
        a.listen(port)
    with pytest.raises(OSError, match="listener entries") as info:
        a.listen(LISTENERS + 1)
    assert info.value.errno == errno.ENOBUFS
    a.call(next(iter(a.engine.listeners)).close)
    a.listen(LISTENERS + 1)
    world.check()


@pytest.mark.parametrize("how", ["lazy", "eager"])
def test_two_listen_at_every_moment_of_each_other(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Of two of one name that want a port, never both get it; and one does, when the other is not stuck."""
    monkeypatch.setattr(listeners, "PATIENCE", 5)
    winners, errors = set(), set()
    for order in (0, 1):
        for step in range(1, 200):
            world = World(how, step, peers=2, size=400 << 10)
            nodes = world.attach("host"), world.attach("host")
            world.quiet()
            first, second = nodes[order], nodes[1 - order]
            got: list[Node] = []

            def listen(node: Node, got: list[Node] = got) -> None:
                try:
                    node.listen(80)
                    got.append(node)
                except OSError as error:
                    errors.add(error.errno)

            def meanwhile(world: World = world, second: Node = second) -> None:
                world.jitter()
                listen(second)

            hook = world.ffi.callback("void(void)", meanwhile)
            world.lib.sh_fake_hook(hook, step)
            listen(first)
            world.lib.sh_fake_hook(world.ffi.NULL, 0)
            world.drain()
            assert len(got) <= 1, (order, step)
            entries = [world.word(world.layout.section(n.section) + lay.LISTENER) for n in nodes]
            assert sum(bool(e) for e in entries) == len(got)
            if got:
                winners.add(nodes.index(got[0]))
            world.check()
    assert winners == {0, 1}
    assert errors == {errno.EADDRINUSE}


def lie(world: World, liar: Node, ports: list[int], flags: int) -> None:
    """Entries that no honest peer leaves as they are."""
    at = world.layout.section(liar.section)
    for index, port in enumerate(ports):
        world.poke(at + lay.LISTENER + 8 * index, port | flags << 16)
    world.poke(at + lay.N_LISTENERS, len(ports))


@pytest.mark.parametrize("datagram", [False, True])
@pytest.mark.parametrize("listeners_word", [LISTENERS, (1 << 64) - 1])
def test_who_stays_tentative_for_ever_delays_nobody_for_long(datagram: bool, listeners_word: int) -> None:
    world = World(peers=16)
    honest, liar = world.attach("host"), world.attach("host")
    world.quiet()
    flags = listeners.USED | listeners.TENTATIVE | datagram * listeners.DATAGRAM
    first = honest.engine.listeners.ephemeral(datagram)
    lie(world, liar, [80, *range(first + 1, first + LISTENERS)], flags)
    world.poke(world.layout.section(liar.section) + lay.N_LISTENERS, listeners_word)
    clock = Clock(world)
    with clock, pytest.raises(OSError, match="already in use") as info:
        honest.call(honest.engine.listeners.open, 80, 1, False, False, datagram)
    assert info.value.errno == errno.EADDRINUSE
    assert clock.passed < 10 * MS
    with clock:
        for _ in range(3):
            made = honest.call(honest.engine.listeners.open, 0, 1, False, False, datagram)
            assert made.port not in range(first + 1, first + LISTENERS)
    assert clock.passed < 10 * MS
    world.check()


class Clock:
    """Time that passes with each access of shared memory: 50 ns."""

    def __init__(self, world: World) -> None:
        self.world, self.passed = world, 0
        self.tick = world.ffi.callback("void(void)", self._tick)

    def _tick(self) -> None:
        self.passed += 50
        self.world.lib.sh_fake_time(self.world.now + self.passed)
        self.world.lib.sh_fake_hook(self.tick, 1)

    def __enter__(self) -> None:
        self.passed = 0
        self.world.lib.sh_fake_hook(self.tick, 1)

    def __exit__(self, *_: object) -> None:
        self.world.lib.sh_fake_hook(self.world.ffi.NULL, 0)
