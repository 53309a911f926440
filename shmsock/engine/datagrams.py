"""Datagrams: the endpoints of this node. The links that carry them are in datagram_links.py.

A datagram is lost in these cases only, and each is counted:
    datagrams_unreachable     nobody has the port, when it is sent or when it arrives
    datagrams_dropped_full    what a paused receiving endpoint keeps is at its bound already
    datagrams_dropped_unsent  what waits in the sending endpoint is at its bound already (it ignored
                              pause_writing); or the endpoint was closed, or the peer left or died, meanwhile;
                              or, one of a broadcast, there is no memory for its link, or too little
    datagrams_lost_unread     the peer left or died, and had not read it from the ring
The bounds are Settings.datagram_queue_bytes; it is always the newest that goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from shmsock.address import check_port
from shmsock.engine.connection import Connection
from shmsock.engine.datagram_links import (
    OVERHEAD,
    RECORDS_PER_PASS,
    Address,
    Gate,
    Incoming,
    Outgoing,
    Route,
    Waiting,
    remember,
)
from shmsock.engine.home import Home
from shmsock.engine.listeners import Listener, Listeners
from shmsock.engine.peers import Peer, Peers
from shmsock.engine.slots import Slots
from shmsock.errors import datagram_too_long, node_closed
from shmsock.native._core import lib

__all__ = ["BROADCAST", "DATAGRAM_MAX", "Datagrams", "Endpoint"]

DATAGRAM_MAX: int = lib.SH_DATAGRAM_MAX
BROADCAST = "*"


class Endpoint:
    """A port for datagrams. `handler` belongs to the driver, and is called from the pump only: datagram(data,
    source); space() when `unsent` went down; refused(error) when nobody received what a connected endpoint
    sent or, with a NodeClosedError, when this node is over."""

    home: Home
    listener: Listener
    owner: Datagrams
    local: tuple[str, int]
    remote: Address | None
    paused: bool
    closed: bool

    def __init__(self, owner: Datagrams, listener: Listener, remote: Address | None, given: Any) -> None:
        self.owner, self.home, self.listener = owner, owner.home, listener
        self.local, self.remote = (owner.home.name, listener.port), remote
        #: The driver may translate addresses: shown(address, section) those of senders, host(host) the host
        #: of a destination.
        self.shown: Callable[[Address, int], Address] = lambda address, section: address
        self.host: Callable[[Any], Any] = lambda host: host
        self.aliases: list[Any] = [None, remote, given]  # what send() may be given when connected
        self.handler: Any = None
        self.sink: Any = None  # (protocol, context): the driver's pump calls it instead of `handler`
        self.closed = False
        self.unsent = 0  # bytes that wait for room in a ring, and OVERHEAD for each datagram
        self.paused = False  # paused, or not yet through with what came meanwhile
        self._to: Any = given if remote and isinstance(given[0], int) else remote
        self._bound = owner.home.settings.datagram_queue_bytes
        self.routes: dict[Any, Route] = {}
        self._paused = False
        self._kept: deque[tuple[bytes, Address]] = deque()
        self._kept_bytes = 0
        self._due = False
        self._error: OSError | None = None

    def __repr__(self) -> str:
        return f"<Endpoint {'closed' if self.closed else 'open'} {self.local} - {self.remote}>"

    # -- sending

    def send(self, data: Any, to: Any = None) -> None:
        """Send a datagram, or queue it; never blocks. `to`: (host, port), or ("*", port) for all that have
        the port, or None if connected.

        Raises OSError: EMSGSIZE above 65507 bytes, socket.gaierror, ENOBUFS (no memory for a link, or so
        little that this one never fits), NodeClosedError; TypeError, ValueError."""
        self.home.check()
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        data = bytes(data)
        if len(data) > DATAGRAM_MAX:
            raise datagram_too_long(len(data), DATAGRAM_MAX)
        if self.closed:
            raise node_closed(self.local, "the endpoint was closed")
        if self.remote is None:
            if not isinstance(to, tuple) or len(to) not in (2, 4):  # 4: with what AF_INET6 adds
                raise TypeError(f"an address is needed, (host, port), not {to!r}: this is not connected")
            host, port = self.host(to[0]), check_port(to[1], "sendto")
        elif to not in self.aliases:
            raise ValueError(f"Invalid address: must be None or {self.remote}")
        else:
            host, port = self._to
        if host == BROADCAST:
            self._broadcast(data, port)
        else:
            self.send_to(data, to, host, port)

    def send_to(self, data: bytes, to: Any, host: Any, port: int) -> None:
        refused: OSError | None = None
        for _ in range(2):  # again when the port changed hands, or the link was lost, just now
            route = self.routes.get(to)
            try:
                if route is None or not route.link.usable:
                    peer = self.owner.listeners.find(host, port, datagram=True)
                    entry = self.owner.listeners.reachable(peer, port, datagram=True)
                    link = self.owner.link(peer)
                    route = Route(link, port, entry, link.gate)
                    remember(self.routes, to, route)
            except ConnectionRefusedError as error:
                refused = error
                break
            if route.link.send(Waiting(self, (to, host, port), route, data)):
                return
            self.routes.pop(to, None)
        self.home.counts["datagrams_unreachable"] += 1
        if self.remote is not None:
            self.soon(refused or self.owner.listeners.refused(self.remote[0], port))

    def _broadcast(self, data: bytes, port: int) -> None:
        """Send a copy to every peer that has the port; the own node is one if another of its endpoints has
        it."""
        listeners, peers = self.owner.listeners, self.owner.peers
        peers.refresh_all(self.home.now())
        for peer in peers.all:
            entry = peer.live and listeners.reachable(peer, port, datagram=True)
            if entry and (
                peer.section != self.home.section
                or any(x is not self.listener for x in listeners.serving(port, peer, datagram=True))
            ):
                try:
                    link = self.owner.link(peer)
                    if not link.send(Waiting(self, None, Route(link, port, entry, link.gate), data)):
                        self.home.counts["datagrams_unreachable"] += 1
                except OSError:  # no room for a link, or in its ring, or it is not listened to
                    self.home.counts["datagrams_dropped_unsent"] += 1

    def retry(self, item: Waiting) -> None:
        """Send a datagram again that waited while its port changed hands."""
        try:
            self.send_to(item.data, *item.to)
        except OSError as error:  # nobody has that name any more, or there is no room for a link
            self.home.counts["datagrams_dropped_unsent"] += 1
            self.soon(error if self.remote is not None else None)

    def uses(self, link: Outgoing) -> bool:
        return any(route.link is link for route in self.routes.values())

    # -- receiving

    def accepts(self, source: Address) -> bool:
        """Does it take datagrams from there? A connected endpoint takes its remote's only."""
        return self.remote is None or self.remote[0] == BROADCAST or self.remote == source

    def receive(self, data: bytes, source: Address) -> None:
        """Hand a datagram to the handler, or keep it while paused; drop it when too much is kept."""
        if not self.paused:
            self.handler.datagram(data, source)
        elif self._kept_bytes + len(data) + OVERHEAD > self._bound:
            self.home.counts["datagrams_dropped_full"] += 1
        else:
            self._kept.append((data, source))
            self._kept_bytes += len(data) + OVERHEAD

    def pause(self) -> None:
        """Keep what arrives, up to the bound."""
        self._paused = self.paused = True

    def resume(self) -> None:
        """Deliver again; the pump brings what was kept."""
        self._paused, self.paused = False, bool(self._kept)
        if self.paused:
            self.soon()

    # -- what the pump has to tell

    def soon(self, error: OSError | None = None) -> None:
        """Have happened() called after this pass of the pump, with the first error that came meanwhile."""
        self._error = self._error or error
        if not (self._due or self.closed):
            self._due = True
            self.home.emit(self.happened)

    def happened(self, _: None = None) -> None:
        """Tell the handler of an error, of space, and of what was kept: at least one datagram, and as many as
        the turn has time for. (An event.)"""
        self._due = False
        error, self._error = self._error, None
        try:
            if error is not None and self._told:
                self.handler.refused(error)
            if self._told:
                self.handler.space()
            for given in range(RECORDS_PER_PASS):
                if self._paused or not (self._kept and self._told):
                    break
                if given and self.home.lib.sh_over(self.home.nd):
                    break
                data, source = self._kept.popleft()
                self._kept_bytes -= len(data) + OVERHEAD
                self.handler.datagram(data, source)
        finally:
            self.paused = self._paused or bool(self._kept)
            if self._kept and not self._paused:
                self.soon()

    @property
    def _told(self) -> bool:
        return self.handler is not None and not self.closed

    def close(self) -> None:
        """Give the port back. What waits is dropped: close when nothing is `unsent` if it shall go out."""
        if self.closed:
            return
        self.closed = True
        self.listener.close()
        self.listener.handler = None
        self.home.counts["datagrams_unreachable"] += len(self._kept)
        self._kept.clear()
        self.routes.clear()
        self.owner.closed(self)


