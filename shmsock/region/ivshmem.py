"""Regions of an ivshmem server: a process of the host as one of its peers, beside QEMU's.

The server hands out the memory and the eventfds, and says who comes and goes; for anything else it is not
needed. What is mapped stays so without it, and eventfds that are known go on working.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import socket
import stat
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from shmsock.errors import ProtocolViolation, RegionError, format_error, region_error, violation
from shmsock.region import info_block, storage
from shmsock.region.base import MINIMUM, identity_of, map_bytes
from shmsock.region.doorbell import Doorbell, Reach
from shmsock.region.file import FileRegion, whose
from shmsock.region.ivshmem_protocol import MAX_ID, MAX_VECTORS, MEMORY, PROTOCOL_VERSION, Receiver
from shmsock.region.sizes import format_size

__all__ = ["IvshmemDoorbell", "IvshmemRegion", "Wait", "open_ivshmem", "opening_ivshmem"]

_T = TypeVar("_T")

PATIENCE_S = 2.0
"""Connecting and the first messages may take so long together. A server answers at once."""
MAX_PEERS = 256
"""The eventfds of so many peers are kept; others are not kicked. A region has 64 sections at most."""
BATCH = 256
"""The most messages that one call of news() takes in."""

_LONGEST = 107  # bytes of a socket's path, in struct sockaddr_un
_EVENTFD = "anon_inode:[eventfd]"
_SERVER = "ivshmem server"

_log = logging.getLogger("shmsock")


class Wait(NamedTuple):
    """A step of opening to wait for: until `sock` is readable (None: nothing but time), `seconds` at most."""

    sock: socket.socket | None
    seconds: float


_Waits = Generator[Wait, None, _T]


class IvshmemRegion(FileRegion):
    """The memory of an ivshmem server. It has a doorbell."""

    doorbell: IvshmemDoorbell

    def __init__(
        self,
        path: str,
        mapping: mmap.mmap,
        fd: int,
        writable: bool,
        fs: storage.FileSystem,
        doorbell: IvshmemDoorbell,
        own: bool,
        origin: int,
    ) -> None:
        """Take `doorbell` over as well. `own`: `fd` came from an open() of ours. If not, it is the
        description that the server passes to all, and a lock on it would be everybody's."""
        super().__init__(path, mapping, fd, writable, fs, f"ivshmem:{path}", origin)
        self._can_lock = self._can_lock and own
        self.place = None  # the path is the server's
        self.doorbell = doorbell


@dataclass
class _Peer:
    fd: int
    """The eventfd of its vector 0, which kicks it; others are closed at once. -1: not kept."""
    vectors: int = 1


