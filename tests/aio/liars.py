"""Peers that write what is not so, as fast as can be.

`python -m tests.aio.liars REGION KIND RINGS SECONDS` attaches as "liar", talks to "victim", port 7000, says
"lying", and then does to its own section what FLOODS names.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import mmap
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shmsock
from shmsock.engine import layout as lay
from shmsock.engine.layout import Layout, read_layout
from shmsock.engine.memory import Memory, native_core

SOURCE = Path(__file__).with_name("flood.c")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "native"
ADD, FLIP, TURNS, RANDOM = range(4)
SILENT, ONCE_A_SLEEP, ALWAYS = range(3)
ALL, LOW, HIGH = (1 << 64) - 1, (1 << 32) - 1, (1 << 64) - (1 << 32)
FIN, RST, REL, WANT, EPOCHS = 1 << 32, 1 << 33, 1 << 34, 1 << 35, 15 << 36
SENT = 64
"""Bytes that the liar sends first."""


@contextmanager
def memory_of(path: str) -> Iterator[Layout]:
    """All words of a region, for who keeps to no rules."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        memory = Memory(native_core(), mapping)
        try:
            yield read_layout(memory)
        finally:
            memory.release()


@functools.cache
def compiled() -> str:
    """flood.c, as a shared object. Compiled once for each state of it."""
    made = CACHE / f"flood-{SOURCE.stat().st_mtime_ns}.so"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        mine = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, "-O2", "-shared", "-fPIC", "-o", str(mine), str(SOURCE)], check=True)
        os.replace(mine, made)
    return str(made)


class Step(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("word", "how", "a", "b"))


class Words:
    """Where a liar's words are: in its section, towards the victim, and of its connection with it."""

    def __init__(self, layout: Layout, liar: int, victim: int) -> None:
        g: Any = layout.geometry
        self.load = layout.memory.load
        self.at = layout.section(liar)
        self.pair = layout.pair(liar, victim)
        self.t, self.a = self.pair + int(g.toggle_off), self.pair + int(g.ack_off)
        self.message = self.pair + int(g.message_off)
        self.bell, self.rang = self.pair + lay.NOTIFY_SEQ, self.pair + 8
        self.slot = next(
            at
            for at in range(self.at + int(g.slot_off), self.at + int(g.slot_off) + layout.slots * 192, 192)
            if self.load(at) >> 8 & 1 and self.load(at) >> 32 & 0xFF == victim
        )
        self.p, self.c = self.slot + 0x40, self.slot + 0x80
        self.theirs = self.load(self.slot) >> 16 & 0xFFFF  # the victim's slot
        self.victims_sleep = layout.section(victim) + 0x80

    def open_bit(self) -> tuple[int, int]:
        return self.t + self.theirs // 64 * 8, 1 << self.theirs % 64

    def closed_bits(self) -> tuple[int, int]:
        return self.t, ALL ^ (1 << self.theirs if self.theirs < 64 else 0)


Steps = list[tuple[int, int, int, int]]


def _said(w: Words, *steps: tuple[int, int, int, int]) -> Steps:
    """That, a toggle of the open connection, and a bell."""
    word, bit = w.open_bit()
    return [*steps, (word, FLIP, bit, 0), (w.bell, ADD, 1, 0)]


def _turns(w: Words, word: int, other: int) -> tuple[int, int, int, int]:
    return (word, TURNS, w.load(word), other)


