"""A client of the ivshmem server protocol, from QEMU's specification alone: nothing here is shmsock's.

`Client` takes one message at a time, keeps every byte it got, and holds the stream to the protocol's grammar.
It needs the standard library only; as a program it is the process that tests kill, or one of those that come
and go.
"""

from __future__ import annotations

import array
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

MESSAGE = struct.Struct("<q")
MAX_ID = 0xFFFF  # the device's doorbell register has 16 bits for it
PATIENCE = 30.0
FDS_TAKEN = 8  # room for more than the one that a message may carry: a second is an error to be seen


class ProtocolError(AssertionError):
    """The server said what the specification does not allow."""


class ServerGone(EOFError):
    """The server closed the connection, between two messages."""


class Message(NamedTuple):
    """A message as it came: its eight bytes, and how many descriptors came with them."""

    data: bytes
    fds: int

    @property
    def value(self) -> int:
        return int(MESSAGE.unpack(self.data)[0])


class News(NamedTuple):
    id: int
    came: bool


@dataclass
class Books:
    """What a client knows, and the grammar of its stream: `take` each message, in order."""

    vectors: int
    id: int = -1
    memory: int = -1
    peers: dict[int, list[int]] = field(default_factory=dict)  # those here: an eventfd for each vector
    own: list[int] = field(default_factory=list)
    found: list[int] = field(default_factory=list)  # who was there already, in the order told
    news: list[News] = field(default_factory=list)  # whole arrivals and departures after that
    gone: set[int] = field(default_factory=set)
    taken: int = 0
    running: int = -1  # the id whose vectors are being told
    half: list[int] = field(default_factory=list)  # and those so far

    @property
    def settled(self) -> bool:
        """All of the handshake is here."""
        return bool(self.own)

    @property
    def seen(self) -> set[int]:
        return self.gone | set(self.peers) | {self.id}

    def take(self, value: int, fd: int | None) -> None:
        self.taken += 1
        try:
            if self.taken <= 3:
                self.greet(value, fd)
            elif fd is None:
                self.departure(value)
            else:
                self.vector(value, fd)
        except ProtocolError as exc:
            said = f"{value} {'without an fd' if fd is None else 'with an fd'}"
            raise ProtocolError(f"message {self.taken} to {self.id}, {said}: {exc}") from None

    def greet(self, value: int, fd: int | None) -> None:
        expect((fd is not None) == (self.taken == 3), "of the first three only the third has an fd")
        if self.taken == 1:
            expect(value == 0, "the protocol's version is 0")
        elif self.taken == 2:
            expect(0 <= value <= MAX_ID, "no id")
            self.id = value
        else:
            assert fd is not None
            expect(value == -1, "the memory comes with -1")
            self.memory = fd

    def vector(self, value: int, fd: int) -> None:
        """The nth message of an id is its vector n-1: that is how QEMU counts."""
        expect(0 <= value <= MAX_ID, "no id")
        expect(self.running in (-1, value), f"in the middle of the vectors of {self.running}")
        expect(value not in self.gone, "this id was seen to leave: no client may get it again")
        expect(value != self.id or not self.settled, "more vectors of my own than there are")
        expect(value not in self.peers, "more vectors than there are")
        self.running = value
        self.half.append(fd)
        if len(self.half) < self.vectors:
            return
        whole, self.half, self.running = self.half, [], -1
        if value == self.id:
            self.own = whole
            return
        self.peers[value] = whole
        if self.settled:
            self.news.append(News(value, True))
        else:
            self.found.append(value)

    def departure(self, value: int) -> None:
        expect(self.settled, "in the middle of the handshake")
        expect(self.running == -1, f"in the middle of the vectors of {self.running}")
        expect(value != self.id, "I am told that I left")
        expect(value in self.peers, "it is not here")
        for fd in self.peers.pop(value):
            close_fd(fd)
        self.gone.add(value)
        self.news.append(News(value, False))


def expect(right: bool, text: str) -> None:
    if not right:
        raise ProtocolError(text)


