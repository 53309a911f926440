"""How connections come to be: CONNECT, ACCEPT, REFUSE. Everything after that is bits in the slots.

A CONNECT takes a credit, of which there are 32 per direction, and each gets exactly one answer: honest
message rings of 64 cannot overflow.
"""

from __future__ import annotations

from errno import ECONNREFUSED
from typing import TYPE_CHECKING

from shmsock.engine.connection import EMPTY, OPENING, SPACE, VIOLATION, Connection
from shmsock.engine.peers import VIOLATIONS, Peer
from shmsock.engine.slots import NO_MEMORY, NO_SLOT
from shmsock.errors import violation

if TYPE_CHECKING:
    from shmsock.engine.engine import Engine

__all__ = ["Handshake"]

CONNECT, ACCEPT, REFUSE = 1, 2, 3  # enum sh_kind
NO_LISTENER, BACKLOG, STALE_CONNECT = 1, 4, 5  # enum sh_reason
MESSAGES, MESSAGES_PER_PASS = 64, 16  # in the ring; taken at a time


class Handshake:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._note = engine.ffi.new("uint32_t[8]")

    def connect(self, section: int, port: int, *, local: tuple[str, int], remote: str) -> Connection:
        """Ask `section` for a connection to `port` (0: one for datagrams). The answer is an event, connected
        or failed.

        Raises OSError (ENOBUFS) when slots or arena are exhausted, OSError (ENOSPC) when the disk is full,
        ConnectionRefusedError when nobody is there, ProtocolViolation while it is not listened to.
        """
        engine = self.engine
        peer, adopted = engine.peers.all[section], engine.lib.sh_adopted(engine.nd, section)
        if adopted != 1 or not peer.live:
            self._reach(peer, adopted, port, remote)
        conn = engine.slots.take(peer, accepted=False, datagrams=not port)
        if isinstance(conn, int):
            raise engine.slots.no_room(conn)
        conn.local, conn.remote = local, (remote, port)
        peer.waiting.append(conn)
        self.send_waiting(peer)
        return conn

    def _reach(self, peer: Peer, adopted: int, port: int, remote: str) -> None:
        """Adopt the link to a peer that was not, or has started anew; or raise why not."""
        engine, now_ns = self.engine, self.engine.lib.sh_clock()
        engine.check()
        engine.peers.refresh_all(now_ns)
        if not peer.live:
            raise engine.listeners.refused(remote, port)
        if adopted == EMPTY and now_ns < peer.ignore_until_ns:
            raise violation(
                f"{remote!r} (section {peer.section})",
                f"{VIOLATIONS} times; it is not listened to for a while",
            )
        if adopted in (0, EMPTY):
            engine.adopt(peer, now_ns)

    def send_waiting(self, peer: Peer) -> None:
        lib = self.engine.lib
        while peer.answers and self._sent(
            peer, lib.sh_answer(self.engine.nd, peer.section, *peer.answers[0])
        ):
            peer.answers.popleft()
        while peer.waiting and peer.credits > 0 and not peer.answers:
            conn = peer.waiting[0]
            if conn.state is OPENING:
                if not self._sent(peer, lib.sh_connect(conn.ep, peer.section, conn.remote[1], conn.local[1])):
                    return
                peer.credits -= 1
            peer.waiting.popleft()

    def _sent(self, peer: Peer, status: int) -> bool:
        if status == VIOLATION:
            self.engine.offence(peer.section)
        self.engine.stir()
        return status == 0

    def messages(self, peer: Peer, now_ns: int) -> None:
        engine, note = self.engine, self._note
        for _ in range(MESSAGES_PER_PASS):
            status = engine.lib.sh_message_recv(engine.nd, peer.section, note)
            if status == VIOLATION:
                engine.mail.discard(peer.section)
                if engine.lib.sh_adopted(engine.nd, peer.section) == 0:
                    engine.tag_changed(peer, now_ns)
                else:  # the message ring cannot be trusted any more: a violation of the whole link
                    peer.violations = VIOLATIONS
                    engine.offence(peer.section)
                return
            if status > 0:
                peer.seen = True
                kind, reason, slot, gen, dst_slot, dst_gen, port, src_port = engine.ffi.unpack(note, 8)
                if kind == CONNECT:
                    self._on_connect(peer, slot, gen, port, src_port, now_ns)
                else:
                    peer.credits = min(peer.credits + 1, engine.settings.max_connects)
                    self._on_answer(peer, kind, reason, slot, gen, dst_slot, dst_gen)
            if status < 2:  # there are no more
                engine.mail.discard(peer.section)
                break
        engine.lib.sh_message_done(engine.nd, peer.section)
        self.send_waiting(peer)

    def last_messages(self, peer: Peer, now_ns: int) -> None:
        """What a peer that is gone had to say: one of them may be the answer to a connection whose bytes are
        there already."""
        self.engine.mail.add(peer.section)
        for _ in range(MESSAGES // MESSAGES_PER_PASS):
            if peer.section not in self.engine.mail:
                break
            self.messages(peer, now_ns)

    def _on_connect(self, peer: Peer, slot: int, gen: int, port: int, src_port: int, now_ns: int) -> None:
        engine = self.engine
        if (old := peer.connections.get(slot)) is not None:
            engine.ready(old.slot)  # a released slot whose toggle we have not looked at yet
        listener = engine.listeners.accepting(port, peer) if port else None
        reason, conn, bits = 0, None, 0
        if slot in peer.connections:
            reason = STALE_CONNECT
        elif port and listener is None:
            reason = NO_LISTENER
        elif listener is not None and listener.full:
            reason = BACKLOG
        else:
            try:
                taken = engine.slots.take(peer, accepted=True, datagrams=not port)
            except OSError:
                taken = NO_MEMORY
            if isinstance(taken, int):
                reason = taken
            else:
                conn = taken
                bits = conn.open(peer, slot, gen)
                if bits < 0:
                    conn.release()
                    reason = STALE_CONNECT
                    if bits == VIOLATION:
                        engine.offence(peer.section)
        if reason or conn is None:
            engine.counts["refused"] += 1
            self._answer(peer, reason, 0, 0, slot, gen)
            return
        self._answer(peer, 0, conn.slot, conn.gen, slot, gen)
        if not peer.live:
            engine.peers.heard(peer, now_ns)
        conn.local, conn.remote = (engine.name, port), (peer.name, src_port)
        engine.counts["accepted"] += 1
        if listener is None:
            engine.datagrams.accept(conn)
        else:
            listener.pending += 1
            engine.emit("accepted", listener, conn)
        if bits != SPACE:
            engine.looked(conn, bits)

    def _answer(self, peer: Peer, *fields: int) -> None:
        """`fields`: reason, slot, gen, dst_slot, dst_gen."""
        engine = self.engine
        if peer.answers or not self._sent(peer, engine.lib.sh_answer(engine.nd, peer.section, *fields)):
            if len(peer.answers) < 64:  # an honest peer has at most 32 CONNECTs on the way
                peer.answers.append(fields)
            else:
                engine.offence(peer.section)

    def _on_answer(
        self, peer: Peer, kind: int, reason: int, slot: int, gen: int, dst_slot: int, dst_gen: int
    ) -> None:
        engine = self.engine
        conn = engine.connections.get(dst_slot)
        if conn is None or conn.gen != dst_gen or conn.state is not OPENING or conn.peer != peer.section:
            if kind == ACCEPT:
                # it shall look, and find our generation gone
                engine.lib.sh_notify(engine.nd, peer.section, slot)
            return
        if kind == REFUSE:
            conn.release()
            engine.counts["refused"] += 1
            error: OSError
            if reason in (NO_SLOT, NO_MEMORY):
                error = OSError(
                    105,
                    f"{conn.remote} has no room for another connection: use a larger region, or close some",
                )
            elif reason == BACKLOG:
                error = ConnectionRefusedError(
                    ECONNREFUSED,
                    f"{conn.remote} has its backlog full: try again, or listen with a larger backlog",
                )
            else:
                error = engine.listeners.refused(*conn.remote)
            engine.emit("failed", conn, error)
            return
        if (old := peer.connections.get(slot)) is not None:
            engine.ready(old.slot)  # released, accepted anew, and we have not looked since
        bits = conn.open(peer, slot, gen) if slot not in peer.connections else VIOLATION
        if bits < 0:
            conn.release()
            engine.emit(
                "failed", conn, ConnectionResetError(104, f"connection to {conn.remote} was reset at once")
            )
            if bits == VIOLATION:
                engine.offence(peer.section)
            return
        engine.counts["connected"] += 1
        engine.emit("connected", conn)
        if bits != SPACE:
            engine.looked(conn, bits)
