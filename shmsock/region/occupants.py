"""The owners of a region's sections, as its bytes say: for a message to whoever would overwrite them.

Nothing read here is trusted: what makes no sense is left out.
"""

from __future__ import annotations

from typing import Any

from shmsock.native._core import ffi, lib
from shmsock.region.base import Region
from shmsock.region.file import FileRegion

__all__ = ["MAGIC", "claimed_by", "is_formatted", "region_id"]

MAGIC: bytes = lib.SH_MAGIC.to_bytes(8, "little")
_ALLOWED = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789._-")


def is_formatted(region: Region) -> bool:
    """Does the region begin as one of shmsock does, of whatever version?"""
    return _bytes(region, 0, len(MAGIC))[:-1] == MAGIC[:-1]


def region_id(region: Region) -> int:
    """Read the number that tells a formatted region from others; 0: it is not formatted."""
    return _word(region, lib.SH_HEADER_REGION_ID) if is_formatted(region) else 0


def claimed_by(region: Region) -> list[str]:
    """List the owners of its sections: 'vm-a (process 17)'. Some may have died since."""
    geometry: Any = ffi.new("sh_geometry *")
    size = min(_word(region, lib.SH_HEADER_REGION_BYTES), region.size)
    if lib.sh_geometry_of(_word(region, lib.SH_HEADER_REGION_ID), size, geometry) < 0:
        return []
    found = []
    for section in range(geometry.peers):
        at = lib.SH_HEADER_SIZE + section * geometry.section_bytes
        if _word(region, at + lib.SH_SECTION_CLAIM):
            name = _bytes(region, at + lib.SH_SECTION_NAME, 64).partition(b"\0")[0]
            known = name.decode("ascii") if name and _ALLOWED.issuperset(name) else "no name"
            found.append(f"{known} (process {_word(region, at + lib.SH_SECTION_PID)})")
    return found


def _word(region: Region, offset: int) -> int:
    return int.from_bytes(_bytes(region, offset, 8), "little")


def _bytes(region: Region, offset: int, length: int) -> bytes:
    """Read bytes; of a file not through the mapping, where even reading a hole takes a page."""
    if isinstance(region, FileRegion):
        return region.peek(length, offset)
    return bytes(region.mmap[offset : offset + length])
