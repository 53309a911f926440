"""The clients of an ivshmem server: their ids, and what each of them has yet to be told.

A client numbers the vectors of a peer by counting messages, and QEMU frees the place for a peer's eventfds
when that peer leaves. So no message is lost, none is said twice, and nobody hears of an id a second time.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from shmsock.region.ivshmem_protocol import MAX_ID, MEMORY, PROTOCOL_VERSION, send_message
from shmsock.region.processes import read_line

__all__ = ["Client", "Credentials", "Flow", "Id", "Ids", "Limiter", "credentials"]

_LONG = 1024
"""The length of a queue from which on comings and goings that cancel out are left out."""
_EVENTFD = os.EFD_NONBLOCK | os.EFD_CLOEXEC
# The kernel's troubles, or this process's: not the doing of the client that is being told something.
_LATER = frozenset((errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE))


class Id(NamedTuple):
    """The id that a newcomer gets. A `join` is a client's number in the order of coming, from 1."""

    number: int
    known: int = 0
    """Clients up to this join may have heard of it, and must not hear of it again. 0: nobody here has."""
    last: int = 0
    """The join of the client that had it before."""


class Ids:
    """Peer ids: new ones first, then those of clients that left, the oldest first."""

    def __init__(self, maximum: int = MAX_ID) -> None:
        self._maximum = maximum
        self._next = 0
        self._unused: list[Id] = []
        self._retired: deque[Id] = deque()

    def take(self, oldest: int | None, new: bool = True) -> Id | None:
        """A free id; None: all are in use. `oldest`: the join of the client that is here longest; None:
        nobody is here, so nobody remembers any. `new`: one that nobody had yet, while there is one."""
        if oldest is None:
            self._next = 0
            self._unused.clear()
            self._retired.clear()
        if self._retired and (not new or (not self._unused and self._next > self._maximum)):
            taken = self._retired.popleft()
            return taken if oldest is not None and oldest <= taken.known else Id(taken.number)
        if self._unused:
            return self._unused.pop()
        if self._next <= self._maximum:
            self._next += 1
            return Id(self._next - 1)
        return None

    def give_back(self, taken: Id) -> None:
        """Take an id back that nobody was told about."""
        if taken.known:
            self._retired.appendleft(taken)
        else:
            self._unused.append(taken)

    def retire(self, number: int, join: int, newest: int) -> None:
        """Note that its owner left. Clients up to the join `newest` may know it."""
        self._retired.append(Id(number, newest, join))


class Credentials(NamedTuple):
    """The process that connected. The pid is 0 when that process lies outside of our pid namespace."""

    pid: int
    uid: int
    name: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name}), uid {self.uid}"


