"""What the ring has no room for: kept without copying what cannot change, never moved, and in its order."""

from __future__ import annotations

import array
import asyncio
import ctypes
import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmsock.aio.write_buffer import OutgoingFile, WriteBuffer
from shmsock.native._core import ffi
from tests.aio.conftest import Run, World, until
from tests.aio.processes import pattern

LARGE = 32 << 20
ROOM = 4 << 20
"""More than the largest ring, and what Python needs besides."""


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [bytes, memoryview, lambda data: memoryview(data).cast("I")])
def test_bytes_are_kept_by_reference(
    run: Run, world: World, traced: None, kind: Callable[[bytes], Any]
) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            data = pattern(1, 0, LARGE)
            given = kind(data)
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            c.transport.write(given)
            assert c.transport.get_write_buffer_size() > LARGE - ROOM
            assert tracemalloc.get_traced_memory()[1] - held < ROOM
            second = kind(data)
            c.transport.write(second)
            assert tracemalloc.get_traced_memory()[1] - held < ROOM
            for released in (given, second):
                if isinstance(released, memoryview):
                    released.release()
            tracemalloc.stop()
            assert await s.reader.readexactly(LARGE) == data
            assert await s.reader.readexactly(LARGE) == data

    run(main())


def test_large_lines_are_kept_by_reference(run: Run, world: World, traced: None) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            data = pattern(1, 0, LARGE)
            lines: list[Any] = [b"head", bytearray(b"er"), data, memoryview(b"between"), data, b"", b"end"]
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with pytest.raises(TypeError):
                c.transport.writelines([*lines, 1])
            assert c.transport.get_write_buffer_size() == 0
            c.transport.writelines(iter(lines))
            assert tracemalloc.get_traced_memory()[1] - held < ROOM
            tracemalloc.stop()
            c.transport.write_eof()
            assert await s.reader.read() == b"".join(lines)

    run(main())