FLOODS: dict[str, Callable[[Words], Steps]] = {
    "bell": lambda w: [(w.bell, ADD, 1, 0)],
    "tag": lambda w: [(w.bell, RANDOM, ALL, 0)],
    "two tags": lambda w: [(w.bell, FLIP, 1 << 40, 0)],
    "tag of nobody": lambda w: [(w.bell, TURNS, 1, w.load(w.bell))],
    "closed toggles": lambda w: [(*w.closed_bits()[:1], FLIP, w.closed_bits()[1], 0), (w.bell, ADD, 1, 0)],
    "open toggle": _said,
    "toggle without a bell": lambda w: [(w.open_bit()[0], FLIP, w.open_bit()[1], 0)],
    "acknowledged": lambda w: [(w.a, FLIP, ALL, 0), (w.bell, ADD, 1, 0)],
    "rang": lambda w: [(w.rang, ADD, 1, 0)],
    "rings": lambda w: [],
    "sleeping": lambda w: [(w.at + 0x80, ADD, 1, 0), (w.bell, ADD, 1, 0)],
    "beat": lambda w: [(w.at + lay.BEAT, RANDOM, ALL, 0)],
    "outbox": lambda w: [(w.pair + lay.OUTBOX, FLIP, 1, 0), (w.bell, ADD, 1, 0)],
    "outbox of others": lambda w: [(w.pair + lay.OUTBOX, RANDOM, ALL, 0), (w.bell, ADD, 1, 0)],
    "inbox": lambda w: [(w.pair + lay.INBOX, RANDOM, ALL, 0), (w.bell, ADD, 1, 0)],
    "users": lambda w: [(w.pair + lay.USERS, RANDOM, ALL, 0), (w.bell, ADD, 1, 0)],
    "want": lambda w: _said(w, (w.p, FLIP, WANT, 0)),
    "want without a bell": lambda w: [(w.p, FLIP, WANT, 0)],
    "epoch": lambda w: _said(w, (w.p, FLIP, 1 << 36, 0)),
    "fin": lambda w: _said(w, (w.p, FLIP, FIN, 0)),
    "rel": lambda w: _said(w, (w.p, FLIP, REL, 0)),
    "rst": lambda w: _said(w, (w.p, FLIP, RST, 0)),
    "tail": lambda w: _said(w, _turns(w, w.p, w.load(w.p) - 1)),
    "generation": lambda w: _said(w, (w.p, FLIP, 1 << 40, 0)),
    "head": lambda w: _said(w, (w.c, RANDOM, LOW, w.load(w.c))),
    "reserved": lambda w: _said(w, (w.c, FLIP, 1 << 36, 0)),
    "link and ring": lambda w: _said(w, (w.slot, RANDOM, ALL, 0), (w.slot + 8, RANDOM, ALL, 0)),
    "claim": lambda w: [(w.at, RANDOM, ALL, 1), (w.bell, ADD, 1, 0)],
    "here and gone": lambda w: [_turns(w, w.at + lay.STATE, 3), (w.bell, ADD, 1, 0)],
    "coming": lambda w: [_turns(w, w.at + lay.STATE, 0), (w.bell, ADD, 1, 0)],
    "lives": lambda w: [(w.at + lay.INCARNATION, RANDOM, ALL, 1), (w.bell, ADD, 1, 0)],
    "names": lambda w: [
        (w.at + lay.INCARNATION, RANDOM, ALL, 1),
        _turns(w, w.at + lay.NAME, int.from_bytes(b"other\0\0\0", "little")),
        (w.bell, ADD, 1, 0),
    ],
    "kernels": lambda w: [
        (w.at + lay.INCARNATION, RANDOM, ALL, 1), (w.at + lay.BOOT, FLIP, 1, 0), (w.bell, ADD, 1, 0)
    ],
    "flags": lambda w: [
        (w.at + lay.INCARNATION, RANDOM, ALL, 1), (w.at + lay.FLAGS, RANDOM, 3, 0), (w.bell, ADD, 1, 0)
    ],
    "doorbell": lambda w: [(w.at + lay.DOORBELL, RANDOM, ALL, 0), (w.bell, ADD, 1, 0)],
    "listeners": lambda w: [
        (w.at + lay.N_LISTENERS, RANDOM, ALL, 0),
        *((w.at + lay.LISTENER + 8 * i, RANDOM, (1 << 21) - 1, 0) for i in range(8)),
        (w.bell, ADD, 1, 0),
    ],
    "messages": lambda w: [
        (w.message, RANDOM, ALL, 0),
        (w.pair + lay.OUTBOX, ADD, 1, 0),
        (w.bell, ADD, 1, 0),
    ],
    "everything": lambda w: _said(
        w,
        *((w.at + word, RANDOM, ALL, 0) for word in range(lay.INCARNATION, lay.LISTENER, 8)),
        *((w.pair + word, RANDOM, LOW, w.load(w.pair + word)) for word in (8, 0x40, 0x80, 0xC0)),
        *((word, RANDOM, ALL ^ EPOCHS, w.load(word)) for word in (w.p, w.c)),
    ),
}  # fmt: skip


async def main(region: str, kind: str, rings: int, seconds: float) -> None:
    async with shmsock.attach(region, name="liar") as node:
        reader, writer = await shmsock.open_connection("victim", 7000, node=node)
        writer.write(bytes(SENT))
        await reader.readexactly(SENT)
        victim = node.find("victim", 7000, ()).section
        with memory_of(region) as layout:
            words = Words(layout, node.section, victim)
            steps = FLOODS[kind](words)
            base = int(layout.memory.core.ffi.cast("uintptr_t", layout.memory._base))
            array = (Step * len(steps))(*(Step(base + word, *how) for word, *how in steps))
            flood = ctypes.CDLL(compiled()).flood
            at = [ctypes.c_void_p(base + word) for word in (words.rang, words.victims_sleep)]
            print("lying", flush=True)
            flood(array, len(steps), *at, rings, ctypes.c_double(seconds))
            os._exit(0)  # there is nothing left to be ended in order


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
