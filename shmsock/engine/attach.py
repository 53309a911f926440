"""Claiming a section, giving it back, and taking back what the dead left.

Claiming may wait: 20 ms to see that the claim stands, where somebody of another kernel could take it as well;
where no section is free, 500 ms to see whose beat does not move, and then until the bytes that a section's
last owner left are read. As the engine knows no clock, it is a generator that yields seconds to wait and
returns the Claim. But for the claim word, nothing in a section is written by two processes.

What was seen before a claim proves nothing: another may have lived in the section and left in between. So
whether anybody still reads there is found out behind the compare-and-swap, when no owner can come any more,
and a section that is read is given back. The readers' side is `users` and the inbox (native/LAYOUT.md, rule
U); tests/models/reuse.pml is the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from shmsock.engine.layout import Identity, Layout
from shmsock.errors import section_taken, sections_full

__all__ = ["Claim", "Locks", "Seen", "claim_section", "name_taken", "reap", "release_claim", "survey"]

SETTLE_S = 0.02
LOOK_S = 0.005
STILL_S = 0.5
PATIENCE_S = (
    65.0  # who left a section, and is read: longer than a reader keeps what it has (Settings.linger_s)
)


class Locks(Protocol):
    """Section locks of the region's file: the kernel drops them with the process that holds them."""

    identity: tuple[int, int]

    @property
    def lock_fd(self) -> int: ...
    @property
    def can_lock(self) -> bool: ...
    def lock_section(self, index: int) -> bool: ...
    def unlock_section(self, index: int) -> None: ...
    def section_locked(self, index: int) -> bool: ...


@dataclass(frozen=True)
class Claim:
    section: int
    word: int


@dataclass(frozen=True)
class Seen:
    """One section, as seen from outside."""

    section: int
    claim: int
    beat: int
    state: int
    used: bool
    life: int
    """The incarnation of its owner, or of the last one."""
    who: Identity | None
    dead: bool
    """Proven: its lock is under this kernel and nobody holds it."""
    left: int


def survey(layout: Layout, locks: Locks, boot_id: bytes) -> list[Seen]:
    found = []
    for i in range(layout.peers):
        claim, who, life = layout.claim(i), layout.identity(i), layout.life(i)
        used = life != 0
        # A former owner's identity says nothing of the one that is just claiming the section.
        lock_here = who is not None and who.claim == claim and who.lock_tells(boot_id, locks.identity)
        found.append(
            Seen(
                section=i,
                claim=claim,
                beat=layout.beat(i),
                state=layout.state(i),
                used=used,
                life=life,
                who=who,
                # Without any identity (killed while it claimed a fresh section) nothing was published either.
                dead=bool(claim and (lock_here or not used) and not locks.section_locked(i)),
                left=layout.departure(i),
            )
        )
    return found


def _alive(layout: Layout, before: list[Seen]) -> set[int]:
    """Return the sections whose beat moved since `before` was taken."""
    return {s.section for s in before if s.claim and layout.beat(s.section) != s.beat}


def _is_read(layout: Layout, section: int, readers: set[int]) -> bool:
    """Has one of these left messages of the section's last owner unread, or does it still read what that
    published? (A message may be the answer to a connection whose bytes are there already.)"""
    if not layout.life(section):
        return False  # nobody ever lived there: no need to wait for readers, whatever others say
    return any(layout.is_read_by(section, reader) for reader in readers - {section})


def _readers(now: list[Seen], alive: set[int]) -> set[int]:
    """Return the sections whose owners may read: all but the proven dead. One whose beat is still may be a
    stopped process or VM, which reads on when it is continued."""
    return {s.section for s in now if s.claim and not s.dead} | alive


def _free(now: list[Seen]) -> list[Seen]:
    """List the free sections: never used ones, then those left cleanly, the oldest first."""
    return sorted((s for s in now if not s.claim), key=lambda s: (s.used, s.left if s.used else 0))