class IvshmemDoorbell(Doorbell):
    """The eventfds that an ivshmem server hands out: our own, and those of the other peers."""

    def __init__(self, path: str, sock: socket.socket) -> None:
        """Take `sock` over, which is connected to the server at `path`. greet() comes next."""
        self.path = path
        self.id, self.vectors, self.fd = -1, 0, -1
        self.server_fd = sock.fileno()
        self._sock = sock
        self._receiver = Receiver(sock)
        self._peers: dict[int, _Peer] = {}
        self._kept = 0
        self._newest = -1  # whose vectors are coming in
        self._logged: set[str] = set()
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path} peer {self.id}>"

    def reach(self, peer: int) -> Reach | None:
        known = self._peers.get(peer)
        return None if known is None or known.fd < 0 else Reach("eventfd", known.fd)

    def others(self) -> frozenset[int] | None:
        return None if self.lost else frozenset(self._peers)

    def news(self) -> list[int]:
        left: list[int] = []
        if self.lost or self.server_fd < 0:
            return left
        try:
            for _ in range(BATCH):  # then it is the loop's turn: server_fd stays readable
                number, fd = self._receiver.receive()
                if self._take(number, fd):
                    left.append(number)
        except BlockingIOError:
            pass
        except OSError as error:
            gone = isinstance(error, ConnectionResetError) and not isinstance(error, ProtocolViolation)
            what = "has gone" if gone else f"cannot be understood any more ({self._explain(error)})"
            self.lost = (
                f"the ivshmem server at {self.path} {what}, and another cannot take its peers over; to have "
                "doorbells again, start the server and all of its peers anew, guests included"
            )
        return left

    def close(self) -> None:
        """Give everything back; in a forked child only its copies, as the parent's connection lives on."""
        if self.server_fd < 0:
            return
        self._receiver.close()
        if os.getpid() == self._pid:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # a forked child may still have a copy
            except OSError:
                pass  # the server has gone
        self._sock.close()
        for fd in (self.fd, *(peer.fd for peer in self._peers.values())):
            if fd >= 0:
                os.close(fd)
        self._peers.clear()
        self.fd = self.server_fd = -1

    # -- the first messages

    def greet(self, deadline: float) -> _Waits[int]:
        """Take in what a newcomer is told. Returns the descriptor of the memory, the caller's to close.

        Nothing marks the end. Our own vectors come last, and the first is enough to go on, unless the other
        peers show how many are to come. Raises RegionError.
        """
        memory = -1
        try:
            yield from self._hear_version(deadline)
            yield from self._hear_id(deadline)
            common = 0
            while memory < 0 or self.vectors < max(common, 1):
                number, fd = yield from self._hear(deadline, self._missing(memory, common))
                if number == MEMORY and memory < 0 <= fd:
                    memory = fd
                    continue
                before = self.vectors
                self._take(number, fd)
                if self.vectors and not before:
                    common = self._common_vectors()
            self.news()
            if common and self.vectors != common:
                raise self._differ(f"we have {self.vectors}, the others {common}")
            taken, memory = memory, -1
            return taken
        except ProtocolViolation as error:
            code = errno.EMFILE if self._starved() else errno.EPROTO
            raise self._refuse(code, self._explain(error)) from None
        finally:
            if memory >= 0:
                os.close(memory)

    def _hear_version(self, deadline: float) -> _Waits[None]:
        version, fd = yield from self._hear(deadline, "the version of its protocol")
        if fd >= 0:
            os.close(fd)
            raise violation(_SERVER, "a descriptor beside the version", "none")
        if version == PROTOCOL_VERSION:
            return
        if 0 < version < 1 << 16:
            seen = f"it speaks version {version} of the protocol, expected {PROTOCOL_VERSION}"
            raise self._refuse(errno.EPROTONOSUPPORT, f"{seen}; use a server that fits")
        data = version.to_bytes(8, "little", signed=True)
        seen = f"it began with {data!r}, expected a protocol version, {PROTOCOL_VERSION}"
        raise self._refuse(errno.EPROTO, f"{seen}; not an ivshmem server? Name the socket of one")

    def _hear_id(self, deadline: float) -> _Waits[None]:
        number, fd = yield from self._hear(deadline, "our id")
        if fd >= 0:
            os.close(fd)
        if fd >= 0 or not 0 <= number <= MAX_ID:
            seen = f"the id {number}" + (", with a descriptor" if fd >= 0 else "")
            raise violation(_SERVER, seen, f"one of 0 to {MAX_ID}, alone (servers before QEMU 2.5 differ)")
        self.id = number

    def _hear(self, deadline: float, wanted: str) -> _Waits[tuple[int, int]]:
        """Return the next message, waiting for it until `deadline`. Raises RegionError, ProtocolViolation."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._receiver.receive()
            except BlockingIOError:
                yield Wait(self._sock, left)
            except ProtocolViolation:
                raise
            except OSError as error:
                if not isinstance(error, ConnectionResetError):
                    raise self._refuse(error.errno or errno.EIO, str(error)) from None
                seen = f"it closed the connection without {wanted}"
                advice = "not an ivshmem server, or one that takes nobody in; see its log"
                raise self._refuse(errno.ECONNRESET, f"{seen}: {advice}") from None
        seen = f"{PATIENCE_S:g} s went by without {wanted}"
        raise self._refuse(errno.ETIMEDOUT, f"{seen}: not an ivshmem server, or one that hangs")

    def _missing(self, memory: int, common: int) -> str:
        if memory < 0:
            return "the shared memory"
        if not self.vectors:
            return "our first vector (it takes a server with at least one, `--vectors 1`)"
        return f"as many vectors as its other peers have ({self.vectors} of {common})"

    def _common_vectors(self) -> int:
        """Count the vectors of each other peer, 0 without any. Raises RegionError when they differ."""
        counts = {known.vectors: peer for peer, known in self._peers.items()}
        if len(counts) > 1:
            (less, one), (more, two) = min(counts.items()), max(counts.items())
            raise self._differ(f"peer {one} has {less}, peer {two} {more}")
        return next(iter(counts), 0)

    def _differ(self, seen: str) -> RegionError:
        return self._refuse(
            errno.EPROTO,
            f"its peers differ in how many vectors they have ({seen}), expected one number for all: it lost "
            "messages, and who rings whom is not certain; start it and all of its peers anew",
        )

    def _refuse(self, code: int, text: str) -> RegionError:
        return region_error(code, f"cannot use the ivshmem server at {self.path}: {text}", self.path)

    # -- what every message does

    def _take(self, number: int, fd: int) -> bool:
        """Take in a message, and its descriptor: has a peer left? Raises ProtocolViolation."""
        kept = False
        try:
            if not 0 <= number <= MAX_ID:
                raise violation(_SERVER, f"message {number} where none belongs", f"an id, 0 to {MAX_ID}")
            if number != self._newest:
                self._compare()
            if fd < 0:
                return self._leave(number)
            if not _is_eventfd(fd):
                raise violation(_SERVER, f"a vector of peer {number} that is no eventfd", "one")
            kept = self._own_vector(fd) if number == self.id else self._vector(number, fd)
            if kept:
                os.set_blocking(fd, False)
            return False
        finally:
            if fd >= 0 and not kept:
                os.close(fd)

    def _own_vector(self, fd: int) -> bool:
        self.vectors = _one_more(self.vectors, self.id)
        if self.vectors == 1:
            self.fd = fd
        return self.fd == fd

    def _vector(self, number: int, fd: int) -> bool:
        self._newest = number
        if known := self._peers.get(number):
            known.vectors = _one_more(known.vectors, number)
            return False
        # Those that are not kept are counted, or else a later vector of theirs would be taken for the first.
        kept = self._kept < MAX_PEERS
        self._kept += kept
        self._peers[number] = _Peer(fd if kept else -1)
        if not kept:
            self._log_once(
                "peers", f"has more than {MAX_PEERS} peers: those beyond are not rung, and have to poll"
            )
        return kept

    def _leave(self, number: int) -> bool:
        if number == self.id:
            raise violation(_SERVER, "the news that we left", "that of others only")
        known = self._peers.pop(number, None)
        if known is not None and known.fd >= 0:
            self._kept -= 1
            os.close(known.fd)
        return known is not None

    def _compare(self) -> None:
        """Compare the vectors of `_newest`, which are complete once another message comes."""
        known = self._peers.get(self._newest)
        if self.vectors and known and known.vectors != self.vectors:
            self._log_once(
                "vectors",
                f"gave peer {self._newest} {known.vectors} vectors and us {self.vectors}, expected one "
                "number for all: it lost messages, and rings may go astray; start all of them anew",
            )
        self._newest = -1

    def _log_once(self, what: str, text: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            _log.warning("the ivshmem server at %s %s", self.path, text)

    def _explain(self, error: OSError) -> str:
        if self._starved():
            return "this process may open no more files, and lost a descriptor: raise `ulimit -n`"
        return error.strerror or str(error)

    def _starved(self) -> bool:
        """Is there no room for one more descriptor?"""
        try:
            os.close(os.dup(self._sock.fileno()))
        except OSError:
            return True
        return False


def _one_more(vectors: int, peer: int) -> int:
    if vectors == MAX_VECTORS:
        raise violation(_SERVER, f"more than {MAX_VECTORS} vectors of peer {peer}", "that many at most")
    return vectors + 1


def _is_eventfd(fd: int) -> bool:
    """Check for an eventfd: a write to anything else might wait, make a file longer, or raise signals."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _EVENTFD
    except OSError:
        return True  # no /proc: believe it


