"""Ring memory of one section: a buddy allocator whose books are private (nothing of it is in shared
memory)."""

from __future__ import annotations

from shmsock.native._core import lib

__all__ = ["MIN_RING", "Arena"]

MIN_RING: int = lib.SH_MIN_RING
KEPT = 32


class Arena:
    """Hands out power-of-two blocks of 4 KiB to `largest` bytes, aligned to 4 KiB. Offsets are relative to
    the section.

    Every free slot keeps a claim to one smallest ring, so that a few large connections do not shut out all
    others.
    """

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size // MIN_RING * MIN_RING
        self.free_bytes = self.size
        self._free: dict[int, set[int]] = {}
        #: Blocks given back lately, by size: used again as they are, and merged when other sizes are needed.
        self._kept: dict[int, list[int]] = {}
        at = 0
        while at < self.size:  # the arena need not be a power of two: split it into aligned blocks
            block = (at & -at) or 1 << (self.size.bit_length() - 1)
            while at + block > self.size:
                block //= 2
            self._free.setdefault(block, set()).add(at)
            at += block

    @staticmethod
    def fit(largest: int, free_bytes: int, free_slots: int, parts: int = 8) -> int:
        """Choose the ring size to try first: one of `parts` parts of what is left beyond the reserve, at most
        `largest`."""
        spare = max(free_bytes - free_slots * MIN_RING, 0) // parts
        return max(MIN_RING, min(largest, 1 << max(spare.bit_length() - 1, 0)))

    def alloc(self, nbytes: int) -> tuple[int, int] | None:
        """Take a block of `nbytes`, or the largest smaller one there is. Returns (offset, bytes); None when
        all is in use."""
        kept = self._kept.get(nbytes)
        if kept:
            self.free_bytes -= nbytes
            return self.offset + kept.pop(), nbytes
        want = nbytes
        while want >= MIN_RING:
            found = min((b for b, blocks in self._free.items() if b >= want and blocks), default=0)
            if found:
                at = self._free[found].pop()
                while found > want:
                    found //= 2
                    self._free.setdefault(found, set()).add(at + found)
                self.free_bytes -= want
                return self.offset + at, want
            if self._kept:
                self.merge()
            else:
                want //= 2
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Take a block back."""
        self.free_bytes += nbytes
        kept = self._kept.setdefault(nbytes, [])
        if len(kept) < KEPT:
            kept.append(offset - self.offset)
        else:
            self._merge(offset - self.offset, nbytes)

    def merge(self) -> None:
        """Merge all free blocks into blocks as large as can be."""
        for block, kept in self._kept.items():
            for at in kept:
                self._merge(at, block)
        self._kept.clear()

    def _merge(self, at: int, block: int) -> None:
        while block < self.size:
            buddy = at ^ block
            peers = self._free.get(block)
            if not peers or buddy not in peers:
                break
            peers.remove(buddy)
            at, block = min(at, buddy), block * 2
        self._free.setdefault(block, set()).add(at)