def _freed_since(before: list[Seen], now: list[Seen]) -> bool:
    """Did another free a section under our hands, as it buried the dead one that we were about to take from?
    Then the next round takes it."""
    return any(was.claim and not s.claim for was, s in zip(before, now, strict=True))


class _Patience:
    """Notes how long each section has been as it is, left by its owner, while somebody says that it reads
    there. What a peer says delays others, and does not stop them for good."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[tuple[int, int, int], float]] = {}
        self.waited = 0.0

    def is_over(self, seen: Seen) -> bool:
        state = (seen.claim, seen.life, seen.left)
        since = self._since.get(seen.section)
        if since is None or since[0] != state:
            since = self._since[seen.section] = state, self.waited
        return self.waited - since[1] >= PATIENCE_S


def claim_section(
    layout: Layout,
    locks: Locks,
    boot_id: bytes,
    machine_id: bytes,
    rng: random.Random,
    *,
    path: str | None = None,
    url: str = "",
    only: int | None = None,
    device: bool = True,
    waits: Callable[[list[str]], None] = lambda sections: None,
) -> Generator[float, None, Claim]:
    """Claim a section: never used ones first, then those left cleanly (oldest first), then those of the
    proven dead; `only`: that one, or none. `device`: the region is the memory of a device, for this process
    or, most likely, for others.

    Yields seconds to wait. `waits` is told once when all that can be had are still read by others: of such a
    section no byte is lost that is read within PATIENCE_S. Raises RegionError (ENOSPC) that names the silent
    sections when there is none to wait for.
    """

    def wanted(found: list[Seen]) -> list[Seen]:
        return [s for s in found if only in (None, s.section)]

    patience, told = _Patience(), False
    before, since = survey(layout, locks, boot_id), 0.0
    now = before
    while True:
        watched = patience.waited - since >= STILL_S  # until then, everybody may be alive
        alive = _alive(layout, before) if watched else {s.section for s in now if s.claim}
        # Of a file, a fallen lock is proof enough. The memory of a device is also used under other kernels,
        # one of which may have this one's boot id; and of who has no identity yet, no lock tells.
        alive -= {s.section for s in now if s.dead and s.used and not device}
        machines = {s.who.machine_id for s in now if s.section in alive and s.who}
        dead = [
            s
            for s in now
            if s.claim and s.section not in alive and (s.dead or _rebooted(s, boot_id, machine_id, machines))
        ]
        readers, held = _readers(now, alive), []
        for seen in wanted(_free(now) + dead):
            late = patience.is_over(seen)
            if not late and _is_read(layout, seen.section, readers):
                held.append(f"{seen.section} ({seen.who.name if seen.who else 'no name'})")
                continue
            claim = yield from _take(layout, locks, boot_id, seen, rng, None if late else alive, device)
            if claim:
                return claim
        if watched:
            freed = patience.waited < PATIENCE_S and _freed_since(now, survey(layout, locks, boot_id))
            if not held and not freed:
                break
            before, since = now, patience.waited
        if held and not told and patience.waited >= 2 * STILL_S:
            told = True
            waits(held)
        # Often at first: the readers of one that was just killed are about to notice it, if only now.
        for reader in readers if held and not device else ():
            layout.knock(reader)
        wait = min(max(patience.waited / 8, LOOK_S), STILL_S)
        yield wait
        patience.waited += wait
        now = survey(layout, locks, boot_id)
    # A process that came meanwhile (and may have been quicker just now) was not seen to beat yet; and until
    # it has published its identity, the name is that of the former owner.
    now = survey(layout, locks, boot_id)
    silent = [
        s
        for s in wanted(now)
        if s.section not in alive
        and s.claim == before[s.section].claim
        and (not s.claim or s.who is None or s.who.claim == s.claim)
    ]
    stopped = {
        s.section: s.who.pid
        for s in silent
        if s.who and s.who.lock_tells(boot_id, locks.identity) and locks.section_locked(s.section)
    }
    names = [
        f"{s.section} ({s.who.name if s.who else 'no name'})" for s in silent if s.section not in stopped
    ]
    if only is not None:
        who = now[only].who
        raise section_taken(only, who.name if who else "", bool(names), path, url)
    raise sections_full(names, layout.peers, path, url, list(stopped.values()))


def name_taken(
    layout: Layout, locks: Locks, boot_id: bytes, name: str
) -> Generator[float, None, Identity | None]:
    """Find out whether another live machine (its boot id differs) has this name, such as a clone of the same
    image.

    Yields seconds to wait, only if there is one: if its beat is still it is that machine before its reboot.
    Returns the identity of the other, or None.
    """
    who = [layout.identity(i) if layout.claim(i) else None for i in range(layout.peers)]
    if any(w.name == name and w.boot_id != boot_id for w in who if w):
        others = [
            s
            for s in survey(layout, locks, boot_id)
            if s.claim and not s.dead and s.who and s.who.name == name and s.who.boot_id != boot_id
        ]
        yield STILL_S
        alive = _alive(layout, others)
        return next((s.who for s in others if s.section in alive), None)
    return None


def release_claim(layout: Layout, locks: Locks, claim: Claim) -> None:
    """Undo a claim that no engine was made for."""
    layout.swap_claim(claim.section, claim.word, 0)
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
    layout: Layout,
    locks: Locks,
    boot_id: bytes,
    seen: Seen,
    rng: random.Random,
    alive: set[int] | None,
    device: bool,
) -> Generator[float, None, Claim | None]:
    """Claim that section, unless somebody was quicker or it is still read (not asked if `alive` is None)."""
    if not locks.lock_section(seen.section):
        return None
    word = rng.getrandbits(64) | 1
    taken = False
    try:
        if layout.swap_claim(seen.section, seen.claim, word):
            now = survey(layout, locks, boot_id)
            if device or not _of_one_kernel(now, seen.section, locks, boot_id):
                yield SETTLE_S
                now = survey(layout, locks, boot_id)
            taken = layout.claim(seen.section) == word
            if taken and alive is not None:  # from here on no other owner can come, so the answer stays true
                taken = not _is_read(layout, seen.section, _readers(now, alive))
    finally:
        if not taken:  # also when the caller gave up, and closed this generator
            layout.swap_claim(seen.section, word, seen.claim)
            locks.unlock_section(seen.section)
    return Claim(seen.section, word) if taken else None


def _of_one_kernel(now: list[Seen], own: int, locks: Locks, boot_id: bytes) -> bool:
    """Is everybody who has a section, or had it last, under this kernel, and known by its lock? (`own` is
    claimed, and its lock ours.)

    In a guest with one emulated CPU, a compare-and-swap of a device's memory is a load and then a store: it
    may overwrite a claim that came in between, so whoever meets such guests waits and looks whether its own
    stands. Under one kernel there is nothing to see: the section's lock lets nobody else try. Should the
    first guest that the region ever sees overwrite a claim in this very moment, then nobody is harmed: it
    waits those 20 ms before it stores anything more, and a node looks at its claim word at each of its calls
    and beats, and stores nothing once that is another's.
    """

    def is_here(seen: Seen) -> bool:
        if seen.claim and seen.section != own and (seen.who is None or seen.who.claim != seen.claim):
            return locks.section_locked(seen.section)  # somebody who is claiming it: the identity is not its
        return not seen.used or (seen.who is not None and seen.who.lock_tells(boot_id, locks.identity))

    return locks.can_lock and all(map(is_here, now))


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
    seconds to wait, returns what was freed. What somebody still reads there, it can go on reading: whoever
    claims the section checks that.
    """
    before = survey(layout, locks, boot_id)
    yield watch_s
    alive = _alive(layout, before)
    freed = []
    for seen in before:
        if not seen.claim or seen.section in alive:
            continue
        wanted = seen.dead or (force is not None and force(seen))
        if wanted and layout.swap_claim(seen.section, seen.claim, 0):
            freed.append(seen)
    return freed
