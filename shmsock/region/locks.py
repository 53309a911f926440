"""One write lock per section, on one byte of the region's file: proof that a process of this kernel lives.

Open-file-description locks (Linux 3.15): they belong to what open() returned, not to the process. So they
vanish when the last copy of that descriptor is closed, be it by SIGKILL, and no close() of another descriptor
of the same file drops them, as it would with POSIX locks.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct

__all__ = ["SECTIONS", "SERVER_LOCK", "is_locked", "supported", "try_lock", "unlock"]

SECTIONS = 64
"""The most sections of a region: their bytes come first."""
SERVER_LOCK = 4096
"""The byte of the ivshmem server that serves this file; those of the sections are below."""

# struct flock: short l_type, short l_whence, off_t l_start, off_t l_len, pid_t l_pid (must be 0 for these
# locks).
_FLOCK = struct.Struct("@hhqqi4x")

_FREE = struct.pack("@h", fcntl.F_UNLCK)  # how F_OFD_GETLK's answer begins when nobody has the lock
_UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS))


@functools.lru_cache(maxsize=256)
def _flock(kind: int, index: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, index, 1, 0)


def supported(fd: int) -> bool:
    """Can bytes of this file be locked at all? (Some network file systems say no.)"""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, 0))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def try_lock(fd: int, index: int) -> bool:
    """Take the lock of section `index`; False when another open file description has it. Never waits.

    Raises OSError, EBADF when `fd` is not open for writing.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, index))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int, index: int) -> None:
    """Give the lock of section `index` back. That holds for every forked child too that still has a copy of
    `fd`."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, index))


def is_locked(fd: int, index: int) -> bool:
    """Does another open file description than `fd`'s hold the lock of section `index`?"""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, index))
    return answer[: len(_FREE)] != _FREE
