"""Direct mode of a stream reader, as its transport sees it: who takes the bytes of a connection.

While one of the reader's calls in C is awaited, that call takes them from the ring (native/extension/op.c).
While one of asyncio's coroutines waits, the reader is fed like any other. While nobody waits, it is given a
little.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from shmsock.engine.connection import Connection

__all__ = ["DirectMode", "fill"]

DELIVER_MAX = 256 * 1024  # bytes given to one protocol in one pass
IDLE_MAX = 4096  # bytes in the buffer of a reader that nobody waits for


def fill(buffer: Any, take: Callable[[int], bytes | int]) -> int:
    """Put what `take` has into the buffer of a BufferedProtocol. Returns how many bytes, or the status that
    it gave instead. Raises what is wrong with the buffer."""
    with memoryview(buffer) as whole, whole.cast("B") as view:  # it may be resized right afterwards
        if not view:
            raise RuntimeError("get_buffer() returned an empty buffer")
        if view.readonly:
            raise TypeError("get_buffer() returned a buffer that cannot be written")
        data = take(min(len(view), DELIVER_MAX))
        if isinstance(data, int):
            return data
        view[: len(data)] = data
        return len(data)


class DirectMode:
    """The direct mode of one connection, on whose `fast_path` it sets can_read. `used`: its reader has, or
    had, direct mode."""

    def __init__(self, fast_path: Any) -> None:
        self._fast_path = fast_path
        self._reader: weakref.ref[Any] | None = None
        self._on = False

    def begin(self, reader: Any, is_open: bool) -> None:
        """Let `reader` take bytes from the ring, if there is one."""
        self._reader = weakref.ref(reader)
        self._on = self._fast_path.can_read = is_open
        if is_open:
            self._fast_path.attach(reader)

    def take(self, reader: Any, deliver: Callable[[bytes], object]) -> bool:
        """Deliver to the reader what is in the ring, maybe after a spin. False: nothing is there, or it is
        not for now. Raises what `deliver` does; the reader raises it then, too, as behind a gap nothing is to
        be read."""
        data = self._fast_path.take(self.room(reader))
        if data is None:
            return False
        try:
            deliver(data)
        except BaseException as error:
            reader.set_exception(error)
            raise
        return True

    def suspend(self) -> None:
        """Feed the reader until resume() is called."""
        self._fast_path.can_read = False

    def resume(self, reader: Any) -> None:
        """Let the reader take bytes itself again, unless that has ended."""
        self._fast_path.can_read = self._on and reader._exception is None

    def end(self) -> Any:
        """Let neither a reader nor the pump take bytes from the ring any more. Returns the reader, whose
        buffer can still be read, or None."""
        self._on = False
        self._fast_path.detach()
        return self.reader

    def forget(self) -> None:
        """Forget the reader: the connection has another protocol now."""
        self._reader = None

    @property
    def used(self) -> bool:
        return self._reader is not None

    @property
    def reader(self) -> Any:
        """The reader; None when there was none, or its owner has dropped it."""
        return None if self._reader is None else self._reader()

    @staticmethod
    def room(reader: Any) -> int:
        """Return how many bytes asyncio's reader would take before it pauses, or a little more."""
        return max(2 * int(reader._limit), 1 << 16)

    def wanted(self) -> int:
        """Return how many bytes may be delivered in one pass. A reader that nobody waits for is given a few,
        so that at_eof() and the buffer, into which connection pools look, tell the truth."""
        reader = self.reader
        if reader is None:
            return DELIVER_MAX
        if not self._fast_path.can_read:
            return self.room(reader)
        return 0 if reader._eof else IDLE_MAX - len(reader._buffer)

    def read_ahead(self, conn: Connection) -> None:
        """Put into the buffer what asyncio's reader would have there by now: what had arrived, up to its
        limits. Raises what the buffer does when it cannot grow (somebody holds a memoryview of it); the
        reader raises it then, as behind a gap nothing is to be read."""
        reader = self.reader if self._on else None
        while reader is not None and reader._exception is None:
            room = self.room(reader) - len(reader._buffer)
            data = conn.read(room) if room > 0 else b""
            if isinstance(data, int) or not data:
                return
            try:
                reader._buffer += data
            except BaseException as error:
                reader.set_exception(error)
                raise