def close_fd(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class Client:
    """A peer. Without `keep` it closes the eventfds of the others at once, and cannot ring them."""

    def __init__(self, path: str | os.PathLike[str], vectors: int, *, keep: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.books = Books(vectors)
        self.log: list[Message] = []
        self.keep = keep
        self._part = b""
        self._fds: list[int] = []
        try:
            self.sock.connect(
                os.fspath(path)
            )  # blocking: with a timeout it would fail when the queue is full
            self.sock.settimeout(PATIENCE)
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def id(self) -> int:
        return self.books.id

    def fileno(self) -> int:
        return self.sock.fileno()

    def read(self, most: int = MESSAGE.size) -> Message | None:
        """Up to `most` bytes of the message that comes next; the message, when these were its last ones."""
        room = socket.CMSG_SPACE(FDS_TAKEN * 4)
        want = min(most, MESSAGE.size - len(self._part))
        data, control, flags, _ = self.sock.recvmsg(want, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i", payload[: len(payload) // 4 * 4])
                self._fds += fds.tolist()
        if not data:
            if self._part:
                raise ProtocolError(f"the stream ended after {len(self._part)} bytes of a message")
            raise ServerGone("the server closed the connection")
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"more than {FDS_TAKEN} descriptors with one message")
        self._part += data
        if len(self._part) < MESSAGE.size:
            return None
        message = Message(self._part, len(self._fds))
        fds_here, self._part, self._fds = self._fds, b"", []
        self.log.append(message)
        if len(fds_here) > 1:
            raise ProtocolError(
                f"{len(fds_here)} descriptors with message {message.value}, expected one at most"
            )
        fd = fds_here[0] if fds_here else None
        before = self.books.taken
        if fd is not None and not self.keep and before > 2 and message.value != self.id:
            os.close(fd)
            fd = -1
        self.books.take(message.value, fd)
        return message

    def take(self) -> Message:
        """One message; waits for it."""
        while True:
            message = self.read()
            if message is not None:
                return message

    def handshake(self) -> Client:
        while not self.books.settled:
            self.take()
        return self

    def take_ready(self) -> int:
        """All the messages that are here; how many they were."""
        count = 0
        while select_readable(self.sock, 0):
            count += self.read() is not None
        return count

    def until(self, true: Callable[[Books], bool]) -> Client:
        while not true(self.books):
            self.take()
        return self

    def until_eof(self) -> None:
        try:
            while True:
                self.take()
        except (ServerGone, ConnectionResetError):
            pass

    def ring(self, peer: int, vector: int, value: int = 1) -> None:
        fds = self.books.own if peer == self.id else self.books.peers[peer]
        os.write(fds[vector], value.to_bytes(8, sys.byteorder))

    def rung(self, vector: int, patience: float = 0) -> int:
        """What the own eventfd of a vector counted since the last look; 0 if nothing, after `patience`."""
        fd = self.books.own[vector]
        if not select_readable(fd, patience):
            return 0
        return int.from_bytes(os.read(fd, 8), sys.byteorder)

    def close(self) -> None:
        self.sock.close()
        books = self.books
        others = [fd for fds in books.peers.values() for fd in fds]
        for fd in [books.memory, *books.own, *books.half, *others, *self._fds]:
            close_fd(fd)
        books.memory = -1
        books.own, books.half, books.peers, self._fds = [], [], {}, []


def select_readable(one: int | socket.socket, patience: float) -> bool:
    """Whether there is something to read, within so many seconds. poll(): numbers of fds may be high."""
    poll = select.poll()
    poll.register(one, select.POLLIN)
    return bool(poll.poll(patience * 1000))


class Follower:
    """A client that a thread reads for, so that it is never the one that does not read."""

    def __init__(self, path: str | os.PathLike[str], vectors: int, *, keep: bool = True) -> None:
        self.client = Client(path, vectors, keep=keep).handshake()
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._follow, name=f"follower {self.id}")
        self._thread.start()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def id(self) -> int:
        return self.client.id

    @property
    def books(self) -> Books:
        return self.client.books

    def _follow(self) -> None:
        poll = select.poll()
        poll.register(self.client, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if self._stop in ready:
                    return
                with self._changed:
                    self.client.read()
                    self._changed.notify_all()
        except BaseException as exc:
            with self._changed:
                self.error = exc
                self._changed.notify_all()

    def wait(self, true: Callable[[Books], bool], what: str, patience: float = PATIENCE) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or true(self.books), patience)
            if true(self.books):
                return
            if self.error is not None:
                raise self.error
            peers, gone = sorted(self.books.peers)[:20], sorted(self.books.gone)[-20:]
            raise TimeoutError(f"{what}: not within {patience} s; here: {peers}, gone: {gone}")

    def wait_gone(self, *ids: int, patience: float = PATIENCE) -> None:
        self.wait(lambda books: books.gone.issuperset(ids), f"{self.id} waits for {ids} to leave", patience)

    def wait_here(self, *ids: int) -> None:
        """Whoever left already was here."""
        self.wait(lambda books: books.seen.issuperset(ids), f"{self.id} waits for {ids} to come")

    def check(self) -> None:
        """Nothing was wrong so far."""
        with self._changed:
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        os.write(self._stopper, b"x")
        self._thread.join()
        os.close(self._stop)
        os.close(self._stopper)
        self.client.close()


# As a program.


def stay(path: str, vectors: int, count: int) -> None:
    """Read `count` bytes, say so, and stay."""
    client = Client(path, vectors)
    for _ in range(count):
        client.read(1)
    print("here", flush=True)
    signal.pause()


def crowd(path: str, count: int) -> None:
    """So many connections at once, of which none is read."""
    here = []
    for _ in range(count):
        here.append(socket.socket(socket.AF_UNIX))
        here[-1].connect(path)
    print("here", flush=True)
    signal.pause()


def come_and_go(path: str, vectors: int, clients: int, seconds: float, seed: int) -> None:
    """So many clients that join, stay for a while and leave; at the end their books, a line each."""
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    poll = select.poll()
    here: dict[int, tuple[Client, float]] = {}

    def leave(client: Client) -> None:
        poll.unregister(client)
        del here[client.fileno()]
        books = client.books
        said = {"id": books.id, "settled": books.settled, "found": books.found, "news": books.news}
        client.close()
        print(json.dumps(said))

    while (now := time.monotonic()) < end:
        while len(here) < clients:
            client = Client(path, vectors, keep=rng.random() < 0.5)
            here[client.fileno()] = client, now + rng.choice((0, 0.05, 1, 2, 3)) * rng.random()
            poll.register(client, select.POLLIN)
        soonest = min(until for _, until in here.values())
        for fd, _ in poll.poll(max(0.0, soonest - now) * 1000):
            here[fd][0].read()
        for client, until in list(here.values()):
            if until <= now:
                leave(client)
    for client, _ in list(here.values()):
        leave(client)


if __name__ == "__main__":
    path, vectors, role, *numbers = sys.argv[1:]
    if role == "stay":
        stay(path, int(vectors), int(numbers[0]))
    elif role == "crowd":
        crowd(path, int(numbers[0]))
    else:
        come_and_go(path, int(vectors), int(numbers[0]), float(numbers[1]), int(numbers[2]))
