"""What this section has to give: slots, and ring memory for them. The books are the core's (native/slots.c);
here is which connection has which slot, and what to say when there is nothing left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from shmsock.engine.home import Home
from shmsock.engine.layout import Layout, larger
from shmsock.errors import no_buffers
from shmsock.native._core import lib

__all__ = ["Held", "Slots", "Storage"]

NO_SLOTS: int = lib.SH_NO_SLOTS
NO_ROOM: int = lib.SH_NO_ROOM
NO_STORAGE: int = lib.SH_NO_STORAGE
MIN_RING: int = lib.SH_MIN_RING
STORAGE: int = lib.SH_STORAGE
DATAGRAM_RING = 256 << 10  # at best; a quarter of it holds the largest datagram


class Storage(NamedTuple):
    """A region that is a file with holes: its descriptor, whether fallocate(2) is real there, and what puts
    storage behind so many bytes at an offset, or raises OSError."""

    fd: int
    fallocate: bool
    ensure: Callable[[int, int], None]


class Held:
    """A slot in use."""

    slot: int


H = TypeVar("H", bound=Held)


class Slots(Generic[H]):
    """The slots of this section that are in use."""

    home: Home

    def __init__(self, home: Home, storage: Storage | None) -> None:
        self.home, self._storage, lib = home, storage, home.lib
        self.connections: dict[int, H] = {}
        self.orphans: set[H] = set()  # their peer is gone, and bytes may still be read
        us = home.settings
        lib.sh_limits(home.nd, us.first_ring_bytes, us.ring_bytes, DATAGRAM_RING, us.max_connects)
        if storage:
            storage.ensure(home.layout.section(home.section), home.layout.geometry.slot_off)
            lib.sh_storage(home.nd, storage.fd, storage.fallocate)

    def no_room(self, status: int) -> OSError:
        """Build the error for a status of the core, when it had no slot or ring to give."""
        if status == NO_STORAGE and self._storage:
            at = self.home.lib.sh_storage_missing(self.home.nd)
            try:
                self._storage.ensure(at, min(STORAGE, self.home.layout.region_bytes - at))
            except OSError as error:
                return error
        elif status not in (NO_SLOTS, NO_ROOM):
            return self.home.failure()
        return self.none_left(status == NO_SLOTS)

    def none_left(self, slots: bool, peer: str | None = None) -> OSError:
        """Build the error for a section, that of `peer` or the own one, without slots or ring memory."""
        layout = self.home.layout
        if slots:
            what = f"connection slots (of {layout.slots}, some are kept for those who hold few)"
            return no_buffers(what, larger(layout, lambda other: other.slots > layout.slots), peer)
        return no_buffers("ring memory", larger(layout, lambda other: True), peer)

    def free(self, conn: H) -> None:
        """Note that a connection was released."""
        self.connections.pop(conn.slot, None)
        self.orphans.discard(conn)

    @property
    def free_slots(self) -> int:
        return int(self.home.lib.sh_free_slots(self.home.nd))

    @property
    def free_bytes(self) -> int:
        """Ring memory that is not in use."""
        return int(self.home.lib.sh_arena_free(self.home.lib.sh_arena_of(self.home.nd)))

    def region_for_link(self, need: int) -> tuple[str, int] | None:
        """Find a region in which a link would get a ring of `need` bytes with as much in use as here."""
        fit, used = self.home.lib.sh_ring_fit, self.home.layout.arena_bytes - self.free_bytes

        def has_room(other: Layout) -> bool:
            reserved = (other.slots - len(self.connections) - 1) * MIN_RING
            return bool(fit(DATAGRAM_RING, other.arena_bytes - used, reserved) >= need)

        return larger(self.home.layout, has_room)
