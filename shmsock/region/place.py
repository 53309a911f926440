"""The path of a region, and whether it is found there still: files are removed, moved and made anew under
those who have them mapped, and a later process gets another file, or none."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

from shmsock.errors import listing
from shmsock.region.processes import command_of, pids

__all__ = ["LOCAL", "Holder", "Place", "holders", "restart"]

LOCAL = frozenset(
    (
        "bcachefs", "btrfs", "devtmpfs", "ext2", "ext3", "ext4", "f2fs", "hugetlbfs", "overlay", "ramfs",
        "tmpfs", "xfs", "zfs",
    )
)  # fmt: skip
"""File systems on which a look at a path never waits for another machine or process."""

# Such paths lead through a process, and end with it or with its descriptors.
_THROUGH_PROCESSES = ("/proc/", "/dev/fd/")


@dataclass(frozen=True)
class Holder:
    """A process that has a removed file mapped."""

    pid: int
    command: str
    inode: int

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


class Place:
    """A path, and what it led to when this was made: `identity` is its (st_dev, st_ino)."""

    path: str

    def __init__(self, path: str, identity: tuple[int, int]) -> None:
        self.path, self._identity = path, identity
        self._view = _view()

    def lost(self, fd: int) -> str:
        """Tell what became of it: "" while the path leads to it, or while nobody can tell; "removed" or
        "moved": nothing is there; "replaced": something else is.

        `fd`: of the file. One that still has a name can be somewhere else for this process alone, which has
        changed its root or its mounts: that says nothing about the file.
        """
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                return ""
            seen = "replaced"
        except (FileNotFoundError, NotADirectoryError):
            seen = "moved"
        except OSError:  # a directory on the way is closed to us by now
            seen = ""
        through_process = os.path.normpath(self.path).startswith(_THROUGH_PROCESSES)
        known = seen and not through_process and _view() == self._view
        if os.fstat(fd).st_nlink == 0:
            return "replaced" if known and seen == "replaced" else "removed"
        return seen if known and _is_mounted(fd) else ""


def _view() -> tuple[object, ...]:
    """Identify what paths mean to this thread: its root directory, and its mounts."""
    root = os.stat("/")
    try:
        mounts = os.readlink("/proc/thread-self/ns/mnt")
    except OSError:
        mounts = ""
    return root.st_dev, root.st_ino, mounts


def _is_mounted(fd: int) -> bool:
    """Is what `fd` was opened through still among the mounts of this thread?"""
    try:
        with open(f"/proc/thread-self/fdinfo/{fd}", "rb") as info:
            number = next(line.split()[1] for line in info if line.startswith(b"mnt_id:"))
        with open("/proc/thread-self/mountinfo", "rb") as table:
            return any(line.split(None, 1)[0] == number for line in table)
    except (OSError, StopIteration):
        return True  # it cannot be told


def holders(path: str, within_s: float | None = None) -> list[Holder]:
    """Other processes that have a file mapped that was removed from `path`, as far as this one may see.

    Reads /proc, for up to `within_s` seconds of processor time (on a busy machine
    others take some meanwhile): not for every message of a busy loop.
    """
    end = None if within_s is None else time.thread_time() + within_s
    needle = os.fsencode(path) + b" (deleted)\n"
    try:
        device = os.stat(os.path.dirname(path) or "/").st_dev
    except OSError:
        return []
    here = b"%02x:%02x" % (os.major(device), os.minor(device))  # such a path elsewhere is another one
    found = []
    for name in pids():
        if end is not None and time.thread_time() >= end:
            break
        if int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            with open(f"/proc/{name}/maps", "rb") as table:
                maps = table.read()
            if needle not in maps:
                continue
            # address perms offset major:minor inode path
            lines = [line.split(None, 5) for line in maps.splitlines(keepends=True) if line.endswith(needle)]
            inodes = {int(line[4]) for line in lines if line[3] == here and line[5] == needle}
            found += [Holder(int(name), command_of(name), inode) for inode in sorted(inodes)]
    return found


def restart(old: list[Holder], path: str) -> str:
    """Tell who holds what was removed from `path`, and to restart them."""
    use, them = ("uses", "it") if len(old) == 1 else ("use", "them")
    seen = f"the file at {path} was removed or replaced while {listing(old)} still {use} the old one"
    return f"{seen}: restart {them}"
