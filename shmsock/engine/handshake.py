"""How connections come to be: CONNECT, ACCEPT, REFUSE. Everything after that is bits in the slots.

A CONNECT takes a credit, of which there are 32 per direction, and each gets exactly one answer: honest
message rings of 64 cannot overflow.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from shmsock.engine.connection import EMPTY, OPENING, SPACE, VIOLATION, VIOLATIONS, Connection, Link
from shmsock.engine.home import Home
from shmsock.engine.links import Links
from shmsock.engine.listeners import Listeners
from shmsock.engine.peers import Peer, Peers
from shmsock.engine.slots import NO_MEMORY, NO_SLOT, NO_SLOTS, Slots
from shmsock.errors import backlog_full, peer_full, violation
from shmsock.native._core import lib

__all__ = ["Handshake"]

CONNECT: int = lib.SH_CONNECT
ACCEPT: int = lib.SH_ACCEPT
REFUSE: int = lib.SH_REFUSE
NO_LISTENER: int = lib.SH_NO_LISTENER
BACKLOG: int = lib.SH_BACKLOG
STALE_CONNECT: int = lib.SH_STALE_CONNECT
MESSAGES: int = lib.SH_MESSAGES
MESSAGES_PER_PASS = 16  # read from a peer at a time


class Handshake:
    """Opens and accepts connections. `accept`, set from above, takes those that are to carry datagrams."""

    def __init__(
        self, home: Home, peers: Peers, links: Links, slots: Slots[Connection], listeners: Listeners
    ) -> None:
        self.home, self.peers, self.links = home, peers, links
        self.slots, self.listeners = slots, listeners
        self.accept: Callable[[Connection], None] = Connection.abort
        self._note = home.ffi.new("uint32_t[8]")

    def connect(self, section: int, port: int, *, local: tuple[str, int], remote: str) -> Connection:
        """Ask `section` for a connection to `port` (0: one for datagrams). The answer is an event, connected
        or failed.

        Raises OSError (ENOBUFS) when slots or arena are exhausted, OSError (ENOSPC) when the disk is full,
        ConnectionRefusedError when nobody is there, ProtocolViolation while that peer is ignored for its
        violations.
        """
        home, link = self.home, self.links[section]
        adopted = home.lib.sh_adopted(home.nd, section)
        if adopted != 1 or not self.peers.all[section].live:
            self._link_up(link, adopted, port, remote)
        slot = self.slots.take(section, accepted=False, datagrams=not port)
        if slot < 0:
            raise self.slots.no_room(slot)
        conn = Connection(home, self.slots, link, slot, accepted=False)
        conn.local, conn.remote = local, (remote, port)
        link.waiting.append(conn)
        self._send_waiting(link)
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

    def _send_waiting(self, link: Link) -> None:
        lib = self.home.lib
        while link.answers and self._sent(link, lib.sh_answer(self.home.nd, link.section, *link.answers[0])):
            link.answers.popleft()
        while link.waiting and link.credits > 0 and not link.answers:
            conn = link.waiting[0]
            if conn.state is OPENING:
                if not self._sent(link, lib.sh_connect(conn.ep, link.section, conn.remote[1], conn.local[1])):
                    return
                link.credits -= 1
            link.waiting.popleft()

    def _sent(self, link: Link, status: int) -> bool:
        if status == VIOLATION:
            link.offence()
        self.home.stir()
        return status == 0

    def messages(self, section: int, now_ns: int) -> None:
        """Act on a peer's messages, up to MESSAGES_PER_PASS; if more are there it stays in `home.mail`."""
        home, note = self.home, self._note
        link, peer = self.links[section], self.peers[section]
        for _ in range(MESSAGES_PER_PASS):
            status = home.lib.sh_message_recv(home.nd, section, note)
            if status == VIOLATION:
                home.mail.discard(section)
                if home.lib.sh_adopted(home.nd, section) == 0:
                    self.links.tag_changed(section, now_ns)
                else:  # the message ring cannot be trusted any more: a violation of the whole link
                    link.violations = VIOLATIONS
                    link.offence()
                return
            if status > 0:
                peer.seen = True
                kind, reason, slot, gen, dst_slot, dst_gen, port, src_port = home.ffi.unpack(note, 8)
                if kind == CONNECT:
                    self._on_connect(link, peer, slot, gen, port, src_port, now_ns)
                else:
                    link.credits = min(link.credits + 1, home.settings.max_connects)
                    self._on_answer(link, peer, kind, reason, slot, gen, dst_slot, dst_gen)
            if status < 2:  # there are no more
                home.mail.discard(section)
                break
        home.lib.sh_message_done(home.nd, section)
        self._send_waiting(link)

    def last_messages(self, section: int, now_ns: int) -> None:
        """Act on all messages of a peer that is gone: one may be the answer to a connection whose bytes are
        there already."""
        self.home.mail.add(section)
        for _ in range(MESSAGES // MESSAGES_PER_PASS):
            if section not in self.home.mail:
                break
            self.messages(section, now_ns)

    def _on_connect(
        self, link: Link, peer: Peer, slot: int, gen: int, port: int, src_port: int, now_ns: int
    ) -> None:
        home = self.home
        if (old := link.connections.get(slot)) is not None:
            old.poll()  # the peer released that slot, and we have not polled it since
        listener = self.listeners.accepting(port, peer) if port else None
        reason, conn, bits = 0, None, 0
        if slot in link.connections:
            reason = STALE_CONNECT
        elif port and listener is None:
            reason = NO_LISTENER
        elif listener is not None and listener.full:
            reason = BACKLOG
        else:
            own = self.slots.take(link.section, accepted=True, datagrams=not port)
            if own < 0:
                reason = NO_SLOT if own == NO_SLOTS else NO_MEMORY
            else:
                conn = Connection(home, self.slots, link, own, accepted=True)
                bits = conn.open(slot, gen)
                if bits < 0:
                    conn.release()
                    reason = STALE_CONNECT
                    if bits == VIOLATION:
                        link.offence()
        if reason or conn is None:
            home.counts["refused"] += 1
            self._answer(link, reason, 0, 0, slot, gen)
            return
        self._answer(link, 0, conn.slot, conn.gen, slot, gen)
        self.peers.met(peer)
        if not peer.live:
            self.peers.heard(peer, now_ns)
        conn.local, conn.remote = (home.name, port), (peer.name, src_port)
        home.counts["accepted"] += 1
        if listener is None:
            self.accept(conn)
        else:
            listener.pending += 1
            home.emit(listener.accepted, conn)
        if bits != SPACE:
            conn.inspect(bits)

    def _answer(self, link: Link, *fields: int) -> None:
        """Send ACCEPT or REFUSE, or keep it until the message ring has room. `fields`: reason, slot, gen,
        dst_slot, dst_gen."""
        lib, nd = self.home.lib, self.home.nd
        if link.answers or not self._sent(link, lib.sh_answer(nd, link.section, *fields)):
            if len(link.answers) < MESSAGES:  # an honest peer has at most 32 CONNECTs on the way
                link.answers.append(fields)
            else:
                link.offence()

    def _on_answer(
        self, link: Link, peer: Peer, kind: int, reason: int, slot: int, gen: int, dst_slot: int, dst_gen: int
    ) -> None:
        home, conn = self.home, self.slots.connections.get(dst_slot)
        if conn is None or conn.gen != dst_gen or conn.state is not OPENING or conn.link is not link:
            if kind == ACCEPT:
                # ours is released, or open already: have the peer poll its slot and see which
                home.lib.sh_notify(home.nd, link.section, slot)
            return
        if kind == REFUSE:
            conn.release()
            home.counts["refused"] += 1
            if reason in (NO_SLOT, NO_MEMORY):
                home.emit(conn.failed, peer_full(conn.remote))
            elif reason == BACKLOG:
                home.emit(conn.failed, backlog_full(conn.remote))
            else:
                home.emit(conn.failed, self.listeners.refused(*conn.remote))
            return
        if (old := link.connections.get(slot)) is not None:
            old.poll()  # the peer released and reused that slot, and we have not polled it since
        bits = conn.open(slot, gen) if slot not in link.connections else VIOLATION
        if bits < 0:
            conn.release()
            why = f"connection to {conn.remote} was reset at once"
            home.emit(conn.failed, ConnectionResetError(errno.ECONNRESET, why))
            if bits == VIOLATION:
                link.offence()
            return
        self.peers.met(peer)
        home.counts["connected"] += 1
        home.emit(conn.connected)
        if bits != SPACE:
            conn.inspect(bits)
