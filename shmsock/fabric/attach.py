"""Claiming a section, giving it back, and taking back what the dead left.

Claiming waits (20 ms to see that the claim stands; where none is free, 500 ms to see whose beat does not
move), and the engine knows no clock: so it is a generator that yields seconds to wait and returns the Claim.
Nothing else is used by two at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from shmsock.errors import sections_full
from shmsock.fabric import layout as lay
from shmsock.fabric.layout import Identity, Layout

__all__ = ["Claim", "Locks", "Seen", "claim_section", "name_taken", "reap", "release_claim", "survey"]

SETTLE_S = 0.02
STILL_S = 0.5


class Locks(Protocol):
    """Section locks of the region's file: the kernel drops them with the process that holds them."""

    identity: tuple[int, int]

    def lock_section(self, index: int) -> bool: ...
    def unlock_section(self, index: int) -> None: ...
    def section_locked(self, index: int) -> bool: ...


@dataclass(frozen=True)
class Claim:
    section: int
    word: int


@dataclass(frozen=True)
class Seen:
    """One section as somebody outside sees it."""

    section: int
    claim: int
    beat: int
    state: int
    used: bool
    who: Identity | None
    dead: bool
    """Proven: its lock is under this kernel and nobody holds it."""
    left: int


def survey(layout: Layout, locks: Locks, boot_id: bytes) -> list[Seen]:
    memory, found = layout.memory, []
    for i in range(layout.peers):
        at = layout.section(i)
        claim, who = memory.load(at + lay.CLAIM), layout.identity(i)
        used = memory.load(at + lay.INCARNATION) != 0
        lock_here = who is not None and who.lock_tells(boot_id, locks.identity)
        found.append(
            Seen(
                section=i,
                claim=claim,
                beat=memory.load(at + lay.BEAT),
                state=memory.load(at + lay.STATE),
                used=used,
                who=who,
                # Without any identity (killed while it claimed a fresh section) nothing was published either.
                dead=bool(claim and (lock_here or not used) and not locks.section_locked(i)),
                left=memory.load(at + lay.LEFT),
            )
        )
    return found


def _alive(layout: Layout, before: list[Seen]) -> set[int]:
    """Sections whose beat moved since `before` was taken."""
    load = layout.memory.load
    return {s.section for s in before if s.claim and load(layout.section(s.section) + lay.BEAT) != s.beat}


def _still_read(layout: Layout, section: int, before: list[Seen], alive: set[int]) -> bool:
    """Does a peer that is not proven dead still read what the section's last owner published?

    One whose beat is still may be a stopped process or VM, which reads on when it is continued."""
    load = layout.memory.load
    # an own lock does not look held
    readers = {s.section for s in before if s.claim and not s.dead} | alive
    for reader in readers - {section}:
        users = load(layout.pair(reader, section) + lay.USERS)
        tag = load(layout.pair(section, reader) + lay.BELL) >> 32
        if users & 0xFFFFFFFF and users >> 32 == tag:
            return True
    return False


def _has_mail(layout: Layout, section: int, readers: set[int]) -> bool:
    """Is there a peer that has not taken all messages of the section's last owner? One of them may be the
    answer to a connection whose bytes are there already."""
    load = layout.memory.load
    for reader in readers - {section}:
        there, back = layout.pair(section, reader), layout.pair(reader, section)
        sent, taken = load(there + lay.OUTBOX), load(back + lay.INBOX)
        head = taken if taken >> 32 == load(there + lay.BELL) >> 32 else 0
        if sent >> 32 == load(back + lay.BELL) >> 32 and (sent ^ head) & 0xFFFFFFFF:
            return True
    return False


def _free(before: list[Seen]) -> list[Seen]:
    """Never used ones, then those left cleanly, the oldest first."""
    return sorted((s for s in before if not s.claim), key=lambda s: (s.used, s.left if s.used else 0))


