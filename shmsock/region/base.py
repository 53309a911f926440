"""A region: shared bytes, mapped. What every kind of region offers to the engine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import warnings
from mmap import ACCESS_READ, ACCESS_WRITE, PAGESIZE
from mmap import mmap as Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from shmsock.errors import ForkedError, RegionError, forked, format_error, region_error
from shmsock.region import locks
from shmsock.region.doorbell import Doorbell
from shmsock.region.sizes import format_size

if TYPE_CHECKING:
    from types import TracebackType

    from shmsock.region.place import Place

__all__ = ["MINIMUM", "Description", "Region", "check_size", "identity_of", "map_bytes"]

_R = TypeVar("_R", bound="Region")

MINIMUM = PAGESIZE
"""Bytes. Nothing smaller is taken for a region; the engine asks for more."""


class _Shared:
    """A mapping that several regions of this process use."""

    def __init__(self, key: tuple[object, ...], mapping: Mapping) -> None:
        self.key, self.mapping, self.users = key, mapping, 1


_shared: dict[tuple[object, ...], _Shared] = {}
_sharing = threading.RLock()  # the collector may close a region in the middle of another's share()


def _after_fork() -> None:
    global _sharing
    _sharing = threading.RLock()
    _shared.clear()


os.register_at_fork(after_in_child=_after_fork)


class Description(NamedTuple):
    """The storage of a region, at the moment of asking."""

    filesystem: str
    page_size: int
    allocated: int
    """Bytes that have storage."""
    mode: int
    uid: int
    gid: int


class Region:
    """Shared bytes and the locks that go with them. Also a context manager that closes.

    Loads and stores go to `mmap`; take its address with `ffi.from_buffer(region.mmap)`. Before touching any
    byte of a region that is `sparse`, `ensure()` it: reading counts as touching.
    """

    url: str
    """Canonical: "file:/dev/shm/x", "pci:0000:00:04.0", "vfio:0000:00:04.0", "dax:dax0.0" or
    "ivshmem:/run/ivshmem.sock"."""
    kind: str
    """The part of `url` before the colon."""
    path: str
    """The file that is mapped; the socket of the server whose memory it is."""
    size: int
    """Bytes mapped."""
    writable: bool
    write_combining = False
    """May stores be combined and pass each other, so that they need `sfence` and loads `lfence`?"""
    sparse = False
    """Must bytes be backed by `ensure()` before they are touched?"""
    identity: tuple[int, int]
    """(st_dev, st_ino) of what is locked. Two processes of one kernel that agree on it map the same
    thing and see each other's locks. (Otherwise it may still be one device, through two sysfs mounts.)"""
    doorbell: Doorbell | None = None
    """The way to be kicked, and to kick others; None: it has only memory. Closed together with the region."""
    place: Place | None = None
    """The path where others find it; None: there is none, or a look at it may have to wait."""

    def __init__(self, url: str, path: str, mapping: Mapping, fd: int, writable: bool) -> None:
        """Take `mapping` and `fd` over, unless it raises.

        `fd` must come from an open() of its own: the mapping keeps a duplicate of the descriptor that it was
        made from, and a lock would live as long as that.
        """
        self.url, self.path = url, path
        self.kind = url.partition(":")[0]
        self.size = len(mapping)
        self.writable = writable
        self.identity = identity_of(fd)
        self._can_lock = locks.supported(fd)
        self._locked: set[int] = set()
        self._pid = os.getpid()
        self._mmap: Mapping | None = mapping
        self._shared: _Shared | None = None
        self._fd = fd  # last: from here on it is ours to close

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else format_size(self.size)
        return f"<{type(self).__name__} {self.url} {state}>"

    # -- memory

    @property
    def mmap(self) -> Mapping:
        """The mapping. Raises ForkedError after drop_inherited(), ValueError after close()."""
        if self._mmap is None:
            raise self._gone()
        return self._mmap

    def share(self) -> None:
        """Use one mapping together with all regions of this process that are the same memory and called this
        as well. Nobody may have a buffer of the mapping yet."""
        key = self.url, self.identity, self.size, self.writable, self.write_combining
        with _sharing:
            found = _shared.get(key)
            if found is None or not found.users:
                self._shared = _shared[key] = _Shared(key, self.mmap)
                return
            found.users += 1
            own, self._mmap, self._shared = self.mmap, found.mapping, found
        own.close()

    def _unmap(self) -> None:
        """Close the mapping, unless others share it. Raises BufferError."""
        if self._mmap is None:
            return
        with _sharing:
            if self._shared is None or self._shared.users == 1:
                self._mmap.close()
            if self._shared is not None:
                self._mmap = None
                self._unshare()

    def _unshare(self) -> None:
        with _sharing:
            shared, self._shared = self._shared, None
            if shared is not None:
                shared.users -= 1
                if not shared.users and _shared.get(shared.key) is shared:
                    del _shared[shared.key]

    @property
    def closed(self) -> bool:
        return self._fd < 0

    @property
    def holes(self) -> tuple[int, bool] | None:
        """The descriptor of a file with holes, and whether fallocate(2) is real there; None: it has none."""
        return None

    def ensure(self, offset: int, length: int) -> None:
        """Back the bytes [offset, offset + length) with storage; their values stay.

        Here they have it already. Raises ValueError outside the region, OSError (ENOSPC) if the disk is full.
        """
        self._check_range(offset, length)

    def _check_range(self, offset: int, length: int) -> None:
        self._open_fd()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(
                f"bytes {offset}..{offset + length} are outside of {self.url}, which has {self.size}"
            )

    def displaced(self) -> str:
        """Tell whether others who name it get something else by now: "" if not, or if that cannot be told;
        else "removed" or "moved" (there is nothing where it was), or "replaced" (there is something else).

        Never waits. Raises ValueError when closed.
        """
        fd = self._open_fd()
        return "" if self.place is None else self.place.lost(fd)

    # -- locks

    @property
    def can_lock(self) -> bool:
        """Whether this file knows locks. If not, every section seems free, and nothing follows from that."""
        return self._can_lock

    @property
    def lock_fd(self) -> int:
        """Return the descriptor for F_OFD_GETLK, -1 when there are no locks. Valid until close()."""
        return self._fd if self._can_lock else -1

    def lock_section(self, index: int) -> bool:
        """Lock section `index` until close() or the end of this process; False if somebody else has it.

        True without effect when the file knows no locks (`can_lock`). Raises RegionError if read-only.
        """
        fd = self._open_fd()
        if not self.writable:
            raise region_error(
                errno.EBADF, f"{self.url} was opened read-only: it takes a writable one to claim a section"
            )
        if not self._can_lock:
            return True
        if not locks.try_lock(fd, index):
            return False
        self._locked.add(index)
        return True

    def unlock_section(self, index: int) -> None:
        """Give the lock of section `index` back; nothing happens if it is not held here."""
        fd = self._open_fd()
        if index in self._locked:
            self._locked.discard(index)
            locks.unlock(fd, index)

    def section_locked(self, index: int) -> bool:
        """Does somebody else, be it another Region of this process, hold the lock of section `index`?"""
        fd = self._open_fd()
        return self._can_lock and locks.is_locked(fd, index)

    # -- the end

    def close(self) -> None:
        """Give up locks, mapping, doorbell and descriptors. A second call does nothing.

        Raises BufferError, and changes nothing, while a buffer of the mapping is in use.
        """
        if self._fd < 0:
            return
        if os.getpid() != self._pid:
            self.drop_inherited()
            return
        try:
            self._unmap()
        except BufferError:
            raise BufferError(
                f"{self.url} is still in use: release the memoryviews and buffers of its mapping, then "
                "close it again"
            ) from None
        # Explicitly, since a forked child may still have a copy of the descriptor.
        for index in self._locked:
            locks.unlock(self._fd, index)
        self._close_fd()

    def drop_inherited(self) -> None:
        """In a forked child: let go of everything, without touching the parent's locks or memory.

        The mapping itself stays for as long as somebody has a buffer of it.
        """
        if self._fd < 0:
            return
        self._close_fd()  # never unlock here: the lock is the parent's as well
        with contextlib.suppress(BufferError):
            self._unmap()
        self._mmap = None

    def detach(self) -> Mapping:
        """Close everything but the mapping, which is not shared, and hand that to the caller."""
        self._open_fd()
        mapping, self._mmap = self.mmap, None
        self.close()
        return mapping

    def _close_fd(self) -> None:
        """The doorbell goes with it. (In a forked child too: it knows which process made it.)"""
        fd, self._fd = self._fd, -1
        self._locked.clear()
        self._can_lock = False
        try:
            if self.doorbell is not None:
                self.doorbell.close()
        finally:
            os.close(fd)

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise self._gone()
        return self._fd

    def _gone(self) -> ForkedError | ValueError:
        if os.getpid() != self._pid:
            return forked(f"region {self.url}")
        return ValueError(f"region {self.url} is closed")

    def __enter__(self: _R) -> _R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A descriptor, unlike a mapping, does not go away by itself. (__init__ may not have come that far.)
        if getattr(self, "_fd", -1) < 0:
            return
        try:
            if os.getpid() == self._pid:
                warnings.warn(f"unclosed region {self.url}", ResourceWarning, source=self, stacklevel=2)
        finally:
            self._close_fd()
            self._unshare()

    # -- for people

    def describe(self) -> Description:
        """Tell what stores the region's bytes, for people. Raises ValueError when closed."""
        status = os.fstat(self._open_fd())
        return Description(
            "sysfs", PAGESIZE, self.size, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        )


def identity_of(file: int | str) -> tuple[int, int]:
    """Device and inode of a descriptor, or of what has that name; a link itself, not what it leads to."""
    status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    return status.st_dev, status.st_ino


def check_size(path: str, size: int, minimum: int = MINIMUM) -> None:
    """Raise RegionFormatError when there are fewer bytes than a region takes."""
    if size < minimum:
        seen = "is empty" if not size else f"has {format_size(size)}"
        raise format_error(
            f"region {path} {seen}, expected at least {format_size(minimum)}: truncated, or not a region; "
            "name another, or make one with `shmsock create`",
            path,
        )


def map_bytes(fd: int, size: int, writable: bool, offset: int = 0) -> Mapping:
    """Map `size` bytes of `fd` from `offset` on, shared.

    Raises what mmap(2) does, RegionError if the file is shorter.
    """
    access = ACCESS_WRITE if writable else ACCESS_READ
    try:
        return Mapping(fd, size, access=access, offset=offset)
    except ValueError as error:  # the module compares with the size of the file: it shrank just now
        raise RegionError(errno.EINVAL, f"truncated while it was being mapped ({error})") from None
