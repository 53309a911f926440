"""The links that carry datagrams from one peer to another.

A link is an ordinary connection that the sender opens at first use, with CONNECT to port 0: one for each
ordered pair of peers (the own section is one too). It carries records one way, from its opener; the other
side's ring is never used. So the order of what one peer sends to another is kept, whichever ports it is for.
An idle link keeps its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from errno import ECONNREFUSED
from typing import Any, NamedTuple, Protocol

from shmsock.engine.connection import DATA, DONE, EMPTY, EOF, SPACE, UNBOUND, VIOLATION, Connection, State
from shmsock.engine.home import Home
from shmsock.errors import no_buffers
from shmsock.native._core import lib

__all__ = [
    "OVERHEAD",
    "RECORDS_PER_PASS",
    "Address",
    "Gate",
    "Incoming",
    "Outgoing",
    "Receiver",
    "Route",
    "Sender",
    "Waiting",
    "remember",
]

HEADER: int = lib.SH_RECORD_HEADER
OVERHEAD = 64  # bytes that a waiting datagram counts beside its own
RECORDS_PER_PASS, BYTES_PER_PASS = 64, 256 << 10
SENT_PER_PASS = 256
REMEMBERED = 1024  # addresses of one endpoint, and flows of one link

Address = tuple[str, int]


class Sender(Protocol):
    """What a link asks of an endpoint that sends through it."""

    handler: Any
    closed: bool
    unsent: int

    @property
    def local(self) -> Address: ...
    @property
    def remote(self) -> Address | None: ...
    def retry(self, item: Waiting) -> None: ...
    def soon(self, error: OSError | None = None) -> None: ...


class Receiver(Protocol):
    """What a link asks of an endpoint that it brings datagrams to."""

    def receive(self, data: bytes, source: Address) -> None: ...


class Gate:
    """Says whether datagrams go straight to the ring: `can_write`, the link is open and nothing waits."""

    __slots__ = ("can_write",)

    def __init__(self, conn: Connection, link: Outgoing) -> None:
        self.can_write: bool = False


class Route(NamedTuple):
    """Where an address leads: a link, index << 8 | flags of the port's entry in the peer's table, and the
    link's gate."""

    link: Outgoing
    port: int
    entry: int
    gate: Any


class Waiting(NamedTuple):
    """A datagram that could not go out yet. `to` None: it is not worth a second try (a broadcast)."""

    endpoint: Sender
    to: Any
    route: Route
    data: bytes


