"""The engine: one process's side of a region. It knows no event loop and no clock: `now_ns` (monotonic nanoseconds) is an
argument, what happened comes back as events, and when it wants to be called again says `next_deadline()`.

A byte's way does not lead through here: Connection.write and .read go straight to C. Here is what happens seldom: links that
appear and vanish, connections that are opened, answered and released, and the slow looks that make all of it robust.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from shmsock.errors import NodeClosedError, no_buffers, node_closed, port_refused, violation
from shmsock.fabric import layout as lay
from shmsock.fabric.arena import MIN_RING, Arena
from shmsock.fabric.attach import Claim, Locks
from shmsock.fabric.connection import STALE, VIOLATION, Connection, State
from shmsock.fabric.layout import Identity, Layout, region_for
from shmsock.fabric.listeners import Listener, Listeners
from shmsock.fabric.peers import ADOPTIONS_PER_S, VIOLATIONS, Peer, Peers
from shmsock.fabric.settings import Settings

__all__ = ["Engine", "Event"]

CONNECT, ACCEPT, REFUSE = 1, 2, 3
NO_LISTENER, NO_SLOT, NO_MEMORY, BACKLOG, STALE_CONNECT = 1, 2, 3, 4, 5
EV_SLOT, EV_ADOPT, EV_MESSAGE = 0, 1, 2
SAMPLE_NS = 100_000_000
SAFETY_NS = 1_000_000_000
EVENTS_PER_PASS = 64
MESSAGES_PER_PASS = 16
COUNTERS = (
    "pumps", "reads", "writes", "bytes_in", "bytes_out", "notifies", "notifies_pending", "spin_hits", "spin_misses", "wakeups",
    "healed", "bells",
)  # fmt: skip


class Event(NamedTuple):
    """`ready`: look at the connection (arg: LOOK bits). `connected`, `failed` (arg: OSError): the answer to connect().
    `accepted`: a listener has a new connection (arg). `down` (arg: OSError): this node is over; target is None."""

    kind: str
    target: Any
    arg: Any = None


class Engine:
    """Attached to one section. Raises what connect() and listen() name; all else comes as events."""

    def __init__(
        self,
        layout: Layout,
        claim: Claim,
        identity: Identity,
        *,
        settings: Settings | None = None,
        rng: random.Random | None = None,
        ensure: Callable[[int, int], None] | None = None,
        watch: Callable[[Peer, bool], None] | None = None,
        locks: Locks | None = None,
        now_ns: int = 0,
    ) -> None:
        self.layout, self.memory, self.claim = layout, layout.memory, claim
        self.settings = settings or Settings()
        self.rng = rng or random.SystemRandom()
        self.ffi, self.lib = self.memory.core
        self.section = claim.section
        self.name = identity.name
        self._ensure = ensure or (lambda offset, length: None)
        self._watch = watch or (lambda peer, on: None)
        self._backed: set[int] = set()
        self._ensure(layout.section(self.section), layout.arena_off)
        self.nd = self.ffi.gc(
            self.lib.sh_node_new(self.memory.base, layout.geometry, self.section, self.memory.wc), self.lib.sh_node_free
        )
        if not self.nd:
            raise MemoryError("no memory for a node's private state")
        self.peers = Peers(layout, self.section, identity, self.settings.max_connects, self.settings.dead_after_s, locks)
        self.arena = Arena(layout.arena_off, layout.arena_bytes)
        self.free_slots = list(range(layout.slots - 1, -1, -1))
        self.connections: dict[int, Connection] = {}
        self.listeners = Listeners(self)
        self.counts = {"accepted": 0, "connected": 0, "refused": 0, "violations": 0, "adoptions": 0, "peers_lost": 0}
        self._out = self.ffi.new("uint32_t[]", EVENTS_PER_PASS)
        self._note = self.ffi.new("sh_note *")
        self._events: list[Event] = []
        self._failure: OSError | None = None
        self._orphans: set[Connection] = set()
        self._mail: set[int] = set()
        self._tags: set[int] = set()  # links whose tag changed while they were ignored
        self._condemned: set[int] = set()  # peers that broke the rules too often: the pump drops them
        self._reap: dict[int, tuple[int, int, int]] = {}
        self._next_sample = now_ns
        self._next_safety = now_ns + SAFETY_NS
        self._attach(identity, now_ns)

    # -- life

    def _attach(self, identity: Identity, now_ns: int) -> None:
        lib, me = self.lib, self.section
        lib.sh_node_claim(self.nd, self.claim.word)
        us = self.settings
        lib.sh_node_settings(self.nd, us.hold_us * 1000, us.busy_poll_us * 1000, 1000)
        at = self.layout.section(me)
        self.layout.write_identity(me, identity, self.rng.getrandbits(63) | 1)
        for j in range(self.layout.peers):
            lib.sh_restart(self.nd, j, self._pair_inc(me, j))
        self.memory.fence()
        self.memory.store(at + lay.STATE, lay.LIVE)
        self.peers.refresh_all(now_ns)

    def _pair_inc(self, of: int, towards: int) -> int:
        """Random, not 0, and not what the word holds now."""
        old = self.memory.load(self.layout.pair(of, towards) + lay.BELL) >> 32
        while (fresh := self.rng.getrandbits(32)) in (0, old):
            pass
        return fresh

    def leave(self) -> None:
        """Close what is open as a process's end would, and give the section back. What was published stays readable."""
        if self._failure is None:
            if not self.lib.sh_node_is_inert(self.nd):
                self._give_back()
            self._failure = node_closed(self.name)
        self.lib.sh_node_inert(self.nd)

    def _give_back(self) -> None:
        memory, at = self.memory, self.layout.section(self.section)
        memory.store(at + lay.STATE, lay.LEAVING)
        for listener in list(self.listeners):
            listener.close()
        for conn in list(self.connections.values()):
            conn.close()
        if not self.lib.sh_node_is_inert(self.nd):
            # no clock is common to all machines: count departures, so that the oldest is reused first
            latest = max(memory.load(self.layout.section(i) + lay.LEFT) for i in range(self.layout.peers))
            memory.store(at + lay.LEFT, (latest + 1) & 0xFFFFFFFFFFFFFFFF)
            memory.store(at + lay.STATE, lay.GONE)
            memory.fence()
            memory.cas(at + lay.CLAIM, self.claim.word, 0)

    def abandon(self, why: OSError) -> None:
        """In a forked child, or when the section was lost: every call fails from now on, nothing is stored."""
        self.lib.sh_node_inert(self.nd)
        self._failure = self._failure or why

    def failure(self) -> OSError:
        """Why this node may not touch the region any more."""
        return self._failure or node_closed(
            self.name, "its section was taken by another (this process or VM was stopped for too long), or the region was zeroed"
        )

    @property
    def alive(self) -> bool:
        return self._failure is None

    def check(self) -> None:
        """Raises when this node is over. A zombie finds it out here, at its next call, and not only in the pump."""
        if self._failure is None and self.lib.sh_node_is_inert(self.nd):
            self._down(self.failure())
        if self._failure is not None:
            raise self._failure

    # -- the pump

    def pump(self, now_ns: int, unlocked: int = 0) -> list[Event]:
        """One pass. `unlocked`: a mask of sections whose lock fell (Keeper.unlocked). Returns events, oldest first."""
        if self._failure is not None:
            return self._take_events()
        n = self.lib.sh_pump(self.nd, self._out, EVENTS_PER_PASS)
        if n == STALE:
            self._down(self.failure())
            return self._take_events()
        for i in range(n):
            word = self._out[i]
            kind, what = word >> 24, word & 0xFFFFFF
            if kind == EV_SLOT:
                self._ready(what)
            elif kind == EV_ADOPT:
                self._tag_changed(self.peers[what], now_ns)
            else:
                self._mail.add(what)
        if self._mail:
            for section in list(self._mail):
                self._messages(self.peers[section], now_ns)
        if unlocked:
            self._lost_locks(unlocked, now_ns)
        if now_ns >= self._next_sample:
            self._sample(now_ns)
        if now_ns >= self._next_safety:
            self._next_safety = now_ns + SAFETY_NS
            if self.lib.sh_safety(self.nd):
                self._mail.update(range(self.layout.peers))
        for section in list(self._condemned):
            self._punish(self.peers[section], now_ns)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    @property
    def quiet(self) -> bool:
        """Nothing is owed a pass."""
        return not (self._events or self._mail or self._condemned) and bool(self.lib.sh_quiet(self.nd))

    def next_deadline(self) -> int:
        """When to pump again at the latest, monotonic nanoseconds."""
        return min(self._next_sample, self._next_safety)

    def _ready(self, slot: int) -> None:
        conn = self.connections.get(slot)
        if conn is not None:
            bits = conn.look()
            if bits:
                self._events.append(Event("ready", conn, bits))

    def _down(self, why: OSError) -> None:
        self._failure = why
        self.lib.sh_node_inert(self.nd)
        for conn in list(self.connections.values()):
            conn.error = why
            self._events.append(Event("failed" if conn.state is State.OPENING else "ready", conn, why))
            conn.state = State.FREE
        self.connections.clear()
        self._events.append(Event("down", None, why))

    # -- links

    def _tag_changed(self, peer: Peer, now_ns: int) -> None:
        """Its bell carries a pair_inc that we have not adopted: it restarted, or dropped us, or is new."""
        if now_ns < peer.ignore_until_ns:
            self._tags.add(peer.section)
            return
        if len(peer.adoptions) == ADOPTIONS_PER_S and now_ns - peer.adoptions[0] < 1_000_000_000:
            peer.ignore_until_ns = peer.adoptions[0] + 1_000_000_000
            self._tags.add(peer.section)
            return
        peer.adoptions.append(now_ns)
        self._adopt(peer, now_ns)

    def _adopt(self, peer: Peer, now_ns: int) -> None:
        self._tags.discard(peer.section)
        self._end_connections(peer, now_ns)
        self.counts["adoptions"] += 1
        self.lib.sh_adopt(self.nd, peer.section)
        self._mail.add(peer.section)
        self._publish_users(peer)
        self.peers.refresh(peer, now_ns)
        self._watch_lock(peer)

    def _watch_lock(self, peer: Peer) -> None:
        """Once per life. Its bells may be heard before its section says that it is there, so every sample asks."""
        if peer.live and not peer.watched:
            peer.watched = True
            self._watch(peer, True)

    def drop(self, peer: Peer, now_ns: int) -> None:
        """End everything with one peer, and start towards it anew: what a later life of it, or the same one continued, needs."""
        self._end_connections(peer, now_ns)
        self.lib.sh_restart(self.nd, peer.section, self._pair_inc(self.section, peer.section))
        self.lib.sh_adopt(self.nd, peer.section)
        self._publish_users(peer)

    def _end_connections(self, peer: Peer, now_ns: int) -> None:
        for conn in [c for c in self.connections.values() if c.peer == peer.section]:
            opening = conn.state is State.OPENING
            conn.gone(now_ns)
            if opening:
                self._events.append(Event("failed", conn, ConnectionResetError(104, f"peer {peer.name!r} went away while connecting")))
            elif conn.state is State.OPEN:
                self._orphans.add(conn)
                self._events.append(Event("ready", conn, conn.look()))
        peer.connections.clear()
        peer.waiting.clear()
        peer.answers.clear()
        peer.credits = self.settings.max_connects
        self._mail.discard(peer.section)

    def offence(self, section: int) -> None:
        """A peer broke a rule: after three its link is dropped, by the pump and not in the middle of what found it."""
        peer = self.peers[section]
        self.counts["violations"] += 1
        peer.violations += 1
        if peer.violations >= VIOLATIONS:
            self._condemned.add(section)

    def _punish(self, peer: Peer, now_ns: int) -> None:
        """Drop the link, and do not adopt the peer, that is not listen to it, for a while: longer each time."""
        self._end_connections(peer, now_ns)
        self.lib.sh_restart(self.nd, peer.section, self._pair_inc(self.section, peer.section))
        self._tags.add(peer.section)
        self._condemned.discard(peer.section)
        peer.violations = 0
        peer.ignore_until_ns = now_ns + peer.backoff_s * 1_000_000_000
        peer.backoff_s = min(peer.backoff_s * 2, 60)

    def _lost_locks(self, mask: int, now_ns: int) -> None:
        while mask:
            section = (mask & -mask).bit_length() - 1
            mask &= mask - 1
            peer = self.peers[section]
            self._watch(peer, False)  # until its section's next life
            if peer.here:
                self.peers.declare_dead(peer)
                self._lost(peer, now_ns)

    def _lost(self, peer: Peer, now_ns: int) -> None:
        self.counts["peers_lost"] += 1
        self.drop(peer, now_ns)

    def _sample(self, now_ns: int) -> None:
        self._next_sample = now_ns + SAMPLE_NS
        for peer in self.peers.sample(now_ns):
            self._lost(peer, now_ns)
        for peer in self.peers.all:
            self._watch_lock(peer)
        for section in list(self._tags):
            if now_ns >= self.peers[section].ignore_until_ns:
                self._tag_changed(self.peers[section], now_ns)
        for conn in [c for c in self._orphans if now_ns - c.orphaned_ns > self.settings.linger_s * 1e9]:
            conn.fail(ConnectionResetError(104, f"peer {conn.remote} is gone, and its bytes were not read for linger_s"))
            self._events.append(Event("ready", conn, 0))
        if self.settings.reap_after_s is not None:
            self._reap_silent(now_ns, int(self.settings.reap_after_s * 1e9))

    def _reap_silent(self, now_ns: int, after_ns: int) -> None:
        load, seen = self.memory.load, self._reap
        for peer in self.peers.all:
            if peer.live or not peer.claim or peer.section == self.section:
                seen.pop(peer.section, None)
                continue
            at = self.layout.section(peer.section)
            now = (peer.claim, load(at + lay.BEAT))
            if seen.get(peer.section, (0, 0, 0))[:2] != now:
                seen[peer.section] = (*now, now_ns)
            elif now_ns - seen[peer.section][2] >= after_ns:
                self.memory.cas(at + lay.CLAIM, peer.claim, 0)

    # -- connections

    def mapped(self, conn: Connection) -> None:
        peer = self.peers[conn.peer]
        peer.connections[conn.peer_slot] = conn
        self._publish_users(peer)

    def released(self, conn: Connection) -> None:
        """Give slot and ring back. Called once per connection."""
        peer = self.peers[conn.peer]
        self.connections.pop(conn.slot, None)
        self._orphans.discard(conn)
        if peer.connections.get(conn.peer_slot) is conn:
            del peer.connections[conn.peer_slot]
        self.arena.give(*conn.ring)
        self.free_slots.append(conn.slot)
        if conn.tried == (-1,):
            peer.slots -= 1
            peer.ring_bytes -= conn.ring[1]
        if conn.peer_slot >= 0 and self._failure is None:
            self._publish_users(peer)

    def _publish_users(self, peer: Peer) -> None:
        orphans = sum(1 for c in self._orphans if c.peer == peer.section) if self._orphans else 0
        self.lib.sh_users(self.nd, peer.section, len(peer.connections) + orphans)

    def _take_slot(self, peer: Peer, *, accepted: bool) -> Connection | int:
        """A connection in OPENING with slot and ring, or the reason why not."""
        if not self.free_slots:
            return NO_SLOT
        size = Arena.fit(self.settings.ring_bytes, self.arena.free_bytes, len(self.free_slots) - 1)
        if accepted and peer.section != self.section:
            if peer.slots * 2 >= self.layout.slots:
                return NO_SLOT
            size = min(size, max(MIN_RING, self.layout.arena_bytes // 8))
            if (peer.ring_bytes + size) * 2 > self.layout.arena_bytes:
                size = MIN_RING
                if (peer.ring_bytes + size) * 2 > self.layout.arena_bytes:
                    return NO_MEMORY
        ring = self.arena.take(size)
        if ring is None:
            return NO_MEMORY
        try:
            self._back(*ring)
        except OSError:
            self.arena.give(*ring)
            raise
        slot = self.free_slots.pop()
        conn = Connection(self, slot, ring, peer.section)
        self.lib.sh_ep_take(conn.ep, *ring)
        self.connections[slot] = conn
        if accepted:
            conn.tried = (-1,)
            peer.slots += 1
            peer.ring_bytes += ring[1]
        return conn

    def _back(self, offset: int, size: int) -> None:
        """Have storage behind ring memory before it is written: a full disk is an OSError here, and a SIGBUS later."""
        pages = range(offset // MIN_RING, (offset + size) // MIN_RING)
        if not self._backed.issuperset(pages):
            self._ensure(self.layout.section(self.section) + offset, size)
            self._backed.update(pages)

    def _no_room(self, reason: int) -> OSError:
        what = "connection slots" if reason == NO_SLOT else "ring memory"
        return no_buffers(what, region_for(self.layout))

    def connect(self, section: int, port: int, *, local: tuple[str, int], remote: str, tried: tuple[int, ...] = ()) -> Connection:
        """Ask `section` for a connection to `port`. The answer is an event, connected or failed.

        Raises OSError (ENOBUFS) when slots or arena are exhausted, OSError (ENOSPC) when the disk is full,
        ConnectionRefusedError when nobody is there, ProtocolViolation while it is not listened to.
        """
        self.check()
        peer, now_ns = self.peers[section], self.lib.sh_clock()
        self.peers.refresh(peer, now_ns)
        if not peer.live:
            raise port_refused(remote, port)
        adopted = self.lib.sh_peer_inc(self.nd, section)
        if not adopted and now_ns < peer.ignore_until_ns:
            raise violation(f"{remote!r} (section {section})", f"{VIOLATIONS} times; it is not listened to for a while")
        if not adopted or self.lib.sh_tag_changed(self.nd, section):
            self._adopt(peer, now_ns)
        conn = self._take_slot(peer, accepted=False)
        if isinstance(conn, int):
            raise self._no_room(conn)
        conn.local, conn.remote, conn.tried = local, (remote, port), (*tried, section)
        peer.waiting.append(conn)
        self._send_waiting(peer)
        return conn

    def _send_waiting(self, peer: Peer) -> None:
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
        note = self._note
        note.kind, note.reason, note.slot, note.dst_slot, note.gen, note.dst_gen, note.port, note.src_port = fields
        status: int = self.lib.sh_message_send(self.nd, peer.section, note)
        if status == VIOLATION:
            self.offence(peer.section)
        return status == 0

    def _messages(self, peer: Peer, now_ns: int) -> None:
        note = self._note
        for _ in range(MESSAGES_PER_PASS):
            status = self.lib.sh_message_recv(self.nd, peer.section, note)
            if status == VIOLATION:
                self._mail.discard(peer.section)
                if self.lib.sh_tag_changed(self.nd, peer.section):
                    self._tag_changed(peer, now_ns)
                else:  # the message ring cannot be trusted any more: a violation of the whole link
                    peer.violations = VIOLATIONS
                    self.offence(peer.section)
                return
            if status != 1:
                self._mail.discard(peer.section)
                break
            kind, slot, dst_slot, gen, dst_gen = note.kind, note.slot, note.dst_slot, note.gen, note.dst_gen
            if kind == CONNECT:
                self._on_connect(peer, slot, gen, note.port, note.src_port, now_ns)
            else:
                peer.credits = min(peer.credits + 1, self.settings.max_connects)
                self._on_answer(peer, kind, note.reason, slot, gen, dst_slot, dst_gen)
        self._send_waiting(peer)

    def _on_connect(self, peer: Peer, slot: int, gen: int, port: int, src_port: int, now_ns: int) -> None:
        old = peer.connections.get(slot)
        if old is not None:
            self._ready(old.slot)  # a released slot whose toggle we have not looked at yet
        listener = self.listeners.accepting(port, peer)
        reason, conn = 0, None
        if slot in peer.connections:
            reason = STALE_CONNECT
        elif listener is None:
            reason = NO_LISTENER
        elif listener.full:
            reason = BACKLOG
        else:
            try:
                taken = self._take_slot(peer, accepted=True)
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
                        self.offence(peer.section)
        if reason or conn is None or listener is None:
            self.counts["refused"] += 1
            self._answer(peer, REFUSE, reason, 0, slot, 0, gen, 0, 0)
            return
        self.peers.refresh(peer, now_ns)
        conn.local, conn.remote = (self.name, port), (peer.name, src_port)
        self.counts["accepted"] += 1
        self._answer(peer, ACCEPT, 0, conn.slot, slot, conn.gen, gen, 0, 0)
        listener.pending += 1
        self._events.append(Event("accepted", listener, conn))
        self._ready(conn.slot)

    def _answer(self, peer: Peer, *fields: int) -> None:
        if peer.answers or not self._send(peer, *fields):
            if len(peer.answers) < 64:  # an honest peer has at most 32 CONNECTs on the way
                peer.answers.append(fields)
            else:
                self.offence(peer.section)

    def _on_answer(self, peer: Peer, kind: int, reason: int, slot: int, gen: int, dst_slot: int, dst_gen: int) -> None:
        conn = self.connections.get(dst_slot)
        if conn is None or conn.gen != dst_gen or conn.state is not State.OPENING or conn.peer != peer.section:
            if kind == ACCEPT:
                self.lib.sh_notify_slot(self.nd, peer.section, slot)  # it shall look, and find our generation gone
            return
        if kind == REFUSE:
            conn.release()
            self.counts["refused"] += 1
            error: OSError
            if reason in (NO_SLOT, NO_MEMORY):
                error = OSError(105, f"{conn.remote} has no room for another connection: use a larger region, or close some")
            else:
                error = port_refused(*conn.remote)
            self._events.append(Event("failed", conn, error))
            return
        old = peer.connections.get(slot)
        if old is not None:
            self._ready(old.slot)  # released, accepted anew, and we have not looked since
        status = conn.open(slot, gen) if slot not in peer.connections else VIOLATION
        if status < 0:
            conn.release()
            self._events.append(Event("failed", conn, ConnectionResetError(104, f"connection to {conn.remote} was reset at once")))
            if status == VIOLATION:
                self.offence(peer.section)
            return
        self.counts["connected"] += 1
        self._events.append(Event("connected", conn))
        self._ready(conn.slot)

    # -- names

    def listen(self, port: int, *, backlog: int = 100, reuse_port: bool = False, local_only: bool = False) -> Listener:
        """Accept connections to `port` (0: one is chosen). Raises OSError (EADDRINUSE) when another of this name has it."""
        self.check()
        return self.listeners.open(port, backlog, reuse_port, local_only)

    def statistics(self) -> dict[str, int]:
        """Counters since attach, and what is held now."""
        if isinstance(self._failure, NodeClosedError) and not self.connections:
            base = {}
        else:
            base = {name: int(self.lib.sh_node_counter(self.nd, i)) for i, name in enumerate(COUNTERS)}
        return {
            **base,
            **self.counts,
            "connections": len(self.connections),
            "free_slots": len(self.free_slots),
            "arena_free_bytes": self.arena.free_bytes,
            "peers": sum(p.live for p in self.peers.all),
        }
