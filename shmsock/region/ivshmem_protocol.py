"""The messages of an ivshmem server, which flow from it to its clients alone, over a UNIX stream socket.

A message is 8 bytes, a little-endian number, and at most one file descriptor. To a newcomer, in this order:

    0            the version of the protocol
    id           its own
    -1 and fd    the shared memory
    id and fd    an eventfd that kicks the peer `id`: of each peer one message per vector, vector 0 first
    id and fd    the newcomer's own eventfds, in the same way: they kick it

Later, whenever it happens: `id and fd` of others that came, and `id` without fd of one that left.
"""

from __future__ import annotations

import os
import socket
import struct

from shmsock.errors import violation

__all__ = ["MAX_ID", "MAX_VECTORS", "MEMORY", "MESSAGE", "PROTOCOL_VERSION", "Receiver", "send_message"]

PROTOCOL_VERSION = 0
MESSAGE = struct.Struct("<q")
MEMORY = -1
"""The number that goes with the shared memory."""
MAX_VECTORS = 64
MAX_ID = 65535

_SERVER = "ivshmem server"
_FD = struct.calcsize("@i")
# Room for two: a second descriptor is seen, not cut off unseen; a third is cut off, and MSG_CTRUNC says so.
_CONTROL = socket.CMSG_SPACE(2 * _FD)
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


def send_message(sock: socket.socket, number: int, fd: int | None = None) -> None:
    """Send one message, whole, or raise and send nothing. Never waits, never raises SIGPIPE.

    Raises OSError: BlockingIOError when the other side has to read first; ETOOMANYREFS, ENOBUFS or ENOMEM
    when the kernel has no room for a while, whoever is to blame; BrokenPipeError or ConnectionResetError when
    nobody is there.
    """
    control = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", fd))]
    sent = sock.sendmsg([MESSAGE.pack(number)], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if sent != MESSAGE.size:  # (Linux puts so few bytes into one buffer: all of them or none)
        raise ConnectionAbortedError(f"{sent} bytes of a message of {MESSAGE.size} went out")


class Receiver:
    """The receiving end: puts messages together. Does not own the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._bytes = bytearray()
        self._fd = -1

    def receive(self) -> tuple[int, int]:
        """Return the next message: its number, and its descriptor (the caller's to close; close-on-exec) or
        -1.

        Never waits: raises BlockingIOError when no whole message is there; what came of one is kept for the
        next call. Raises ConnectionResetError when the server is gone, as ProtocolViolation when it sent what
        no server sends.
        """
        while len(self._bytes) < MESSAGE.size:
            # Never past the end of this message: a descriptor that came along could be of the next one.
            data, control, flags, _ = self._sock.recvmsg(MESSAGE.size - len(self._bytes), _CONTROL, _FLAGS)
            self._take_fds(control, flags)
            if not data:
                self.close()
                raise _closed(len(self._bytes))
            self._bytes += data
        (number,) = MESSAGE.unpack(self._bytes)
        fd, self._fd = self._fd, -1
        self._bytes.clear()
        return number, fd

    def close(self) -> None:
        """Close what came with half a message. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _take_fds(self, control: list[tuple[int, int, bytes]], flags: int) -> None:
        fds: list[int] = []
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) // _FD
                fds += struct.unpack(f"@{whole}i", data[: whole * _FD])
        if self._fd < 0 and fds and not flags & socket.MSG_CTRUNC:
            self._fd = fds.pop(0)
        if not fds and not flags & socket.MSG_CTRUNC:
            return
        for fd in fds:
            os.close(fd)
        self.close()
        if flags & socket.MSG_CTRUNC:
            raise violation(
                _SERVER,
                "a message whose descriptor could not be taken",
                "one at most; or this process has as many open as it may (`ulimit -n`)",
            )
        raise violation(_SERVER, "several descriptors in one message", "one at most")


def _closed(have: int) -> ConnectionResetError:
    if have:
        return violation(_SERVER, f"the connection ended after {have} bytes of a message", "8")
    return ConnectionResetError("the ivshmem server closed the connection")
