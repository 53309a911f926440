"""Regions in files: /dev/shm, hugetlbfs, or any path that can be mapped."""

from __future__ import annotations

import errno
import mmap
import os
import pwd
import re
import stat
from contextlib import ExitStack

from shmsock.errors import RegionError, command, disk_full, format_error, region_error
from shmsock.region import info_block, storage
from shmsock.region.base import MINIMUM, Description, Region, check_size, identity_of, map_bytes
from shmsock.region.place import LOCAL, Place, holders, restart
from shmsock.region.sizes import format_size, human

__all__ = ["FileRegion", "check_regular", "explain_open", "open_file", "owner_name", "whose"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}

_DEFAULT = re.compile(r"/dev/shm/shmsock-\d+")
MEET = (
    "meet in a region that is nobody's own (`shmsock create /dev/shm/NAME --mode 0660 --size 64M`, chgrp it, "
    "set SHMSOCK_REGION for all)"
)
"""Advice about a default region, which its owner's processes refuse once others may open it."""
LOOK_S = 0.05
"""The time in which a message may search for processes that hold a removed file."""
_OPEN_IT = "open it to a group: chgrp, chmod 0660 (`shmsock create --mode 0660`)"


class FileRegion(Region):
    """A region in a file."""

    def __init__(
        self,
        path: str,
        mapping: mmap.mmap,
        fd: int,
        writable: bool,
        fs: storage.FileSystem,
        url: str = "",
        origin: int = 0,
    ) -> None:
        """Take `mapping` and `fd` over, unless it raises. `origin`: where in the file the region begins."""
        status = os.fstat(fd)
        # hugetlbfs reserves at mmap() all pages that the file lacks. Elsewhere only tmpfs counts blocks
        # exactly; calling ensure() where it is not needed costs little.
        full = fs.huge or (fs.type == "tmpfs" and status.st_blocks * 512 >= status.st_size)
        super().__init__(url or f"file:{path}", path, mapping, fd, writable)
        self.sparse = not full
        self.origin = origin
        self._fs = fs
        self.place = Place(path, self.identity) if fs.type in LOCAL else None

    @property
    def filesystem(self) -> str:
        """The type of its file system, as mount(8) names it."""
        return self._fs.type

    @property
    def holes(self) -> tuple[int, bool] | None:
        return (self._open_fd(), storage.can_fallocate(self._fs.type)) if self.sparse else None

    def ensure(self, offset: int, length: int) -> None:
        """Back the bytes [offset, offset + length) with storage; their values stay.

        Raises ValueError outside the region; RegionError: ENOSPC when the disk is full, RegionFormatError
        when the file was truncated under the mapping.
        """
        self._check_range(offset, length)
        if not self.sparse or not length:
            return
        if not self.writable:
            raise region_error(
                errno.EBADF, f"{self.url} was opened read-only: its holes cannot be filled", self.path
            )
        self._back(offset, length)

    def allocate(self) -> None:
        """Back the whole region, hugetlbfs included, so that no touch can fail, and what is before it in the
        file. Raises as ensure() does."""
        self._check_range(0, self.size)
        self._back(0, self.size)
        self.sparse = False

    def _back(self, offset: int, length: int) -> None:
        fd, origin = self._open_fd(), self.origin
        seen = os.fstat(fd).st_size
        # Allocating would make the file longer again, behind the culprit's back.
        if seen < origin + offset + length:
            raise format_error(
                f"region {self.path} was truncated to {format_size(seen)} while it was in use, expected "
                f"{format_size(origin + self.size)}; restart what uses it, and create it anew",
                self.path,
            )
        try:
            storage.back(fd, self.mmap, self._fs.type, offset, length, origin)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                raise region_error(
                    error.errno or errno.EIO,
                    f"cannot allocate bytes of {self.path}: {error.strerror}",
                    self.path,
                ) from None
            if self._fs.huge:
                hint = storage.huge_page_hint(length, self._fs.block_size)
            else:
                free = os.fstatvfs(fd)
                room = human(free.f_bavail * free.f_frsize)
                hint = f"{room} are free: make room, or use a smaller region"
            raise disk_full(self.path, human(length), hint) from None

    def peek(self, length: int, offset: int = 0) -> bytes:
        """Read bytes from `offset` on, not through the mapping: there even reading a hole takes a page."""
        return os.pread(self._open_fd(), length, self.origin + offset)

    def reopen(self) -> int:
        """Open the file again, and return a descriptor of its own, whatever has the name by now; as writable
        as the region. The caller closes it. Raises OSError."""
        flags = os.O_RDWR if self.writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{self._open_fd()}", flags | os.O_CLOEXEC)

    def is_zero(self, start: int = 0) -> bool:
        """Is there no other byte from `start` on? Holes are skipped, and stay."""
        fd, step, at = self._open_fd(), 1 << 20, self.origin + start
        while at < self.origin + self.size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return True  # nothing but a hole from here
                if error.errno != errno.EINVAL:
                    raise
            data = os.pread(fd, step, at)
            if data.count(0) != len(data):
                return False
            at += len(data) or step
        return True

    def describe(self) -> Description:
        blocks = os.fstat(self._open_fd()).st_blocks
        return (
            super()
            .describe()
            ._replace(
                filesystem=self._fs.type, page_size=self._fs.unit, allocated=min(self.size, blocks * 512)
            )
        )


