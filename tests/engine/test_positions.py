"""Positions count bytes modulo 2**32: more than that through one connection, over the real core."""

from __future__ import annotations

import mmap
import random
from collections.abc import Generator

from shmsock.engine.attach import Claim, claim_section
from shmsock.engine.connection import EOF
from shmsock.engine.engine import Engine
from shmsock.engine.layout import Identity, format_region
from shmsock.engine.memory import Memory, native_core
from shmsock.engine.settings import Settings
from tests.engine.world import FILE, KERNEL, MACHINE, FakeLocks


def claimed(steps: Generator[float, None, Claim]) -> Claim:
    """Nobody else is there: nothing to wait for."""
    try:
        while True:
            next(steps)
    except StopIteration as done:
        claim: Claim = done.value
        return claim


def test_more_than_four_gigabytes() -> None:
    memory = Memory(native_core(), mmap.mmap(-1, 40 << 20))
    layout = format_region(memory, peers=2)
    engines = []
    for name in "ab":
        steps = claim_section(layout, FakeLocks({}), KERNEL, MACHINE, random.Random(name))
        who = Identity(name, KERNEL, MACHINE, 1, 0, FILE)
        engines.append(Engine(layout, claimed(steps), who, settings=Settings(first_ring_bytes=1 << 20)))
    a, b = engines

    def pump() -> None:
        for _ in range(3):
            for engine in engines:
                engine.attend(engine.poll(), 0)

    pump()
    b.listen(7000)
    conn = a.connect(b.section, 7000, local=("a", 1), remote="b")
    pump()
    (end,) = b.connections.values()
    chunk = random.Random(1).randbytes(conn.ring[1] - 4096 + 17)
    for i in range((1 << 32) // len(chunk) + 100):
        assert conn.write(chunk, len(chunk)) == len(chunk)
        a.attend(a.poll(), 0)
        found = b""
        while len(found) < len(chunk):
            piece = end.read(1 << 20)
            assert isinstance(piece, bytes), i
            found += piece
        b.attend(b.poll(), 0)
        assert found == chunk, i
    conn.close()
    pump()
    assert end.read(1) == EOF
