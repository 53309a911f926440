"""The connections of a region, as both of their ends tell of them: who talks with whom, from which port to
which, and what waits in the rings. Shown, never trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shmsock.engine import layout as lay
from shmsock.engine.layout import Layout, SlotWords
from shmsock.observe.snapshot import Key, Section, Slots

__all__ = ["Connection", "End", "Way", "connections"]

AGAIN = 100
"""So many are looked at once more, as their reader went on meanwhile. Nonsense looks like that, too."""

# Nobody changes these. Frozen, they would take three times as long to make, and there are thousands.


@dataclass
class End:
    """One end of a connection."""

    section: int
    slot: int | None
    """None: it is not known yet."""
    generation: int | None
    """Which life of the slot; None: the slot is not in use by this connection (yet, or any more)."""
    name: str | None
    port: int | None
    """0: it carries datagrams; None: not known."""

    @property
    def title(self) -> str:
        name = self.name or f"section {self.section}"
        return name if self.port == 0 else f"{name}:{'?' if self.port is None else self.port}"


@dataclass
class Way:
    """One direction of a connection."""

    queued: int | None
    """Bytes written, and not read yet. None: what both ends say does not go together."""
    ring: int
    """Bytes; 0: not known."""
    waits: bool
    """Does its writer wait for room?"""
    told: bool
    """Has its reader been told of news that it has not looked for yet?"""
    fin: bool
    reset: bool
    done: bool
    """Its writer has let go of the connection."""
    rate: float | None = None
    """Bytes in a second; None: it was not watched."""


@dataclass
class Connection:
    """`local` has opened it, as far as that is known."""

    state: str
    """opening, open, half-closed (one side has sent FIN), closing (one side has let go), or orphaned (the
    owner of one side is gone, and the other holds it still)."""
    datagrams: bool
    local: End
    remote: End
    sent: Way
    """From `local` to `remote`."""
    received: Way

    @property
    def rate(self) -> float:
        return (self.sent.rate or 0) + (self.received.rate or 0)

    @property
    def queued(self) -> int:
        return (self.sent.queued or 0) + (self.received.queued or 0)

    def seen_from(self, section: int) -> Connection:
        """Return it with that section's end as the local one."""
        if self.local.section == section or self.remote.section != section:
            return self
        return Connection(self.state, self.datagrams, self.remote, self.local, self.received, self.sent)

    def as_json(self) -> dict[str, Any]:
        parts = {name: vars(getattr(self, name)) for name in ("local", "remote", "sent", "received")}
        return {**vars(self), **parts}


def connections(layout: Layout, slots: Slots, sections: Mapping[int, Section]) -> Iterator[Connection]:
    """Put the two ends of each connection together. `sections`: by number, those with an owner."""
    told: dict[Key, bytes] = {}
    again = iter(range(AGAIN))
    answered = {(w.peer, w.peer_slot): key for key, w in slots.items() if w.accepted and not w.asked}

    def is_told(writer: int, reader: int, slot: int | None) -> bool:
        if slot is None or slot >= layout.slots or max(writer, reader) >= layout.peers:
            return False
        if (writer, reader) not in told:
            told[writer, reader] = layout.told(writer, reader)
        return bool(told[writer, reader][slot // 8] >> slot % 8 & 1)

    for own, mine in slots.items():
        theirs = _partner(slots, answered, own, mine)
        other = slots.get(theirs)
        if other and (own > theirs if mine.accepted == other.accepted else mine.accepted):
            continue  # told of once, by who opened it
        ports = mine.ports or (other and other.ports and other.ports[::-1]) or (None, None)
        near = End(*own, mine.generation, _name(sections, own[0]), ports[0])
        far_slot = theirs[1] if theirs[1] >= 0 else None
        far = End(
            mine.peer, far_slot, other.generation if other else None, _name(sections, mine.peer), ports[1]
        )
        sent = _way(layout, again, own, mine, theirs, other, is_told(own[0], mine.peer, far_slot))
        received = _way(layout, again, theirs, other, own, mine, is_told(mine.peer, *own))
        made = Connection(_state(mine, other, sections), 0 in ports, near, far, sent, received)
        yield made.seen_from(mine.peer) if mine.accepted else made


def _partner(slots: Slots, answered: Mapping[Key, Key], own: Key, mine: SlotWords) -> Key:
    """Return section and slot of the other end; the slot is negative when none is known, and not in `slots`
    when that end is gone."""
    if mine.asked:  # maybe it was accepted a moment ago
        found = answered.get(own, (mine.peer, -1))
        return found if found[0] == mine.peer else (mine.peer, -1)
    other = slots.get((mine.peer, mine.peer_slot))
    agrees = other and (other.peer == own[0] if other.asked else (other.peer, other.peer_slot) == own)
    return mine.peer, mine.peer_slot if agrees or other is None else ~mine.peer_slot


def _name(sections: Mapping[int, Section], number: int) -> str | None:
    return sections[number].name if number in sections else None


def _state(mine: SlotWords, other: SlotWords | None, sections: Mapping[int, Section]) -> str:
    peer = sections.get(mine.peer)
    if peer is None or peer.state == "dead":
        return "orphaned"
    bits = mine.bits | (other.bits if other else 0)
    if mine.asked or (other and other.asked):
        return "opening"
    if bits & lay.DONE or other is None:
        return "closing"
    return "half-closed" if bits & lay.FIN else "open"


def _way(
    layout: Layout,
    again: Iterator[int],
    from_: Key,
    writer: SlotWords | None,
    to: Key,
    reader: SlotWords | None,
    told: bool,
) -> Way:
    if writer is None:
        return Way(0, 0, False, False, False, False, False)
    queued = _queued(writer, reader)
    if queued is None and reader is not None and next(again, None) is not None:
        now, after = layout.slot_in_use(*from_), layout.slot_in_use(*to)
        if now and after and (now.generation, after.generation) == (writer.generation, reader.generation):
            writer, queued = now, _queued(now, after)
    return Way(
        queued=queued,
        ring=writer.ring,
        waits=bool(writer.bits & lay.WANT),
        told=told,
        fin=bool(writer.bits & lay.FIN),
        reset=bool(writer.bits & lay.RST),
        done=bool(writer.bits & lay.DONE),
    )


def _queued(writer: SlotWords, reader: SlotWords | None) -> int | None:
    """Count what lies in the ring. Without its reader's word nothing is known to be read."""
    queued = writer.tail - (reader.head if reader else 0) & 0xFFFFFFFF
    if queued <= writer.ring:
        return queued
    return 0 if queued >> 31 and reader is not None else None  # it has read on since the writer was looked at
