"""How connections come to be: CONNECT, ACCEPT, REFUSE. Everything after that is bits in the slots.

A CONNECT takes a credit, of which there are 32 per direction, and each gets exactly one answer: honest
message rings of 64 cannot overflow.
"""

from __future__ import annotations

from errno import ECONNREFUSED
from typing import TYPE_CHECKING

from shmsock.errors import port_refused, violation
from shmsock.fabric.connection import VIOLATION, Connection, State
from shmsock.fabric.peers import VIOLATIONS, Peer
from shmsock.fabric.slots import NO_MEMORY, NO_SLOT

if TYPE_CHECKING:
    from shmsock.fabric.node import Engine

__all__ = ["Handshake"]

CONNECT, ACCEPT, REFUSE = 1, 2, 3  # enum sh_kind
NO_LISTENER, BACKLOG, STALE_CONNECT = 1, 4, 5  # enum sh_reason
MESSAGES_PER_PASS = 16


class Handshake:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._note = engine.ffi.new("sh_note *")

    def connect(self, section: int, port: int, *, local: tuple[str, int], remote: str) -> Connection:
        """Ask `section` for a connection to `port` (0: one for datagrams). The answer is an event, connected
        or failed.

        Raises OSError (ENOBUFS) when slots or arena are exhausted, OSError (ENOSPC) when the disk is full,
        ConnectionRefusedError when nobody is there, ProtocolViolation while it is not listened to.
        """
        engine = self.engine
        engine.check()
        peer, now_ns = engine.peers[section], engine.lib.sh_clock()
        engine.peers.refresh_all(now_ns)
        if not peer.live:
            raise port_refused(remote, port)
        adopted = engine.lib.sh_peer_inc(engine.nd, section)
        if not adopted and now_ns < peer.ignore_until_ns:
            raise violation(
                f"{remote!r} (section {section})", f"{VIOLATIONS} times; it is not listened to for a while"
            )
        if not adopted or engine.lib.sh_tag_changed(engine.nd, section):
            engine.adopt(peer, now_ns)
        conn = engine.slots.take(peer, accepted=False, datagrams=not port)
        if isinstance(conn, int):
            raise engine.slots.no_room(conn)
        conn.local, conn.remote = local, (remote, port)
        peer.waiting.append(conn)
        self.send_waiting(peer)
        return conn

    def send_waiting(self, peer: Peer) -> None:
        while peer.answers and self._send(peer, *peer.answers[0]):
            peer.answers.popleft()
        while peer.waiting and peer.credits > 0 and not peer.answers:
            conn = peer.waiting[0]
            if conn.state is State.OPENING and not self._send(
                peer, CONNECT, 0, conn.slot, 0, conn.gen, 0, conn.remote[1], conn.local[1]
            ):
                return
            peer.waiting.popleft()
            peer.credits -= conn.state is State.OPENING

    def _send(self, peer: Peer, *fields: int) -> bool:
        engine = self.engine
        note = self._note
        note.kind, note.reason, note.slot, note.dst_slot, note.gen, note.dst_gen, note.port, note.src_port = (
            fields
        )
        status: int = engine.lib.sh_message_send(engine.nd, peer.section, note)
        if status == VIOLATION:
            engine.offence(peer.section)
        return status == 0

    def messages(self, peer: Peer, now_ns: int) -> None:
        engine = self.engine
        note = self._note
        for _ in range(MESSAGES_PER_PASS):
            status = engine.lib.sh_message_recv(engine.nd, peer.section, note)
            if status == VIOLATION:
                engine.mail.discard(peer.section)
                if engine.lib.sh_tag_changed(engine.nd, peer.section):
                    engine.tag_changed(peer, now_ns)
                else:  # the message ring cannot be trusted any more: a violation of the whole link
                    peer.violations = VIOLATIONS
                    engine.offence(peer.section)
                return
            if status != 1:
                engine.mail.discard(peer.section)
                break
            kind, slot, dst_slot, gen, dst_gen = note.kind, note.slot, note.dst_slot, note.gen, note.dst_gen
            if kind == CONNECT:
                self._on_connect(peer, slot, gen, note.port, note.src_port, now_ns)
            else:
                peer.credits = min(peer.credits + 1, engine.settings.max_connects)
                self._on_answer(peer, kind, note.reason, slot, gen, dst_slot, dst_gen)
        self.send_waiting(peer)

    def _on_connect(self, peer: Peer, slot: int, gen: int, port: int, src_port: int, now_ns: int) -> None:
        engine = self.engine
        old = peer.connections.get(slot)
        if old is not None:
            engine.ready(old.slot)  # a released slot whose toggle we have not looked at yet
        listener = engine.listeners.accepting(port, peer) if port else None
        reason, conn = 0, None
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
                status = conn.open(slot, gen)
                if status < 0:
                    conn.release()
                    reason = STALE_CONNECT
                    if status == VIOLATION:
                        engine.offence(peer.section)
        if reason or conn is None:
            engine.counts["refused"] += 1
            self._answer(peer, REFUSE, reason, 0, slot, 0, gen, 0, 0)
            return
        self._answer(peer, ACCEPT, 0, conn.slot, slot, conn.gen, gen, 0, 0)
        engine.peers.heard(peer, now_ns)
        conn.local, conn.remote = (engine.name, port), (peer.name, src_port)
        engine.counts["accepted"] += 1
        if listener is None:
            engine.datagrams.accept(conn)
        else:
            listener.pending += 1
            engine.emit("accepted", listener, conn)
        engine.ready(conn.slot)

    def _answer(self, peer: Peer, *fields: int) -> None:
        engine = self.engine
        if peer.answers or not self._send(peer, *fields):
            if len(peer.answers) < 64:  # an honest peer has at most 32 CONNECTs on the way
                peer.answers.append(fields)
            else:
                engine.offence(peer.section)

    def _on_answer(
        self, peer: Peer, kind: int, reason: int, slot: int, gen: int, dst_slot: int, dst_gen: int
    ) -> None:
        engine = self.engine
        conn = engine.connections.get(dst_slot)
        if (
            conn is None
            or conn.gen != dst_gen
            or conn.state is not State.OPENING
            or conn.peer != peer.section
        ):
            if kind == ACCEPT:
                engine.lib.sh_notify_slot(
                    engine.nd, peer.section, slot
                )  # it shall look, and find our generation gone
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
                error = port_refused(*conn.remote)
            engine.emit("failed", conn, error)
            return
        old = peer.connections.get(slot)
        if old is not None:
            engine.ready(old.slot)  # released, accepted anew, and we have not looked since
        status = conn.open(slot, gen) if slot not in peer.connections else VIOLATION
        if status < 0:
            conn.release()
            engine.emit(
                "failed", conn, ConnectionResetError(104, f"connection to {conn.remote} was reset at once")
            )
            if status == VIOLATION:
                engine.offence(peer.section)
            return
        engine.counts["connected"] += 1
        engine.emit("connected", conn)
        engine.ready(conn.slot)
