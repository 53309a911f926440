"""Rings that grow: no byte is lost or comes twice, whenever it is that the other side looks; what was
outgrown comes back; and a peer that says of its ring what cannot be ends its own connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from shmsock.engine.connection import CLOSED, EMPTY, EOF, RESET, Connection, State
from shmsock.engine.settings import Settings
from shmsock.errors import ProtocolViolation
from tests.engine.conftest import TEMPERS
from tests.engine.test_hostile import RING, P, slot
from tests.engine.world import SETTINGS, Node, World, send

LARGE = replace(SETTINGS, ring_bytes=1 << 18, first_ring_bytes=4096)
EPOCH = 1 << 36
HELD = 1 << 16
"""What a few small writes beyond the first ring lead to."""


@pytest.fixture(params=TEMPERS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One with room for such rings."""
    how, _, seed = request.param.partition("-")
    made = roomy(how, int(seed))
    yield made
    made.check()


def roomy(how: str = "eager", seed: int = 0) -> World:
    return World(how, seed, peers=2, size=16 << 20)


def free(node: Node) -> int:
    return node.statistic("arena_free_bytes")


def opened(world: World, settings: Settings = LARGE) -> tuple[Node, Connection, Node, Connection]:
    a, b = world.attach("a", settings=settings), world.attach("b", settings=settings)
    world.quiet()
    c, s = world.open(a, b)
    return a, c, b, s


def test_an_idle_connection_takes_little(world: World) -> None:
    a, b = world.attach("a", settings=Settings()), world.attach("b", settings=Settings())
    world.quiet()
    before = free(a), free(b)
    world.open(a, b)
    assert (before[0] - free(a), before[1] - free(b)) == (512, 512)


@pytest.mark.parametrize("from_opener", [True, False])
def test_a_first_write_that_is_large_goes_in_at_once(world: World, from_opener: bool) -> None:
    a, c, b, s = opened(world)
    node, conn, to, end = (a, c, b, s) if from_opener else (b, s, a, c)
    data = world.rng.randbytes(150_000)
    assert node.write(conn, data) == len(data)
    assert conn.ring[1] == 1 << 18
    assert to.read_all(end) == (data, EMPTY) or world.how != "eager"
    world.quiet()
    assert node.write(conn, b"more") == 4


def test_unread_bytes_move_and_each_ring_may_grow_before_anybody_looked(world: World) -> None:
    a, c, b, s = opened(world)
    data = world.rng.randbytes(1 << 18)
    sizes = []
    for at in range(0, len(data), 4000):
        assert a.write(c, data[at : at + 4000]) == len(data[at : at + 4000])
        sizes.append(c.ring[1])
    assert sorted(set(sizes)) == [4096, HELD, 1 << 18]
    assert a.write(c, b"x") == 0
    world.quiet()
    assert b.read_all(s) == (data, EMPTY)


def test_the_accepter_grows_before_the_opener_has_seen_it() -> None:
    world = roomy()
    a, b = world.attach("a", settings=LARGE), world.attach("b", settings=LARGE)
    world.quiet()
    listener = b.listen()
    c = a.connect(b)
    b.pump()
    s = b.accepted(listener)
    data = world.rng.randbytes(70_000)
    for at in range(0, len(data), 3500):
        assert b.write(s, data[at : at + 3500]) == 3500
    assert s.ring[1] == 1 << 18
    world.quiet()
    assert a.read_all(c) == (data, EMPTY)
    assert world.lib.sh_fake_rx_bytes(c.ep) == 1 << 18
    assert send(world, b, s, data * 5, a, c) == data * 5
    world.check()


@pytest.mark.parametrize("first", [4096, 8192, 1 << 14, 1 << 16])
def test_bytes_across_growth(world: World, first: int) -> None:
    """At every offset, in pieces of every size, with readers that take some now and then."""
    settings = Settings(ring_bytes=1 << 16, first_ring_bytes=first)
    a, c, b, s = opened(world, settings)
    rng, sent, got = world.rng, bytearray(), bytearray()
    for _ in range(60):
        piece = rng.randbytes(rng.choice((1, 7, 1000, 4096, 5000, 20000)))
        taken = a.write(c, piece)
        assert taken >= 0
        sent += piece[:taken]
        if rng.random() < 0.6:
            found = b.read(s, rng.choice((1, 100, 4096, 1 << 20)))
            got += found if isinstance(found, bytes) else b""
        if rng.random() < 0.3:
            world.pump_all()
    a.finish(c)
    world.quiet()
    rest, status = b.read_all(s)
    assert (got + rest, status) == (sent, EOF)
    assert c.ring[1] == 1 << 16