class Datagrams:
    """All endpoints of a node, and the links that they share.

    `connect(section, port, local=, remote=)` opens a connection, as Handshake.connect() does."""

    home: Home
    listeners: Listeners
    peers: Peers

    def __init__(
        self,
        home: Home,
        peers: Peers,
        listeners: Listeners,
        slots: Slots[Connection],
        connect: Callable[..., Connection],
    ) -> None:
        self.home, self.peers, self.listeners, self._slots = home, peers, listeners, slots
        self._connect = connect
        self._endpoints: set[Endpoint] = set()
        self._links: dict[int, Outgoing] = {}
        self.incoming: set[Incoming] = set()
        #: The driver may set these: what makes the gate of a link, and the inbox of one that a peer opened.
        self.gate: Callable[[Connection, Outgoing], Any] = Gate
        self.inbox: Callable[[Connection, dict[int, Any]], Any] | None = None

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(list(self._endpoints))

    def bind(
        self,
        port: int,
        *,
        reuse_port: bool = False,
        local_only: bool = False,
        remote: tuple[Any, int] | None = None,
    ) -> Endpoint:
        """Open an endpoint at `port` (0: one is chosen), connected to `remote` if given: then it sends there,
        and takes only what comes from there. Raises OSError (EADDRINUSE, ENOBUFS), socket.gaierror when
        nobody has the remote name."""
        self.home.check()
        named = None if remote is None else (self.name_of(*remote), remote[1])
        listener = self.listeners.open(port, 1, reuse_port, local_only, datagram=True)
        listener.handler = endpoint = Endpoint(self, listener, named, remote)
        self._endpoints.add(endpoint)
        return endpoint

    def name_of(self, host: Any, port: int) -> str:
        """Return the name of the peer at (host, port). Raises socket.gaierror when nobody is there."""
        return BROADCAST if host == BROADCAST else self.peer_of(host, port).name

    def peer_of(self, host: Any, port: int) -> Peer:
        """Find the peer at (host, port); one without the port will do. Raises socket.gaierror, and
        ConnectionRefusedError when the name is pinned to a section that has another owner."""
        listeners, peers = self.listeners, self.peers
        try:
            return listeners.find(host, port, datagram=True)
        except ConnectionRefusedError:  # it is there, and has not got the port
            if isinstance(host, int):
                return peers[host]
            own = listeners.is_own_machine(host)
            named = [peers[self.home.section]] if own else peers.named(listeners.peer_name(host))
            if not named:  # the pinned one is not there
                raise
            return named[0]

    def link(self, peer: Peer) -> Outgoing:
        """Return the link to that peer, opened if need be. Raises what Engine.connect() raises."""
        link = self._links.get(peer.section)
        if link is not None and not link.usable:
            link.lost()
            link = None
        if link is None:
            conn = self._connect(peer.section, 0, local=(self.home.name, 0), remote=peer.name)
            room = self._slots.region_for_link
            link = self._links[peer.section] = Outgoing(self.home, conn, self.gate, room, self._forget)
        return link

    def _forget(self, link: Outgoing) -> list[Endpoint]:
        if self._links.get(link.conn.peer) is link:
            del self._links[link.conn.peer]
        return [endpoint for endpoint in self if endpoint.uses(link)]

    def accept(self, conn: Connection) -> None:
        """Take over a connection that a peer opened as a link."""
        incoming = Incoming(self.home, conn, self.inbox, self._flow, self.incoming.discard)
        self.incoming.add(incoming)

    def _flow(self, conn: Connection, ports: int) -> tuple[Endpoint, Address] | None:
        """Find the endpoint for what comes from port `ports` >> 16 to port `ports` & 0xFFFF, and the source's
        address as shown to it. One that is connected to the source comes first, the sender itself last."""
        source, peer = (conn.remote[0], ports >> 16), self.peers[conn.peer]
        serving = self.listeners.serving(ports & 0xFFFF, peer, datagram=True)
        group = [x for x in serving if x.handler.accepts(source)]
        group = [x for x in group if x.handler.remote is not None] or group
        if peer.section == self.home.section:
            group = [x for x in group if x.handler.local != source] or group
        if not group:
            return None
        endpoint = self.listeners.in_turn(group).handler
        return endpoint, endpoint.shown(source, peer.section)

    def closed(self, endpoint: Endpoint) -> None:
        """Drop the datagrams of an endpoint that wait, and have no link remember it."""
        self._endpoints.discard(endpoint)
        for incoming in self.incoming:
            incoming.forget(endpoint)
        for link in list(self._links.values()):
            kept = deque(item for item in link.queue if item.endpoint is not endpoint)
            self.home.counts["datagrams_dropped_unsent"] += len(link.queue) - len(kept)
            link.queue = kept
        endpoint.unsent = 0

    def down(self, why: OSError) -> None:
        """Tell all endpoints that the node is over."""
        for endpoint in self:
            endpoint.soon(why)
