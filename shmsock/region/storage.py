"""The ground under a file: its file system, huge pages, and how to back bytes with storage.

A shared mapping of a file with holes is a trap: when the file system is full, touching a hole is a SIGBUS
instead of an error. (On tmpfs loads as well as stores: reading a hole allocates its page.)
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from dataclasses import dataclass

from shmsock.region.processes import read_line
from shmsock.region.sizes import format_size

__all__ = [
    "FileSystem",
    "back",
    "can_fallocate",
    "disk_words",
    "filesystem",
    "huge_page_hint",
    "warn_of_disk",
]

log = logging.getLogger("shmsock.region")

# Where fallocate(2) is real. Elsewhere glibc's posix_fallocate() reads and rewrites one byte per block, which
# would overwrite what another process stores there at that moment.
_FALLOCATE = frozenset(("btrfs", "devtmpfs", "ext4", "f2fs", "hugetlbfs", "tmpfs", "xfs"))

# Where pages that were written to are written back to a disk, again and again.
_DISKS = frozenset(("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "xfs", "zfs"))
_warned: set[str] = set()

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it


@dataclass(frozen=True)
class FileSystem:
    """The file system that a file lies on."""

    type: str
    """Its name as in mount(8): "tmpfs", "hugetlbfs", "ext4"; "unknown" when /proc does not say."""
    block_size: int
    """Bytes. On hugetlbfs the size of one huge page."""

    @property
    def huge(self) -> bool:
        return self.type == "hugetlbfs"

    @property
    def unit(self) -> int:
        """Sizes of files, and lengths of mappings, are multiples of so many bytes."""
        return self.block_size if self.huge else mmap.PAGESIZE


def filesystem(file: int | str, mountinfo: str = "/proc/self/mountinfo") -> FileSystem:
    """Find the file system of a descriptor or path. Raises OSError when `file` is not there."""
    device = os.stat(file).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kind = "unknown"
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as table:
            for line in table:
                # 36 35 98:0 /root /mount/point options optional... - type source options
                mount, _, source = line.partition(" - ")
                if mount.split()[2:3] == [wanted] and source:
                    kind = source.split()[0]
                    break
    except OSError:
        pass  # no /proc: the type only steers messages and the way of allocating
    block_size = os.statvfs(file).f_bsize
    if kind == "unknown" and isinstance(file, int) and _in_memory(file):
        kind = "tmpfs" if block_size == mmap.PAGESIZE else "hugetlbfs"
    return FileSystem(kind, block_size)


def disk_words(kind: str) -> str:
    """Warn of a region on a file system of that type; empty: there is no need."""
    if kind not in _DISKS:
        return ""
    return (
        f"lies on a disk ({kind}): the kernel writes changes back to it all the time, and whoever touches "
        "it may have to wait for that; use /dev/shm or hugetlbfs"
    )


def warn_of_disk(path: str, kind: str) -> None:
    """Log it, once for each path."""
    if (words := disk_words(kind)) and path not in _warned:
        _warned.add(path)
        log.warning("region %s %s", path, words)


def _in_memory(fd: int) -> bool:
    """Describe the file system of a file on tmpfs or hugetlbfs, mostly a memfd, whose mount no table
    shows."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def can_fallocate(kind: str) -> bool:
    """Does fallocate(2) of that type of file system put storage behind a file?"""
    return kind in _FALLOCATE


def back(fd: int, mapping: mmap.mmap, kind: str, offset: int, length: int, origin: int = 0) -> None:
    """Give the bytes [offset, offset + length) storage, without changing any. Touching them cannot fail then.

    `fd`: of the same file, open for writing. `kind`: FileSystem.type. `origin`: where in the file the mapping
    begins; the first byte gets what is before it as well.
    Raises OSError, ENOSPC or EDQUOT when there is no room.
    """
    if not can_fallocate(kind):
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            mapping.madvise(_MADV_POPULATE_WRITE, start, offset + length - start)
            return
        except OSError as error:
            if error.errno == errno.EFAULT:  # "a SIGBUS would have been generated"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            if error.errno != errno.EINVAL:
                raise
            # EINVAL: a kernel before 5.14; the emulation is better than a SIGBUS.
    start = origin + offset if offset else 0
    os.posix_fallocate(fd, start, origin + offset + length - start)


def huge_page_hint(size: int, page: int, root: str = "/sys/kernel/mm/hugepages") -> str:
    """Tell how many huge pages `size` bytes take, how many there are, and the command that reserves them."""
    need = -(-size // page)
    directory = f"{root}/hugepages-{page // 1024}kB"
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages")
    total, free, reserved = (int(read_line(f"{directory}/{name}") or 0) for name in names)
    available = max(0, free - reserved)
    wanted = total - available + need
    command = (
        f"sysctl vm.nr_hugepages={wanted}" if page == 2 << 20 else f"echo {wanted} > {directory}/nr_hugepages"
    )
    return (
        f"it takes {need} huge pages of {format_size(page)}, and {available} of {total} are free; "
        f"reserve more on this host: {command}"
    )
