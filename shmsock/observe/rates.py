"""A region watched for a while: what it looks like now, and what has moved in it, in a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from shmsock.address import boot_id
from shmsock.engine import layout as lay
from shmsock.engine.attach import Seen, survey
from shmsock.engine.counters import SHOWN
from shmsock.engine.layout import Layout, SlotWords, read_layout
from shmsock.errors import format_error
from shmsock.observe.connections import Connection, End, Way, connections
from shmsock.observe.memory import memory_of
from shmsock.observe.snapshot import (
    BEAT_S,
    MOST,
    Content,
    Section,
    content_of,
    is_readable,
    section_of,
    slots_of,
    with_doorbells,
)
from shmsock.region.base import Region

__all__ = ["LOOK_S", "Node", "View", "Watcher"]

LOOK_S = 0.1
"""Positions in rings are counted modulo 4 GiB, of which half may pass between two looks: 20 GB/s."""
SHARE = 10
"""A look takes one of so many parts of the time at most."""
Counters = dict[str, int]
Key = tuple[int, int | None, int | None]


@dataclass(frozen=True)
class Node:
    """The owner of a section, and what it does."""

    section: Section
    asleep: bool
    """Does its loop sleep, so that news have to wake it?"""
    connections: int
    links: int
    """Those that carry datagrams: from it, or to it."""
    ring_bytes: int
    """In use by its connections."""
    queued_in: int
    """Bytes for it that it has not read."""
    queued_out: int
    counts: Counters
    """Totals since it attached (of `sleeps`: since the section was made). Those that it shows modulo 2**32
    begin with that, and go on beyond it while they are watched. A version that shows none has only `sleeps`
    and `pumps`."""
    rates: dict[str, float]
    """What the same counters gained in a second, and in any case bytes, by its connections."""

    def as_json(self) -> dict[str, Any]:
        section = asdict(self.section)
        del section["connections"]
        return {**section, **{k: v for k, v in vars(self).items() if k != "section"}}


@dataclass(frozen=True)
class View:
    """A region at one moment."""

    taken: float
    """Seconds since the epoch."""
    url: str
    content: Content
    nodes: list[Node]
    connections: list[Connection]
    more: bool
    """There are more connections than were looked at."""
    seconds: float
    """Rates are of so many seconds."""
    displaced: str
    """Where the region's file is by now: see Region.displaced()."""
    history: dict[int, deque[float]] = field(default_factory=dict)
    """Of each section, bytes in a second, in and out, at former views; under -1 what all have sent."""

    def as_json(self) -> dict[str, Any]:
        content = asdict(self.content)
        del content["sections"]
        return {
            "taken": self.taken,
            "seconds": self.seconds,
            "url": self.url,
            "region": content,
            "displaced": self.displaced,
            "peers": [node.as_json() for node in self.nodes],
            "connections": [c.as_json() for c in self.connections],
            "more_connections": self.more,
        }


class _Total:
    """A counter that others may set to anything, summed up: what it gained, modulo `size`."""

    def __init__(self, now: int, size: int) -> None:
        self.first, self.last, self.size, self.gained = now, now, size, 0

    def see(self, now: int) -> None:
        gain = (now - self.last) % self.size
        self.last = now
        if gain < self.size - self.size // 4:  # else it went backwards: torn, or nonsense
            self.gained += gain


