"""How connections come to be, as far as the core (native/connect.c) leaves something to be done: it takes
slots and rings, sends and receives CONNECT, ACCEPT and REFUSE, and gives out one event for each."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from shmsock.engine.connection import EMPTY, OPEN, OPENING, SPACE, VIOLATIONS, Connection, Link
from shmsock.engine.home import Home
from shmsock.engine.links import Links
from shmsock.engine.listeners import Listeners
from shmsock.engine.peers import Peers
from shmsock.engine.slots import Slots
from shmsock.errors import upgrade_needed, violation
from shmsock.native._core import lib

__all__ = ["Handshake"]

NO_SLOT: int = lib.SH_NO_SLOT
NO_MEMORY: int = lib.SH_NO_MEMORY
DATAGRAMS: int = lib.SH_LISTENERS  # the entry of what is for no listener


class Handshake:
    """Opens and accepts connections. `accept`, set from above, takes those that are to carry datagrams."""

    home: Home
    links: Links
    peers: Peers
    listeners: Listeners
    slots: Slots[Connection]

    def __init__(
        self, home: Home, peers: Peers, links: Links, slots: Slots[Connection], listeners: Listeners
    ) -> None:
        self.home, self.peers, self.links = home, peers, links
        self.slots, self.listeners = slots, listeners
        self.accept: Callable[[Connection], None] = Connection.abort

    def connect(self, section: int, port: int, *, local: tuple[str, int], remote: str) -> Connection:
        """Ask `section` for a connection to `port` (0: one for datagrams). The answer is an event, connected
        or failed. While the peer's backlog is full, it is asked again and again.

        Raises OSError (ENOBUFS) when slots or arena are exhausted, OSError (ENOSPC) when the disk is full,
        ConnectionRefusedError when nobody is there, or one side has to be upgraded, ProtocolViolation while
        that peer is ignored for its violations.
        """
        home, link = self.home, self.links[section]
        adopted = home.lib.sh_adopted(home.nd, section)
        if adopted != 1 or not self.peers.all[section].live:
            self._link_up(link, adopted, port, remote)
        slot = home.lib.sh_connect(home.nd, section, port, local[1])
        if slot < 0:
            raise self.slots.no_room(slot)
        home.stir()
        conn = Connection(home, self.slots, link, slot, local, (remote, port))
        if home.trace:
            home.trace("asks section %d for a connection: %r", section, conn)
        return conn

    def connect_again(self, host: Any, port: int) -> Connection | None:
        """Ask the peer that was found for (host, port) before. None: it is to be looked up. It may have been
        killed meanwhile: if no answer comes, Peers.killed() tells."""
        if (found := self.listeners.known(host, port)) is None:
            return None
        home, (peer, life, entry), own = self.home, found, self.listeners.ephemeral()
        slot = home.lib.sh_connect_again(home.nd, peer.section, life, port, entry, own)
        if slot < 0:
            return None
        home.stir()
        link = self.links.all[peer.section]
        conn = Connection(home, self.slots, link, slot, (home.name, own), (peer.name, port))
        if home.trace:
            home.trace("asks section %d again for a connection: %r", peer.section, conn)
        return conn

    def _link_up(self, link: Link, adopted: int, port: int, remote: str) -> None:
        """Adopt a peer that was not adopted yet, or has started anew. Raises the reason when it cannot be."""
        self.home.check()
        now_ns = self.home.now()
        self.peers.refresh_all(now_ns)
        if not self.peers[link.section].live:
            raise self.listeners.refused(remote, port)
        if adopted == EMPTY and now_ns < link.ignore_until_ns:
            raise violation(
                f"{remote!r} (section {link.section})",
                f"{VIOLATIONS} times; it is not listened to for a while",
            )
        if adopted in (0, EMPTY):
            self.links.adopt(link.section, now_ns)
            if refusal := self.links.refusal(link.section):
                raise upgrade_needed(refusal)

    # -- what the core has done

    def opened(self, conn: Connection) -> None:
        """Note that the peer has accepted a connection."""
        conn.state, peer = OPEN, self.peers.all[conn.peer]
        peer.seen = True
        if not peer.here:
            self.peers.met(peer)
        self.home.counts["connected"] += 1
        if self.home.trace:
            self.home.trace("accepted by its peer: %r", conn)

    def accepted(
        self, what: int, more: int, now_ns: int, tell: Callable[[Callable[[Any], object], Any], object]
    ) -> None:
        """Take over a connection that a peer opened. `what`, `more`: the halves of the core's event. `tell`
        is given an event of our own, a call and its argument, for the listener."""
        home, section, slot = self.home, what >> 16, what & 0xFFFF
        index, src_port, bits = more >> 23, more >> 7 & 0xFFFF, more & 0x7F
        peer = self.peers.all[section]
        listener = None if index == DATAGRAMS else self.listeners.by_index[index]
        local, remote = (home.name, listener.port if listener else 0), (peer.name, src_port)
        conn = Connection(home, self.slots, self.links.all[section], slot, local, remote)
        conn.state, conn.accepted, peer.seen = OPEN, True, True
        if not peer.here:
            self.peers.met(peer)
        if not peer.live:
            self.peers.heard(peer, now_ns)
        home.counts["accepted"] += 1
        if home.trace:
            what_for = "datagrams" if index == DATAGRAMS else "a connection"
            home.trace("accepts %s of section %d: %r", what_for, section, conn)
        if index == DATAGRAMS:
            self.accept(conn)
        elif listener is None or not self.listeners.serves(listener, peer):
            if listener is not None:  # the core took its peer for one of this machine, and that was killed
                listener.taken()
            conn.abort()
        else:
            tell(listener.accepted, conn)
        if bits != SPACE:  # behind that: who has the connection by now hears of it
            conn.inspect(bits)

    def answered(self, slot: int, gen: int, bits: int, reason: int) -> None:
        """Take in the answer to a CONNECT: it is open, and `bits` are those of a poll; or it is not (-1), for
        that reason."""
        home, conn = self.home, self.slots.connections.get(slot)
        if conn is None or conn.gen != gen or conn.state is not OPENING:
            return  # given up meanwhile
        peer = self.peers.all[conn.peer]
        peer.seen = True
        if bits >= 0:
            self.opened(conn)
            home.emit(conn.connected)
            if bits != SPACE:
                conn.inspect(bits)
            return
        if home.trace:
            home.trace("refused, reason %d: %r", reason, conn)
        conn.release()
        if reason in (NO_SLOT, NO_MEMORY):
            home.emit(conn.failed, self.slots.none_left(reason == NO_SLOT, conn.remote[0]))
        elif reason:
            home.emit(conn.failed, self.listeners.refused(*conn.remote))
        else:
            why = f"connection to {conn.remote} was reset at once"
            home.emit(conn.failed, ConnectionResetError(errno.ECONNRESET, why))
