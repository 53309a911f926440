"""Making region files, so that nobody ever sees a half-made one.

A file is made under a temporary name in the same directory, gets its storage and its format there, and is
published by link(), which never replaces: of two processes that make one at the same moment, one wins and
both use its file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator

from shmsock.errors import RegionError, RegionExistsError, RegionNotFoundError, disk_full, region_error
from shmsock.region import storage
from shmsock.region.base import MINIMUM, Region
from shmsock.region.file import FileRegion, check_regular, explain_open, open_file, owner_name
from shmsock.region.sizes import format_size, round_up

__all__ = ["DEFAULT_SIZE", "create_file", "open_default"]

DEFAULT_SIZE = 256 << 20
"""Bytes of the default region. It is sparse: only what is used takes memory."""

Prepare = Callable[[Region], None]
"""Formats a region that is all zero and not published yet."""
Check = Callable[[Region], None]
"""Raises if an existing region must not be overwritten."""

_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))


def create_file(
    path: str,
    size: int,
    *,
    mode: int = 0o600,
    force: bool = False,
    prepare: Prepare | None = None,
    check: Check | None = None,
) -> int:
    """Make a region file with all its storage, format it with `prepare`, and return its size in bytes.

    `size` is rounded up to whole pages, on hugetlbfs to whole huge pages. `mode`: permissions, whatever the
    umask. `force`: there may be a file already, and `check(old)`, given it, may raise to keep it. Of the same
    size, it is formatted in place, zeroed, as QEMU may have it mapped; of another size, it is replaced: a
    mapped file must not shrink, and who has it mapped keeps the old one until restarted.

    Raises RegionError: RegionExistsError (without `force`), ENOSPC (nothing is left behind), ... and what
    `prepare` and `check` raise.
    """
    directory = os.path.dirname(path) or "."
    try:
        fs = storage.filesystem(directory)
    except OSError as error:
        raise explain_open(error, path) from None
    if size <= 0:
        raise ValueError(f"a region cannot have {size} bytes")
    size = round_up(size, fs.unit)
    replace = False
    if _exists(path):
        if not force:
            raise _already(path)
        if _reuse(path, size, mode, prepare, check):
            return size
        replace = True
    with _temporary(directory, path, size, mode) as temporary:
        with open_file(temporary) as region:
            region.allocate()
            if prepare:
                prepare(region)
        if replace:
            os.rename(temporary, path)
        else:
            _publish(temporary, path)
    return size


def open_default(
    path: str,
    *,
    size: int = DEFAULT_SIZE,
    prepare: Prepare | None = None,
    create: bool = True,
    writable: bool = True,
) -> FileRegion:
    """Open this user's own region. With `create` it is made if it is not there: `size` bytes, sparse.

    A region that anyone else could open is refused: whoever maps a region may do anything with it.
    `prepare` formats a new one; it must ensure() the bytes that it touches.
    Raises RegionError: RegionPermissionError (not ours, or open to others), ENOSPC, ... and what `prepare`
    raises.
    """
    for _ in range(10):
        try:
            return _open_own(path, writable)
        except RegionNotFoundError:
            if not create or not os.path.isdir(os.path.dirname(path)):
                raise
        with _temporary(os.path.dirname(path), path, size, 0o600) as temporary:
            if prepare:
                with open_file(temporary) as region:
                    prepare(region)
            try:
                _publish(temporary, path)
            except RegionExistsError:
                pass  # somebody else was faster: theirs it is
    raise region_error(
        errno.EBUSY, f"region {path} comes and goes: something removes it as soon as it is made", path
    )


def _open_own(path: str, writable: bool) -> FileRegion:
    try:
        before = os.lstat(path)
    except OSError as error:
        raise explain_open(error, path) from None
    if stat.S_ISREG(before.st_mode):  # the rest is open_file()'s to refuse
        _check_own(path, before.st_uid, before.st_mode)
    region = open_file(path, writable=writable)
    try:
        opened = region.describe()  # once more, of what was opened: the name may have moved on
        _check_own(path, opened.uid, opened.mode)
    except BaseException:
        region.close()
        raise
    return region


def _check_own(path: str, uid: int, mode: int) -> None:
    """Raises RegionPermissionError unless a file of this owner and mode is ours alone."""
    me = os.geteuid()
    if uid != me:
        raise region_error(
            errno.EACCES,
            f"region {path} is owned by somebody else: {owner_name(uid)}, expected {owner_name(me)}; have it "
            "removed, or name another region with SHMSOCK_REGION or region=",
            path,
        )
    if mode & 0o077:
        raise region_error(
            errno.EACCES,
            f"region {path} has mode {stat.S_IMODE(mode):04o}, expected 0600: others could read or write it; "
            "chmod it; to share one, make it under another path, to be named by SHMSOCK_REGION or region=",
            path,
        )


@contextlib.contextmanager
def _temporary(directory: str, path: str, size: int, mode: int) -> Iterator[str]:
    """A file of `size` bytes, sparse, beside `path`. Afterwards its temporary name is gone in any case."""
    temporary = os.path.join(directory, f".shmsock-{secrets.token_hex(8)}.tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _explain_create(error, path, directory) from None
    try:
        try:
            os.ftruncate(fd, size)
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise disk_full(path, size) from None
            raise region_error(
                error.errno or errno.EIO,
                f"cannot make {path} {format_size(size)} long: {error.strerror}",
                path,
            ) from None
        finally:
            os.close(fd)
        try:
            yield temporary
        except RegionError as error:  # people know the name that they asked for
            made = type(error)(error.errno or errno.EIO, (error.strerror or "").replace(temporary, path))
            made.filename = path
            raise made from None
    finally:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass  # renamed


def _publish(temporary: str, path: str) -> None:
    """Give the file its name. Raises RegionExistsError when the name is taken."""
    try:
        os.link(temporary, path, follow_symlinks=False)
        return
    except FileExistsError:
        raise _already(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise _explain_create(error, path, os.path.dirname(path)) from None
    # A file system without hard links: take the name with an empty file, then put ours in its place.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise _already(path) from None
    os.rename(temporary, path)


def _reuse(path: str, size: int, mode: int, prepare: Prepare | None, check: Check | None) -> bool:
    """Format the existing file in place, if it has the right size; False: replace it."""
    status = os.lstat(path)
    check_regular(path, status.st_mode)
    if status.st_size < MINIMUM:
        return False  # nothing that anyone could use
    with open_file(path) as region:
        if check:
            check(region)
        if region.size != size:
            return False
        region.allocate()
        # From back to front: whoever attaches meanwhile finds out when the format word, at the front, goes
        # last. The other way round it could format anew what is then cleared.
        step = 1 << 20
        zeros = bytes(step)
        for start in range((size - 1) // step * step, -1, -step):
            length = min(step, size - start)
            region.mmap[start : start + length] = zeros[:length]
        os.chmod(path, mode)
        if prepare:
            prepare(region)
    return True


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise explain_open(error, path) from None
    return True


def _already(path: str) -> RegionError:
    return region_error(
        errno.EEXIST,
        f"region {path} exists already: use it as it is, or `shmsock create --force` to start anew",
        path,
    )


def _explain_create(error: OSError, path: str, directory: str) -> RegionError:
    """What it means that no file can be made in `directory`."""
    code = error.errno or errno.EIO
    if code in (errno.EACCES, errno.EPERM):
        try:
            status = os.stat(directory)
            seen = f"belongs to {owner_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o}"
        except OSError:
            seen = "cannot be looked at"
        me = owner_name(os.geteuid())
        text = f"no permission to make {path}: {directory} {seen}, we run as {me}; choose another path"
    elif code in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path)
    elif code == errno.EROFS:
        text = f"cannot make {path}: {directory} is on a read-only file system; choose another path"
    elif code in (errno.EOPNOTSUPP, errno.ENODEV):
        return region_error(
            errno.EOPNOTSUPP, f"cannot make {path}: no files can be made in {directory}", path
        )
    else:
        text = f"cannot make {path}: {os.strerror(code)}"
    return region_error(code, text, path)