class Watcher:
    """Looks at a region again and again. Nothing is written. Its memory is let go of by close()."""

    def __init__(self, region: Region, history: int = 120, most: int = MOST) -> None:
        """`most`: slots. Raises RegionFormatError when it is not formatted."""
        self._region, self._length, self._most = region, history, most
        self._memory = memory_of(region)
        try:
            self.layout: Layout = read_layout(self._memory, looks=True)
        except BaseException:
            self._memory.release()
            raise
        self._boot = boot_id()
        self._surveys: deque[tuple[float, list[Seen]]] = deque()
        self._moved: dict[Key, _Total] = {}
        self._counted: dict[tuple[int, int], dict[str, _Total]] = {}
        self._at = 0.0  # the last view, or the first look, and what had moved by then
        self._then: tuple[dict[Key, int], dict[tuple[int, int], Counters]] = {}, {}
        self._history: dict[int, deque[float]] = {}
        self._slots: dict[tuple[int, int], SlotWords] = {}
        self._more = False

    def close(self) -> None:
        self._memory.release()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, seconds: float, idle: Callable[[float], bool] | None = None) -> View:
        """Look often for so long, and return what is there at the end. `idle` sleeps for so many seconds, and
        returns whether to stop at once."""
        end, pause = time.monotonic() + seconds, idle or _sleep
        while True:
            begin = time.monotonic()
            self.look()
            now = time.monotonic()
            wait = max(LOOK_S, (now - begin) * SHARE)
            if now >= end or pause(min(wait, end - now)):
                return self.view()

    def look(self) -> None:
        """See what has moved since the last look."""
        now_there = read_layout(self._memory, looks=True)
        if (now_there.region_id, now_there.region_bytes) != (self.layout.region_id, self.layout.region_bytes):
            path = self._region.path
            raise format_error(f"region {path} was formatted anew while it was looked at: try again", path)
        now = time.monotonic()
        found = survey(self.layout, self._region, self._boot)
        self._surveys.append((now, found))
        while len(self._surveys) > 2 and now - self._surveys[1][0] >= BEAT_S:
            self._surveys.popleft()
        owned = [seen for seen in found if seen.claim and is_readable(seen)]
        if first := len(self._surveys) == 1 and not self._at:
            self._at = now
        self._slots, self._more = slots_of(self.layout, [seen.section for seen in owned], self._most)
        for (section, slot), words in self._slots.items():
            key = section, slot, words.generation
            if key not in self._moved:  # positions of what began since the last look began with 0
                self._moved[key] = _Total(words.tail if first else 0, 1 << 32)
            self._moved[key].see(words.tail)
        there = {(section, slot, words.generation) for (section, slot), words in self._slots.items()}
        self._moved = {key: total for key, total in self._moved.items() if key in there}
        lives = set()
        for seen in owned:
            lives.add(life := (seen.section, seen.life))
            totals = self._counted.setdefault(life, {})
            for name, (value, size) in self._counters(seen).items():
                totals.setdefault(name, _Total(value, size)).see(value)
        self._counted = {life: totals for life, totals in self._counted.items() if life in lives}

    def _counters(self, seen: Seen) -> dict[str, tuple[int, int]]:
        """Return the counters of a section's owner, each with the number that it begins anew at."""
        layout, number = self.layout, seen.section
        found = {
            "sleeps": (layout.sleep_seq(number)[0], 1 << 62),
            "pumps": (layout.pumps(number), 1 << 64),
        }
        if seen.who and seen.who.claim == seen.claim and seen.who.flags & lay.FLAG_COUNTS:
            for name, value in layout.counts(number).items():
                found[name] = value, 1 << (32 if name in SHOWN else 64)
        return found

    def displaced(self) -> str:
        """Tell where the region's file is by now: see Region.displaced()."""
        return self._region.displaced()

    def view(self) -> View:
        """Describe the region as it was at the last look, with rates since the last view."""
        now, found = self._surveys[-1]
        past = self._surveys[0][1]
        sections = {
            s.section: section_of(self.layout, old, s, self._boot, [])
            for old, s in zip(past, found, strict=True)
        }
        sections = {s.number: s for s in with_doorbells(self._region, [*sections.values()])}
        owned = {number: s for number, s in sections.items() if s.state not in ("free", "left")}
        life = {seen.section: seen.life for seen in found}
        took = now - self._at
        rated = list(connections(self.layout, self._slots, owned))
        if took > 0:
            for c in rated:
                c.sent.rate, c.received.rate = self._gained(c.local) / took, self._gained(c.remote) / took
        theirs: dict[int, list[Connection]] = {number: [] for number in owned}
        for c in rated:
            for number in {c.local.section, c.remote.section} & owned.keys():
                theirs[number].append(c)
        nodes = [self._node(section, life[number], theirs[number], took) for number, section in owned.items()]
        self._remember(nodes, now)
        return View(
            taken=time.time(),
            url=self._region.url,
            content=content_of(self.layout, list(sections.values())),
            nodes=nodes,
            connections=rated,
            more=self._more,
            seconds=took,
            displaced=self.displaced(),
            history=self._history,
        )

    def _gained(self, end: End) -> int:
        """Count the bytes that it has written since the last view."""
        key = end.section, end.slot, end.generation
        total = self._moved.get(key)
        return total.gained - self._then[0].get(key, 0) if total else 0

    def _node(self, section: Section, life: int, own: list[Connection], took: float) -> Node:
        number = section.number
        ways: list[tuple[Way, Way]] = []  # from it, to it; a connection with itself is both
        for c in own:
            if c.local.section == number:
                ways.append((c.sent, c.received))
            if c.remote.section == number:
                ways.append((c.received, c.sent))
        totals = self._counted.get((number, life), {})
        then = self._then[1].get((number, life), {})
        rates = {
            name: (total.gained - then.get(name, 0)) / took for name, total in totals.items() if took > 0
        }
        if "bytes_out" not in totals:
            rates["bytes_out"] = sum(out.rate or 0 for out, _ in ways)
            rates["bytes_in"] = sum(in_.rate or 0 for _, in_ in ways)
        return Node(
            section=section,
            asleep=self.layout.sleep_seq(number)[1],
            connections=sum(not c.datagrams for c in own),
            links=sum(c.datagrams for c in own),
            ring_bytes=sum(out.ring for out, _ in ways),
            queued_in=sum(in_.queued or 0 for _, in_ in ways),
            queued_out=sum(out.queued or 0 for out, _ in ways),
            counts={name: total.first + total.gained for name, total in totals.items()},
            rates=rates,
        )

    def _remember(self, nodes: list[Node], now: float) -> None:
        self._at = now
        self._then = (
            {key: total.gained for key, total in self._moved.items()},
            {life: {n: t.gained for n, t in totals.items()} for life, totals in self._counted.items()},
        )
        sent = {node.section.number: node.rates.get("bytes_out", 0.0) for node in nodes}
        for node in nodes:
            line = self._history.setdefault(node.section.number, deque(maxlen=self._length))
            line.append(sent[node.section.number] + node.rates.get("bytes_in", 0.0))
        self._history.setdefault(-1, deque(maxlen=self._length)).append(sum(sent.values()))
        for gone in self._history.keys() - sent.keys() - {-1}:
            del self._history[gone]


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
