"""Direct mode of a stream reader, as its transport sees it: who takes the bytes of a connection. (Its
state is in the connection's FastPath.)

While one of the reader's calls in C is awaited, that call takes them from the ring (native/extension/op.c).
While one of asyncio's coroutines waits, the reader is fed like any other. While nobody waits, it is given a
little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shmsock.engine.connection import Connection

__all__ = ["DELIVER_MAX", "fill", "read_ahead", "resume", "room", "take", "wanted"]

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


def take(fast_path: Any, reader: Any, deliver: Callable[[bytes], object]) -> bool:
    """Deliver to the reader what is in the ring, maybe after a spin. False: nothing is there, or it is not
    for now. Raises what `deliver` does; the reader raises it then, too, as behind a gap nothing is to be
    read."""
    data = fast_path.take(room(reader))
    if data is None:
        return False
    try:
        deliver(data)
    except BaseException as error:
        reader.set_exception(error)
        raise
    return True


def resume(fast_path: Any, reader: Any) -> None:
    """Let the reader take bytes itself again, after it was fed for a while, unless that has ended."""
    fast_path.can_read = fast_path.direct and reader._exception is None


def room(reader: Any) -> int:
    """Return how many bytes asyncio's reader would take before it pauses, or a little more."""
    return max(2 * int(reader._limit), 1 << 16)


def wanted(fast_path: Any) -> int:
    """Return how many bytes may be delivered in one pass. A reader that nobody waits for is given a few, so
    that at_eof() and the buffer, into which connection pools look, tell the truth."""
    reader = fast_path.reader
    if reader is None:
        return DELIVER_MAX
    if not fast_path.can_read:
        return room(reader)
    return 0 if reader._eof else IDLE_MAX - len(reader._buffer)


def read_ahead(fast_path: Any, conn: Connection) -> None:
    """Put into the buffer what asyncio's reader would have there by now: what had arrived, up to its limits.
    Raises what the buffer does when it cannot grow (somebody holds a memoryview of it); the reader raises it
    then, as behind a gap nothing is to be read."""
    reader = fast_path.reader if fast_path.direct else None
    while reader is not None and reader._exception is None:
        space = room(reader) - len(reader._buffer)
        data = conn.read(space) if space > 0 else b""
        if isinstance(data, int) or not data:
            return
        try:
            reader._buffer += data
        except BaseException as error:
            reader.set_exception(error)
            raise
