"""Processes, as /proc shows them, and which of them use a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from typing import NamedTuple

__all__ = ["Users", "command_of", "links", "name_of", "open_elsewhere", "pids", "read_line", "users_of"]


class Users(NamedTuple):
    """The processes that users_of() found."""

    mapped: list[str]
    """Other processes that have it mapped: 'process 17 (python3)', by number."""
    opened: list[str]
    """Processes that have it open, and not mapped; and this one, if it has either."""
    hidden: int
    """The number of processes that may not be inspected: other users'."""


def pids(proc: str = "/proc") -> list[str]:
    """List the numbers of all processes that this one sees."""
    try:
        return sorted((name for name in os.listdir(proc) if name.isdigit()), key=int)
    except OSError:
        return []


def read_line(path: str) -> str:
    """Read a small file of /proc or /sys; "" when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(80).strip()
    except OSError:
        return ""


def command_of(pid: str | int, proc: str = "/proc") -> str:
    """Tell what a process runs, also when it has ended just now. It has chosen that name itself, and it is
    printed on terminals."""
    name = read_line(f"{proc}/{pid}/comm") or "ending"
    return "".join(c if c.isprintable() else "?" for c in name)


def name_of(pid: str, proc: str = "/proc") -> str:
    """'process 17 (python3)'."""
    return f"process {pid} ({command_of(pid, proc)}{', this one' if int(pid) == os.getpid() else ''})"


def links(pid: str, proc: str = "/proc") -> dict[str, str]:
    """List what a process has open, by descriptor; empty when it may not be inspected."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for number in os.listdir(f"{proc}/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed just now
                found[number] = os.readlink(f"{proc}/{pid}/fd/{number}")
    return found


def users_of(fd: int, proc: str = "/proc") -> Users:
    """Find the processes that use the file of `fd`, which may be open here for this question."""
    wanted, identity = _as_in_maps(fd), os.fstat(fd)
    mapped: list[str] = []
    opened: list[str] = []
    hidden = 0 if os.path.isdir(f"{proc}/1") else 1  # mounted with hidepid=
    for pid in pids(proc):
        try:
            with open(f"{proc}/{pid}/maps", "rb") as file:
                found = any(tuple(line.split(None, 5)[3:5]) in wanted for line in file)
            own = int(pid) == os.getpid()
            if found or _times_open(f"{proc}/{pid}/fd", identity) > own:
                (mapped if found and not own else opened).append(name_of(pid, proc))
        except PermissionError:
            hidden += 1
        except OSError:
            pass  # it has ended
    return Users(mapped, opened, hidden)


def _times_open(directory: str, identity: os.stat_result) -> int:
    count = 0
    for number in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # closed just now
            count += os.path.samestat(os.stat(f"{directory}/{number}"), identity)
    return count


def _as_in_maps(fd: int) -> set[tuple[bytes, ...]]:
    """(device, inode) of the file as maps shows it. On btrfs and overlayfs that is another device than
    fstat() tells, so a mapping of our own is looked up too."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found: set[tuple[bytes, ...]] = {(device.encode(), str(status.st_ino).encode())}
    with contextlib.suppress(OSError, ValueError):  # an empty file; hugetlbfs, where fstat() is right
        before = _own_maps()
        with mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ):
            new = _own_maps() - before
        inode = str(status.st_ino).encode()
        found |= {(line[3], line[4]) for line in new if line[4] == inode}
    return found


def _own_maps() -> set[tuple[bytes, ...]]:
    with open("/proc/self/maps", "rb") as file:
        return {tuple(line.split(None, 5)[:5]) for line in file}


def open_elsewhere(fd: int) -> bool | None:
    """Has anybody else the file of `fd` open or mapped, whoever may not be seen included? `fd` must be the
    only descriptor of it here. None: this kernel, or file system, does not tell."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # given only to a process that has the file alone
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
