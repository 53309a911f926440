"""The content of a region, for people: who is attached, who listens, which connections there are.

Nothing is written. What is read is somebody else's and may be nonsense or half written: shown, never trusted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from shmsock.address import boot_id
from shmsock.engine import layout as lay
from shmsock.engine.attach import Seen, survey
from shmsock.engine.features import NONE, OWN, release_text
from shmsock.engine.layout import Layout, SlotWords, read_layout, region_terms, too_small, version_and_size
from shmsock.observe.memory import memory_of
from shmsock.region.base import Region, map_bytes
from shmsock.region.file import FileRegion
from shmsock.region.info_block import find_in_file
from shmsock.region.locks import SERVER_LOCK
from shmsock.region.place import Holder, holders
from shmsock.region.storage import filesystem

__all__ = [
    "Content",
    "OldFile",
    "Section",
    "busy_sections",
    "content_of",
    "inspect",
    "is_readable",
    "old_files",
    "section_of",
    "sections",
    "slot_state",
    "slots_of",
    "with_doorbells",
]

BEAT_S = 0.5
"""A beat moves five times a second at least: one that stands still so long is silent (or its machine very
busy)."""
MOST = 20_000
"""Slots that are looked at in one go: what a hostile peer writes costs no more than that."""
SCANNED = 1 << 20
"""To find so many, that many are looked through."""
Key = tuple[int, int]
"""Section and slot."""
Slots = Mapping[Key, SlotWords]


@dataclass(frozen=True)
class Section:
    """One peer's part of a region, as seen from outside."""

    number: int
    state: str
    """free, left, live, silent, dead (proven: its lock fell), attaching, or leaving."""
    name: str | None
    pid: int | None
    boot: str | None
    here: bool
    """Does its owner run under this kernel?"""
    doorbell: dict[str, int] | None = None
    """The doorbell that kicks it: "id" and "vectors" on the ivshmem server of the region."""
    doorbell_gone: bool = False
    """That id is not the present server's: it was a former one's, and kicks nobody, or somebody else."""
    futex: bool = False
    """Do peers under its kernel kick it by a futex? With neither, it polls."""
    release: str | None = None
    """The version of shmsock that it says it runs; "0.1": one that does not say."""
    features: list[int] = field(default_factory=list)
    """Bits of what it offers to those who link to it."""
    upgrade: str = ""
    """Why this version and its do not connect, and which side is to be upgraded."""
    readable: bool = True
    """May this version look at more than its identity?"""
    ports: list[int] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    """Internet addresses of its machine, as it publishes them."""
    connections: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name or 'no name'}, process {self.pid}"


@dataclass(frozen=True)
class Content:
    """`problem` says why there are no sections."""

    state: str
    """formatted, unformatted, foreign, or broken (too small, too)."""
    problem: str = ""
    version: int | None = None
    release: str | None = None
    """The version of shmsock that formatted it; None: one that did not say."""
    upgrade: str = ""
    """Why programs of this version may not attach, and what is to be upgraded."""
    region_id: str | None = None
    bytes: int | None = None
    peers: int = 0
    connections_per_peer: int = 0
    section_bytes: int = 0
    ring_bytes_per_peer: int = 0
    sections: list[Section] = field(default_factory=list)


def inspect(region: Region, watch_s: float = BEAT_S) -> Content:
    """Read a region that others may be using. Takes `watch_s` seconds when it is formatted."""
    head = _head(region)
    word = int.from_bytes(head[:8], "little")
    memory = memory_of(region)
    try:
        if word not in (0, lay.MAGIC):
            return Content("foreign", f"it begins with {head[:16].hex(' ')}: it holds something else")
        if word == 0 and (small := too_small(memory)):
            return Content("broken", small)
        if not any(head) and (small := too_small(memory, 16)):  # for so many it would be formatted
            return Content("unformatted", f"its first page is all zero, and {small}")
        if not any(head):
            return Content(
                "unformatted",
                "its first page is all zero: nobody formatted it yet (the first who attaches does), or a "
                "boot zeroed it",
            )
        if word == 0:
            return Content(
                "unformatted",
                "somebody began to format it, or zeroed its first word, and did not come to the end",
            )
        version, size = version_and_size(memory)
        try:
            layout = read_layout(memory, looks=True)
        except OSError as error:
            barred = OWN.barred(region_terms(memory), "the region was made by", looks=True)
            barred = barred if version in lay.VERSIONS else ""
            return Content("broken", error.strerror or str(error), version, upgrade=barred, bytes=size)
        return content_of(layout, sections(layout, region, watch_s))
    finally:
        memory.release()