def open_ivshmem(path: str, *, writable: bool = True) -> IvshmemRegion:
    """Become a peer of the ivshmem server that listens at `path`, and map its memory.

    Takes two seconds at most. Raises RegionError with the errno that fits: RegionNotFoundError (no socket),
    RegionPermissionError, ECONNREFUSED (nobody listens), ETIMEDOUT, ECONNRESET, EPROTO and EPROTONOSUPPORT
    (what listens is no ivshmem server, or one that does not work), RegionFormatError (too little memory), ...
    """
    steps = opening_ivshmem(path, writable=writable)
    try:
        while True:
            wait = next(steps)
            if wait.sock is not None:
                _wait_readable(wait.sock, wait.seconds)
            else:
                time.sleep(wait.seconds)
    except StopIteration as end:
        region: IvshmemRegion = end.value
        return region
    finally:
        steps.close()


def opening_ivshmem(path: str, *, writable: bool = True) -> _Waits[IvshmemRegion]:
    """Do as open_ivshmem() does, in steps: yield what is waited for, and never wait. Closed in between, it
    leaves nothing behind."""
    path = os.path.join(os.getcwd(), path)
    deadline = time.monotonic() + PATIENCE_S
    with ExitStack() as undo:
        doorbell = IvshmemDoorbell(path, (yield from _connect(path, deadline)))
        undo.callback(doorbell.close)
        memory = yield from doorbell.greet(deadline)
        try:
            mapping, fs, origin = _map(path, memory, writable)
            undo.callback(mapping.close)
            own = _reopen(memory, writable)
            fd = os.dup(memory) if own < 0 else own
            undo.callback(os.close, fd)
            region = IvshmemRegion(path, mapping, fd, writable, fs, doorbell, own >= 0, origin)
        finally:
            os.close(memory)
        undo.pop_all()
        return region


