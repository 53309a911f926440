"""An ivshmem server that can be told to do anything wrong, written from the protocol's specification alone.

Each message is a signed number of 8 bytes, little-endian, and may carry a descriptor: the version; the
client's id; -1 with the memory; the id of every other peer, once per vector, each with an eventfd; the
client's own id likewise. Later: an id with an eventfd, a vector of a newcomer; an id alone, that peer left.
"""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from shmsock.region.ivshmem import open_ivshmem

Message = tuple[int, list[int]]
"""A number, and the descriptors that go with it."""
Step = Message | bytes
"""A message, or bytes as they are."""

VERSION, OWN_ID, MEMORY = range(3)
"""Where these stand in a burst."""


class FakeServer:
    """Listens from the beginning. It has no thread of its own but while open() runs: tests may fork."""

    def __init__(self, path: str, size: int = 1 << 20, *, vectors: int = 1) -> None:
        self.path = path
        self.vectors = vectors
        self.memory = os.memfd_create("fake-ivshmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memory, size)
        self.peers: dict[int, list[int]] = {}
        """The eventfds of all."""
        self.clients: dict[int, socket.socket] = {}
        self.next_id = 0
        self.edit: Callable[[list[Step]], list[Step]] = lambda burst: burst
        """Changes what a client is told at first."""
        self.pieces = 0
        """Send so many bytes at a time; 0: whole messages."""
        self.hang_up = False
        """Close the connection after the burst."""
        self.said_all = threading.Event()
        """The burst, to some client."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(20)
        self._listener.bind(path)
        self._listener.listen(8)

    # -- what a server does

    def accept(self) -> int:
        """Wait for a client and tell it what there is to tell. Returns its id."""
        client, _ = self._listener.accept()
        client.settimeout(20)
        number = self._new_id()
        self.clients[number] = client
        others = {peer: list(fds) for peer, fds in self.peers.items()}
        self.join(number, but=number)
        burst: list[Step] = [(0, []), (number, []), (-1, [self.memory])]
        burst += [(peer, [fd]) for peer, fds in others.items() for fd in fds]
        burst += [(number, [fd]) for fd in self.peers[number]]
        for step in self.edit(burst):
            self.say(number, step)
        if self.hang_up:
            client.close()
        self.said_all.set()
        return number

    def open(self, opener: Callable[..., Any] = open_ivshmem, **options: Any) -> Any:
        """What open_ivshmem() makes of this server, or another function that connects to it."""
        thread = threading.Thread(target=self.accept)
        thread.start()
        try:
            return opener(self.path, **options)
        finally:
            thread.join()

    def join(self, number: int | None = None, *, vectors: int | None = None, but: int = -1) -> int:
        """Another peer comes, one without a connection to us unless `number` says which. Returns its id."""
        number = self._new_id() if number is None else number
        count = self.vectors if vectors is None else vectors
        self.peers[number] = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count)]
        for fd in self.peers[number]:
            self.tell((number, [fd]), but=but)
        return number

    def leave(self, number: int) -> None:
        """A peer is gone."""
        for fd in self.peers.pop(number):
            os.close(fd)
        if client := self.clients.pop(number, None):
            client.close()
        self.tell((number, []))

    def rung(self, number: int, vector: int = 0) -> int:
        """How often that peer was rung since the last call."""
        fd = self.peers[number][vector]
        os.set_blocking(fd, False)
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    # -- what it can be made to do

    def say(self, number: int, step: Step) -> None:
        """Tell one client something. A client that has gone, or been hung up on, does not matter."""
        data, fds = (
            (step, []) if isinstance(step, bytes) else (step[0].to_bytes(8, "little", signed=True), step[1])
        )
        client = self.clients[number]
        try:
            for start in range(0, len(data), self.pieces or len(data)):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                client.sendmsg([data[start : start + (self.pieces or len(data))]], rights)
                fds = []
        except OSError:
            pass

    def tell(self, step: Step, *, but: int = -1) -> None:
        """Tell all clients."""
        for number in self.clients:
            if number != but:
                self.say(number, step)

    def gone(self, number: int) -> bool:
        """Has that client closed its end? Waits for it, for a while."""
        try:
            return self.clients[number].recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def die(self) -> None:
        """Without a word, as by SIGKILL; the socket's file stays. A second call does nothing."""
        self._listener.close()
        for client in self.clients.values():
            client.close()
        self.clients.clear()

    def close(self) -> None:
        self.die()
        for fds in self.peers.values():
            for fd in fds:
                os.close(fd)
        self.peers.clear()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    def _new_id(self) -> int:
        number = self.next_id
        self.next_id += 1
        return number
