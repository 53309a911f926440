"""One connection whose every byte is known: what each end sends is derived from the connection's seed and the
position in the stream, so that a byte lost, doubled, moved or of another connection shows."""

from __future__ import annotations

import enum
import random
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol

import anyio

from tests.aio.processes import pattern

HEADER = struct.Struct(">16sQIIB")
"""The opener's name, the seed, bytes to the acceptor, bytes to the opener, and the kind."""
PIECES = (1, 7, 100, 1000, 4096, 20_000, 65_536)
STUCK_S = 60.0
"""No piece takes as long, whatever the machine does."""


class Kind(enum.IntEnum):
    WHOLE = 0
    """All bytes in both directions, and a clean end of each."""
    QUESTIONS = 1
    """A little there and as much back, again and again, with pauses."""
    OPENER_LEAVES = 2
    """The opener aborts somewhere."""
    ACCEPTOR_LEAVES = 3


KINDS = (Kind.WHOLE, Kind.WHOLE, Kind.QUESTIONS, *Kind)
LEAVING = (Kind.OPENER_LEAVES, Kind.ACCEPTOR_LEAVES)


class Wrong(Exception):
    """Bytes that are not those of this place: never excused."""


class Broken(Exception):
    """The connection ended before its time: right where the other process died."""


class Pipe(Protocol):
    """What an exchange needs of a stream; on asyncio's or anyio's below it."""

    async def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end. ConnectionError where it broke."""

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None:
        """No more from this side."""

    async def close(self) -> None: ...

    def abort(self) -> None: ...


async def _take(pipe: Pipe, seed: int, size: int, dice: random.Random) -> int:
    """Read and compare until `size` bytes were there or the end comes. Some reads are cancelled meanwhile."""
    at = 0
    while at < size:
        want = min(dice.choice(PIECES), size - at)
        data = None
        if dice.random() < 0.05:
            with anyio.move_on_after(dice.random() * 0.002):
                data = await pipe.read(want)
        if data is None:
            with anyio.fail_after(STUCK_S):
                data = await pipe.read(want)
        if not data:
            break
        if data != pattern(seed, at, len(data)):
            raise Wrong(f"stream {seed:#x}: {len(data)} bytes from {at} on are not its own")
        at += len(data)
        if dice.random() < 0.02:
            await anyio.sleep(dice.random() * 0.02)  # a slow reader
    return at


async def _give(pipe: Pipe, seed: int, size: int, dice: random.Random) -> None:
    at = 0
    while at < size:
        piece = min(dice.choice(PIECES), size - at)
        with anyio.fail_after(STUCK_S):
            await pipe.write(pattern(seed, at, piece))
        at += piece
        if dice.random() < 0.02:
            await anyio.sleep(dice.random() * 0.02)  # a slow writer


async def _whole(pipe: Pipe, out: tuple[int, int], back: tuple[int, int], dice: random.Random) -> int:
    errors: list[Exception] = []

    async def either(side: Callable[[], Awaitable[None]]) -> None:
        try:
            await side()
        except (OSError, Broken, Wrong) as error:
            errors.append(error)
            group.cancel_scope.cancel()

    async def send() -> None:
        await _give(pipe, *out, dice)
        await pipe.end()

    async def receive() -> None:
        taken = await _take(pipe, *back, dice)
        if taken < back[1]:
            raise Broken(f"stream {back[0]:#x} ended at {taken} of {back[1]}")
        with anyio.fail_after(STUCK_S):
            more = await pipe.read(1)
        if more:
            raise Wrong(f"stream {back[0]:#x} goes on after its {back[1]} bytes")

    async with anyio.create_task_group() as group:
        group.start_soon(either, send)
        await either(receive)
    if errors:
        raise errors[0]
    return out[1] + back[1]


async def _questions(
    pipe: Pipe, seed: int, count: int, size: int, dice: random.Random, pause_s: float
) -> int:
    for at in range(0, count * size, size):
        await pipe.write(pattern(seed, at, size))
        got = b""
        while len(got) < size:
            with anyio.fail_after(STUCK_S):
                more = await pipe.read(size - len(got))
            if not more:
                raise Broken(f"stream {seed:#x}: no answer after {at} bytes")
            got += more
        if got != pattern(seed ^ 1, at, size):
            raise Wrong(f"stream {seed:#x}: the answer at {at} is not its own")
        await anyio.sleep(dice.random() * pause_s)
    await pipe.end()
    return 2 * count * size


async def open_side(pipe: Pipe, name: str, kind: Kind, dice: random.Random, pause_s: float, bulk: int) -> int:
    """Be the opener of one exchange of that kind. Returns how many bytes were right."""
    seed = dice.getrandbits(63) << 1
    if kind is Kind.QUESTIONS:
        sizes = dice.randint(1, 20), dice.choice(PIECES[:5])
    else:
        sizes = int(dice.random() ** 4 * bulk), int(dice.random() ** 4 * bulk)
    await pipe.write(HEADER.pack(name.encode(), seed, *sizes, kind))
    if kind is Kind.QUESTIONS:
        return await _questions(pipe, seed, *sizes, dice, pause_s)
    if kind is Kind.OPENER_LEAVES:
        taken = await _take(pipe, seed ^ 1, dice.randint(0, sizes[1]), dice)
        pipe.abort()
        return taken
    if kind is Kind.ACCEPTOR_LEAVES:
        try:
            return await _take(pipe, seed ^ 1, sizes[1], dice)
        except ConnectionError:
            return 0
    return await _whole(pipe, (seed, sizes[0]), (seed ^ 1, sizes[1]), dice)


async def read_header(pipe: Pipe) -> tuple[str, int, int, int, Kind] | None:
    """The opener's name, the seed and so on; None where the opener left before."""
    head = b""
    while len(head) < HEADER.size:
        with anyio.fail_after(STUCK_S):
            more = await pipe.read(HEADER.size - len(head))
        if not more:
            return None
        head += more
    name, seed, up, down, kind = HEADER.unpack(head)
    return name.rstrip(b"\0").decode(), seed, up, down, Kind(kind)


async def accept_side(pipe: Pipe, head: tuple[str, int, int, int, Kind], dice: random.Random) -> int:
    """Be the acceptor of the exchange that `head` tells. Returns how many bytes were right."""
    _, seed, up, down, kind = head
    if kind is Kind.QUESTIONS:
        for at in range(0, up * down, down):
            got = b""
            while len(got) < down:
                more = await pipe.read(down - len(got))  # pauses are the opener's business
                if not more:
                    raise Broken(f"stream {seed:#x}: no question after {at} bytes")
                got += more
            if got != pattern(seed, at, down):
                raise Wrong(f"stream {seed:#x}: the question at {at} is not its own")
            await pipe.write(pattern(seed ^ 1, at, down))
        await pipe.end()
        return 2 * up * down
    if kind is Kind.OPENER_LEAVES:
        try:
            await _give(pipe, seed ^ 1, down, dice)
            await _take(pipe, seed, 1, dice)
        except ConnectionError:
            pass
        return 0
    if kind is Kind.ACCEPTOR_LEAVES:
        await _give(pipe, seed ^ 1, dice.randint(0, down), dice)
        pipe.abort()
        return 0
    return await _whole(pipe, (seed ^ 1, down), (seed, up), dice)
