"""What this section has to give: slots, and ring memory for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shmsock.engine.arena import MIN_RING, Arena
from shmsock.engine.connection import Connection
from shmsock.engine.layout import Layout, default_slots, region_for
from shmsock.errors import no_buffers

if TYPE_CHECKING:
    from shmsock.engine.engine import Engine
    from shmsock.engine.peers import Peer

__all__ = ["NO_MEMORY", "NO_SLOT", "Slots"]

NO_SLOT, NO_MEMORY = 2, 3  # enum sh_reason
DATAGRAM_RING = 256 << 10  # at best; a quarter of it holds the largest datagram


class Slots:
    """The books are private. A peer that connects gets at most half of either."""

    def __init__(self, engine: Engine, ensure: Callable[[int, int], None] | None) -> None:
        self.engine = engine
        self._ensure = ensure
        self._backed: set[int] = set()
        self.arena = Arena(engine.layout.arena_off, engine.layout.arena_bytes)
        self.free = list(range(engine.layout.slots - 1, -1, -1))
        self.connections: dict[int, Connection] = {}
        self._outgrown: set[Connection] = set()  # they hold former rings besides
        self._short: dict[Connection, int] = {}  # found no larger ring, and how much was free then
        if ensure:
            ensure(engine.layout.section(engine.section), engine.layout.arena_off)

    def take(self, peer: Peer, *, accepted: bool, datagrams: bool = False) -> Connection | int:
        """A connection in OPENING with slot and ring, or the reason why not. One for datagrams carries them
        from who opens it: the ring of the other side is of no use, so it is the smallest."""
        if not self.free:
            return NO_SLOT
        settings = self.engine.settings
        most = min(settings.first_ring_bytes, settings.ring_bytes)
        if datagrams:
            most = MIN_RING if accepted else DATAGRAM_RING
        if accepted and peer.section != self.engine.section and peer.slots * 2 >= self.engine.layout.slots:
            return NO_SLOT
        ring = self._ring(self._fit(most, peer, accepted, slots=1))
        if ring is None:
            return NO_MEMORY
        slot = self.free.pop()
        may_grow = not datagrams and ring[1] < settings.ring_bytes
        conn = self.connections[slot] = Connection(self.engine, slot, ring, peer.section, accepted, may_grow)
        if accepted:
            peer.slots += 1
            peer.ring_bytes += ring[1]
        return conn

    def _fit(self, most: int, peer: Peer, accepted: bool, slots: int) -> int:
        """What a connection that takes so many slots gets of ring memory, at most; 0: nothing is left for
        that peer."""
        layout, share = self.engine.layout, 0
        foreign = accepted and peer.section != self.engine.section
        if foreign and (share := layout.arena_bytes // 2 - peer.ring_bytes) < MIN_RING:
            return 0
        if most == MIN_RING:
            return most
        size = Arena.fit(most, self.arena.free_bytes, len(self.free) - slots)
        # Half of the arena is its share, and that is handed out as the whole is: with a reserve for the
        # rest of its slots, so that a few large rings do not shut out all that it opens after them.
        return Arena.fit(size, share, layout.slots // 2 - peer.slots - slots, parts=4) if foreign else size

    def _ring(self, size: int) -> tuple[int, int] | None:
        """With storage behind it."""
        ring = self.arena.take(size)
        if ring is not None:
            try:
                if self._ensure:
                    self._back(self._ensure, *ring)
            except (OSError, ValueError):
                self.arena.give(*ring)
                self.engine.check()  # closed just now, by a signal handler, and its region with it?
                raise
        return ring

    def grow(self, conn: Connection, need: int) -> None:
        """Before a write of so many bytes, for which the ring has no room: one of sixteen times the size, or
        of what they take, if ring_bytes and the memory that is left allow it."""
        engine, peer, held = self.engine, self.engine.peers[conn.peer], conn.ring[1]
        self._collect(conn)
        most = engine.settings.ring_bytes
        size = self._fit(
            min(max(16 * held, 1 << (held + need - 1).bit_length()), most), peer, conn.accepted, slots=0
        )
        try:
            ring = self._ring(size) if size > held else None
        except OSError:  # the disk is full: a small ring will do
            ring = None
        if ring is None or engine.lib.sh_ep_grow(conn.ep, *ring) <= 0:
            if ring is not None:
                self.arena.give(*ring)
            engine.lib.sh_ep_may_grow(conn.ep, 0)  # not at each write
            self._short[conn] = self.arena.free_bytes
            return
        conn.outgrown, conn.ring = (*conn.outgrown, conn.ring), ring
        self._outgrown.add(conn)
        if conn.accepted:
            peer.ring_bytes += ring[1]
        engine.lib.sh_ep_may_grow(conn.ep, ring[1] < most)

    def _collect(self, conn: Connection) -> None:
        if conn.outgrown and self.engine.lib.sh_ep_outgrown(conn.ep):
            self._give_outgrown(conn)

    def _give_outgrown(self, conn: Connection) -> None:
        self._outgrown.discard(conn)
        for ring in conn.outgrown:
            self.arena.give(*ring)
            if conn.accepted:
                self.engine.peers[conn.peer].ring_bytes -= ring[1]
        conn.outgrown = ()

    def sweep(self) -> None:
        """Now and then: former rings that no peer reads any more, and those who may try again to grow."""
        for conn in list(self._outgrown):
            self._collect(conn)
        for conn, free in list(self._short.items()):
            if self.arena.free_bytes > free:
                del self._short[conn]
                self.engine.lib.sh_ep_may_grow(conn.ep, 1)

    def give_back(self, conn: Connection, peer: Peer) -> None:
        self.connections.pop(conn.slot, None)
        self._short.pop(conn, None)
        if conn.outgrown:
            self._give_outgrown(conn)
        self.arena.give(*conn.ring)
        self.free.append(conn.slot)
        if conn.accepted:
            peer.slots -= 1
            peer.ring_bytes -= conn.ring[1]

    def _back(self, ensure: Callable[[int, int], None], offset: int, size: int) -> None:
        """Have storage behind ring memory before it is written: a full disk is an OSError here, and a SIGBUS
        later."""
        pages = range(offset // MIN_RING, (offset + size) // MIN_RING)
        if not self._backed.issuperset(pages):
            ensure(self.engine.layout.section(self.engine.section) + offset, size)
            self._backed.update(pages)

    def no_room(self, reason: int) -> OSError:
        what = "connection slots" if reason == NO_SLOT else "ring memory"
        return no_buffers(what, region_for(self.engine.layout))

    def region_for_link(self, need: int) -> str:
        """A size of region in which a link gets a ring of `need` bytes, with as much in use as here."""
        layout, used = self.engine.layout, self.arena.size - self.arena.free_bytes
        for factor in (1 << k for k in range(1, 20)):
            size = layout.region_bytes * factor
            slots = default_slots(self.engine.memory, size, layout.peers)
            if not slots:
                break
            larger = Layout(self.engine.memory, (slots.bit_length() - 1) << 8 | layout.peers, size)
            room = larger.arena_bytes - used
            if Arena.fit(DATAGRAM_RING, room, larger.slots - len(self.connections) - 1) >= need:
                return region_for(layout, factor)
        return ""
