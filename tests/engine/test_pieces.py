"""Large writes and reads go in pieces: each side copies while the other one does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from shmsock.engine.connection import EMPTY, RESET
from tests.engine.world import SETTINGS, World

RING = 1 << 18
LARGE = replace(SETTINGS, ring_bytes=RING, first_ring_bytes=RING)


@pytest.fixture
def world() -> Iterator[World]:
    made = World(peers=2, size=16 << 20)
    yield made
    made.check()


@contextlib.contextmanager
def during(world: World, act: Callable[[], object]) -> Iterator[None]:
    """Have `act` run at each access to memory."""

    def hook() -> None:
        try:
            act()
        except BaseException as error:
            world.trouble = error
        world.lib.sh_fake_hook(again, 1)

    again = world.ffi.callback("void(void)", hook)
    world.lib.sh_fake_hook(again, 1)
    try:
        yield
    finally:
        world.lib.sh_fake_hook(world.ffi.NULL, 0)


def test_a_write_can_be_read_while_it_is_made(world: World) -> None:
    a, b = world.attach("a", settings=LARGE), world.attach("b", settings=LARGE)
    c, s = world.open(a, b)
    data, seen = world.rng.randbytes(200_000), set()
    with during(world, lambda: seen.add(b.call(s.available))):
        assert a.write(c, data) == len(data)
    assert any(0 < there < len(data) for there in seen)
    assert b.read_all(s) == (data, EMPTY)


def test_a_read_gives_space_back_while_it_is_made(world: World) -> None:
    a, b = world.attach("a", settings=LARGE), world.attach("b", settings=LARGE)
    c, s = world.open(a, b)
    data, seen = world.rng.randbytes(RING), set()
    assert a.write(c, data + b"x") == RING
    with during(world, lambda: seen.add(a.call(world.lib.sh_wait_space, c.ep, 0))):
        assert b.read(s) == data
    assert any(0 < space < RING for space in seen)


def test_a_read_takes_what_comes_meanwhile_until_its_turn_is_over(world: World) -> None:
    a, b = world.attach("a", settings=LARGE), world.attach("b", settings=LARGE)
    c, s = world.open(a, b)
    much = 16 * RING
    data, sent, room = world.rng.randbytes(much), 0, world.ffi.new("char[]", much)

    def send() -> None:
        nonlocal sent
        sent += a.write(c, data[sent : sent + RING])
        world.lib.sh_fake_time(world.now + 1_000 * (sent - RING) // 1024)  # 1 us for each KiB

    def read() -> int:
        world.lib.sh_turn(b.engine.nd)
        n: int = world.lib.sh_read_wait(s.ep, room, much, 1, 0)
        return n

    send()
    with during(world, send):
        n = b.call(read)
    assert RING < n < 4 * RING  # a turn has 500 us
    assert world.ffi.buffer(room)[:n] == data[:n]
    assert b.read_all(s) == (data[n:sent], EMPTY)


def test_what_ends_a_read_between_two_pieces_is_told_by_the_next_one(world: World) -> None:
    a, b = world.attach("a", settings=LARGE), world.attach("b", settings=LARGE)
    c, s = world.open(a, b)
    data = world.rng.randbytes(RING)
    assert a.write(c, data + b"x") == RING

    def reset() -> None:
        if a.call(world.lib.sh_wait_space, c.ep, 0) > 0:
            a.abort(c)

    with during(world, reset):
        got = b.read(s)
    assert isinstance(got, bytes)
    assert got == data[: len(got)]
    assert len(got) < RING
    assert b.read(s) == RESET
