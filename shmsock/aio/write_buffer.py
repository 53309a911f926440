"""The outgoing queue of a transport: what the ring had no room for yet, in order.

Bytes that nobody can change are kept by reference and copied once, into the ring. What its owner may change
after write() (a bytearray, a memoryview of one) is copied at once, as is what is small: that gathers in
blocks, so that many small writes cost neither an object nor a call into the core each. Nothing that is queued
is moved again: a place in the first piece says how far the ring has taken it.

A file can stand in the queue, too. Its bytes are read straight into the ring when their turn comes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any

from shmsock.engine.connection import COPY_MAX, EOF, Connection

__all__ = ["PIECE", "OutgoingFile", "OutgoingSocket", "WriteBuffer", "flat", "gathered"]

BLOCK = 1 << 16  # bytes from which on a piece is not gathered with others
PIECE = (
    COPY_MAX  # bytes that are put into the ring at once, or that a copy has: each is freed when it is sent
)


def flat(data: Any) -> bytes | bytearray | memoryview:
    """Return the same bytes as something whose length is their number. Raises TypeError for what has none."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
    if isinstance(data, memoryview) and not (data.ndim == data.itemsize == 1 and data.c_contiguous):
        return data.cast("B") if data.c_contiguous and data.nbytes else bytes(data)
    return data


def gathered(pieces: Iterable[Any]) -> list[bytes]:
    """Join what is small, and leave what is large and cannot change as it is. Raises TypeError for what has
    no bytes."""
    found: list[bytes] = []
    small: list[Any] = []
    for data in pieces:
        if isinstance(data, bytes) and len(data) >= BLOCK:
            found += [b"".join(small), data] if small else [data]
            small = []
        else:
            small.append(data)
    return [*found, b"".join(small)] if small or not found else found


class OutgoingFile:
    """A part of a file that is to be sent: `left` bytes from `at` on, or up to its end. `over` is done when
    the ring has taken the last of them, and has an exception when that cannot be."""

    def __init__(self, fd: int, at: int, left: int, over: asyncio.Future[None]) -> None:
        self.fd, self.at, self.left, self.over, self.sent = fd, at, left, over, 0

    def put(self, conn: Connection) -> int:
        """Put a piece into the ring. Returns how many bytes, 0 when it is full, or a status. Raises OSError
        when it cannot be read."""
        wanted = min(self.left, PIECE)
        taken = conn.write_file(self.fd, self.at, wanted) if wanted else EOF
        if taken > 0:
            self.at += taken
            self.left -= taken
            self.sent += taken
        return taken

    def end(self, error: BaseException | None = None) -> None:
        if self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)


class OutgoingSocket(OutgoingFile):
    """What a kernel socket has received, until there is nothing for now: then `over` has a BlockingIOError.
    At the socket's end it is done without one."""

    def __init__(self, fd: int, over: asyncio.Future[None]) -> None:
        super().__init__(fd, 0, 0, over)

    def put(self, conn: Connection) -> int:
        taken = conn.write_socket(self.fd, PIECE)
        self.sent += max(taken, 0)
        return taken


class WriteBuffer:
    """What waits to be put into the ring of `conn`. False when nothing does; its length is what
    get_write_buffer_size() tells, in which files do not count."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._pieces: deque[bytes | bytearray | memoryview | OutgoingFile] = deque()
        self._taken = 0  # of the first piece
        self._size = 0
        self.comes_again = False  # the transport has send() called again

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __len__(self) -> int:
        return self._size

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes; a memoryview is one of single bytes, without gaps."""
        size = len(data)
        self._size += size
        owner = data.obj if isinstance(data, memoryview) else data
        if size < BLOCK:
            last = self._pieces[-1] if self._pieces else None
            if isinstance(last, bytearray) and len(last) < BLOCK:
                last += data
            else:
                self._pieces.append(bytearray(data))
        elif isinstance(owner, bytes):
            self._pieces.append(memoryview(data))  # a view of our own, as its owner may release that one
        else:
            view = memoryview(data)
            self._pieces.extend(bytes(view[at : at + PIECE]) for at in range(0, size, PIECE))

    def add_file(self, file: OutgoingFile) -> None:
        self._pieces.append(file)

    def send(self, spins: bool = False) -> int:
        """Put into the ring what it has room for, within the turn's budget; `spins`: busy-poll for room, as
        nothing else is to be run. Returns 1 when the budget was used up first, so that this must be called
        again; 0; or the status with which the connection refused."""
        lib, nd = self._conn.home.lib, self._conn.home.nd
        while self._pieces:
            piece = self._pieces[0]
            is_full, status = self._send_file(piece) if isinstance(piece, OutgoingFile) else self._send(piece)
            if status < 0:
                return status
            if is_full and not (spins and lib.sh_wait_space(self._conn.ep, 1) > 0):
                return 0
            if lib.sh_over(nd):
                return 1 if self._pieces else 0
        return 0

    def _send(self, piece: bytes | bytearray | memoryview) -> tuple[bool, int]:
        """Returns whether the ring is full, and a status that is negative when the connection refused."""
        wanted = min(len(piece) - self._taken, PIECE)
        with self._conn.home.ffi.from_buffer(piece) as begin:
            taken = self._conn.write(begin + self._taken, wanted)
        if taken < 0:
            return False, taken
        self._taken += taken
        self._size -= taken
        if self._taken == len(piece):
            self._next()
        return taken < wanted, 0

    def _send_file(self, file: OutgoingFile) -> tuple[bool, int]:
        error, taken = None, EOF
        if not file.over.done():  # it is: who waited for it was cancelled
            try:
                taken = file.put(self._conn)
            except OSError as unreadable:
                error = unreadable
        if taken == EOF:
            self._next()
            file.end(error)
            return False, 0
        return taken == 0, min(taken, 0)

    def _next(self) -> None:
        self._pieces.popleft()
        self._taken = 0

    def drop(self, error: BaseException) -> None:
        """Forget all of it; who waits for a file is told why."""
        pieces, self._pieces = self._pieces, deque()
        self._taken = self._size = 0
        for piece in pieces:
            if isinstance(piece, OutgoingFile):
                piece.end(error)
