"""Ring memory: blocks never overlap, and what was given back is whole again."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmsock.engine.arena import MIN_RING, Arena
from shmsock.engine.layout import default_slots
from shmsock.engine.memory import Memory
from tests.engine.world import fake_core


def free(arena: Arena) -> dict[int, set[int]]:
    arena.merge()
    return {block: set(where) for block, where in arena._free.items() if where}


@settings(max_examples=300, deadline=None)
@given(
    units=st.integers(1, 300),
    offset=st.integers(0, 50),
    wishes=st.lists(st.one_of(st.integers(0, 9).map(lambda k: MIN_RING << k), st.just(None)), max_size=120),
    data=st.data(),
)
def test_no_overlap_and_all_merges_again(
    units: int, offset: int, wishes: list[int | None], data: st.DataObject
) -> None:
    arena = Arena(offset * MIN_RING, units * MIN_RING + 123)
    before = free(arena)
    assert sum(block * len(where) for block, where in before.items()) == units * MIN_RING == arena.size
    held: list[tuple[int, int]] = []
    for wish in wishes:
        if wish is None:
            if held:
                arena.give(*held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        got = arena.alloc(wish)
        if got is None:
            assert arena.free_bytes == 0
            continue
        at, size = got
        assert at % MIN_RING == 0
        assert size <= wish
        assert size & (size - 1) == 0
        assert arena.offset <= at
        assert at + size <= arena.offset + arena.size
        assert all(at + size <= other or other + n <= at for other, n in held)
        held.append(got)
        assert arena.free_bytes == arena.size - sum(n for _, n in held)
    for block in held:
        arena.give(*block)
    assert free(arena) == before


@given(st.integers(12, 30).map(lambda k: 1 << k), st.integers(0, 1 << 34), st.integers(0, 2048))
def test_fit(largest: int, free_bytes: int, slots: int) -> None:
    size = Arena.fit(largest, free_bytes, slots)
    assert MIN_RING <= size <= largest
    assert size & (size - 1) == 0
    assert size == MIN_RING or size * 8 + slots * MIN_RING <= free_bytes


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
    assert 16 <= slots <= 2048
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
    ("size", "peers", "slots"), [(1 << 28, 16, 1024), (64 << 20, 16, 256), (1 << 20, 16, 0), (1 << 20, 4, 16)]
)
def test_default_slots(size: int, peers: int, slots: int) -> None:
    assert default_slots(Memory(fake_core(), mmap.mmap(-1, 4096)), size, peers) == slots