def claim_section(
    layout: Layout,
    locks: Locks,
    boot_id: bytes,
    machine_id: bytes,
    rng: random.Random,
    *,
    path: str | None = None,
) -> Generator[float, None, Claim]:
    """Claim a section: never used ones first, then those left cleanly (oldest first), then those of the
    proven dead.

    Yields seconds to wait. Raises RegionError (ENOSPC) that names the silent sections when there is none.
    """
    before = survey(layout, locks, boot_id)
    anyone = {s.section for s in before if s.claim}
    for seen in _free(before):
        section = seen.section
        if not seen.used or not (
            _has_mail(layout, section, anyone) or _still_read(layout, section, before, anyone)
        ):
            claim = yield from _take(layout, locks, seen, rng)
            if claim:
                return claim
    # Only now is it worth watching the beats, and every answer below rests on that.
    before = survey(layout, locks, boot_id)
    yield STILL_S
    alive = _alive(layout, before)
    machines = {s.who.machine_id for s in before if s.section in alive and s.who}
    left = _free(before)
    dead = [
        s
        for s in before
        if s.claim and s.section not in alive and (s.dead or _rebooted(s, boot_id, machine_id, machines))
    ]
    for seen in left + dead:
        if not _still_read(layout, seen.section, before, alive):
            claim = yield from _take(layout, locks, seen, rng)
            if claim:
                return claim
    names = []
    for seen in before:
        if seen.section not in alive:
            still_read = ", still being read" if seen in left or seen in dead else ""
            names.append(f"{seen.section} ({seen.who.name if seen.who else 'no name'}{still_read})")
    raise sections_full(names, layout.peers, path)


def name_taken(
    layout: Layout, locks: Locks, boot_id: bytes, name: str
) -> Generator[float, None, Identity | None]:
    """Who else goes by this name and is alive: another machine (its boot id differs), such as a clone of the
    same image.

    Yields seconds to wait, only if somebody is in doubt: a still beat is that machine before its reboot.
    """
    others = [
        s for s in survey(layout, locks, boot_id) if s.claim and not s.dead and s.who and s.who.name == name
    ]
    others = [s for s in others if s.who and s.who.boot_id != boot_id]
    if others:
        yield STILL_S
        alive = _alive(layout, others)
        return next((s.who for s in others if s.section in alive), None)
    return None


def release_claim(layout: Layout, locks: Locks, claim: Claim) -> None:
    """Undo a claim that no engine was made of."""
    layout.memory.cas(layout.section(claim.section) + lay.CLAIM, claim.word, 0)
    locks.unlock_section(claim.section)


def _rebooted(seen: Seen, boot_id: bytes, machine_id: bytes, living_machines: set[bytes]) -> bool:
    """The same machine came back under another boot id, and its beat is still: its former life is over. A
    machine id that a living peer has too is a cloned image and proves nothing."""
    who = seen.who
    return (
        who is not None
        and who.machine_id == machine_id != bytes(16)
        and who.boot_id != boot_id
        and machine_id not in living_machines
    )


def _take(
    layout: Layout, locks: Locks, seen: Seen, rng: random.Random
) -> Generator[float, None, Claim | None]:
    if not locks.lock_section(seen.section):
        return None
    at, word = layout.section(seen.section) + lay.CLAIM, rng.getrandbits(64) | 1
    taken = False
    try:
        if layout.memory.cas(at, seen.claim, word):
            yield SETTLE_S  # on some mappings a compare-and-swap is not one: see that ours stands
            taken = layout.memory.load(at) == word
    finally:
        if not taken:  # also when whoever drives this generator gave up
            layout.memory.cas(at, word, seen.claim)
            locks.unlock_section(seen.section)
    return Claim(seen.section, word) if taken else None


def reap(
    layout: Layout,
    locks: Locks,
    boot_id: bytes,
    *,
    force: Callable[[Seen], bool] | None = None,
    watch_s: float = 3.0,
) -> Generator[float, None, list[Seen]]:
    """Free the sections whose owner is proven dead, or whose beat is still for `watch_s` seconds and for
    which `force` says so.

    For `shmsock reap`: a person knows what no observer can, that a silent VM will not come back. Yields
    seconds to wait, returns what was freed. Sections that somebody still reads are left.
    """
    before = survey(layout, locks, boot_id)
    yield watch_s
    alive = _alive(layout, before)
    freed = []
    for seen in before:
        if not seen.claim or seen.section in alive or _still_read(layout, seen.section, before, alive):
            continue
        if (seen.dead or (force is not None and force(seen))) and layout.memory.cas(
            layout.section(seen.section) + lay.CLAIM, seen.claim, 0
        ):
            freed.append(seen)
    return freed
