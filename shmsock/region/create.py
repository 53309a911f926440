"""Making region files, so that nobody ever sees a half-made one.

A file is made under a temporary name in the same directory, gets its storage and its format there, and is
published by link(), which never replaces: of two processes that make one at the same moment, one wins and
both use its file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator

from shmsock.errors import RegionError, RegionExistsError, RegionNotFoundError, disk_full, region_error
from shmsock.region import info_block, locks, storage
from shmsock.region.base import MINIMUM, Region, identity_of
from shmsock.region.file import FileRegion, check_regular, explain_open, open_file, owner_name
from shmsock.region.processes import open_elsewhere, users_of
from shmsock.region.sizes import format_size, human, round_up

__all__ = ["DEFAULT_SIZE", "create_file", "open_default"]

log = logging.getLogger("shmsock.region")

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
    dax: bool = False,
    prepare: Prepare | None = None,
    check: Check | None = None,
) -> int:
    """Make a region file with all its storage, format it with `prepare`, and return its size in bytes.

    `size` is rounded up to whole pages, on hugetlbfs to whole huge pages. `mode`: permissions, whatever the
    umask. `dax`: it can be given to guests as persistent memory, too. `force`: there may be a file already,
    and `check(old)`, given it, may raise to keep it. It is replaced, never written to: what others have open,
    or by another name, stays as it is. The new one has its group, where that is allowed.

    Raises RegionError: RegionExistsError (without `force`), RegionPermissionError (the old one is another
    user's), EBUSY (somebody has it mapped, or locked), ENOSPC (nothing is left behind), ... and what
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
    if not _exists(path):
        with _temporary(directory, path, size, mode, dax=dax) as made:
            _fill(made, prepare)
            _publish(made, path)
        storage.warn_of_disk(path, fs.type)
        return size
    if not force:
        raise _already(path)
    with _to_be_replaced(path) as old:
        _check_unused(old, path, check)
        with _temporary(directory, path, size, mode, os.fstat(old).st_gid, dax) as made:
            _fill(made, prepare)
            _check_unused(old, path, again=True)  # allocating and formatting took time: others may have come
            if _identity(path) != identity_of(old):
                raise _swapped(path)
            os.rename(made.path, path)
            _check_published(made, path)
    storage.warn_of_disk(path, fs.type)
    return size


def _fill(made: FileRegion, prepare: Prepare | None) -> None:
    made.allocate()
    if prepare:
        prepare(made)


@contextlib.contextmanager
def _to_be_replaced(path: str) -> Iterator[int]:
    """A descriptor of the file that is there. Raises RegionPermissionError unless it is ours."""
    try:
        before = os.lstat(path)  # first: opening a device may already do something
        check_regular(path, before.st_mode)
        _check_owner(path, before.st_uid)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(path, flags)
    except RegionError:
        raise
    except OSError as error:
        raise explain_open(error, path) from None
    try:
        opened = os.fstat(fd)  # once more, of what was opened: the name may have moved on
        check_regular(path, opened.st_mode)
        _check_owner(path, opened.st_uid)
        yield fd
    finally:
        os.close(fd)


def _check_unused(old: int, path: str, check: Check | None = None, *, again: bool = False) -> None:
    """Raise RegionError, EBUSY, when somebody has the file mapped, or holds a lock of it; before that, what
    `check` does. `again`: whom it could not see was told before."""
    if check and os.fstat(old).st_size >= MINIMUM:
        with open_file(path, writable=False) as region:
            if region.identity != identity_of(old):
                raise _swapped(path)
            check(region)
    elsewhere, users = open_elsewhere(old), users_of(old)
    seen = users.mapped[:]
    if not seen and locks.supported(old):
        held = [str(index) for index in range(locks.SECTIONS) if locks.is_locked(old, index)]
        seen += [f"whoever holds the lock of section {', '.join(held)}"] if held else []
        seen += ["an ivshmem server"] if locks.is_locked(old, locks.SERVER_LOCK) else []
    if not seen and users.hidden and elsewhere and not users.opened:
        seen = ["somebody who could not be seen, a process of another user (try as root)"]
    if seen:
        raise region_error(
            errno.EBUSY,
            f"region {path} is in use by {', '.join(seen)}: stop them, or make another region",
            path,
        )
    if users.hidden and elsewhere is not False and not again:
        log.warning("%d processes of other users could not be seen: have they %s mapped?", users.hidden, path)


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
        may_create = create and os.path.isdir(os.path.dirname(path))
        try:
            # Not to have an error made that nobody sees: it looks for those who hold a removed file.
            if not may_create or os.path.lexists(path):
                return _open_own(path, writable)
        except RegionNotFoundError:
            if not may_create:
                raise
        with _temporary(os.path.dirname(path), path, size, 0o600) as made:
            if prepare:
                prepare(made)
            try:
                _publish(made, path)
            except RegionExistsError:
                pass  # somebody else was faster: theirs is used
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
    """Raise RegionPermissionError unless a file of this owner and mode is ours alone."""
    _check_owner(path, uid)
    if mode & 0o077:
        raise region_error(
            errno.EACCES,
            f"region {path} has mode {stat.S_IMODE(mode):04o}, expected 0600: others could read or write it; "
            "chmod it; to share one, make it under another path, to be named by SHMSOCK_REGION or region=",
            path,
        )


def _check_owner(path: str, uid: int) -> None:
    me = os.geteuid()
    if uid != me:
        raise region_error(
            errno.EACCES,
            f"region {path} is owned by somebody else: {owner_name(uid)}, expected {owner_name(me)}; have it "
            "removed, or name another region with SHMSOCK_REGION or region=",
            path,
        )


@contextlib.contextmanager
def _temporary(
    directory: str, path: str, size: int, mode: int, group: int | None = None, dax: bool = False
) -> Iterator[FileRegion]:
    """Make a sparse file of `size` bytes beside `path`, and open it. Afterwards its temporary name is gone in
    any case."""
    temporary = os.path.join(directory, f".shmsock-{os.urandom(8).hex()}.tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _explain_create(error, path, directory) from None
    try:
        try:
            os.ftruncate(fd, size)
            if group is not None:
                with contextlib.suppress(PermissionError):  # a group that we are not in
                    os.fchown(fd, -1, group)
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise disk_full(path, human(size)) from None
            raise region_error(
                error.errno or errno.EIO,
                f"cannot make {path} {format_size(size)} long: {error.strerror}",
                path,
            ) from None
        try:
            if dax:
                info_block.write(fd, size, storage.filesystem(fd).unit, path)
            with open_file(temporary) as made:
                if made.identity != identity_of(fd):
                    raise _swapped(path)
                yield made
        except RegionError as error:  # people know the name that they asked for
            named = type(error)(error.errno or errno.EIO, (error.strerror or "").replace(temporary, path))
            named.filename = path
            raise named from None
    finally:
        os.close(fd)
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass  # renamed


def _publish(made: FileRegion, path: str) -> None:
    """Give the file its name. Raises RegionExistsError when the name is taken."""
    try:
        os.link(made.path, path, follow_symlinks=False)
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
        os.rename(made.path, path)
    _check_published(made, path)


def _check_published(made: FileRegion, path: str) -> None:
    """Check that the name leads to our file: whoever may write to the directory can move names."""
    if _identity(path) != made.identity:
        raise _swapped(path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        return identity_of(path)
    except OSError:
        return None


def _swapped(path: str) -> RegionError:
    return region_error(
        errno.ESTALE,
        f"region {path} was removed or replaced by somebody else meanwhile: try again, or choose a directory "
        "that others cannot write to",
        path,
    )


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise explain_open(error, path) from None
    return True


def _already(path: str) -> RegionError:
    do = (
        "use it as it is (whoever attaches first formats a blank one), or `shmsock create --force` to start "
        "anew"
    )
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            do = "it is no regular file, choose another path"
        elif status.st_uid != os.geteuid():
            do = f"it belongs to {owner_name(status.st_uid)}, have it removed, or choose another path"
    return region_error(errno.EEXIST, f"region {path} exists already: {do}", path)


def _explain_create(error: OSError, path: str, directory: str) -> RegionError:
    """Explain why no file can be made in `directory`."""
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
