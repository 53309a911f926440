"""The ground of an ivshmem server: its memory, its listening socket, and what systemd hands to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import stat
import time
from functools import partial
from typing import NamedTuple

from shmsock import region as regions
from shmsock.aio.attach import prepare_region
from shmsock.engine import layout as lay
from shmsock.engine.memory import Memory, native_core
from shmsock.errors import RegionError, RegionExistsError, disk_full, format_error, region_error
from shmsock.region import locks, storage
from shmsock.region.base import Region, identity_of, map_bytes
from shmsock.region.file import FileRegion, owner_name
from shmsock.region.sizes import format_size, human, round_up

__all__ = [
    "MEMFD",
    "Listener",
    "Store",
    "activated",
    "listen",
    "make_store",
    "notify",
    "raise_limit",
]

MEMFD = "memfd"
"""In place of a file: memory without a name, which goes with the last process that has it."""

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_PATH_BYTES = 107  # sockaddr_un.sun_path, but for the zero at its end
_PROBE_S = 0.05


class Store(NamedTuple):
    """The memory that clients are given."""

    fd: int
    lock_fd: int
    """Holds the lock that says that a server is here; -1: none is needed."""
    size: int
    title: str
    """For people: "/dev/shm/x, 64 MiB, made"."""

    def close(self) -> None:
        os.close(self.fd)
        if self.lock_fd >= 0:
            os.close(self.lock_fd)


def make_store(region: str, size: int | None, *, peers: int = 16, mode: int = 0o600) -> Store:
    """Memory, formatted: `region` is "memfd", or names a file, which is made when it is not there, formatted
    when it is all zero, and left as it is when it is a region already, since others may be using it.

    Raises RegionError that says what is wrong.
    """
    if size is not None:
        _check_power(size, "the size asked for")
    if region == MEMFD:
        if size is None:
            raise region_error(errno.EINVAL, "a memfd has no size yet: give one, such as --size 64M")
        return _make_memfd(size, peers)
    kind, path = regions.parse_url(region if ":" in region.partition("/")[0] else os.path.abspath(region))
    if kind != "file":
        raise region_error(errno.EINVAL, f"{region}: expected the path of a file, or {MEMFD}: that is served")
    made = False
    if size is not None:
        try:
            regions.create_file(path, size, mode=mode, prepare=partial(prepare_region, peers=peers))
            made = True
        except RegionExistsError:
            pass
    elif not os.path.lexists(path):
        raise region_error(
            errno.ENOENT, f"region {path} does not exist: give a size, such as --size 64M, to make it", path
        )
    with regions.open_file(path) as opened:
        return _serve_file(opened, size, peers, "made" if made else "as it was")


def _serve_file(opened: FileRegion, size: int | None, peers: int, state: str) -> Store:
    """All that follows is about what was opened, whatever has its name by now."""
    path, known = opened.path, opened.describe()
    _check_owner(f"region {path}", known.uid, path)
    whole = opened.origin + opened.size
    wanted = whole if size is None else round_up(size, known.page_size)
    if whole != wanted:
        raise region_error(
            errno.EINVAL,
            f"region {path} has {format_size(whole)}, expected the {format_size(wanted)} asked for: "
            "leave the size out, or name another file",
            path,
        )
    _check_power(whole, f"region {path}", path)
    storage.warn_of_disk(path, known.filesystem)
    lock_fd = _lock(opened)
    try:
        if any(opened.peek(lay.HEADER)):
            _check_formatted(opened)
        elif not opened.is_zero():
            raise format_error(
                f"region {path} begins with zeros and holds something else further on: make it anew with "
                "`shmsock create --force`, or name another file",
                path,
            )
        else:
            state = "formatted"
        opened.allocate()  # a hole would be a SIGBUS in somebody's QEMU when the disk is full
        if state == "formatted":
            prepare_region(opened, peers)
        fd = opened.reopen()  # file locks belong to an open(), and everybody gets this one
    except BaseException:
        os.close(lock_fd)
        raise
    if known.mode & 0o007:
        state += f", mode {known.mode:04o}: everybody can open it"
    return Store(fd, lock_fd, whole, f"{path}, {format_size(whole)}, {state}")


def _check_owner(what: str, uid: int, path: str) -> None:
    """Raises RegionPermissionError when somebody else made it: who owns a file can truncate it, or open it to
    others, at any time."""
    if uid not in (0, os.geteuid()):
        raise region_error(
            errno.EACCES,
            f"{what} is owned by {owner_name(uid)}, expected {owner_name(os.geteuid())}: have it removed, "
            "choose another path, or run the server as its owner",
            path,
        )


def _lock(opened: FileRegion) -> int:
    """One server for each file: peers of two would take each other's ids for those of their own server. The
    descriptor is nobody else's, so that the lock falls with this process."""
    fd = opened.reopen()
    if locks.supported(fd) and not locks.try_lock(fd, locks.SERVER_LOCK):
        os.close(fd)
        raise region_error(
            errno.EBUSY,
            f"region {opened.path} is served by another ivshmem server already: stop that one, or name "
            "another file",
            opened.path,
        )
    return fd


