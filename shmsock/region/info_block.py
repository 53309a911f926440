"""The info block of persistent memory: where in a file, or in BAR2, the region lies.

Linux makes /dev/daxN.M of an NVDIMM, or of virtio-pmem, that has this block (`struct nd_pfn_sb` of its
drivers/nvdimm) 4096 bytes from its beginning. What the block calls data is what the guest can map; so that is
the region, for everybody who has the same bytes in another way. Without a block the region is all of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable
from functools import partial

from shmsock.errors import format_error, region_error
from shmsock.region.base import MINIMUM, map_bytes
from shmsock.region.sizes import format_size

__all__ = ["OURS", "UNIT", "find", "find_in_file", "map_device", "write"]

UNIT = 2 << 20
"""Bytes. Such memory is mapped in whole multiples of it; the first one is the block's, not the region's."""
OURS = b"shmsock\0"
"""How the UUID begins that `shmsock create --dax` gives. The guest shows that in sysfs, to everybody."""

_AT = _BYTES = 4096
_SIGNATURE, _FILES = b"NVDIMM_DAX_INFO\0", b"NVDIMM_PFN_INFO\0"
# signature, uuid, parent's uuid, flags, version (2), offset of the data, pages, mode, padding before and
# after, alignment, size of a page, size of the kernel's struct page. A checksum ends the block.
_WORDS = struct.Struct("<16s16s16sIHHQQIIIIIH")
_VERSION, _IN_RAM, _STRUCT_PAGE = (1, 4), 1, 64

Read = Callable[[int, int], bytes]
"""Reads so many bytes, from an offset on."""


def find(read: Read, size: int, name: str) -> tuple[int, int]:
    """Find where in `size` bytes the region lies: offset and length. Raises RegionFormatError."""
    from shmsock.native._core import lib  # not needed to list devices, and shmsock.pyz may have none

    magic: bytes = lib.SH_MAGIC.to_bytes(8, "little")[:-1]
    if size < 2 * UNIT or read(len(magic), 0) == magic:
        return 0, size
    block = read(_BYTES, _AT)  # once: others may write there
    signature = block[:16]
    if signature not in (_SIGNATURE, _FILES) or _checksum(block[:-8]) != block[-8:]:
        return 0, size
    words = _WORDS.unpack_from(block)
    offset, start_pad, end_trunc = words[6], words[9], words[10]
    length = size - offset - end_trunc
    if signature == _FILES:
        raise format_error(f"region {name} is memory for a file system (fsdax): name another", name)
    if start_pad or offset % mmap.PAGESIZE or length % mmap.PAGESIZE or length < MINIMUM:
        raise format_error(
            f"region {name} has an info block of persistent memory that does not fit {format_size(size)}: it "
            "was made for another size; make the region anew with `shmsock create --dax`",
            name,
        )
    return offset, length


def map_device(fd: int, size: int, writable: bool, name: str, base: int = 0) -> mmap.mmap:
    """Map the region in the `size` bytes of a device from `base` on. Raises as map_bytes() and find() do."""
    offset, length = 0, size
    if size >= 2 * UNIT:
        with map_bytes(fd, _AT + _BYTES, False, base) as head:
            offset, length = find(lambda count, at: head[at : at + count], size, name)
    return map_bytes(fd, length, writable, base + offset)


def find_in_file(fd: int, size: int, name: str) -> tuple[int, int]:
    """Do as find() does. Nothing is mapped: in a hole that would take a page."""
    return find(partial(os.pread, fd), size, name)


def write(fd: int, size: int, unit: int, name: str) -> None:
    """Write a block into a new file of `size` bytes that is mapped in multiples of `unit`. Raises
    RegionError."""
    if unit > UNIT:
        raise region_error(
            errno.EINVAL,
            f"{name} lies on pages of {format_size(unit)}, expected at most {format_size(UNIT)}: persistent "
            "memory would have to be mapped from the middle of a page on",
            name,
        )
    if size % UNIT or size < 2 * UNIT:
        raise region_error(
            errno.EINVAL,
            f"{name} cannot have {format_size(size)} as persistent memory, expected a multiple of "
            f"{format_size(UNIT)}, from {format_size(2 * UNIT)} on",
            name,
        )
    block = _WORDS.pack(
        *(_SIGNATURE, OURS + os.urandom(8), bytes(16), 0, *_VERSION),
        *(UNIT, (size - UNIT) // mmap.PAGESIZE, _IN_RAM, 0, 0, UNIT, mmap.PAGESIZE, _STRUCT_PAGE),
    ).ljust(_BYTES - 8, b"\0")
    # Through a mapping, as hugetlbfs knows no write(2).
    with map_bytes(fd, max(unit, _AT + _BYTES), True) as head:
        head[_AT : _AT + _BYTES] = block + _checksum(block)


def _checksum(block: bytes) -> bytes:
    """Fletcher's, over 32-bit words, with a checksum of zero."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", block + bytes(8)):
        low = (low + word) & 0xFFFFFFFF
        high += low
    return ((high << 32 | low) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
