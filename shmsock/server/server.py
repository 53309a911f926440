"""A server for QEMU's ivshmem-doorbell: it hands out the memory, ids, and eventfds to kick each other.

What goes over the wire: shmsock/region/ivshmem_protocol.py. Clients have nothing to say, and the server waits
for none of them: each has a queue, and a client that does not read is dropped. Nothing that one of them does
is felt by another, except that it comes and goes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections import Counter, deque
from types import TracebackType

from shmsock.errors import region_error
from shmsock.region.ivshmem_protocol import MAX_VECTORS
from shmsock.server.clients import Client, Credentials, Flow, Id, Ids, Limiter, credentials
from shmsock.server.setup import Listener, Store, Unread, listen, make_store, notify, raise_limit

__all__ = ["IvshmemServer", "run_server"]

log = logging.getLogger("shmsock.ivshmem_server")

_BURST = 256
"""Messages for one client, or newcomers, before it is the turn of others."""
_RESERVE = 16
"""Descriptors that we may need for other things than clients."""
_SHARE = 4096
"""A process that took so many new ids gets used ones from then on: joining and leaving without end does not
use up those of others."""
_PAUSE_S = 0.5
"""The pause after the process, or the kernel, ran out of descriptors; and between polls of what is unread."""
_RETRY_S = 0.05
_LAG_S = 1.0
"""When a timer is that late, we were stopped, and perhaps our clients with us."""


class IvshmemServer:
    """`async with IvshmemServer("/run/ivshmem.sock", "memfd", size=64 << 20) as server: ...`

    `socket`: the path to listen at, or what listens already. `region`: "memfd", or a file, which is made with
    `size` bytes for `peers` of shmsock when it is not there. `mode`: permissions of the socket and of a new
    file. `clients`: so many at most, and `per_process` from one process (0: as many). `patience`: seconds for
    which a client may leave a message untaken.

    Start raises ValueError for parameters that make no sense, RegionError for what cannot be had.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | Listener,
        region: str | os.PathLike[str],
        *,
        size: int | None = None,
        peers: int = 16,
        vectors: int = 1,
        mode: int = 0o600,
        clients: int = 1024,
        per_process: int = 64,
        patience: float = 5.0,
    ) -> None:
        if not 1 <= vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} vectors were asked for, expected 1 to {MAX_VECTORS}")
        if clients < 2:
            raise ValueError(f"{clients} clients were asked for, expected 2 or more: one has nobody to ring")
        if patience <= 0:
            raise ValueError(f"a patience of {patience} s was asked for, expected more than 0")
        self.vectors = vectors
        self.limit = clients
        """The most clients; start() lowers it to what RLIMIT_NOFILE allows."""
        self._socket, self._region = socket, os.fspath(region)
        self._size, self._peers, self._mode = size, peers, mode
        self._per_process, self._patience = per_process, patience
        self._listener: Listener | None = None
        self._store: Store | None = None
        self._clients: dict[int, Client] = {}  # by join, so the oldest is the first
        self._joins = 0
        self._ids = Ids()
        self._taken: Counter[tuple[int, int]] = Counter()  # new ids, by process
        self._processes: Counter[tuple[int, int]] = Counter()
        self._writing: set[Client] = set()
        self._timers: dict[Client, asyncio.TimerHandle] = {}
        self._departed: deque[Client] = deque()
        self._parting = False
        self._lingering: list[Client] = []  # gone, but for what they have not read
        self._sweep: asyncio.TimerHandle | None = None
        self._held: set[Client] = set()  # told nothing more until the kernel has room
        self._retry: asyncio.TimerHandle | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._moves = Limiter(512, 0.05)
        self._troubles = Limiter(8, 2.0)

    # -- start and end

    async def start(self) -> None:
        """Get everything, then serve."""
        self._loop = asyncio.get_running_loop()
        try:
            if isinstance(self._socket, Listener):
                self._listener = self._socket
            else:
                self._listener = listen(os.fspath(self._socket), self._mode)
            self._store = make_store(self._region, self._size, peers=self._peers, mode=self._mode)
            self.limit = self._room()
            self._loop.add_reader(self._listener.sock, self._accept)
        except BaseException:
            await self.aclose()
            raise
        log.info("listening on %s: %s", self._listener.path, self._store.title)
        plural = "" if self.vectors == 1 else "s"
        log.info("room for %d clients with %d vector%s each", self.limit, self.vectors, plural)

    def _room(self) -> int:
        """Count the clients that RLIMIT_NOFILE allows: connections, eventfds, and what they leave unread."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft == resource.RLIM_INFINITY:
            soft = 1 << 30
        each = 1 + self.vectors
        used = len(os.listdir("/proc/self/fd")) + _RESERVE
        room = min(self.limit, (soft - used) // each)
        if room < 2:
            raise region_error(
                errno.EMFILE,
                f"the limit of {soft} open files leaves no room for two clients with {self.vectors} vectors: "
                f"expected {used + 2 * each} or more; raise it (`ulimit -n`, LimitNOFILE=)",
            )
        self._unread = Unread(soft * 3 // 4, room)  # the rest is for other processes of our user
        return self._unread.clients

    async def aclose(self) -> None:
        """Let go of everybody. They see the end of their connections. A second call does nothing."""
        for handle in (self._retry, self._resume, self._sweep):
            if handle is not None:
                handle.cancel()
        self._retry = self._resume = self._sweep = None
        if self._listener is not None:
            self._loop.remove_reader(self._listener.sock)
            self._listener.close()
            self._listener = None
        for client in self._clients.values():
            self._unwatch(client)
            client.close()
        for client in self._lingering:
            client.close()
        self._lingering.clear()
        self._clients.clear()
        self._processes.clear()
        if self._store is not None:
            self._store.close()
            self._store = None

    async def __aenter__(self) -> IvshmemServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def connected(self) -> int:
        """The number of clients."""
        return len(self._clients)

    # -- coming

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_BURST):
            try:
                sock = self._listener.sock.accept()[0]
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                self._pause(error)
                return
            try:
                self._join(sock)
            except OSError as error:
                sock.close()
                self._trouble("a newcomer was refused: %s", error.strerror)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._pause(error)
                    return

    def _pause(self, error: OSError) -> None:
        """No descriptor is free: newcomers wait in the backlog. (Listening on would be a busy loop.)"""
        assert self._listener is not None
        self._trouble("cannot accept clients: %s; trying again", error.strerror)
        self._loop.remove_reader(self._listener.sock)
        self._resume = self._loop.call_later(
            _PAUSE_S, self._loop.add_reader, self._listener.sock, self._accept
        )

    def _join(self, sock: socket.socket) -> None:
        """Raises OSError, and leaves `sock` to be closed."""
        assert self._store is not None
        sock.setblocking(False)
        # A byte out of band is a byte too many like any other, and not one that is ready and cannot be read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        who = credentials(sock)
        if (refusal := self._refuse(who)) or (taken := self._take_id(who)) is None:
            self._trouble("%s was refused: %s", who, refusal or "all ids are in use")
            sock.close()
            return
        try:
            client = Client(
                sock, taken.number, self._joins + 1, self.vectors, who, self._store.fd, taken.known
            )
        except OSError:
            self._ids.give_back(taken)
            raise
        self._joins += 1
        client.room = self._unread.take(sock)
        client.greet(self._clients.values())
        # Nobody hears of one that is gone again, or broke the rules, before it could be of any use: its id is
        # not spent.
        why = self._listen_to(client)
        moved, flow = 0, Flow.MORE
        if not why:
            try:
                moved, flow = client.flush(_BURST)
            except OSError as error:
                why = f"left: {error.strerror}"
        if why:
            client.close()
            self._unread.give_back(client.room)
            self._ids.give_back(taken)
            self._move("%s came and %s; %d connected", client, why, self.connected)
            return
        others = list(self._clients.values())
        for other in others:  # all of them, before any is flushed and found to be gone
            if taken.known:
                other.overlook(taken.last)
            other.tell(client)
        self._clients[client.join] = client
        self._processes[who.pid, who.uid] += 1
        self._taken[who.pid, who.uid] += not taken.known
        self._loop.add_reader(sock, self._readable, client)
        self._move("%s came; %d connected", client, self.connected)
        if taken.known:
            self._trouble(
                "%s has an id that was in use before: peers that were here then cannot ring it", client
            )
        self._after(client, moved, flow)
        for other in others:
            self._flush(other)

    def _refuse(self, who: Credentials) -> str:
        if self.connected + len(self._lingering) >= self.limit:
            return f"there are {self.connected + len(self._lingering)} clients, as many as fit"
        if self._per_process and self._processes[who.pid, who.uid] >= self._per_process:
            return f"that process has {self._per_process} connections, the most that one may have"
        return ""

    def _take_id(self, who: Credentials) -> Id | None:
        oldest = next(iter(self._clients), None)
        if oldest is None:
            self._taken.clear()
        return self._ids.take(oldest, new=self._taken[who.pid, who.uid] < _SHARE)

    # -- telling

    def _flush(self, client: Client) -> None:
        """Send what can be sent."""
        if client.gone:
            return
        try:
            moved, flow = client.flush(_BURST)
        except OSError as error:
            self._lose(client, f"left: {error.strerror}")
        else:
            self._after(client, moved, flow)

    def _after(self, client: Client, moved: int, flow: Flow) -> None:
        """Wait for what it takes to go on."""
        if flow is Flow.FULL and client not in self._writing:
            self._writing.add(client)
            self._loop.add_writer(client.sock, self._flush, client)
        elif flow is not Flow.FULL and client in self._writing:
            self._writing.discard(client)
            self._loop.remove_writer(client.sock)
        if (moved or flow is not Flow.FULL) and (timer := self._timers.pop(client, None)):
            timer.cancel()
        if flow is Flow.FULL and client not in self._timers:
            due = self._loop.time() + self._patience
            self._timers[client] = self._loop.call_at(due, self._expired, client, due)
        if flow is Flow.MORE:  # writable is not what it waits for: to the kernel that means mostly empty
            self._loop.call_soon(self._flush, client)
        if flow is Flow.LATER:
            self._held.add(client)
            if self._retry is None:
                self._retry = self._loop.call_later(_RETRY_S, self._try_held)
        else:
            self._held.discard(client)

    def _expired(self, client: Client, due: float) -> None:
        """The message at the head of its queue waited long enough."""
        del self._timers[client]
        try:
            moved, flow = client.flush(_BURST)  # it may have read a little: not enough to be called writable
        except OSError as error:
            self._lose(client, f"left: {error.strerror}")
            return
        if flow is Flow.FULL and not moved and self._loop.time() - due < _LAG_S:
            self._lose(client, f"was dropped: it took no message for {self._patience:g} s")
        else:
            self._after(client, moved, flow)

    def _try_held(self) -> None:
        self._retry = None
        for client in list(self._held):
            self._flush(client)
        if self._held:
            self._trouble("no room to send messages to %d clients: trying again", len(self._held))

    # -- leaving

    def _readable(self, client: Client) -> None:
        if why := self._listen_to(client):
            self._lose(client, why)

    def _listen_to(self, client: Client) -> str:
        """Why it has to go, empty: it may stay. (Descriptors that it sends are closed by the kernel: they are
        not asked for.)"""
        try:
            data = client.sock.recv(4096)
        except BlockingIOError:
            return ""
        except OSError as error:
            return f"left: {error.strerror}"
        return f"was dropped: it sent {len(data)} bytes, and clients send none" if data else "left"

    def _lose(self, client: Client, why: str) -> None:
        """Close its connection and have all others told."""
        if client.gone:
            return
        self._unwatch(client)
        del self._clients[client.join]
        if client.end():
            self._release(client)
        else:
            self._lingering.append(client)
            if self._sweep is None:
                self._sweep = self._loop.call_later(_RETRY_S, self._poll_lingering)
        self._ids.retire(client.number, client.join, self._joins)
        self._move("%s %s; %d connected", client, why, self.connected)
        # Telling the others may show that one more is gone: one after the other, not one inside the other.
        self._departed.append(client)
        if self._parting:
            return
        self._parting = True
        try:
            while self._departed:
                gone = self._departed.popleft()
                others = list(self._clients.values())
                for other in others:
                    other.forget(gone)
                for other in others:
                    self._flush(other)
        finally:
            self._parting = False

    def _poll_lingering(self) -> None:
        """Keep the place of one that is gone until it reads the rest or closes its end: nobody gets more
        unread messages out of us than fit by leaving and coming again."""
        self._sweep = None
        still = []
        for client in self._lingering:
            if client.unread():
                still.append(client)
            else:
                client.close()
                self._release(client)
        self._lingering = still
        if still:
            self._sweep = self._loop.call_later(_PAUSE_S, self._poll_lingering)

    def _release(self, client: Client) -> None:
        """Give its place to others."""
        self._unread.give_back(client.room)
        key = (client.who.pid, client.who.uid)
        self._processes[key] -= 1
        if not self._processes[key]:
            del self._processes[key]

    def _unwatch(self, client: Client) -> None:
        self._loop.remove_reader(client.sock)
        if client in self._writing:
            self._writing.discard(client)
            self._loop.remove_writer(client.sock)
        if timer := self._timers.pop(client, None):
            timer.cancel()
        self._held.discard(client)

    # -- log lines that clients can cause

    def _move(self, text: str, *args: object) -> None:
        self._say(self._moves, logging.INFO, text, *args)

    def _trouble(self, text: str, *args: object) -> None:
        self._say(self._troubles, logging.WARNING, text, *args)

    def _say(self, limiter: Limiter, level: int, text: str, *args: object) -> None:
        if not limiter.allows(self._loop.time()):
            return
        if limiter.missed:
            log.log(level, "%d lines such as the next were left out", limiter.missed)
            limiter.missed = 0
        log.log(level, text, *args)


def run_server(server: IvshmemServer) -> None:
    """Serve until SIGTERM or SIGINT, and log to stderr. Raises what start() does."""
    raise_limit()
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=f"{stamp}%(message)s")
    asyncio.run(_serve(server))


async def _serve(server: IvshmemServer) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with server:
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping; %d connected", server.connected)
