"""Ports: those that this node listens on, and look-ups of those that others do. Ports of datagrams and ports
of streams share the table and the rules, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from errno import EADDRINUSE
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from shmsock.address import Address, is_local, normalize_name
from shmsock.engine import layout as lay
from shmsock.engine.home import Home
from shmsock.engine.peers import FORSAKEN_SAMPLES, Peer, Peers
from shmsock.errors import (
    name_malformed,
    name_unknown,
    no_listeners,
    not_local,
    not_published,
    pinned,
    port_refused,
    port_taken,
    ports_exhausted,
)
from shmsock.native._core import lib

__all__ = ["Listener", "Listeners"]

USED: int = lib.SH_LISTEN_USED
REUSE: int = lib.SH_LISTEN_REUSE
LOCAL: int = lib.SH_LISTEN_LOCAL
TENTATIVE: int = lib.SH_LISTEN_TENTATIVE
DATAGRAM: int = lib.SH_LISTEN_DATAGRAM
EPHEMERAL = 32768
PATIENCE, PATIENCE_NS = 20000, 3_000_000  # tries, and time: the loop stands still meanwhile
REMEMBERED = 256


_ADDRESSES = (IPv4Address, IPv6Address)


def _key(port: int, datagram: bool) -> int:
    return port | DATAGRAM << 16 if datagram else port


class Listener:
    """A port that is listened on. `handler`, the driver's, is called with each connection that was accepted;
    that of a port for datagrams is its Endpoint."""

    closed: bool
    flags: int
    index: int
    owner: Listeners
    port: int

    def __init__(self, owner: Listeners, index: int, port: int, backlog: int, flags: int) -> None:
        self.owner, self.index, self.port, self.flags = owner, index, port, flags
        self.handler: Any = None
        self.closed = self._serving = False
        if not flags & DATAGRAM:
            home = owner.home
            home.lib.sh_listen(home.nd, index, port, backlog, bool(flags & LOCAL))
        self.serving = True

    @property
    def serving(self) -> bool:
        """False: the port is occupied, and a CONNECT is refused."""
        return self._serving

    @serving.setter
    def serving(self, serves: bool) -> None:
        self._serving = serves
        home = self.owner.home
        home.lib.sh_listen_serve(home.nd, self.index, serves)

    @property
    def pending(self) -> int:
        """How many connections were accepted, and taken() was not called yet."""
        return int(self.owner.home.lib.sh_listen_pending(self.owner.home.nd, self.index))

    def taken(self) -> None:
        """Let another connection into the backlog, as one was taken out of it."""
        if not self.closed:
            self.owner.home.lib.sh_listen_taken(self.owner.home.nd, self.index)

    def accepted(self, conn: Any) -> None:
        """Hand a connection to the handler. (An event.)"""
        if self.handler is None or self.closed:
            conn.abort()
        else:
            self.handler(conn)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.owner.remove(self)


class Listeners:
    """The listener table of the own section, and the rules of who may have a port.

    A port belongs to a name, and processes of one host share their name, each with its own section. To take
    one: publish the entry as tentative, fence, scan the others of that name. Somebody who listens wins over
    who is tentative; of two tentative ones the lower section wins, and the other one withdraws.
    """

    home: Home
    peers: Peers

    def __init__(self, home: Home, peers: Peers, used: Callable[[], set[int]]) -> None:
        """`used`: returns the own ports of connections."""
        self.home, self.peers, self._used = home, peers, used
        self.mine: dict[int, list[Listener]] = {}  # by port, those of datagrams under _key(port, True)
        self.by_index: list[Listener | None] = [None] * lay.LISTENERS
        self._free = list(range(lay.LISTENERS - 1, -1, -1))
        slice_size = (65536 - EPHEMERAL) // home.layout.peers
        first = EPHEMERAL + home.section * slice_size
        self._slice = range(first, first + slice_size)
        self._count = 0
        self._ephemeral = self._unused()
        #: The peer that was found for (host, port, datagram), its incarnation, and the entry of the port.
        self._found: dict[Any, tuple[Peer, int, int]] = {}
        #: The section that was asked last for (name, port), where several have it.
        self._asked: dict[tuple[str | Address | None, int], int] = {}

    def __iter__(self) -> Iterator[Listener]:
        return (listener for group in list(self.mine.values()) for listener in group)

    def ephemeral(self, datagram: bool = False) -> int:
        """A port of this section's own slice, not listened on and, as long as there are others, not used by a
        connection."""
        for _ in self._slice:
            port = next(self._ephemeral)
            if (_key(port, True) if datagram else port) not in self.mine:
                break
        return port

    def _unused(self) -> Iterator[int]:
        """Yield ports, round and round. Those of connections are looked up once in each round, which has an
        eighth of all ports at least: first those that are not in use, and none of them twice, then any."""
        least = max(len(self._slice) // 8, 1)
        while True:
            used = self._used()
            unused = [port for port in self._slice if port not in used]
            yield from unused
            for _ in range(least - len(unused)):
                yield self.home.rng.choice(self._slice)

    def open(self, port: int, backlog: int, reuse: bool, local: bool, datagram: bool = False) -> Listener:
        if port == 0:
            return self._open_any(backlog, reuse, local, datagram)
        flags = USED | reuse * REUSE | local * LOCAL | datagram * DATAGRAM
        group = self.mine.get(_key(port, datagram), [])
        if any(not (reuse and other.flags & REUSE) for other in group):
            raise port_taken(self.home.name, port, "this process")
        if not self._free:
            raise no_listeners(lay.LISTENERS)
        index = self._free.pop()
        self._store(index, port | (flags | TENTATIVE) << 16)
        self.home.memory.fence()
        if not self._settle(port, reuse, datagram):
            self._store(index, 0)
            self._free.append(index)
            others = [p for p in self._namesakes() if self.entry(p, port, datagram) and p.who]
            raise port_taken(self.home.name, port, *(f"process {p.who.pid}" for p in others[:1] if p.who))
        self._store(index, port | flags << 16)
        listener = self.by_index[index] = Listener(self, index, port, backlog, flags)
        self.mine.setdefault(_key(port, datagram), []).append(listener)
        if self.home.trace:
            self.home.trace("listens on %d%s", port, " for datagrams" if datagram else "")
        return listener

    def _open_any(self, backlog: int, reuse: bool, local: bool, datagram: bool) -> Listener:
        taken, end = self._taken(datagram), self.home.now() + PATIENCE_NS
        for _ in range(len(self._slice)):
            port = self.ephemeral(datagram)
            if port in taken:
                continue
            try:
                return self.open(port, backlog, reuse, local, datagram)
            except OSError as error:  # a namesake asked for that very port
                if error.errno != EADDRINUSE or self.home.now() > end:
                    raise
        raise ports_exhausted(self.home.name, self._slice[0], self._slice[-1])

    def _taken(self, datagram: bool) -> set[int]:
        """Return the ports that others of the own name have, or are about to have."""
        return {
            port
            for peer in self._namesakes()
            for port, flags in self.home.layout.listener_entries(peer.section)
            if bool(flags & DATAGRAM) == datagram
        }

    def _settle(self, port: int, reuse: bool, datagram: bool) -> bool:
        """Is the port ours? A tentative owner decides within microseconds, unless it was stopped in the
        middle of it, or lies: then it is not, and this is over within PATIENCE_NS."""
        end = self.home.now() + PATIENCE_NS
        for _ in range(PATIENCE):
            undecided = False
            for peer in self._namesakes():
                flags = self.entry(peer, port, datagram)
                if not flags or (reuse and flags & REUSE):
                    continue
                if not flags & TENTATIVE or peer.section < self.home.section:
                    return False
                undecided = True  # it is about to see our entry, or did not see it and is about to listen
            if not undecided:
                return True
            if self.home.now() > end:
                break
            os.sched_yield()
        return False

    def _namesakes(self) -> list[Peer]:
        self.peers.refresh_all(self.home.now())
        return [p for p in self.peers.named(self.home.name, local=True) if p.section != self.home.section]

    def entry(self, peer: Peer, port: int, datagram: bool = False) -> int:
        """Look a port up in a peer's table: index << 8 | flags; 0 when it does not listen there."""
        found: int = self.home.memory.find_listener(self.home.layout.geometry, peer.section, port, datagram)
        return found

    def reachable(self, peer: Peer, port: int, datagram: bool = False) -> int:
        """Return the entry of a peer's port if this node may use it, else 0."""
        entry = self.entry(peer, port, datagram)
        closed = entry & TENTATIVE or (entry & LOCAL and not self.peers.same_kernel(peer))
        return 0 if closed else entry

    def remove(self, listener: Listener) -> None:
        if self.home.trace:
            self.home.trace("listens on %d no more", listener.port)
        key = _key(listener.port, bool(listener.flags & DATAGRAM))
        self.mine[key].remove(listener)
        if not self.mine[key]:
            del self.mine[key]
        self.by_index[listener.index] = None
        self._store(listener.index, 0)
        self.home.lib.sh_listen(self.home.nd, listener.index, 0, 0, 0)
        self._free.append(listener.index)

    def _store(self, index: int, entry: int) -> None:
        memory, at = self.home.memory, self.home.layout.section(self.home.section)
        if self.home.is_inert():
            return  # the section may be another's by now
        memory.store(at + lay.LISTENER + 8 * index, entry)
        if index >= self._count:
            self._count = index + 1
            memory.store(at + lay.N_LISTENERS, self._count)

    def serving(self, port: int, peer: Peer, datagram: bool = False) -> list[Listener]:
        """List the listeners of this node on `port` that serve that peer."""
        return [x for x in self.mine.get(_key(port, datagram), ()) if self.serves(x, peer)]

    def serves(self, listener: Listener, peer: Peer) -> bool:
        return listener._serving and (not listener.flags & LOCAL or self.peers.same_kernel(peer))

    def in_turn(self, group: list[Listener]) -> Listener:
        """Choose of several listeners of one port the one whose turn was longest ago."""
        listener = group[0]
        if len(group) > 1:
            mine = self.mine[_key(listener.port, bool(listener.flags & DATAGRAM))]
            mine.remove(listener)
            mine.append(listener)
        return listener

    def elsewhere(
        self, name: str | Address | None, port: int, *, exclude: tuple[int, ...] = (), datagram: bool = False
    ) -> tuple[list[Peer], bool]:
        """List the peers of that name (None: of this machine), or with that published address, that listen on
        `port`; tell also whether anybody has the name at all."""
        peers, now_ns = self.peers, self.home.now()
        peers.refresh_all(now_ns)
        while True:
            named = self._published(name, now_ns) if isinstance(name, _ADDRESSES) else peers.named(name)
            found = [p for p in named if p.section not in exclude and self.reachable(p, port, datagram)]
            if found or not peers.came_back(now_ns):
                break
        if len(found) > 1:
            # whose beat moved last comes first: a dead namesake, until it is known to be dead, is tried last
            found.sort(key=lambda p: min(p.samples, 3))
        return found, bool(named)

    def _published(self, address: Address, now_ns: int) -> list[Peer]:
        """List the peers that publish the address; none when those of several machines do."""
        found = self.peers.claiming(address, now_ns)
        return found if self.peers.of_one_machine(found) else []

    def find(
        self,
        host: Any,
        port: int,
        *,
        exclude: tuple[int, ...] = (),
        datagram: bool = False,
        takes_turn: bool = True,
    ) -> Peer:
        """Find the peer to ask for (host, port): a section's owner, a peer of that name, one that publishes
        that address, or (None, localhost) one of this machine. Several that have the port (reuse_port) take
        turns, unless it is for datagrams or nobody is going to be asked now (`takes_turn`). Raises
        socket.gaierror, ConnectionRefusedError."""
        if isinstance(host, int) and not isinstance(host, bool):
            now_ns = self.home.now()
            self.peers.refresh_all(now_ns)
            self.peers.came_back(now_ns)
            sections = {p.section: p for p in self.peers.all if p.live}
            if host not in sections:
                raise self.unknown(host)
            if host in exclude or not self.entry(sections[host], port, datagram):
                raise self.refused(host, port)
            return sections[host]
        key = None  # datagrams remember their addresses themselves
        if not exclude and not datagram and (host is None or type(host) is str):
            key = (host, port)
        if key and (known := self.known(*key)):
            if self._still(port, *known):
                return known[0]
            self.forget(*key)
        name: str | Address | None = None
        if isinstance(host, _ADDRESSES):
            name = host
        elif not self.is_own_machine(host):
            name = self.peer_name(host)
        found, named = self.elsewhere(name, port, exclude=exclude, datagram=datagram)
        if not found:
            if isinstance(name, _ADDRESSES):
                raise not_published(name, port)
            raise self._not_found(host, name, port, named, datagram)
        peer, entry = found[0], self.entry(found[0], port, datagram)
        # Of several another is to be asked next. 0: it stopped listening just now.
        if key and len(found) == 1 and entry and not entry & REUSE:
            if len(self._found) == REMEMBERED:
                self._found.clear()
            self._found[key] = peer, peer.incarnation, entry
        if all(self.entry(p, port, datagram) & REUSE for p in found):
            # A beat that is not due yet says nothing against those who share a port.
            now_ns = self.home.now()
            best = [p for p in found if not self.peers.stale(p, now_ns)] or [peer]
        else:  # one that is dead and not known to be, and its successor
            best = [p for p in found if p.samples <= peer.samples]
        if len(best) == 1:
            return best[0]
        return self.home.rng.choice(best) if datagram or not takes_turn else self._next((name, port), best)

    def _next(self, key: tuple[str | Address | None, int], peers: list[Peer]) -> Peer:
        """Choose the one behind the last that was asked, in the order of sections; the first time any, or
        all clients would begin with the same."""
        last = self._asked.get(key)
        behind = [p for p in peers if last is not None and p.section > last]
        found = self.home.rng.choice(peers) if last is None else min(behind or peers, key=lambda p: p.section)
        if len(self._asked) == REMEMBERED and last is None:
            self._asked.clear()
        self._asked[key] = found.section
        return found

    def _not_found(self, host: Any, name: str | None, port: int, known: bool, datagram: bool) -> OSError:
        peers = self.peers
        if not known:
            return self.not_pinned(name) or self.unknown(host)
        same = [p for p in peers.some if p.live and (name is None or p.name == name)]
        if any(self.entry(p, port, datagram) & LOCAL and not peers.same_kernel(p) for p in same):
            return not_local(host, port, bool(peers.me.flags & lay.FLAG_LOCKED))
        return self.refused(host, port)

    def not_pinned(self, name: str | None) -> ConnectionRefusedError | None:
        """Explain that a name is pinned to a section whose owner does not have it."""
        peers = self.peers
        section = None if name is None else peers.pin.get(name)
        if name is None or section is None:
            return None
        there = peers[section] if section < len(peers.all) else None
        return pinned(name, section, there.name if there and there.live else None)

    def known(self, host: Any, port: int) -> tuple[Peer, int, int] | None:
        """Return the peer that was found before, its life, and the entry of its port, if it beats. While its
        beat stands for longer than beats take, a namesake may have taken its place, and all have to be
        compared."""
        found = self._found.get((host, port)) if host is None or type(host) is str else None
        if found is None or not found[0].live or found[0].incarnation != found[1]:
            return None
        return None if found[0].samples >= FORSAKEN_SAMPLES else found

    def forget(self, host: Any, port: int) -> None:
        """Have the peer looked up again that was found before."""
        self._found.pop((host, port), None)

    def _still(self, port: int, peer: Peer, life: int, entry: int) -> bool:
        """Does a peer that is known still have the port?"""
        home, locks = self.home, self.peers.locks
        lock_fd = locks.lock_fd if locks is not None and peer.locked else -1
        return home.memory.still_listens(home.layout.geometry, peer.section, life, port, entry, lock_fd) and (
            lock_fd >= 0 or not self.peers.killed(peer)
        )

    @staticmethod
    def is_own_machine(host: Any) -> bool:
        return host is None or host == "" or is_local(host)

    def peer_name(self, host: str) -> str:
        """Return the canonical spelling of a peer's name. Raises socket.gaierror for what is no name."""
        try:
            return normalize_name(host)
        except ValueError as error:
            raise name_malformed(error) from None

    # -- errors of look-ups

    def _others(self) -> list[Peer]:
        peers = self.peers
        peers.refresh_all(self.home.now())
        return [p for p in peers.there() if p.section != peers.own]

    def unknown(self, host: Any) -> OSError:
        """Build the error for a host that is nobody's name or section."""
        number = isinstance(host, int)
        known = {str(p.section) if number else p.name for p in self._others()}
        return name_unknown(host, sorted(known), self.home.url, self.home.hint())

    def refused(self, host: Any, port: int) -> ConnectionRefusedError:
        """Build the error for a port that nobody of that name listens on."""
        return port_refused(host, port, self.home.url, alone=not self._others(), hint=self.home.hint())