def content_of(layout: Layout, found: list[Section]) -> Content:
    """Describe a region that is formatted."""
    terms = region_terms(layout.memory)
    return Content(
        "formatted",
        version=version_and_size(layout.memory)[0],
        release=release_text(terms.release) if terms.release else None,
        upgrade=OWN.barred(terms, "the region was made by"),
        region_id=f"{layout.region_id:#018x}",
        bytes=layout.region_bytes,
        peers=layout.peers,
        connections_per_peer=layout.connections,
        section_bytes=layout.section_bytes,
        ring_bytes_per_peer=layout.arena_bytes,
        sections=found,
    )


def _head(region: Region) -> bytes:
    """Read the first page, of a file not through the mapping: even reading a hole there takes a page."""
    if isinstance(region, FileRegion):
        return region.peek(lay.HEADER)
    return bytes(region.mmap[: lay.HEADER])


def sections(layout: Layout, region: Region, watch_s: float = BEAT_S) -> list[Section]:
    """Survey all sections twice, `watch_s` seconds apart."""
    boot = boot_id()
    before = survey(layout, region, boot)
    if any(seen.claim for seen in before):
        time.sleep(watch_s)
    after = survey(layout, region, boot)
    slots, _ = slots_of(layout, [seen.section for seen in after if seen.claim and is_readable(seen)])
    own: dict[int, list[SlotWords]] = {seen.section: [] for seen in after}
    for (number, _), words in slots.items():
        own[number].append(words)
    found = [
        section_of(layout, first, now, boot, own[now.section])
        for first, now in zip(before, after, strict=True)
    ]
    return with_doorbells(region, found)


def slots_of(layout: Layout, sections: Sequence[int], most: int = MOST) -> tuple[dict[Key, SlotWords], bool]:
    """Read the slots of these sections that are in use: `most` of them, and of each section as many as of any
    other, if it has so many. Returns them, and whether there are more."""
    found: dict[Key, SlotWords] = {}
    used = sorted((layout.slots_used(section), section) for section in sections)
    if sum(highest for highest, _ in used) > most:
        most //= 2
    more, scanned = False, SCANNED // max(len(used), 1)
    for done, (highest, section) in enumerate(used):
        part = (most - len(found)) // (len(used) - done)
        own = list(islice(layout.slots_in_use(section, scanned), part + 1))
        more |= highest > scanned or len(own) > part
        found |= {(section, words.slot): words for words in own[:part]}
    if more:  # the other half is of their peers: without it a connection would look as if it ended
        for words in list(found.values()):
            other = words.peer, words.peer_slot
            known = other in found or words.peer not in sections or words.peer_slot >= layout.slots
            if not (known or words.asked) and (theirs := layout.slot_in_use(*other)):
                found[other] = theirs
    return found, more


def with_doorbells(region: Region, found: list[Section]) -> list[Section]:
    """Mark the sections whose doorbell is not one of the present ivshmem server's, where that is known."""
    ids = _ids(region)
    if ids is None:
        return found
    return [replace(s, doorbell_gone=s.doorbell is not None and s.doorbell["id"] not in ids) for s in found]


def _ids(region: Region) -> frozenset[int] | None:
    """Get the ids that the region's ivshmem server gave to others; None: that cannot be known here."""
    if region.doorbell is not None:
        region.doorbell.news()
        return region.doorbell.others()
    if region.kind == "file" and region.can_lock and not region.section_locked(SERVER_LOCK):
        return frozenset()  # no server serves it
    return None