def open_file(path: str, *, writable: bool = True, minimum: int = MINIMUM) -> FileRegion:
    """Map the file `path`, which must be a regular one and no symbolic link; the whole of it, unless an info
    block of persistent memory says otherwise. Such a file has no holes afterwards, unless it is read-only.

    Raises RegionError with the errno that fits: RegionNotFoundError, RegionPermissionError, RegionFormatError
    (fewer than `minimum` bytes), ENODEV (cannot be mapped), ENOMEM (no huge pages), ...
    """
    path = os.path.join(os.getcwd(), path)  # itself if absolute, as it mostly is
    with ExitStack() as undo:
        fd = _open(path, writable)
        try:
            status = os.fstat(fd)
            check_regular(path, status.st_mode)
            check_size(path, status.st_size, minimum)
            fs = storage.filesystem(fd)
            if status.st_size % fs.unit and fs.huge:  # mmap() would succeed, and munmap() fail
                raise format_error(
                    f"region {path} has {format_size(status.st_size)}, expected a multiple of the huge page, "
                    f"{format_size(fs.unit)}; `shmsock create` rounds up",
                    path,
                )
            origin, size = info_block.find_in_file(fd, status.st_size, path)
            try:
                mapping = undo.enter_context(map_bytes(fd, size, writable, origin))
            except OSError as error:
                raise _explain_map(error, path, status.st_size, fs) from None
            # Not dup(): locks must belong to a description of their own (see Region.__init__).
            second = _open(path, writable)
            undo.callback(os.close, second)
            if identity_of(second) != identity_of(fd):
                raise region_error(
                    errno.ESTALE, f"region {path} was replaced while it was opened: try again", path
                )
            region = FileRegion(path, mapping, second, writable, fs, origin=origin)
        finally:
            os.close(fd)
        undo.pop_all()
        if origin and region.sparse and writable:
            try:
                region.allocate()
            except BaseException:
                region.close()
                raise
        return region


def _open(path: str, writable: bool) -> int:
    """open(2) for a regular file; raises RegionError."""
    try:
        check_regular(path, os.lstat(path).st_mode)  # first: opening a device may already do something
        # O_NONBLOCK: should it have become a named pipe since, do not wait for its other end.
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        return os.open(path, flags | (os.O_RDWR if writable else os.O_RDONLY))
    except RegionError:
        raise
    except OSError as error:
        raise explain_open(error, path, writable) from None


