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

    After release() whatever needs the mapping raises NodeClosedError. So nobody keeps `base`, or a pointer
    made of it, where no look at the node's end comes before each use."""

    base: Any
    _ended: OSError

    def __init__(self, core: Core, mapping: Any, *, write_combining: bool = False) -> None:
        self.core = core
        self.buffer = core.ffi.from_buffer("uint8_t[]", mapping)
        self.base = core.ffi.cast("void *", self.buffer)  # until release(): then __getattr__ is asked
        self.size = len(self.buffer)
        self.wc = int(write_combining)
        room = core.ffi.new("char[]", core.lib.SH_TAKE)
        self.room = (
            room,
            core.ffi.buffer(room),
        )  # where sh_take() puts bytes, and a buffer whose slices are bytes

    def load(self, offset: int) -> int:
        value: int = self.core.lib.sh_load64(self.base, offset)
        return value

    def store(self, offset: int, value: int) -> None:
        self.core.lib.sh_store64(self.base, offset, value, self.wc)

    def cas(self, offset: int, old: int, new: int) -> bool:
        return bool(self.core.lib.sh_cas64(self.base, offset, old, new))

    def fence(self) -> None:
        self.core.lib.sh_full_fence(self.wc)

    def read(self, offset: int, n: int) -> bytes:
        copy = self.core.ffi.new("uint8_t[]", n)
        self.core.lib.sh_read_bytes(self.base, offset, copy, n)
        return bytes(self.core.ffi.buffer(copy))

    def write(self, offset: int, data: bytes) -> None:
        self.core.lib.sh_write_bytes(self.base, offset, data, len(data))

    def view(self, offset: int, n: int) -> Any:
        """A buffer whose slices are copies (bytes): how ring bytes come out. It is not to be kept beyond
        release()."""
        return self.core.ffi.buffer(self.core.ffi.cast("uint8_t *", self.base) + offset, n)

    def release(self, why: OSError | None = None) -> None:
        """Let go of the mapping, so that it can be closed. `why`: what is raised from here on. A node on it
        must be inert: C does not ask here."""
        self._ended = why or node_closed("?", "its region was closed")
        self.__dict__.pop("base", None)
        self.core.ffi.release(self.buffer)

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise self._ended
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