def test_never_where_it_may_not() -> None:
    world = roomy()
    a, c, b, s = opened(world, replace(LARGE, first_ring_bytes=LARGE.ring_bytes))
    assert c.ring[1] == s.ring[1] == 1 << 18
    assert a.write(c, bytes(1 << 19)) == 1 << 18
    assert c.outgrown == ()
    b.read_all(s)
    world.check()


@pytest.mark.parametrize("name", ["ring_bytes", "first_ring_bytes"])
@pytest.mark.parametrize("wrong", [0, 256, 5000, 1 << 31])
def test_sizes_that_cannot_be(name: str, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {wrong}, expected a power of two"):
        Settings(**{name: wrong})  # type: ignore[arg-type]


# -- memory


def test_what_was_outgrown_comes_back_when_the_reader_is_past_it(world: World) -> None:
    a, c, b, s = opened(world)
    before = free(a) + 4096
    for _ in range(5):
        a.write(c, bytes(1000))
    assert (c.ring[1], c.outgrown[0][1]) == (HELD, 4096)
    assert before - free(a) == HELD + 4096
    world.advance(1.2)
    assert before - free(a) == HELD + 4096  # its reader may be in the middle of it
    world.quiet()
    b.read(s, 4000)
    world.advance(1.2)
    assert before - free(a) == HELD + 4096
    b.read(s, 1)
    world.advance(1.2)
    assert before - free(a) == HELD


def starved(world: World) -> tuple[Node, Connection, Node, Connection, list[tuple[int, int]]]:
    """All but what the free slots have a claim to is taken."""
    a, c, b, s = opened(world)
    slots, claims = a.engine.slots, 512 * a.engine.slots.free_slots
    taken = []
    while slots.free_bytes > claims:
        block = a.take_memory(512)
        assert block is not None
        taken.append(block)
    return a, c, b, s, taken


def test_without_memory_it_goes_on_as_it_is_and_grows_when_there_is_some(world: World) -> None:
    a, c, b, s, taken = starved(world)
    data = world.rng.randbytes(50_000)
    assert a.write(c, data) == 4096
    assert b.read_all(s)[0] == data[:4096] or world.how != "eager"
    world.quiet()
    b.read_all(s)
    assert send(world, a, c, data, b, s) == data
    assert (c.ring[1], c.outgrown) == (4096, ())
    world.quiet()
    b.read_all(s)
    for block in taken:
        a.give_memory(block)
    world.advance(1.2)
    assert send(world, a, c, data, b, s) == data
    assert c.ring[1] > 4096


def test_a_full_disk_is_no_error_either() -> None:
    world = roomy()
    a, c, b, s = opened(world)

    with open(os.devnull) as full:  # it takes no storage
        world.lib.sh_storage(a.engine.nd, full.fileno(), 1)
        before, data = free(a), world.rng.randbytes(20_000)
        assert send(world, a, c, data, b, s) == data
        assert (c.ring[1], free(a)) == (4096, before)
    world.lib.sh_storage(a.engine.nd, -1, 0)
    world.check()


def test_one_that_holds_much_leaves_an_eighth_of_the_arena() -> None:
    """And smallest rings for all that may be opened; one that holds little goes on in what was left."""
    world = World(peers=3, size=3 << 20)
    settings = replace(LARGE, ring_bytes=1 << 14, first_ring_bytes=512)
    a, b, c = (world.attach(name, settings=settings) for name in "abc")
    world.quiet()
    listener, layout = b.listen(), b.engine.layout
    ends = [world.open(a, b)[1] for _ in range(layout.slots * 7 // 8)]
    assert (a.engine.slots.free_slots, b.engine.slots.free_slots) == (layout.slots // 8,) * 2
    for end in ends:
        b.write(end, bytes(1 << 14))
    claims = 512 * b.engine.slots.free_slots
    assert ends[0].ring[1] > 512
    assert free(b) - claims >= layout.arena_bytes // 8
    held = sum(e.ring[1] + sum(n for _, n in e.outgrown) for e in ends)
    assert b.held_by(a.section) == (len(ends), held)
    assert b.call(world.lib.sh_ep_new, b.engine.nd, a.section, 1, 0) == world.lib.SH_NO_SLOTS
    _, s = world.open(c, b)
    b.write(s, bytes(1 << 14))
    assert s.ring[1] > 512
    listener.close()
    world.check()


@pytest.mark.parametrize("end", ["close", "abort", "finish", "release", "kill", "leave", "peer"])
def test_an_end_at_any_time_leaks_nothing(world: World, end: str) -> None:
    """(The fixture looks for it.)"""
    a, c, b, s = opened(world)
    data = world.rng.randbytes(9000)
    for at in range(0, 9000, 3000):
        a.write(c, data[at : at + 3000])
    b.write(s, bytes(40_000))
    assert c.outgrown
    if end == "kill":
        world.kill(a)
    elif end == "leave":
        world.leave(a)
    elif end == "peer":
        world.kill(b)
        world.advance(0.3)
        assert a.write(c, b"x") == CLOSED
        return
    else:
        a.call(getattr(c, end))
    world.advance(0.3)
    if end in ("close", "finish", "kill", "leave"):
        assert b.read_all(s)[0] == data


def test_a_writer_that_dies_while_it_grows() -> None:
    """Wherever it was: what had been published is there."""
    steps = 1
    while True:
        world = World("lazy", steps, peers=3, size=3 << 20)
        a, c, b, s = opened(world)
        first = world.rng.randbytes(4000)
        a.write(c, first)
        world.quiet()
        second = world.rng.randbytes(4000)
        died = world.run_and_die(a, steps, partial(a.write, c, second))
        world.drain()
        world.advance(0.3)
        found, status = b.read_all(s)
        assert found == first or found == first + second
        assert died == (status == RESET)
        world.check()
        if not died:
            assert c.ring[1] == HELD
            return
        steps += 1


# -- what peers may say


def grown(world: World) -> tuple[Node, Connection, Node, Connection]:
    """a's ring has grown, and b has not looked yet."""
    a, c, b, s = opened(world)
    world.meanwhile = lambda node: None  # or it does
    for _ in range(5):
        a.write(c, bytes(1000))
    world.drain()
    assert c.ring[1] == HELD
    return a, c, b, s


def descriptor(gen: int, epoch: int, log2_bytes: int, unit: int) -> int:
    return gen << 40 | epoch << 36 | log2_bytes << 30 | unit


@pytest.mark.parametrize(
    ("generation", "epoch", "log2_bytes", "unit"),
    [
        (0, 1, 12, None),  # as small as before
        (0, 1, 8, None),
        (0, 1, 31, None),
        (0, 1, 63, None),
        (0, 1, 16, 0),  # words of the section
        (0, 1, 16, 0x3FFFFFFF),
        (0, 1, 30, None),
        (0, 0, 16, None),  # an epoch before the one that P names
        (1, 1, 16, None),  # another generation's
    ],
)
def test_an_impossible_larger_ring_is_never_read(
    world: World, generation: int, epoch: int, log2_bytes: int, unit: int | None
) -> None:
    _, c, b, s = grown(world)
    word = descriptor(c.gen + generation, epoch, log2_bytes, c.ring[0] // 512 if unit is None else unit)
    world.poke(slot(world, c) + RING, word)
    assert b.read(s) == RESET
    assert isinstance(s.error, ProtocolViolation)
    assert b.statistic("violations") == 1
    assert world.lib.sh_fake_rx_bytes(s.ep) == 4096


@pytest.mark.parametrize("step", [1, 2, 7, 8, 14, 15])
def test_an_epoch_that_no_ring_belongs_to(world: World, step: int) -> None:
    a, c, b, s = opened(world)
    a.write(c, b"hello")
    world.quiet()
    assert b.read(s) == b"hello"
    for _ in range(5):
        a.write(c, bytes(1000))
    world.quiet()
    assert len(b.read_all(s)[0]) == 5000
    at = slot(world, c) + P
    word = world.word(at)
    world.poke(at, (word & ~(15 * EPOCH)) | ((word // EPOCH + step) & 15) * EPOCH)
    assert b.read(s) == RESET
    assert isinstance(s.error, ProtocolViolation)


def test_a_ring_that_goes_on_growing_holds_nobody_up() -> None:
    """A descriptor and an epoch that run ahead, with ever more bytes: it ends with the sizes there are."""
    world = World(peers=2, size=64 << 20)
    a, b = world.pair()
    c, s = world.open(a, b)
    unit, looks = world.layout.arena_off // 512, 0
    for epoch in range(1, 40):
        log2_bytes = 9 + epoch
        world.poke(slot(world, c) + RING, descriptor(c.gen, epoch & 15, log2_bytes, unit))
        world.poke(slot(world, c) + P, c.gen << 40 | (epoch & 15) << 36 | epoch)
        if b.read(s) == RESET:
            break
        looks += 1
    assert 10 <= looks <= 21
    assert isinstance(s.error, ProtocolViolation)
    assert s.state is not State.OPEN