@pytest.mark.parametrize(
    "view",
    [
        lambda data: data,
        memoryview,
        lambda data: memoryview(data).toreadonly(),
        lambda data: memoryview(array.array("B", data)),
        lambda data: memoryview(data).cast("H"),
        lambda data: memoryview(data)[::-1],
    ],
    ids=["bytearray", "view", "read-only view", "view of an array", "view of others", "view with gaps"],
)
@pytest.mark.parametrize("size", [1000, 100_000, 5_000_000])
def test_what_changes_after_write_arrives_as_it_was(
    run: Run, world: World, view: Callable[[bytearray], Any], size: int
) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.transport.write(pattern(1, 0, LARGE // 8))  # the ring is full
            given = view(bytearray(pattern(2, 0, size)))
            expected = bytes(given)
            c.transport.write(given)
            changed = given.obj if isinstance(given, memoryview) else given
            ctypes.memset((ctypes.c_char * size).from_buffer(changed), 0, size)
            assert await s.reader.readexactly(LARGE // 8) == pattern(1, 0, LARGE // 8)
            assert await s.reader.readexactly(size) == expected

    run(main())


def test_large_and_small_writes_keep_their_order(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            expected, rng = bytearray(), random.Random(1)
            for number in range(300):
                data = pattern(number, 0, rng.choice([0, 1, 100, 5000, 65_536, 70_000, 300_000]))
                expected += data
                c.transport.write(rng.choice([bytes, bytearray, memoryview])(data))
                if not number % 7:
                    got = await s.reader.read(200_000)
                    assert got == expected[: len(got)]
                    del expected[: len(got)]
            c.transport.write_eof()
            assert await s.reader.read() == expected

    run(main())


class Narrow:
    """A connection that takes few bytes at once, and notes where they lay."""

    def __init__(self, most: int) -> None:
        self.home: Any = self
        self.lib, self.nd, self.ffi, self.ep = self, None, ffi, None
        self.most, self.room = most, 0
        self.sent = bytearray()
        self.bases: set[int] = set()  # where what was sent would begin, if it had never moved
        self.offered = 0

    def sh_over(self, nd: None) -> bool:
        return False

    def sh_wait_space(self, ep: None, spin: int) -> int:
        self.room = self.most
        return self.room

    def write(self, data: Any, size: int) -> int:
        taken = min(size, self.room)
        self.room -= taken
        self.offered += size
        self.bases.add(int(ffi.cast("uintptr_t", data)) - len(self.sent))
        self.sent += bytes(ffi.buffer(data, taken))
        return taken


@pytest.mark.parametrize(
    ("piece", "count", "most_blocks"), [(100, 20_000, 40), (65_536, 100, 100), (5_000_000, 1, 1)]
)
def test_what_is_queued_never_moves(piece: int, count: int, most_blocks: int) -> None:
    """However many pieces there are, and however little the ring takes at once: each byte goes into the ring
    from where it was put first."""
    conn = Narrow(3000)
    buffer = WriteBuffer(conn)  # type: ignore[arg-type]
    given = [pattern(n, 0, piece) for n in range(count)]
    for data in given:
        buffer.add(data)
    assert len(buffer) == piece * count
    while buffer:
        conn.room = conn.most
        assert buffer.send() == 0
    assert conn.sent == b"".join(given)
    assert len(conn.bases) <= most_blocks
    assert len(buffer) == 0


def test_a_copy_is_freed_as_it_is_sent(traced: None) -> None:
    conn = Narrow(1 << 20)
    buffer = WriteBuffer(conn)  # type: ignore[arg-type]
    data = bytearray(LARGE)
    buffer.add(data)
    full = tracemalloc.get_traced_memory()[0]
    for _ in range(16):
        conn.room = conn.most
        buffer.send()
    conn.sent.clear()
    assert len(buffer) == LARGE - (16 << 20)
    assert tracemalloc.get_traced_memory()[0] < full - (15 << 20)


def test_a_turn_ends_when_its_budget_is_used_up() -> None:
    conn = Narrow(0)
    buffer = WriteBuffer(conn)  # type: ignore[arg-type]
    buffer.add(bytes(3 << 20))
    conn.room = 3 << 20
    conn.sh_over = lambda nd: True  # type: ignore[method-assign]
    assert [buffer.send() for _ in range(3)] == [1, 1, 0]
    assert not buffer


@pytest.mark.parametrize("spins", [False, True])
def test_room_that_comes_soon_is_waited_for(spins: bool) -> None:
    """Where nothing else is to be run."""
    conn = Narrow(1000)
    buffer = WriteBuffer(conn)  # type: ignore[arg-type]
    buffer.add(bytes(100_000))
    assert buffer.send(spins) == 0
    assert len(conn.sent) == (100_000 if spins else 0)


def test_what_is_dropped_is_told_to_who_waits_for_a_file(run: Run) -> None:
    async def main() -> None:
        buffer = WriteBuffer(Narrow(0))  # type: ignore[arg-type]
        file = OutgoingFile(0, 0, 10, asyncio.get_running_loop().create_future())
        buffer.add(b"before")
        buffer.add_file(file)
        assert len(buffer) == 6
        buffer.drop(ConnectionResetError("gone"))
        assert not buffer
        with pytest.raises(ConnectionResetError, match="gone"):
            await file.over

    run(main())


def test_a_large_write_leaves_the_loop_its_turns(run: Run, world: World) -> None:
    """Both ends are of one loop here: it can only end if each of them lets the other run."""

    async def main() -> None:
        async with world.pair() as (c, s):
            done = False

            async def read() -> None:
                nonlocal done
                assert await s.reader.readexactly(LARGE) == pattern(1, 0, LARGE)
                done = True

            task = asyncio.ensure_future(read())
            c.transport.write(pattern(1, 0, LARGE))
            turns = 0
            while not done:
                turns += 1
                await asyncio.sleep(0)
            await task
            assert turns > 10
            await until(lambda: c.transport.get_write_buffer_size() == 0)

    run(main())