def credentials(sock: socket.socket) -> Credentials:
    """Raises OSError."""
    pid, uid, _ = struct.unpack("@iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    name = read_line(f"/proc/{pid}/comm") or "?"
    return Credentials(pid, uid, "".join(c if c.isprintable() and c.isascii() else "?" for c in name))


class Flow(enum.Enum):
    """The reason why no more is sent to a client for now."""

    DONE = enum.auto()
    FULL = enum.auto()
    """The client has to read first."""
    MORE = enum.auto()
    """Others have to be served first."""
    LATER = enum.auto()
    """The kernel has no room, or this process no descriptor: try again in a while."""


class Client:
    """One of them: its connection, its eventfds, its queue. Knows no event loop. Joins count from 1."""

    def __init__(
        self,
        sock: socket.socket,
        number: int,
        join: int,
        vectors: int,
        who: Credentials,
        memory: int,
        known: int = 0,
    ) -> None:
        """Takes `sock` over, unless it raises (OSError: no descriptors for the eventfds). `known`: see Id."""
        self.sock, self.number, self.join, self.vectors, self.who = sock, number, join, vectors, who
        self.known = known
        self.eventfds: list[int] = []
        self.gone = False
        self.room = 0
        """The room that the server set aside for this client's unread messages."""
        self._hello: list[tuple[int, int | None]] = [
            (MEMORY, memory),
            (number, None),
            (PROTOCOL_VERSION, None),
        ]
        # After that: the peer by its join, if it is to be told that it came; by -join, that it left. (This
        # takes less memory than messages: each may have to be told of all others.)
        self._queue: dict[int, Client] = {}
        self._sent = 0  # messages of the first in it
        try:
            for _ in range(vectors):
                self.eventfds.append(os.eventfd(0, _EVENTFD))
        except OSError:
            self._close_eventfds()
            raise

    def __str__(self) -> str:
        return f"client {self.number}, {self.who}"

    def greet(self, others: Iterable[Client]) -> None:
        """Have it told, as a newcomer, who is there, and then its own eventfds."""
        for other in others:
            self.tell(other)
        self.tell(self)

    def tell(self, peer: Client) -> None:
        """Have it told that `peer` came, unless it may have heard of that id before."""
        if self.join > peer.known:
            self._queue[peer.join] = peer

    def forget(self, peer: Client) -> None:
        """Have it told that `peer` left. When much is queued, and nothing of that peer was told yet, it is
        not mentioned at all: the queue of one that reads slowly does not grow with those who come and go."""
        if self.join <= peer.known:
            return
        if len(self._queue) < _LONG or peer.join not in self._queue or self._telling() == peer.join:
            self._queue[-peer.join] = peer
        else:
            del self._queue[peer.join]

    def overlook(self, join: int) -> None:
        """Drop the news of one that left and whose id another has now: it would seem to be about that one."""
        self._queue.pop(-join, None)
        if self._telling() != join:
            self._queue.pop(join, None)

    def _telling(self) -> int:
        """The join of a peer of which it was told some vectors, and not yet all; 0: none."""
        return next(iter(self._queue)) if self._sent else 0

    def flush(self, most: int) -> tuple[int, Flow]:
        """Send what is queued, at most so many messages: how many went, and why it stopped there.

        Raises OSError when it is gone.
        """
        for moved in range(most):
            if not self._hello and not self._queue:
                return moved, Flow.DONE
            try:
                self._send_one()
            except BlockingIOError:
                return moved, Flow.FULL
            except OSError as error:
                if error.errno in _LATER:
                    return moved, Flow.LATER
                raise
        return most, Flow.MORE if self._hello or self._queue else Flow.DONE

    def _send_one(self) -> None:
        if self._hello:
            send_message(self.sock, *self._hello[-1])
            self._hello.pop()
            return
        key, peer = next(iter(self._queue.items()))
        if key < 0:
            send_message(self.sock, peer.number)
            del self._queue[key]
            return
        if peer.eventfds:
            send_message(self.sock, peer.number, peer.eventfds[self._sent])
        else:
            # It left in the middle of these. Whoever counts them gets as many as of any other peer, so that
            # its leaving can follow; and a client that does not read keeps no descriptor of ours open.
            stand_in = os.eventfd(0, _EVENTFD)
            try:
                send_message(self.sock, peer.number, stand_in)
            finally:
                os.close(stand_in)
        self._sent += 1
        if self._sent == peer.vectors:
            del self._queue[key]
            self._sent = 0

    def unread(self) -> bool:
        """Is there anything that it was sent, and did not read? (Not once it closed its end.)"""
        return any(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))

    def end(self) -> bool:
        """Tell it nothing more; its connection ends after what it has not read. False: that is still there,
        and so are the descriptors in it, for which our user is held to account; close() later."""
        self._say_no_more()
        if not self.unread():
            self.sock.close()
            return True
        with contextlib.suppress(OSError):  # it is gone just now
            self.sock.shutdown(socket.SHUT_RDWR)
            # Its own end may lie in what it sent to us, and would be open for as long as that.
            while self.sock.recv(1 << 16):
                pass
        return False

    def close(self) -> None:
        self._say_no_more()
        self.sock.close()

    def _say_no_more(self) -> None:
        self.gone = True
        self._hello.clear()
        self._queue.clear()
        self._close_eventfds()

    def _close_eventfds(self) -> None:
        while self.eventfds:
            os.close(self.eventfds.pop())


class Limiter:
    """Allow so many at once, then one every so often: for log lines that others can cause."""

    def __init__(self, burst: int, every_s: float) -> None:
        self._burst, self._every = burst, every_s
        self._room, self._then = float(burst), 0.0
        self.missed = 0
        """The number refused since the last that was allowed."""

    def allows(self, now: float) -> bool:
        self._room = min(self._burst, self._room + (now - self._then) / self._every)
        self._then = now
        if self._room < 1:
            self.missed += 1
            return False
        self._room -= 1
        return True
