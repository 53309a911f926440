"""After a pass the pump polls on, or lets the loop sleep: by who spoke after whom lately."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from shmsock.engine.connection import EMPTY, EOF, YIELD, Connection
from tests.engine.world import Node, World

TIMES = 8


class Turns:
    """Node `a` and what it makes of a peer's news. `hot`: whether its pump polled on, pass by pass."""

    def __init__(self) -> None:
        self.world = World("eager", 0, peers=3, size=4 << 20)
        self.a, self.b = self.world.attach("a"), self.world.attach("b")
        self.b.listen()
        self.ours, self.theirs = self.world.open(self.a, self.b)
        self.world.quiet()
        self.a.call(self.world.lib.sh_hot, self.a.engine.nd, 300_000, 1 << 62, 0)
        self.hot: list[bool] = []

    def passes(self, then: Callable[[], object] = lambda: None) -> None:
        """Make a pass, and do that with what it found."""
        self.world.advance(0.00001)
        self.a.pump()
        then()
        stays = self.a.call(self.world.lib.sh_stay_hot, self.a.engine.nd, self.a.engine.home.now(), 0)
        self.hot.append(stays > 1)

    def peer_speaks(self) -> None:
        self.says(self.b, self.theirs)

    def speaks(self) -> None:
        self.says(self.a, self.ours)

    @staticmethod
    def says(node: Node, conn: Connection) -> None:
        assert node.write(conn, b"x" * 64) == 64

    def hears(self) -> None:
        assert self.a.read(self.ours) == b"x" * 64

    def answers(self) -> None:
        self.hears()
        self.speaks()

    def peer_hears(self) -> None:
        self.b.pump()
        assert self.b.read(self.theirs) == b"x" * 64


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def ready(turns: Turns) -> Iterator[Callable[[], None]]:
    """ready(): another descriptor of the loop is ready during a spin."""
    fd = os.eventfd(0)
    lib, nd = turns.world.lib, turns.a.engine.nd
    turns.a.call(lib.sh_loop, nd, fd)

    def one() -> None:
        os.eventfd_write(fd, 1)
        turns.a.call(lib.sh_turn, nd)
        turns.world.now += 60_000
        lib.sh_fake_time(turns.world.now)
        assert turns.a.call(lib.sh_over, nd)
        os.eventfd_read(fd)
        turns.a.call(lib.sh_turn, nd)

    yield one
    turns.a.call(lib.sh_loop, nd, -1)
    os.close(fd)


def passes_on(turns: Turns) -> None:
    for _ in range(TIMES):
        turns.peer_speaks()
        turns.passes(turns.hears)
        turns.speaks()
        turns.passes()
        turns.peer_hears()


def test_a_bridge_polls_on_after_its_own_words_and_not_after_the_peer_s(
    turns: Turns, ready: Callable[[], None]
) -> None:
    """What it hears goes to a socket, from which the answer comes: that has to run."""
    ready()
    passes_on(turns)
    assert turns.hot[-4:] == [False, True] * 2
    turns.world.advance(0.2)
    passes_on(turns)
    assert turns.hot[-4:] == [True] * 4  # it has to be seen again
    ready()
    passes_on(turns)
    assert turns.hot[-4:] == [False, True] * 2


def test_without_sockets_who_speaks_next_polls_on(turns: Turns) -> None:
    """Such as who closes a connection, and opens another one."""
    passes_on(turns)
    assert turns.hot[-4:] == [True] * 4


def test_who_answers_in_the_same_pass_polls_on(turns: Turns) -> None:
    for _ in range(TIMES):
        turns.peer_speaks()
        turns.passes(turns.answers)
        turns.peer_hears()
    assert turns.hot[-4:] == [True] * 4


def test_who_only_listens_polls_on(turns: Turns) -> None:
    for _ in range(TIMES):
        turns.peer_speaks()
        turns.passes(turns.hears)
    assert turns.hot[-4:] == [True] * 4


def test_who_has_yielded_is_answered_though_others_use_up_each_turn(turns: Turns) -> None:
    """As on a crowded machine. Else it would not see the end, nor that fewer bytes are there than it wants,
    until a turn is not over when it comes."""
    world, a = turns.world, turns.a

    def is_told(least: int = 1) -> list[bytes | int]:
        said = []
        for how in (world.lib.SH_MAY_SPIN, world.lib.SH_MAY_SPIN | world.lib.SH_YIELDED):
            a.call(world.lib.sh_turn, a.engine.nd)
            world.now += 60_000_000
            world.lib.sh_fake_time(world.now)
            assert a.call(world.lib.sh_over, a.engine.nd)
            said.append(a.read_or_arm(turns.ours, 64, least, how))
        return said

    assert is_told() == [YIELD, EMPTY]
    turns.peer_speaks()
    assert is_told(65) == [YIELD, world.lib.SH_SLOW]
    assert is_told() == [YIELD, b"x" * 64]
    turns.b.call(turns.theirs.finish)
    assert is_told() == [YIELD, EOF]
