"""Descriptors of other processes under the same kernel: copied with pidfd_getfd (Linux 5.6), by those who may
trace that process (ptrace(2): the same user, unless Yama forbids it, or root)."""

from __future__ import annotations

import ctypes
import os

__all__ = ["copy_descriptor", "copy_eventfd", "eventfd_id"]

KEEPER = "shmsock-keeper"
"""The name of a node's own thread (keeper.c)."""
_PIDFD_GETFD = 438  # the number is the same on every machine


def copy_descriptor(pid: int, fd: int) -> int:
    """Another process's descriptor. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        taken: int = libc.syscall(_PIDFD_GETFD, process, fd, 0)
        if taken < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        return taken
    finally:
        os.close(process)


def eventfd_id(fd: int) -> int:
    """The kernel's number of an eventfd, which no other has as long as it is there (proc(5), Linux 5.2).
    0: none is told, or this is no eventfd."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name == "eventfd-id":
                    return int(value) + 1  # they begin with 0
    except (OSError, ValueError):
        pass
    return 0


def _has_keeper(pid: int) -> bool:
    """Is that a process of this user with a node?"""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/comm", encoding="utf-8", errors="replace") as file:
                if file.read(80).strip() == KEEPER:
                    return True
    except OSError:
        pass
    return False


def copy_eventfd(pid: int, fd: int, ident: int) -> int:
    """A descriptor of that process's eventfd, if it is the one that is meant: `ident` is its eventfd_id().
    -1: not to be had.

    All three are what a section says, and may be a hostile VM's bytes. So no program but those of this user
    that have a node is asked: else root would ring the eventfds of others for that VM.
    """
    if not _has_keeper(pid):
        return -1
    try:
        taken = copy_descriptor(pid, fd)
    except OSError:
        return -1
    if ident and eventfd_id(taken) == ident:
        return taken
    os.close(taken)
    return -1
