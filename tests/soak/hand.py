"""A hand that writes nonsense into a region while its process talks on it as any other does: into the own
section only (a liar), or into all of them but the header (a scribbler)."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from shmsock.engine import layout as lay

AT_ONCE, PAUSE_S = 200, 0.05
"""Words of a burst, and the longest pause between two."""


def ranges(layout: Any, section: int) -> list[tuple[int, int]]:
    """Where the owner of a section writes, small parts as likely as large ones: offset and size."""
    g, at = layout.geometry, layout.section(section)
    pairs = [(layout.pair(section, j), int(g.pair_bytes)) for j in range(layout.peers)]
    heads = [(pair, 0x100) for pair, _ in pairs]
    bells = [(pair + off, 0x100) for pair, _ in pairs for off in (g.toggle_off, g.ack_off, g.message_off)]
    slots = [(at + g.slot_off, lay.SLOT_BYTES * 64), (at + g.slot_off, lay.SLOT_BYTES * layout.slots)]
    arena = [(at + layout.arena_off, 1 << 16), (at + layout.arena_off, layout.arena_bytes)]
    whole: list[tuple[int, int]] = [(at, 0x200), (at + lay.LISTENER, 0x1000), (at, layout.section_bytes)]
    return [*pairs, *heads, *bells, *slots, *arena, *whole]


class Hand(threading.Thread):
    """Scribbles until its process ends."""

    def __init__(
        self, path: str, layout: Any, section: int, everywhere: bool, told: Callable[[int], None]
    ) -> None:
        super().__init__(daemon=True)
        with open(path, "r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._bytes).cast("Q")
        sections = range(layout.peers) if everywhere else [section]
        self._ranges = [ranges(layout, number) for number in sections]
        self._ends = {layout.section(number) // 8 + word for number in sections for word in range(8)}
        self._told = told
        self._dice = random.Random()
        self._seen: list[int] = [0]

    def _value(self, old: int, at: int) -> int:
        dice = self._dice
        near = self._words[max(at - dice.randint(1, 24), 0)]  # a word of its neighbourhood
        one = 1 << dice.randrange(64)
        choices = (
            dice.getrandbits(64), 0, (1 << 64) - 1, old + 1, old - 1, old ^ one, old ^ one, old + (1 << 32),
            old & ~0xFFFFFFFF | dice.getrandbits(32), near, dice.choice(self._seen),
            old ^ (1 << dice.randrange(32, 40)),
        )  # fmt: skip
        return dice.choice(choices) % (1 << 64)

    def run(self) -> None:
        while True:
            for _ in range(AT_ONCE):
                start, size = self._dice.choice(self._dice.choice(self._ranges))
                at = (start + self._dice.randrange(size)) // 8
                if at in self._ends and self._dice.random() < 0.98:
                    continue  # a node that has lost its section has nothing more to be tried on
                old = self._words[at]
                if len(self._seen) < 1000:
                    self._seen.append(old)  # to be played again, later and elsewhere
                else:
                    self._seen[self._dice.randrange(1000)] = old
                self._words[at] = self._value(old, at)
            self._told(AT_ONCE)
            time.sleep(self._dice.random() * PAUSE_S)
