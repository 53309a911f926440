"""Ring memory: blocks never overlap, and what was given back is whole again."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmsock.engine.layout import default_slots
from shmsock.engine.memory import Memory
from shmsock.native._core import lib
from tests.engine.world import fake_core

MIN_RING: int = lib.SH_MIN_RING


class Arena:
    """The core's, without a node."""

    def __init__(self, offset: int, size: int) -> None:
        self.ffi, self.lib = fake_core()
        self.memory = self.ffi.new("uint8_t[]", self.lib.sh_arena_bytes(size))
        self.arena = self.lib.sh_arena_new(self.memory, offset, size)
        self.offset, self.size = offset, size // MIN_RING * MIN_RING

    @property
    def free(self) -> int:
        return int(self.lib.sh_arena_free(self.arena))

    def take(self, size: int) -> tuple[int, int] | None:
        got = self.ffi.new("uint32_t *", size)
        at = self.lib.sh_arena_take(self.arena, got)
        return (at, got[0]) if at else None

    def give(self, block: tuple[int, int]) -> None:
        self.lib.sh_arena_give(self.arena, *block)

    def largest(self) -> list[int]:
        """The sizes of blocks that it has when the largest one is always taken first; they are given back."""
        held = []
        while (block := self.take(1 << 30)) is not None:
            held.append(block)
        for block in held:
            self.give(block)
        return [size for _, size in held]


wishes = st.lists(st.one_of(st.integers(0, 9).map(lambda k: MIN_RING << k), st.just(None)), max_size=120)


@settings(max_examples=300, deadline=None)
@given(units=st.integers(1, 300), offset=st.integers(1, 50), wishes=wishes, data=st.data())
def test_no_overlap_and_all_comes_together_again(
    units: int, offset: int, wishes: list[int | None], data: st.DataObject
) -> None:
    arena = Arena(offset * 4096, units * MIN_RING + 123)
    before = arena.largest()
    assert sum(before) == units * MIN_RING == arena.size == arena.free
    assert len(before) <= units.bit_length()
    held: list[tuple[int, int]] = []
    for wish in wishes:
        if wish is None:
            if held:
                arena.give(held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        got = arena.take(wish)
        if got is None:
            assert arena.free == 0
            continue
        at, size = got
        assert at % MIN_RING == 0
        assert size <= wish
        assert size & (size - 1) == 0
        assert arena.offset <= at
        assert at + size <= arena.offset + arena.size
        assert all(at + size <= other or other + n <= at for other, n in held)
        held.append(got)
        assert arena.free == arena.size - sum(n for _, n in held)
    for block in held:
        arena.give(block)
    assert arena.largest() == before


@given(units=st.integers(1, 64), size=st.integers(0, 4).map(lambda k: MIN_RING << k))
def test_a_block_is_smaller_only_when_there_is_none_of_that_size(units: int, size: int) -> None:
    arena = Arena(4096, units * MIN_RING)
    ring = MIN_RING
    small = [block for block in iter(lambda: arena.take(ring), None)]
    assert len(small) == units
    for block in small:
        arena.give(block)
    whole = sum(n // size * size for n in arena.largest())
    for _ in range(whole // size):
        got = arena.take(size)
        assert got is not None
        assert got[1] == size
    got = arena.take(size)
    assert got is None or got[1] < size


def test_an_arena_larger_than_the_largest_ring() -> None:
    arena = Arena(4096, 5 << 30)
    assert arena.largest() == [1 << 30] * 5


@given(st.integers(12, 30).map(lambda k: 1 << k), st.integers(0, 1 << 34), st.integers(0, 1 << 30))
def test_fit(largest: int, free: int, reserved: int) -> None:
    size = fake_core().lib.sh_ring_fit(largest, free, reserved)
    assert MIN_RING <= size <= largest
    assert size & (size - 1) == 0
    assert size == MIN_RING or size * 8 + reserved <= free
    assert size == largest or size * 16 + reserved > free


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(1, 1 << 36))
def test_geometry_has_room_for_all_it_promises(peers: int, size: int) -> None:
    core = fake_core()
    memory = Memory(core, mmap.mmap(-1, 4096))
    slots = default_slots(memory, size, peers)
    if not slots:
        assert size < 4096 + 64 * (1 << 20)
        return
    g = core.ffi.new("sh_geometry *")
    assert core.lib.sh_geometry_of((slots.bit_length() - 1) << 8 | peers, size, g) == 0
    assert 16 <= slots <= 65536
    assert g.slots == slots
    assert g.section_bytes * peers + 4096 <= size
    assert g.pair_off + peers * g.pair_bytes == g.slot_off
    assert g.slot_off + slots * 192 <= g.arena_off
    assert g.arena_off + g.arena_bytes == g.section_bytes
    assert g.arena_bytes >= 2 * MIN_RING
    assert slots == 16 or g.arena_bytes >= slots * 2 * MIN_RING
    assert all(
        offset % 64 == 0
        for offset in (g.pair_off, g.pair_bytes, g.toggle_off, g.ack_off, g.message_off, g.slot_off)
    )
    assert g.arena_off % 4096 == g.section_bytes % 4096 == 0


@pytest.mark.parametrize(
    ("size", "peers", "slots"),
    [
        (1 << 31, 4, 1 << 16),
        (1 << 28, 4, 1 << 15),
        (1 << 28, 16, 8192),
        (64 << 20, 16, 2048),
        (1 << 20, 16, 0),
        (1 << 20, 4, 128),
    ],
)
def test_default_slots(size: int, peers: int, slots: int) -> None:
    assert default_slots(Memory(fake_core(), mmap.mmap(-1, 4096)), size, peers) == slots
