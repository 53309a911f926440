"""A spin whose processor does not come back soon learns it: it offers it no more for a while, and naps."""

from __future__ import annotations

import pytest

from shmsock.engine.connection import EMPTY, Connection
from tests.engine.world import Node, World

LONG, SHORT = 1_000_000, 50_000  # ns that a yield takes: beside a hog, and beside a peer that answers


@pytest.fixture
def world() -> World:
    return World("eager", 0, peers=3, size=4 << 20)


def by_futexes(world: World, *nodes: Node) -> None:
    """Have them wake each other by futexes, and offer their processor at the first step of a spin."""
    lib = world.lib
    for node in nodes:
        nd = node.engine.nd
        node.call(lib.sh_node_settings, nd, 500_000, 200_000, 0)
        for other in nodes:
            if other is not node:
                node.call(lib.sh_set_wake_in, nd, other.engine.section, lib.SH_WAKE_IN_FUTEX, 1)
                node.call(lib.sh_set_wake_out, nd, other.engine.section, lib.SH_WAKE_OUT_FUTEX, -1, 0, 0)


def spin(world: World, node: Node, conn: Connection) -> tuple[int, int]:
    """A read that waits in vain: how often it offered its processor, and how often it napped."""
    lib, before = world.lib, node.statistic("naps")
    lib.sh_fake_yields(LONG)
    node.call(lib.sh_turn, node.engine.nd)
    assert node.read_or_arm(conn, 100, how=lib.SH_MAY_SPIN) == EMPTY
    return lib.sh_fake_yields(LONG), node.statistic("naps") - before


def test_it_is_offered_again_256_times_as_long_later(world: World) -> None:
    a, b = world.attach("a"), world.attach("b")
    b.listen()
    conn, _ = world.open(a, b)
    by_futexes(world, a, b)
    assert spin(world, a, conn) == (1, 0)
    for _ in range(2):
        assert spin(world, a, conn) == (1, 0)
        for _ in range(10):
            assert spin(world, a, conn) == (0, 1)
        world.advance(0.255)
        assert spin(world, a, conn) == (0, 1)
        world.advance(0.002)


def test_once_proves_nothing(world: World) -> None:
    """Who has something to do now and then is no hog."""
    a, b = world.attach("a"), world.attach("b")
    b.listen()
    conn, _ = world.open(a, b)
    by_futexes(world, a, b)
    for _ in range(5):
        assert spin(world, a, conn) == (1, 0)
        world.advance(0.512)


def test_a_peer_that_answers_within_a_tenth_of_a_millisecond_is_no_hog(world: World) -> None:
    a, b = world.attach("a"), world.attach("b")
    b.listen()
    conn, _ = world.open(a, b)
    by_futexes(world, a, b)
    lib = world.lib
    for _ in range(10):
        lib.sh_fake_yields(SHORT)
        a.call(lib.sh_turn, a.engine.nd)
        assert a.read_or_arm(conn, 100, how=lib.SH_MAY_SPIN) == EMPTY
        assert lib.sh_fake_yields(SHORT) > 0
    assert a.statistic("naps") == 0


def test_nobody_naps_while_all_others_sleep(world: World) -> None:
    """They would say nothing by themselves; the nap would last until its end."""
    a, b = world.attach("a"), world.attach("b")
    b.listen()
    conn, _ = world.open(a, b)
    by_futexes(world, a, b)
    for _ in range(2):
        spin(world, a, conn)
    assert b.call(world.lib.sh_sleep, b.engine.nd)
    assert spin(world, a, conn) == (0, 0)
    b.pump()
    assert spin(world, a, conn) == (0, 1)


def test_nobody_naps_whom_a_peer_wakes_otherwise(world: World) -> None:
    """A doorbell wakes the loop, which does not wait for it. So the processor is offered, as ever."""
    a, b = world.attach("a"), world.attach("b")
    b.listen()
    conn, _ = world.open(a, b)
    by_futexes(world, a, b)
    lib = world.lib
    a.call(lib.sh_set_wake_in, a.engine.nd, b.engine.section, lib.SH_WAKE_IN_DOORBELL, 1)
    for _ in range(3):
        assert spin(world, a, conn) == (1, 0)