def _connect(path: str, deadline: float) -> _Waits[socket.socket]:
    """Connect a non-blocking stream socket to `path`. Raises RegionError."""
    if len(os.fsencode(path)) > _LONGEST:
        seen = f"the path of the socket has {len(os.fsencode(path))} bytes, expected at most {_LONGEST}"
        raise region_error(
            errno.ENAMETOOLONG, f"{path}: {seen}: choose a shorter one, or a symbolic link", path
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                if not stat.S_ISSOCK(os.stat(path).st_mode):
                    raise region_error(
                        errno.ENOTSOCK,
                        f"{path} is no socket, expected that of an ivshmem server; name a file file:{path}",
                        path,
                    )
                sock.connect(path)
                return sock
            except BlockingIOError:  # so many wait to be let in that there is no room for us
                if time.monotonic() > deadline:
                    raise region_error(
                        errno.ETIMEDOUT, f"the ivshmem server at {path} lets nobody in: it hangs", path
                    ) from None
                yield Wait(None, 0.01)
            except RegionError:
                raise
            except OSError as error:
                raise _explain_connect(error, path) from None
    except BaseException:
        sock.close()
        raise


def _explain_connect(error: OSError, path: str) -> RegionError:
    code = error.errno or errno.EIO
    start = (
        f"start one, on the region that its peers had: `shmsock ivshmem-server --socket {path} --region FILE`"
    )
    if code in (errno.ENOENT, errno.ENOTDIR):
        text = f"there is no ivshmem server at {path}, not even a socket: {start}"
    elif code == errno.ECONNREFUSED:
        text = f"nobody listens at {path}, the ivshmem server that made the socket has gone: {start}"
    elif code in (errno.EACCES, errno.EPERM):
        advice = "start the server with --mode 0660 and a group that we are in"
        text = f"no permission to connect to the ivshmem server at {path}: {whose(path, advice)}"
    elif code == errno.EPROTOTYPE:
        text = f"{path} is a socket of another kind, expected a stream socket, of an ivshmem server"
    else:
        text = f"cannot connect to the ivshmem server at {path}: {os.strerror(code)}"
    return region_error(code, text, path)


def _wait_readable(sock: socket.socket, timeout: float) -> None:
    poll = select.poll()  # (select() knows no descriptors above 1023)
    poll.register(sock, select.POLLIN)
    poll.poll(timeout * 1000)


def _reopen(memory: int, writable: bool) -> int:
    """Open the same file again, as locks need a file description of our own; -1 if that may not be."""
    try:
        flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        if not stat.S_ISREG(os.fstat(memory).st_mode):
            return -1  # opening a device may already do something
        fd = os.open(f"/proc/self/fd/{memory}", flags | (os.O_RDWR if writable else os.O_RDONLY))
    except OSError:
        return -1
    if identity_of(fd) == identity_of(memory):
        return fd
    os.close(fd)
    return -1


def _map(path: str, memory: int, writable: bool) -> tuple[mmap.mmap, storage.FileSystem, int]:
    """Map what the server gave. Raises RegionError."""
    status = os.fstat(memory)
    gave = f"the ivshmem server at {path} gave"
    if not stat.S_ISREG(status.st_mode):
        text = f"{gave} something as its memory that is no file, expected a memfd or a regular file"
        raise region_error(errno.EPROTO, text, path)
    size, fs = status.st_size, storage.filesystem(memory)
    if size < MINIMUM:
        text = f"{gave} {size} bytes of memory, expected at least {format_size(MINIMUM)}: start it with more"
        raise format_error(text, path)
    if fs.huge and size % fs.unit:  # mmap() would succeed, and munmap() fail
        page = format_size(fs.unit)
        text = f"{gave} {format_size(size)} of memory, expected a multiple of the huge page, {page}"
        raise format_error(text, path)
    origin, size = info_block.find_in_file(memory, size, path)
    try:
        return map_bytes(memory, size, writable, origin), fs, origin
    except OSError as error:
        code = error.errno or errno.EIO
        if code in (errno.EACCES, errno.EPERM):
            text = f"{gave} memory that cannot be written: it was opened read-only, or sealed"
        else:
            text = f"{gave} {format_size(size)} of memory that cannot be mapped: {error.strerror}"
        raise region_error(code, text, path) from None