def check_regular(path: str, mode: int) -> None:
    """Raises RegionError unless `mode` (st_mode) is a regular file's."""
    if stat.S_ISREG(mode):
        return
    kind = stat.S_IFMT(mode)
    seen = _KINDS.get(kind, "of an unknown kind")
    if kind == stat.S_IFLNK:
        raise region_error(
            errno.ELOOP,
            f"region {path} is a symbolic link, expected a regular file: links are not followed, name the "
            "file itself",
            path,
        )
    name = os.path.basename(path)
    if path.startswith("/dev/dax"):
        seen += f", of persistent memory: name it dax:{name}"
    if path.startswith("/dev/pmem"):
        seen += ", whose mappings are copies in this guest's page cache (see `shmsock create --dax`)"
    code = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
    raise region_error(
        code, f"region {path} is {seen}, expected a regular file: name a file in it, or another path", path
    )


def explain_open(error: OSError, path: str, writable: bool = True) -> RegionError:
    """Explain why `path` could not be opened."""
    code = error.errno or errno.EIO
    directory = os.path.dirname(path) or "/"
    if code == errno.ENOENT and not os.path.isdir(directory):
        text = f"region {path} does not exist, nor does the directory {directory}: make that first"
    elif code == errno.ENOENT:
        text = f"region {path} does not exist: make it with `{command('create', path, '--size 64M')}`"
        if old := holders(path, LOOK_S):
            text += f"; {restart(old, path)}, once there is a new one"
    elif code in (errno.EACCES, errno.EPERM):
        wish = "reading and writing" if writable else "reading"
        advice = MEET if _DEFAULT.fullmatch(path) else _OPEN_IT
        text = f"no permission to open region {path} for {wish}: {whose(path, advice)}"
    elif code == errno.EROFS:
        text = f"region {path} lies on a read-only file system, expected a writable one: mount it so"
    elif code == errno.ELOOP:
        text = f"region {path} is a symbolic link, or reached through a loop of them: name the file itself"
    elif code == errno.ENOTDIR:
        text = f"region {path}: a part of the path is not a directory"
    else:
        text = f"cannot open region {path}: {os.strerror(code)}"
    return region_error(code, text, path)


def whose(path: str, advice: str) -> str:
    """Tell who may open `path`, who we are, and what would help besides being its owner."""
    me = f"this process runs as {owner_name(os.geteuid())}"
    try:
        status = os.stat(path)
    except OSError:
        return f"a directory on the way to it is closed to us, {me}"
    return (
        f"it belongs to {owner_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o}, and {me}; run "
        f"as its owner, or {advice}"
    )


def owner_name(uid: int) -> str:
    """'uid 0 (root)'."""
    try:
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"uid {uid}"


def _explain_map(error: OSError, path: str, size: int, fs: storage.FileSystem) -> RegionError:
    """Explain why the `size` bytes of `path` could not be mapped."""
    code = error.errno or errno.EIO
    amount = format_size(size)
    if isinstance(error, RegionError):
        return format_error(f"region {path} was {error.strerror}: try again", path)
    if code == errno.ENOMEM and fs.huge:
        text = f"cannot map the {amount} of region {path}: {storage.huge_page_hint(size, fs.block_size)}"
    elif code == errno.ENOMEM:
        text = f"cannot map the {amount} of region {path}: no memory, or a limit on address space (ulimit -v)"
    elif code in (errno.ENODEV, errno.EOPNOTSUPP, errno.EIO, errno.EINVAL):
        # Not through region_error(): ENODEV would read as "no such device".
        made = RegionError(
            code,
            f"region {path} lies on a file system ({fs.type}) that cannot map files for sharing "
            f"({os.strerror(code)}): use /dev/shm, hugetlbfs or a local disk",
        )
        made.filename = path
        return made
    elif code in (errno.EACCES, errno.EPERM):
        text = f"no permission to map region {path}: {whose(path, _OPEN_IT)}"
    else:
        text = f"cannot map the {amount} of region {path}: {os.strerror(code)}"
    return region_error(code, text, path)
