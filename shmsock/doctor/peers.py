"""The peers of a region: who is dead, stopped or silent, who is rung in vain, and what is used up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from shmsock.doctor.finding import Finding, errors_of
from shmsock.engine.layout import Layout
from shmsock.errors import command, other_memory
from shmsock.native._core import lib
from shmsock.observe.snapshot import Content, Section
from shmsock.region.base import Region
from shmsock.region.sizes import short_size

__all__ = ["alone", "peers", "room"]

_THERE = ("live", "silent", "attaching", "leaving")


def alone(content: Content) -> bool:
    """Is there at most one who lives?"""
    return sum(section.state in _THERE for section in content.sections) < 2


def peers(region: Region, content: Content) -> Iterator[Finding]:
    """Tell of the owners of all sections, as they are seen from outside."""
    url, state = region.url, Counter(section.state for section in content.sections)
    live = [s for s in content.sections if s.state == "live"]
    told = ", ".join(f"{s.name or 'no name'} runs {s.release}" for s in live[:16])
    yield Finding("peers", "ok", f"{len(live)} live" + (f": {told}" if live else ""), region=url)
    if len(live) == 1 and alone(content):
        yield Finding(
            "alone",
            "note",
            f"{live[0].name or 'no name'} is alone",
            "nobody else is on this memory",
            other_memory(),
            url,
        )
    for section in content.sections:
        if section.state == "dead":
            yield Finding(
                "peer-dead",
                "warning",
                f"section {section.number} ({section.title}): its owner was killed",
                "its section is not used again until somebody frees it; a living peer does so by itself",
                command("reap", url),
                url,
            )
        elif section.state == "silent":
            yield _silent(region, section)
        if section.upgrade and section.state == "live":
            seen, mend = errors_of(section.upgrade, "")
            why = "it and this version do not connect to each other; others are not concerned"
            yield Finding("peer-version", "warning", seen, why, mend, url)
        if section.doorbell_gone and section.doorbell:
            yield Finding(
                "doorbell",
                "warning",
                f"section {section.number} ({section.title}) has doorbell {section.doorbell['id']} of a "
                "former ivshmem server",
                "it is kicked in vain, and has to poll",
                "start the server, then all of its peers anew, guests included",
                url,
            )
    if not state["free"] + state["left"]:
        yield Finding(
            "sections",
            "warning" if state["dead"] else "error",
            f"all {content.peers} sections are taken",
            "nobody else can attach",
            f"{command('reap', url)}; or make a region with more: shmsock create ... --peers N",
            url,
        )


def _silent(region: Region, section: Section) -> Finding:
    """Tell of one whose beat stands still."""
    seen = f"section {section.number} ({section.title}): its beat stands still"
    why = "connections to it wait, and are reset after 3 s"
    if section.here and region.section_locked(section.number):
        mend = f"kill -CONT {section.pid}, or kill it, when ps agrees that it is that process"
        return Finding("peer-stopped", "warning", f"{seen}; it is stopped", why, mend, region.url)
    free = command("reap", region.url, f"--section {section.number}")
    mend = f"let its VM go on if that is paused; if it is gone for good: {free}"
    return Finding("peer-silent", "warning", f"{seen}; its VM is paused, or gone", why, mend, region.url)


def room(region: Region, content: Content, layout: Layout) -> Iterator[Finding]:
    """Tell whose slots or ring memory are used up: an eighth is kept for those who hold little."""
    for section in content.sections:
        if section.state not in _THERE or not section.readable:
            continue
        rings = [slot.ring for slot in layout.slots_in_use(section.number)]
        used, ring_bytes = len(rings), min(sum(rings), layout.arena_bytes)
        slots, arena = layout.slots, layout.arena_bytes
        given = arena - arena // lib.SH_KEPT_FOR_LITTLE - slots * lib.SH_MIN_RING  # beyond what is kept
        left = given - ring_bytes + used * lib.SH_MIN_RING
        if used >= layout.connections:
            yield _used_up(region, section, layout, "slots-full", f"{used} of its {slots} connections")
        elif given > left * 16:
            part = f"{ring_bytes >> 10} of its {arena >> 10} KiB for rings, and keeps the rest for small ones"
            yield _used_up(region, section, layout, "arena-full", part)


def _used_up(region: Region, section: Section, layout: Layout, name: str, part: str) -> Finding:
    size = short_size(layout.region_bytes * 2)
    return Finding(
        name,
        "warning",
        f"section {section.number} ({section.title}) uses {part}",
        "new connections are refused"
        if name == "slots-full"
        else "rings do not grow any more: less is sent at a time, and slower",
        "close connections, have their readers read, or make a larger region: shmsock create FILE --size "
        f"{size} --peers {layout.peers}",
        region.url,
    )