def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Put an item into a dictionary of at most REMEMBERED; the oldest is forgotten."""
    if len(known) >= REMEMBERED and key not in known:
        del known[next(iter(known))]
    known[key] = value


class Outgoing:
    """The link that this node opened to a peer: handler of its connection."""

    conn: Connection
    ep: Any
    home: Home
    ring: int

    def __init__(
        self,
        home: Home,
        conn: Connection,
        gate: Callable[[Connection, Outgoing], Any],
        room: Callable[[int], tuple[str, int] | None],
        forget: Callable[[Outgoing], Iterable[Sender]],
    ) -> None:
        """Become the handler of `conn`. `gate`: makes what lets datagrams through. `room`: finds the size of
        region in which a link has a ring of so many bytes, for a message. `forget`: called when the link is
        over; returns the endpoints that have sent through it."""
        self.home, self.conn, self.ep, self.ring = home, conn, conn.ep, conn.ring[1]
        self._room, self._forget = room, forget
        self.gate: Any = gate(conn, self)
        self.gate.can_write = False
        self.queue: deque[Waiting] = deque()
        self._over = False
        self._unread = 0  # datagrams that the peer had not read when it was gone
        conn.handler = self

    @property
    def usable(self) -> bool:
        return self.conn.state in (State.OPENING, State.OPEN) and not self.conn.orphaned_ns

    def send(self, item: Waiting) -> bool:
        """Send a datagram, or queue it; drop it if too much of its endpoint waits. False: not by this link or
        entry. Raises OSError (ENOBUFS) for one that this ring can never hold."""
        need, ring = HEADER + len(item.data), self.ring
        if need > ring:
            what = f"ring memory for a datagram of {len(item.data)} bytes to {self.conn.remote[0]!r}"
            raise no_buffers(f"{what}, whose link has {ring} bytes,", self._room(need))
        if not self.queue and self.conn.state is State.OPEN:
            status = self._put(item)
            self.gate.can_write = status == 1 and not self._over
            if status:
                return status == 1
        endpoint, size = item.endpoint, len(item.data) + OVERHEAD
        if endpoint.unsent + size > self.home.settings.datagram_queue_bytes:
            self.home.counts["datagrams_dropped_unsent"] += 1
        else:
            endpoint.unsent += size
            self.queue.append(item)
        return True

    def _put(self, item: Waiting) -> int:
        """Put a datagram into the ring. Returns 1; or 0 when there is no room (an event comes when there is);
        or UNBOUND; or, when the link is lost, its status."""
        (endpoint, _, (_, port, entry, _), data), conn = item, self.conn
        if conn.state is not State.OPEN:
            status = EOF
        else:
            status = self.home.lib.sh_send(conn.ep, endpoint.local[1], port, entry, data, len(data))
            self.home.stir()
        if status == VIOLATION:
            conn.violated("its head went where nothing was written")
        if status < 0 and status != UNBOUND:
            self.lost()
        return status

    def flush(self) -> None:
        """Send what waits, as far as the ring has room, and tell the endpoints."""
        queue, told, stray = self.queue, set(), []
        for _ in range(SENT_PER_PASS):
            if not queue or not (status := self._put(queue[0])):
                break
            if status < 0 and status != UNBOUND:
                break  # lost, and so is the queue
            item = queue.popleft()
            item.endpoint.unsent -= len(item.data) + OVERHEAD
            told.add(item.endpoint)
            if status == UNBOUND and item.to is not None:
                stray.append(item)
            elif status == UNBOUND:
                self.home.counts["datagrams_unreachable"] += 1
        else:
            self.home.emit(self.conn.ready, SPACE)
        self.gate.can_write = self.conn.state is State.OPEN and not (queue or self._over)
        for item in stray:
            item.endpoint.retry(item)
        for endpoint in told:
            if endpoint.handler is not None and not endpoint.closed:
                endpoint.handler.space()

    def lost(self, error: OSError | None = None) -> None:
        """End the link, as the peer is gone or reads no more: count what it had not read and what waits, and
        tell the endpoints."""
        if self._over:
            return
        self._over, self.gate.can_write = True, False
        conn, counts = self.conn, self.home.counts
        if conn.state is State.OPEN:
            self._unread = self.home.lib.sh_unread(conn.ep)
        counts["datagrams_lost_unread"] += self._unread
        counts["datagrams_dropped_unsent"] += len(self.queue)
        users = self._forget(self)
        told = set(users if self._unread else ())
        while self.queue:
            item = self.queue.popleft()
            item.endpoint.unsent -= len(item.data) + OVERHEAD
            told.add(item.endpoint)
        conn.close()
        for endpoint in told:
            refused = error or ConnectionRefusedError(
                ECONNREFUSED,
                f"{conn.remote[0]!r} is gone, and did not receive what was sent to it: send again",
            )
            endpoint.soon(refused if endpoint.remote is not None else None)

    # -- handler of the connection

    def connected(self) -> None:
        self.flush()

    def failed(self, error: OSError) -> None:
        self.lost(None if isinstance(error, ConnectionError) else error)

    def ready(self, bits: Any) -> None:
        if not self.usable or bits & DONE:
            self.lost()
        elif bits & DATA:
            self.conn.violated("bytes in a ring that nothing is to be sent through")
            self.lost()
        elif not self.gate.can_write:
            self.flush()

    def silent(self, conn: Connection) -> None:
        """Ignore it: a link for datagrams is for this very peer, another of its name is no substitute."""

    def freed(self) -> None:
        self.gate.can_write = False
        if not self._over:
            self._unread = self.home.lib.sh_unread(self.ep)


class Incoming:
    """A link that a peer opened: handler of its connection. It is always drained, so that no endpoint that is
    paused stands in the way of another."""

    conn: Connection
    ep: Any
    home: Home

    def __init__(
        self,
        home: Home,
        conn: Connection,
        inbox: Callable[[Connection, dict[int, Any]], Any] | None,
        find: Callable[[Connection, int], tuple[Receiver, Address] | None],
        forget: Callable[[Incoming], object],
    ) -> None:
        """Become the handler of `conn`. `inbox`: makes a driver's own way to take datagrams out. `find`:
        gives the endpoint for what comes from one port for another (source << 16 | destination), and the
        source's address as shown to it. `forget`: called when the link is over."""
        self.home, self.conn, self.ep = home, conn, conn.ep
        self._find, self._forget = find, forget
        self._ports = home.ffi.new("uint32_t *")
        self._flows: dict[int, tuple[Receiver, Address]] = {}  # by source << 16 | destination port
        self._inbox = inbox and inbox(conn, self._flows)
        conn.handler = self

    def ready(self, bits: Any) -> None:
        home, conn, ep, ports, flows = self.home, self.conn, self.ep, self._ports, self._flows
        recv, arm, over = home.lib.sh_recv, home.lib.sh_arm, home.lib.sh_over
        room, bytes_of = home.room
        records = given = 0
        there = home.lib.sh_available(ep)  # what comes meanwhile waits until those have run whom this woke
        while conn.state is State.OPEN:
            if records and (
                records == RECORDS_PER_PASS or given >= min(there, BYTES_PER_PASS) or over(home.nd)
            ):
                if arm(ep):
                    home.emit(conn.ready, DATA)
                return
            size = recv(ep, room, ports)
            if size >= 0:
                data = bytes_of[:size]
                records += 1
                given += HEADER + len(data)
                flow = flows.get(ports[0]) or self._flow(ports[0])
                if flow is None:
                    home.counts["datagrams_unreachable"] += 1
                else:
                    flow[0].receive(data, flow[1])
            elif size != EMPTY:
                self._ended(size)
                return
            elif not arm(ep):
                return

    def _ended(self, status: int) -> None:
        if status == VIOLATION:
            self.conn.violated("an impossible datagram, or position, in a ring")
            return
        self.conn.ended_by(status)
        if status == EOF:
            self.conn.close()

    def _flow(self, ports: int) -> tuple[Receiver, Address] | None:
        """Find the endpoint for a pair of ports, and remember it as long as it lives."""
        flow = self._find(self.conn, ports)
        if flow is not None:
            remember(self._flows, ports, flow)
        return flow

    def freed(self) -> None:
        self._forget(self)
        if self._inbox is not None:
            self._inbox.close()

    def forget(self, endpoint: Receiver) -> None:
        """Forget the flows of an endpoint that was closed."""
        for ports in [ports for ports, flow in self._flows.items() if flow[0] is endpoint]:
            del self._flows[ports]
