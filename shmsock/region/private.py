"""Memory of this process alone."""

from __future__ import annotations

import mmap

__all__ = ["zeros"]


def zeros(size: int) -> mmap.mmap:
    """Map so many bytes, all zeros; a forked child has a copy. What of it is never used takes no memory. It
    is there as long as the object is, whatever the collector clears: what C uses until the last of its users
    is gone belongs here."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
