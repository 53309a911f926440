"""Words and bytes of a region, for the cold paths: format, claim, identity. The hot ones are C."""

from __future__ import annotations

from typing import Any, NamedTuple

from shmsock.errors import node_closed

__all__ = ["Core", "Memory", "native_core"]


class Core(NamedTuple):
    """The compiled core: what cffi calls `ffi` and `lib`. Tests pass a variant over lazy memory."""

    ffi: Any
    lib: Any


def native_core() -> Core:
    from shmsock.native._core import ffi, lib

    return Core(ffi, lib)


class Memory:
    """A mapped region. Offsets and sizes in bytes, words are aligned 64-bit.

    Only here does Python know where it is mapped: after release() every method raises NodeClosedError.
    """

    def __init__(self, core: Core, mapping: Any, *, write_combining: bool = False) -> None:
        self.core = core
        self._buffer = core.ffi.from_buffer("uint8_t[]", mapping)
        self._base = core.ffi.cast("void *", self._buffer)  # until release(): then __getattr__ is asked
        self.size: int = len(self._buffer)
        self.wc: int = int(write_combining)

    # -- words

    def load(self, offset: int) -> int:
        value: int = self.core.lib.sh_load64(self._base, offset)
        return value

    def store(self, offset: int, value: int) -> None:
        self.core.lib.sh_store64(self._base, offset, value, self.wc)

    def cas(self, offset: int, old: int, new: int) -> bool:
        """Compare and swap a word. Returns True if it was `old`, and is `new` now."""
        return bool(self.core.lib.sh_cas64(self._base, offset, old, new))

    def fence(self) -> None:
        self.core.lib.sh_full_fence(self.wc)

    # -- bytes

    def read(self, offset: int, n: int) -> bytes:
        copy = self.core.ffi.new("uint8_t[]", n)
        self.core.lib.sh_read_bytes(self._base, offset, copy, n)
        return bytes(self.core.ffi.buffer(copy))

    def write(self, offset: int, data: bytes) -> None:
        self.core.lib.sh_write_bytes(self._base, offset, data, len(data))

    # -- what the core does with the mapping

    def node(self, private: Any, geometry: Any, section: int) -> Any:
        """Make a node in `private` (sh_node_bytes() bytes) that owns that section. It must be inert before
        the mapping is released: C checks that it is, and not whether the mapping is there."""
        private = self.core.ffi.from_buffer(private)
        return self.core.lib.sh_node_new(private, self._base, geometry, section, self.wc)

    def survey(self, geometry: Any, words: Any) -> int:
        """Update `words` (SH_SURVEY of each section). Returns a mask of the sections whose owner, or its
        state, has changed."""
        changed: int = self.core.lib.sh_survey(self._base, geometry, words, self.wc)
        return changed

    def find_listener(self, geometry: Any, section: int, port: int, datagram: bool) -> int:
        """Find the entry of a port in a section's table: index << 8 | flags; 0 when there is none."""
        entry: int = self.core.lib.sh_listen_find(self._base, geometry, section, port, datagram, self.wc)
        return entry

    def still_listens(
        self, geometry: Any, section: int, life: int, port: int, entry: int, lock_fd: int
    ) -> bool:
        """Does the section's owner, in that life, still have the port at that entry? `lock_fd`: and does it
        hold its lock; negative: that is not asked."""
        lib = self.core.lib
        return bool(lib.sh_listen_still(self._base, geometry, section, life, port, entry, lock_fd, self.wc))

    def has_futex(self, offset: int) -> bool:
        """Can this process wait for a change of that word by a futex?"""
        return bool(self.core.lib.sh_futex_works(self._base, offset) == 0)

    def knock(self, geometry: Any, section: int) -> None:
        """Have the owner of a section look at once whose lock fell, if a futex can wake it."""
        self.core.lib.sh_knock(self._base, geometry, section)

    # -- the end

    def release(self, why: OSError | None = None) -> None:
        """Let go of the mapping, so that it can be closed. `why`: the error that every method raises from
        here on."""
        self._ended = why or node_closed("?", "its region was closed")
        self.__dict__.pop("_base", None)
        self.core.ffi.release(self._buffer)

    def __getattr__(self, name: str) -> Any:
        if name == "_base":
            raise self._ended
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
