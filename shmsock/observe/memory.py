"""The bytes of a region for who only looks: a file is read, not mapped, so that one that gets smaller
meanwhile is an error and no signal, and a hole stays a hole."""

from __future__ import annotations

import errno

from shmsock.engine.memory import Memory, native_core
from shmsock.errors import node_closed, region_error
from shmsock.region.base import Region
from shmsock.region.file import FileRegion

__all__ = ["memory_of"]


class _FileMemory(Memory):
    """A file, of which each word or piece is copied when it is asked for."""

    def __init__(self, region: FileRegion) -> None:
        self.core, self.size, self.wc = native_core(), region.size, 0
        self._region: FileRegion | None = region

    def load(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 8), "little")

    def read(self, offset: int, n: int) -> bytes:
        if self._region is None:
            raise node_closed("?", "its region was closed")
        data = self._region.peek(n, offset)
        if len(data) < n:
            path = self._region.path
            raise region_error(errno.ENODATA, f"region {path} was made smaller while it was looked at", path)
        return data

    def fence(self) -> None:
        """Do nothing: a system call is one."""

    def release(self, why: OSError | None = None) -> None:
        self._region = None


def memory_of(region: Region) -> Memory:
    """Return its bytes, to be read only. The caller releases it before the region is closed."""
    if isinstance(region, FileRegion):
        return _FileMemory(region)
    return Memory(native_core(), region.mmap, write_combining=region.write_combining)
