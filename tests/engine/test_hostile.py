"""What a broken or hostile peer can do to us: end its own connections, or its link. Nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shmsock.engine.connection import RESET, VIOLATION, Connection, State
from shmsock.errors import ProtocolViolation
from tests.engine.world import Node, World, send

ROOT = Path(__file__).resolve().parents[2]
RING, P, C = 0x08, 0x40, 0x80


def slot(world: World, conn: Connection) -> int:
    layout = world.layout
    return layout.section(conn.home.section) + int(layout.geometry.slot_off) + 192 * conn.slot


def scribbler(*args: int, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.engine.scribbler", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_garbage_anywhere_at_any_time() -> None:
    scribbler(0, 12, 300)


def test_garbage_under_the_sanitizers() -> None:
    """No access out of bounds of what C owns, nothing undefined."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        asked = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(asked.stdout.strip())
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("this gcc has no sanitizers")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
    # Compiled first, by a compiler that runs without them: under them it takes twice as long.
    scribbler(1000, 1001, 0, CFLAGS=flags, ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0")
    scribbler(1000, 1002, 200, CFLAGS=flags, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")


def tail_beyond_the_ring(w: int) -> int:
    return w + (1 << 14) + 1


def tail_back(w: int) -> int:
    return w - 1


def epoch(w: int) -> int:
    return w + (1 << 36)


@pytest.mark.parametrize("wrong", [tail_beyond_the_ring, tail_back, epoch])
@pytest.mark.parametrize("found_by", ["pump", "read"])
def test_an_impossible_p_resets_the_connection(
    world: World, wrong: Callable[[int], int], found_by: str
) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"hello")
    world.quiet()
    assert b.read(s, 4) == b"hell"
    world.quiet()
    world.poke(slot(world, c) + P, wrong(world.word(slot(world, c) + P)))
    if found_by == "pump":
        world.advance(1.2)  # nobody rang: it is the slow look that sees it
    else:
        while isinstance(b.read(s), bytes):
            pass
    assert b.read(s) == RESET
    assert isinstance(s.error, ProtocolViolation)
    assert "'a' (section 0) broke the protocol" in str(s.error)
    assert b.statistic("violations") == 1
    world.poke(slot(world, c) + P, world.word(slot(world, c) + P) & ~(0xF << 36))
    world.quiet()
    assert s.state is not State.OPEN


def test_fin_is_final(world: World) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"end")
    a.finish(c)
    world.quiet()
    world.poke(slot(world, c) + P, world.word(slot(world, c) + P) + 5)
    world.advance(1.2)
    assert isinstance(s.error, ProtocolViolation)


@pytest.mark.parametrize("step", [-1, 1 << 20, 1 << 31])
def test_an_impossible_head(world: World, step: int) -> None:
    a, b = world.pair()
    c, s = world.open(a, b)
    send(world, a, c, bytes(1000), b, s)
    world.drain()
    assert a.call(world.lib.sh_ep_unsent, c.ep) == 0  # sees the head as it is
    a.write(c, bytes(1 << 20))
    at = slot(world, s) + C
    world.poke(at, world.word(at) + step)
    assert a.write(c, b"x" * 10) == VIOLATION
    assert a.read(c) == RESET
    assert isinstance(c.error, ProtocolViolation)


@pytest.mark.parametrize(
    "ring",
    [
        11 << 30 | 4000,
        31 << 30 | 4000,
        14 << 30,
        14 << 30 | 0x3FFFFFFF,
        63 << 30 | 1,
        1 << 36 | 14 << 30 | 20,
    ],
)
def test_an_impossible_ring_descriptor_is_never_mapped(world: World, ring: int) -> None:
    a, b = world.pair()
    b.listen()
    c = a.connect(b)
    world.drain()
    if b.connections:  # a nested world was faster
        return
    world.poke(slot(world, c) + RING, c.gen << 40 | ring)
    world.quiet()
    assert c.state is State.FREE or world.how == "nested"
    assert b.statistic("violations") == (0 if b.connections else 1)


def break_the_link(world: World, a: Node, b: Node) -> None:
    """a's message ring says what cannot be."""
    at = world.layout.pair(a.section, b.section) + 0x40
    world.poke(at, world.word(at) + 1000)
    world.poke(at - 0x40, world.word(at - 0x40) + 1)
    world.advance(0.2)


def test_a_broken_link_is_dropped_ignored_for_a_while_and_healed(world: World) -> None:
    a, b = world.pair()
    other = world.attach("other")
    c, s = world.open(a, b)
    d, t = world.open(other, b)
    world.quiet()
    for seconds in (1, 2, 4):
        break_the_link(world, a, b)
        assert b.read(s) == RESET
        with pytest.raises(ProtocolViolation, match="not listened to"):
            b.connect(a)
        tried = a.connect(b)
        world.advance(seconds - 0.5)
        assert {tried.state} == {State.OPENING}  # not listened to
        assert send(world, other, d, b"nothing to me", b, t) == b"nothing to me"
        world.advance(0.6)
        world.quiet()
        assert tried.state is State.OPEN
        b.accepted()
        c, s = world.open(a, b)
        assert send(world, a, c, b"again", b, s) == b"again"
    assert b.statistic("violations") == 3


def test_three_bad_slots_cost_the_link(world: World) -> None:
    """And all other connections with that peer; those with others stay."""
    a, b = world.pair()
    conns = [world.open(a, b) for _ in range(5)]
    for c, _ in conns[:3]:
        world.poke(slot(world, c) + P, world.word(slot(world, c) + P) + (1 << 20))
    world.advance(1.2)
    assert [isinstance(s.error, ProtocolViolation) for _, s in conns] == [True] * 3 + [False] * 2
    assert [b.read(s) for _, s in conns] == [RESET] * 5


def test_hundreds_of_bad_slots_at_once() -> None:
    """One violation leads to a drop, which looks at the others, which are bad too: no recursion, no storm."""
    world = World(size=64 << 20, peers=2)
    assert world.layout.slots >= 2048
    a, b = world.pair()
    b.listen(backlog=5000)
    conns = [a.connect(b) for _ in range(1000)]
    world.quiet()
    for c in conns:
        world.poke(slot(world, c) + P, world.word(slot(world, c) + P) + (1 << 30))
    world.advance(1.2)
    assert all(b.read(e.arg) == RESET for e in b.take("accepted"))
    assert not b.connections
    world.advance(2)
    world.open(a, b, 7001)
    world.check()


def test_own_section_scribbled() -> None:
    """The own words are written from private copies and never read back."""
    world = World()
    a, b = world.pair()
    c, s = world.open(a, b)
    at = world.layout.section(a.section)
    g = world.layout.geometry
    for offset in range(at + int(g.pair_off), at + int(g.slot_off) + 192 * 4, 8):
        world.poke(offset, world.rng.getrandbits(64))
    for _ in range(20):
        a.write(c, b"x")
        a.read(c)
        world.advance(0.1)
        b.read(s)
    world.advance(5)
    assert a.engine.alive
    assert b.engine.alive
    for node in (a, b):
        for conn in node.connections:
            node.abort(conn)
    world.advance(8)
    world.quiet()
    d, t = world.open(a, b, 7001)
    assert send(world, a, d, b"well again", b, t) == b"well again"
