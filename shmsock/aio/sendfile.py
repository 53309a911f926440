"""loop.sendfile() of connections in shared memory: a file's bytes are read straight into the ring."""

from __future__ import annotations

import asyncio
import io
import os
import stat
from typing import Any

from shmsock.aio.transport import ShmTransport
from shmsock.aio.write_buffer import OutgoingFile

__all__ = ["descriptor_of", "send_file"]

TO_THE_END = 1 << 62


def descriptor_of(file: Any) -> int | None:
    """Return the descriptor of a regular file; None for anything else, whose bytes only its read() knows."""
    try:
        fd = file.fileno()
        return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except (AttributeError, io.UnsupportedOperation, OSError):
        return None


async def send_file(transport: ShmTransport, file: Any, fd: int, offset: int, count: int | None) -> int:
    """Send `count` bytes of a file, or all up to its end, and return how many that were: as the kernel's
    sendfile() does over TCP. The protocol is told nothing meanwhile: neither bytes that come nor their end.
    Like there, the loop waits for a disk from which the file must be fetched first.

    Raises RuntimeError when the transport is closing, ValueError, OSError. In any case the file's position
    tells what was sent."""
    if transport.is_closing():
        raise RuntimeError("Transport is closing")
    if "b" not in getattr(file, "mode", "b"):
        raise ValueError("file should be opened in binary mode")
    if offset < 0 or (count is not None and count <= 0):
        raise ValueError(f"offset and count must not be negative, nor count 0 (got {offset!r}, {count!r})")
    was_reading = transport.is_reading()
    if was_reading:
        transport.pause_reading()
    file.seek(offset)  # and what was written to it and kept in its buffer is in the file
    over = asyncio.get_running_loop().create_future()
    part = OutgoingFile(fd, offset, TO_THE_END if count is None else count, over)
    try:
        await transport.send_file(part)
        return part.sent
    finally:
        file.seek(offset + part.sent)
        if was_reading:
            transport.resume_reading()
