"""What this section has to give: slots, and ring memory for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from shmsock.engine.arena import MIN_RING, Arena
from shmsock.engine.home import Home
from shmsock.engine.layout import Layout, default_slots, region_for
from shmsock.errors import no_buffers
from shmsock.native._core import lib

__all__ = ["NO_MEMORY", "NO_SLOT", "Held", "Slots"]

NO_SLOT: int = lib.SH_NO_SLOT
NO_MEMORY: int = lib.SH_NO_MEMORY
DATAGRAM_RING = 256 << 10  # at best; a quarter of it holds the largest datagram


class Held:
    """A slot in use, and its rings, as (offset in the section, bytes)."""

    __slots__ = ("__weakref__", "accepted", "ep", "gen", "outgrown", "peer", "ring", "slot")

    slot: int
    gen: int
    ep: Any
    peer: int
    accepted: bool
    ring: tuple[int, int]
    #: Rings before this one, while the peer may read them.
    outgrown: tuple[tuple[int, int], ...]


H = TypeVar("H", bound=Held)


class Share:
    """What the connections that one peer opened hold of this section."""

    __slots__ = ("ring_bytes", "slots")

    def __init__(self) -> None:
        self.slots = self.ring_bytes = 0


class Slots(Generic[H]):
    """Which slots and which ring memory of this section are in use, noted in private memory. What one other
    peer opens holds at most half of the slots and half of the arena.

    `ensure`: puts storage behind so many bytes at an offset of the region, or raises OSError.
    """

    def __init__(self, home: Home, ensure: Callable[[int, int], None] | None) -> None:
        self.home, layout = home, home.layout
        self._ensure = ensure
        self._backed: set[int] = set()
        self.arena = Arena(layout.arena_off, layout.arena_bytes)
        self.free = list(range(layout.slots - 1, -1, -1))
        self.connections: dict[int, H] = {}
        self.orphans: set[H] = set()  # their peer is gone, and bytes may still be read
        self.shares = [Share() for _ in range(layout.peers)]
        self._outgrown: set[H] = set()  # they hold former rings besides
        self._short: dict[H, int] = {}  # found no larger ring, and how much was free then
        if ensure:
            ensure(layout.section(home.section), layout.arena_off)

    def alloc(
        self, peer: int, *, accepted: bool, datagrams: bool = False
    ) -> tuple[int, tuple[int, int], bool, bool] | int:
        """Take a slot and a ring for a connection with the peer of that section. Returns (slot, ring,
        accepted, may grow), or NO_SLOT or NO_MEMORY. Raises OSError (ENOSPC). One for datagrams carries them
        from its opener: the ring of the other side is of no use, so it is the smallest."""
        if not self.free:
            return NO_SLOT
        settings, share = self.home.settings, self.shares[peer]
        most = min(settings.first_ring_bytes, settings.ring_bytes)
        if datagrams:
            most = MIN_RING if accepted else DATAGRAM_RING
        if accepted and peer != self.home.section and share.slots * 2 >= self.home.layout.slots:
            return NO_SLOT
        ring = self._ring(self._fit(most, peer, accepted, slots=1))
        if ring is None:
            return NO_MEMORY
        if accepted:
            share.slots += 1
            share.ring_bytes += ring[1]
        return self.free.pop(), ring, accepted, not datagrams and ring[1] < settings.ring_bytes

    def _fit(self, most: int, peer: int, accepted: bool, slots: int) -> int:
        """Choose a ring size, at most `most`, for a connection that takes `slots` more slots; 0: nothing is
        left for that peer."""
        layout, share, left = self.home.layout, self.shares[peer], 0
        foreign = accepted and peer != self.home.section
        if foreign and (left := layout.arena_bytes // 2 - share.ring_bytes) < MIN_RING:
            return 0
        if most == MIN_RING:
            return most
        size = Arena.fit(most, self.arena.free_bytes, len(self.free) - slots)
        # Half of the arena is its share, and that is handed out as the whole is: with a reserve for the
        # rest of its slots, so that a few large rings do not shut out all that it opens after them.
        return Arena.fit(size, left, layout.slots // 2 - share.slots - slots, parts=4) if foreign else size

    def _ring(self, size: int) -> tuple[int, int] | None:
        """Take a ring of up to `size` bytes, with storage behind it; None when there is no memory."""
        ring = self.arena.alloc(size)
        if ring is not None:
            try:
                if self._ensure:
                    self._back(self._ensure, *ring)
            except (OSError, ValueError):
                self.arena.give(*ring)
                self.home.check()  # closed just now, by a signal handler, and its region with it?
                raise
        return ring

    def grow(self, conn: H, need: int) -> None:
        """Give the connection a larger ring, before a write of `need` bytes that the present one has no room
        for: sixteen times the size, or as much as they take, if ring_bytes and the free memory allow it."""
        lib, held = self.home.lib, conn.ring[1]
        self._collect(conn)
        most = self.home.settings.ring_bytes
        wish = min(max(16 * held, 1 << (held + need - 1).bit_length()), most)
        size = self._fit(wish, conn.peer, conn.accepted, slots=0)
        try:
            ring = self._ring(size) if size > held else None
        except OSError:  # the disk is full: a small ring will do
            ring = None
        if ring is None or lib.sh_ep_grow(conn.ep, *ring) <= 0:
            if ring is not None:
                self.arena.give(*ring)
            lib.sh_ep_may_grow(conn.ep, 0)  # else each write would ask again
            self._short[conn] = self.arena.free_bytes
            return
        conn.outgrown, conn.ring = (*conn.outgrown, conn.ring), ring
        self._outgrown.add(conn)
        if conn.accepted:
            self.shares[conn.peer].ring_bytes += ring[1]
        lib.sh_ep_may_grow(conn.ep, ring[1] < most)

    def _collect(self, conn: H) -> None:
        if conn.outgrown and self.home.lib.sh_ep_outgrown(conn.ep):
            self._give_outgrown(conn)

    def _give_outgrown(self, conn: H) -> None:
        self._outgrown.discard(conn)
        for ring in conn.outgrown:
            self.arena.give(*ring)
            if conn.accepted:
                self.shares[conn.peer].ring_bytes -= ring[1]
        conn.outgrown = ()

    def sweep(self) -> None:
        """Collect former rings that no peer reads any more, and let connections that found no larger ring try
        again when there is more memory than then. Called once a second."""
        for conn in list(self._outgrown):
            self._collect(conn)
        for conn, free in list(self._short.items()):
            if self.arena.free_bytes > free:
                del self._short[conn]
                self.home.lib.sh_ep_may_grow(conn.ep, 1)

    def give_back(self, conn: H) -> None:
        """Take back slot and rings of a connection that was released; called once for each."""
        self.connections.pop(conn.slot, None)
        self.orphans.discard(conn)
        self._short.pop(conn, None)
        if conn.outgrown:
            self._give_outgrown(conn)
        self.arena.give(*conn.ring)
        self.free.append(conn.slot)
        if conn.accepted:
            share = self.shares[conn.peer]
            share.slots -= 1
            share.ring_bytes -= conn.ring[1]

    def _back(self, ensure: Callable[[int, int], None], offset: int, size: int) -> None:
        """Have storage behind ring memory before it is written: a full disk is an OSError here, and a SIGBUS
        later."""
        pages = range(offset // MIN_RING, (offset + size) // MIN_RING)
        if not self._backed.issuperset(pages):
            ensure(self.home.layout.section(self.home.section) + offset, size)
            self._backed.update(pages)

    def no_room(self, reason: int) -> OSError:
        """Build the error for a reason that alloc() gave."""
        what = "connection slots" if reason == NO_SLOT else "ring memory"
        return no_buffers(what, region_for(self.home.layout))

    def region_for_link(self, need: int) -> str:
        """Find a size of region in which a link would get a ring of `need` bytes with as much in use as here;
        "" when there is none."""
        layout, used = self.home.layout, self.arena.size - self.arena.free_bytes
        for factor in (1 << k for k in range(1, 20)):
            size = layout.region_bytes * factor
            slots = default_slots(self.home.memory, size, layout.peers)
            if not slots:
                break
            larger = Layout(self.home.memory, (slots.bit_length() - 1) << 8 | layout.peers, size)
            room = larger.arena_bytes - used
            if Arena.fit(DATAGRAM_RING, room, larger.slots - len(self.connections) - 1) >= need:
                return region_for(layout, factor)
        return ""