def section_of(layout: Layout, first: Seen, now: Seen, boot: bytes, slots: Iterable[SlotWords]) -> Section:
    """Describe a section that was looked at twice: `first`, and `now`."""
    who = now.who
    if not now.claim:
        state = "left" if now.used else "free"
    elif now.dead:
        state = "dead"
    elif now.beat == first.beat and now.claim == first.claim:
        state = "silent"
    elif who is None or not now.state:
        state = "attaching"
    else:
        state = "leaving" if now.state == lay.LEAVING else "live"
    terms = who.terms if who else NONE
    named = who is not None and state not in ("free", "left")
    shown = named and is_readable(now)
    bell = layout.doorbell(now.section) if shown else None
    return Section(
        number=now.section,
        state=state,
        name=who.name if who else None,
        pid=who.pid if who else None,
        boot=who.boot_id.hex() if who else None,
        here=who is not None and who.boot_id == boot != bytes(16),
        doorbell={"id": bell[0], "vectors": bell[1]} if bell else None,
        futex=shown and who is not None and bool(who.flags & lay.FLAG_FUTEX),
        release=release_text(terms.release) if named else None,
        features=[bit for bit in range(64) if named and terms.offers >> bit & 1],
        upgrade=OWN.refuses(terms, f"section {now.section} ({who.name}) runs") if named and who else "",
        readable=not named or shown,
        ports=sorted({port for port, _ in layout.listener_entries(now.section)}) if shown else [],
        addresses=sorted(map(str, layout.published(now.section, now.life)[1])) if shown else [],
        connections=_connections(slots) if shown else [],
    )


def is_readable(seen: Seen) -> bool:
    """May this version look at more of a section than its owner's identity?"""
    return seen.who is None or not OWN.barred(seen.who.terms, "", looks=True)


def slot_state(words: SlotWords) -> str:
    """Return what a slot's owner says of the connection: opening, open, half-closed (it has sent FIN), or
    closing (it has let go)."""
    if words.asked:
        return "opening"
    return "closing" if words.bits & lay.DONE else "half-closed" if words.bits & lay.FIN else "open"


def _connections(slots: Iterable[SlotWords]) -> list[dict[str, Any]]:
    return [
        {
            "slot": words.slot,
            "state": slot_state(words),
            "peer_section": words.peer,
            "peer_slot": words.peer_slot,
            "generation": words.generation,
        }
        for words in slots
    ]


def busy_sections(region: Region) -> list[str]:
    """Find who uses a region: their beat moves, or this kernel says that they run. Nobody, if it is none."""
    content = inspect(region)
    busy = []
    for section in content.sections:
        if section.state in ("live", "attaching", "leaving") or (
            section.state == "silent" and section.here and region.section_locked(section.number)
        ):
            stopped = ", stopped" if section.state == "silent" else ""
            busy.append(f"section {section.number} ({section.title}{stopped})")
    return busy


@dataclass(frozen=True)
class OldFile:
    """A file that was removed from a region's path, and is in use still."""

    held_by: list[Holder]
    content: Content | None
    """None: it cannot be read."""


def old_files(path: str) -> list[OldFile]:
    """Find the removed files of that path, as far as this process may see others."""
    found: dict[int, list[Holder]] = {}
    for holder in holders(path):
        found.setdefault(holder.inode, []).append(holder)
    return [OldFile(held_by, _content_of(held_by[0], path)) for held_by in found.values()]


def _content_of(holder: Holder, path: str) -> Content | None:
    """Inspect a file through one of those who have it open."""
    directory = f"/proc/{holder.pid}/fd"
    try:
        for name in os.listdir(directory):
            link = f"{directory}/{name}"
            if os.readlink(link) != f"{path} (deleted)" or os.stat(link).st_ino != holder.inode:
                continue
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                origin, size = find_in_file(fd, size, path)
                mapping = map_bytes(fd, size, False, origin)
                region = FileRegion(path, mapping, fd, False, filesystem(fd), origin=origin)
            except BaseException:
                os.close(fd)
                raise
            with region:
                return inspect(region)
    except OSError:
        pass  # it has ended, or is another user's
    return None