def _check_formatted(opened: Region) -> None:
    """Raises RegionFormatError unless the whole of it is a region of this version."""
    memory = Memory(native_core(), opened.mmap)
    try:
        layout = lay.read_layout(memory)
    except OSError as error:
        raise format_error(f"{opened.path}: {error.strerror}", opened.path) from None
    finally:
        memory.release()
    if layout.region_bytes != opened.size:
        raise format_error(
            f"region {opened.path} was formatted with {format_size(layout.region_bytes)} and has "
            f"{format_size(opened.size)} now: make it anew with `shmsock create --force`",
            opened.path,
        )


def _check_power(size: int, what: str, path: str | None = None) -> None:
    if size & (size - 1):
        larger = format_size(1 << size.bit_length())
        raise region_error(
            errno.EINVAL,
            f"{what}: {format_size(size)}, expected a power of two, as a PCI BAR must be, such as {larger}",
            path,
        )


def _make_memfd(size: int, peers: int) -> Store:
    """All of its storage taken, and its size fixed for good: nobody who has it can make others crash."""
    if size > (free := _available()):  # taking it all the same would have the kernel kill somebody
        room = human(free)
        raise disk_full(MEMFD, human(size), f"{room} of memory are free: use a smaller size")
    with contextlib.ExitStack() as undo:
        fd = os.memfd_create("shmsock-ivshmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, fd)
        try:
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise disk_full(MEMFD, human(size), "use a smaller size, or a file on huge pages") from None
            raise
        mapping = map_bytes(fd, size, True)
        # Of an open() of its own, since locks and close() go with that.
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        with Region(MEMFD, MEMFD, mapping, own, True) as opened:
            prepare_region(opened, peers)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        undo.pop_all()
    return Store(fd, -1, size, f"a sealed memfd, {format_size(size)}, made")


def _available() -> int:
    """Bytes of memory that can be had without swapping, as the kernel estimates."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as table:
        for line in table:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


class Listener(NamedTuple):
    """A listening socket, and the name to take away at the end."""

    sock: socket.socket
    path: str
    identity: tuple[int, int] | None
    """(st_dev, st_ino) of the socket file that is ours; None: it is systemd's."""

    def close(self) -> None:
        """Stop listening; remove the socket file if it still is the one that we made."""
        self.sock.close()
        if self.identity is not None:
            with contextlib.suppress(OSError):
                if identity_of(self.path) == self.identity:
                    os.unlink(self.path)


def listen(path: str, mode: int = 0o600) -> Listener:
    """Listen at `path`, never open wider than `mode`. A socket file of ours that nobody listens on is
    replaced.

    Raises RegionError: EADDRINUSE when somebody listens there, EEXIST when something else has that name, ...
    """
    path = os.path.abspath(path)
    if (length := len(os.fsencode(path))) > _PATH_BYTES:
        raise region_error(
            errno.ENAMETOOLONG,
            f"socket {path}: {length} bytes are too long for a socket's path, expected at most {_PATH_BYTES}",
            path,
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        for _ in range(10):
            before = os.umask(0o777 & ~mode)
            try:
                sock.bind(path)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise _explain_bind(error, path) from None
            finally:
                os.umask(before)
            _remove_stale(path)
        else:
            raise region_error(errno.EADDRINUSE, f"socket {path} comes and goes: who else makes it?", path)
        made = Listener(sock, path, identity_of(path))
        sock.listen(1024)
        return made
    except BaseException:
        sock.close()
        raise


def _remove_stale(path: str) -> None:
    """Raises RegionError unless it is a socket file that nobody listens on; removes that."""
    try:
        before = os.lstat(path)
        if not stat.S_ISSOCK(before.st_mode):
            raise region_error(
                errno.EEXIST,
                f"{path} is there already and is no socket: remove it, or choose another path",
                path,
            )
        _check_owner(f"socket {path}", before.st_uid, path)
        if _answers(path):
            raise region_error(
                errno.EADDRINUSE,
                f"socket {path} is in use: another server listens there; stop it, or choose another path",
                path,
            )
        time.sleep(_PROBE_S)  # one that is just being made does not listen yet
        if not _answers(path) and identity_of(path) == (before.st_dev, before.st_ino):
            os.unlink(path)
    except FileNotFoundError:
        return  # gone by itself
    except RegionError:
        raise
    except PermissionError as error:
        raise _explain_bind(error, path) from None


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            pass  # it has its backlog full
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:  # of another type than a stream
                return True
            raise
        return True


def _explain_bind(error: OSError, path: str) -> OSError:
    code = error.errno or errno.EIO
    directory = os.path.dirname(path)
    if code == errno.ENOENT:
        text = f"cannot make socket {path}: there is no directory {directory}; make it first"
    elif code in (errno.EACCES, errno.EPERM):
        me = owner_name(os.geteuid())
        text = (
            f"no permission to make or replace socket {path}: this process runs as {me}; choose another path"
        )
    else:
        text = f"cannot make socket {path}: {os.strerror(code)}"
    return region_error(code, text, path)


def activated() -> Listener | None:
    """The socket that systemd opened for us (LISTEN_FDS), checked; None: it did not. Asks once: a second call
    finds nothing, nor do child processes."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise region_error(
            errno.EINVAL, f"LISTEN_FDS={count}: expected 1, one ListenStream= in the socket unit"
        )
    try:
        os.set_inheritable(_FIRST_FD, False)
        sock = socket.socket(fileno=_FIRST_FD)
    except OSError as error:
        text = f"LISTEN_FDS=1, but descriptor {_FIRST_FD} is no socket: {error.strerror}"
        raise region_error(error.errno or errno.EBADF, text) from None
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listening:
        sock.close()
        raise region_error(
            errno.EINVAL,
            f"descriptor {_FIRST_FD} from LISTEN_FDS is not a listening UNIX stream socket: expected "
            "ListenStream=/a/path and Accept=no in the socket unit",
        )
    sock.setblocking(False)
    name = sock.getsockname()
    return Listener(sock, name if isinstance(name, str) else os.fsdecode(name), None)


def notify(state: str) -> None:
    """Tell systemd, or whoever set NOTIFY_SOCKET. Never waits, never raises."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode(), "\0" + name[1:] if name[0] == "@" else name)


class Unread:
    """A limit on messages that lie unread in connections: their descriptors count for our user as if we had
    them open ourselves (else ETOOMANYREFS, for everybody). Each client gets room for `least`, and a part of
    what is left over as long as there is any: so it goes on for a while when it is busy elsewhere."""

    def __init__(self, total: int, clients: int) -> None:
        """`total`: messages, for so many clients."""
        self.least, _ = _messages(1)
        most, size = _messages(1 << 17)
        self._most = most
        self._bytes = size / most  # of SO_SNDBUF for a message
        self.clients = min(clients, total // self.least)
        """The number of clients that can have their room."""
        self._spare = total - self.clients * self.least

    def take(self, sock: socket.socket) -> int:
        """Make room for a client on its connection: the messages to give back later."""
        extra = min(self._most - self.least, self._spare // 16)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int((self.least + extra) * self._bytes))
        self._spare -= extra
        return extra

    def give_back(self, extra: int) -> None:
        self._spare += extra


def _messages(size: int) -> tuple[int, int]:
    """Try how many messages a connection takes with that SO_SNDBUF, and what the kernel makes of it."""
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(8), socket.MSG_DONTWAIT)
                count += 1
        return count, near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2  # it doubles what it is told


def raise_limit() -> None:
    """Open as many descriptors as we are allowed to at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # more than fs.nr_open
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
