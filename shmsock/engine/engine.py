"""The engine: one process's side of a region. It knows no event loop and no clock: `now_ns` (monotonic
nanoseconds) is an argument, what happened comes back as events, and when it wants to be called again it tells
the core (sh_due).

A byte's way does not lead through here: Connection.write and .read go straight to C. Here is what happens
seldom: links that appear and vanish, connections that are opened, answered and released, and the slow looks
that make all of it robust.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from shmsock.engine import layout as lay
from shmsock.engine.attach import Claim, Locks
from shmsock.engine.connection import STALE, Connection, State
from shmsock.engine.counters import OF_CORE, OF_ENGINE
from shmsock.engine.datagrams import Datagrams
from shmsock.engine.handshake import Handshake
from shmsock.engine.layout import Identity, Layout
from shmsock.engine.listeners import LOCAL, Listener, Listeners
from shmsock.engine.peers import ADOPTIONS_PER_S, VIOLATIONS, Peer, Peers
from shmsock.engine.settings import Settings
from shmsock.engine.slots import Slots
from shmsock.engine.wakes import Wakes
from shmsock.errors import NodeClosedError, node_closed, peer_silent, went_away
from shmsock.region.doorbell import Doorbell

__all__ = ["Engine", "Event"]

EV_SLOT, EV_ADOPT, EV_MESSAGE = 0, 1, 2
SAMPLE_NS = 75_000_000  # a bit less than a beat, which is what wakes a sleeping loop for it
SAFETY_NS = 1_000_000_000
COMING_NS = 5_000_000_000
ALONE_NS = 30_000_000_000
EVENTS_PER_PASS = 64


class Event(NamedTuple):
    """`ready`: look at the connection (arg: LOOK bits). `connected`, `failed` (arg: OSError): the answer to
    connect(). `silent`: who is to answer does not beat, and another of its name does. `accepted`: a listener
    has a new connection (arg). `endpoint`: call its happened(). `down` (arg: OSError): this node is over;
    target is None. `alone`: it listens for others, and saw nobody for half a minute; told once."""

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
        doorbell: Doorbell | None = None,
        futex: bool = False,
        now_ns: int = 0,
    ) -> None:
        self.layout, self.memory, self.claim = layout, layout.memory, claim
        self.settings = settings or Settings()
        self.rng = rng or random.SystemRandom()
        self.ffi, self.lib = self.memory.core
        self.section = claim.section
        self.name = identity.name
        #: What messages call the region, and what else they say of where it is. Beside what is pure memory:
        #: the driver's to set, as is what it wants to do once a second.
        self.url = "the region"
        self.hint: Callable[[], str] = str
        self.once_a_second: Callable[[], object] = str
        self._watch = watch or (lambda peer, on: None)
        self.slots = Slots(self, ensure)
        self.arena, self.free_slots, self.connections = (
            self.slots.arena,
            self.slots.free,
            self.slots.connections,
        )
        #: What `nd` points to; whoever keeps that keeps this.
        self.private = self.ffi.new("uint8_t[]", self.lib.sh_node_bytes(layout.geometry))
        self.nd = self.lib.sh_node_new(
            self.private, self.memory.base, layout.geometry, self.section, self.memory.wc
        )
        us = self.settings
        self._sample_ns = int(min(max(us.dead_after_s / 3 * 1e9, SAMPLE_NS), SAFETY_NS))
        self.peers = Peers(
            layout,
            self.section,
            identity,
            us.max_connects,
            us.dead_after_s,
            locks,
            self._changed,
            partial(self.lib.sh_inspect, self.nd),
            us.pin,
        )
        self.listeners = Listeners(self)
        self.handshake = Handshake(self)
        self.datagrams = Datagrams(self)
        self.counts = dict.fromkeys(OF_ENGINE, 0)
        #: Called whenever something was published, or an event is to be told, maybe outside of a pass: one
        #: should follow. A driver's own; the own node may be the peer, and nobody rings itself.
        self.stir: Callable[[], object] = lambda: None
        self._out = self.ffi.new("uint64_t[]", EVENTS_PER_PASS)
        self._events: list[Event] = []
        self._failure: OSError | None = None
        self._orphans: set[Connection] = set()
        self.mail: set[int] = set()
        self._tags: set[int] = set()  # links whose tag changed while they were ignored
        self._condemned: set[int] = set()  # peers that broke the rules too often: the pump drops them
        #: while one of these is not empty, a pass is owed
        self.owed: tuple[Any, ...] = (self._events, self.mail, self._condemned)
        self._reap: dict[int, tuple[int, int, int]] = {}
        self._alone_ns: int | None = None  # since when it listens for others, and nobody was there
        self._told_alone = False
        self._next_safety = now_ns + SAFETY_NS
        self._sample_at(now_ns)
        self._attach(identity, Wakes(self, doorbell, futex), now_ns)

    # -- life

    def _attach(self, identity: Identity, wakes: Wakes, now_ns: int) -> None:
        lib, me = self.lib, self.section
        lib.sh_node_claim(self.nd, self.claim.word)
        us = self.settings
        lib.sh_node_settings(self.nd, us.hold_us * 1000, us.busy_poll_us * 1000, 1000)
        at = self.layout.section(me)
        self.memory.store(at + lay.STATE, 0)  # a former life's must not vouch for what is half written
        self.layout.write_identity(me, replace(identity, claim=self.claim.word), self.rng.getrandbits(63) | 1)
        self.wakes = wakes
        wakes.announce()
        for j in range(self.layout.peers):
            lib.sh_restart(self.nd, j, self._pair_inc(me, j))
        self.memory.fence()
        self.memory.store(at + lay.STATE, lay.LIVE)
        self.peers.refresh_all(now_ns)

    def _changed(self, peer: Peer) -> None:
        self.wakes.update(peer)

    def left_server(self, ids: list[int], now_ns: int) -> None:
        """The ivshmem server says that these peers of it are gone."""
        for peer in self.wakes.left(ids):
            self.peers.forsake(peer, now_ns)
            self._sample_at(now_ns)

    def _pair_inc(self, of: int, towards: int) -> int:
        """Random, not 0, and not what the word holds now."""
        old = self.memory.load(self.layout.pair(of, towards) + lay.NOTIFY_SEQ) >> 32
        while (fresh := self.rng.getrandbits(32)) in (0, old):
            pass
        return fresh

    def leave(self) -> None:
        """Close what is open as a process's end would, and give the section back. What was published stays
        readable."""
        try:
            if self._failure is None and not self.lib.sh_node_is_inert(self.nd):
                self._give_back()
        finally:  # whatever happens: the region may be unmapped from here on
            self.abandon(node_closed(self.name))

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
        """In a forked child, or when the section was lost: every call fails from now on, nothing is
        stored."""
        self.lib.sh_node_inert(self.nd)
        self.peers.locks = None  # they are the parent's, or another's
        self._failure = self._failure or why
        for conn in self.connections.values():
            conn.let_go()

    def failure(self) -> OSError:
        """Why this node may not touch the region any more."""
        return self._failure or node_closed(
            self.name,
            "its section was taken by another (this process or VM was stopped for too long), or the region "
            "was zeroed",
        )

    @property
    def address(self) -> int:
        """Of what C calls sh_node."""
        return int(self.ffi.cast("uintptr_t", self.nd))

    @property
    def alive(self) -> bool:
        return self._failure is None

    def check(self) -> None:
        """Raises when this node is over. A zombie finds it out here, at its next call, and not only in the
        pump."""
        if self._failure is None and self.lib.sh_node_is_inert(self.nd):
            self._down(self.failure())
        if self._failure is not None:
            raise self._failure

    # -- the pump

    def pump(self, now_ns: int, unlocked: int = 0) -> list[Event]:
        """One pass. `unlocked`: a mask of sections whose lock fell (Heartbeat.unlocked). Returns events,
        oldest first."""
        return self.take_in(self.look(), now_ns, unlocked)

    def look(self) -> list[int] | None:
        """The core's part of a pass: what it found, for take_in(). None: this node is over."""
        n = self.lib.sh_pump(self.nd, self._out, EVENTS_PER_PASS) if self._failure is None else STALE
        return None if n == STALE else self._out[0:n]

    def look_on(self, now: int, ns: int) -> list[int] | None:
        """The same once more in the same turn of the loop: waits so long, busily. Empty: nothing came."""
        n = STALE
        if self._failure is None:
            n = self.lib.sh_pump_more(self.nd, self._out, EVENTS_PER_PASS, now, ns)
        return None if n == STALE else self._out[0:n]

    def take_in(self, words: list[int] | None, now_ns: int, unlocked: int = 0) -> list[Event]:
        """The engine's part: see pump()."""
        if words is None:
            if self._failure is None:
                self._down(self.failure())
            return self._take_events()
        for word in words:
            kind, what = word >> 24 & 0xFF, word & 0xFFFFFF
            if kind == EV_SLOT:
                if conn := self.connections.get(what):
                    self.looked(conn, word >> 32)
            elif kind == EV_ADOPT:
                self.tag_changed(self.peers[what], now_ns)
            else:
                self.mail.add(what)
        if self.mail:
            for section in list(self.mail):
                self.handshake.messages(self.peers[section], now_ns)
        if unlocked:
            self._lost_locks(unlocked, now_ns)
        if now_ns >= self._next_sample or now_ns >= self._next_safety:
            self._look_around(now_ns)
        if self._condemned:
            for section in list(self._condemned):
                self._punish(self.peers[section], now_ns)
        return self._take_events()

    def _look_around(self, now_ns: int) -> None:
        safety = now_ns >= self._next_safety - SAMPLE_NS
        if safety or now_ns >= self._next_sample:  # one wakeup for both
            self._sample(now_ns)
        if safety:
            self._next_safety = now_ns + SAFETY_NS
            self._sample_at(self._next_sample)
            self.slots.sweep()
            self.once_a_second()
            if self.peers.alone:
                self._note_alone(now_ns)
            if self.lib.sh_safety(self.nd):
                self.mail.update(range(self.layout.peers))

    def _note_alone(self, now_ns: int) -> None:
        """Whoever is on other memory than its peers looks healthy, and is alone. One that listens for this
        machine only, or is used by itself, is alone on purpose."""
        waits = any(not listener.flags & LOCAL for listener in self.listeners)
        if not waits or self.connections or self.counts["accepted"] or self.counts["connected"]:
            self._alone_ns = None
        elif self._alone_ns is None:
            self._alone_ns = now_ns
        elif now_ns - self._alone_ns >= ALONE_NS and not self._told_alone:
            self._told_alone = True
            self._events.append(Event("alone", None))

    def emit(self, kind: str, target: Any, arg: Any = None) -> None:
        # past the constructor: this is on the way of every connection, and of every byte that wakes somebody
        self._events.append(tuple.__new__(Event, (kind, target, arg)))
        self.stir()

    def _take_events(self) -> list[Event]:
        events = self._events[:]
        self._events.clear()
        return events

    def put_back(self, events: list[Event]) -> None:
        """What a pump returned and nobody has looked at: the next one returns it first."""
        self._events[:0] = events

    @property
    def quiet(self) -> bool:
        """Nothing is owed a pass."""
        return not any(self.owed) and bool(self.lib.sh_quiet(self.nd))

    def _sample_at(self, now_ns: int) -> None:
        self._next_sample = now_ns
        self.lib.sh_due(self.nd, min(now_ns, self._next_safety))

    def ready(self, slot: int) -> None:
        """Look at it, if it is in use."""
        if conn := self.connections.get(slot):
            self.looked(conn, self.lib.sh_poll(conn.ep))

    def looked(self, conn: Connection, bits: int) -> None:
        if bits := conn.looked(bits):
            self.emit("ready", conn, bits)

    def _down(self, why: OSError) -> None:
        self._failure = why
        self.lib.sh_node_inert(self.nd)
        for conn in list(self.connections.values()):
            conn.error = why
            self.emit("failed" if conn.state is State.OPENING else "ready", conn, why)
            conn.state = State.FREE
            conn.let_go()
        self.connections.clear()
        self.datagrams.down(why)
        self.emit("down", None, why)

    # -- links

    def tag_changed(self, peer: Peer, now_ns: int) -> None:
        """Its bell carries a pair_inc that we have not adopted: it restarted, or dropped us, or is new."""
        if now_ns < peer.ignore_until_ns:
            self._tags.add(peer.section)
            return
        if len(peer.adoptions) == ADOPTIONS_PER_S and now_ns - peer.adoptions[0] < 1_000_000_000:
            peer.ignore_until_ns = peer.adoptions[0] + 1_000_000_000
            self._tags.add(peer.section)
            return
        peer.adoptions.append(now_ns)
        self.adopt(peer, now_ns)

    def adopt(self, peer: Peer, now_ns: int) -> None:
        self._tags.discard(peer.section)
        self._end_connections(peer, now_ns)
        self.counts["adoptions"] += 1
        self.lib.sh_adopt(self.nd, peer.section)
        self.mail.add(peer.section)
        self.peers.refresh(peer, now_ns)
        self._watch_lock(peer)
        if not peer.live:  # its bells may be heard before it says that it is there
            self._sample_at(min(self._next_sample, now_ns + SAMPLE_NS))

    def _watch_lock(self, peer: Peer) -> None:
        """Once per life."""
        if peer.live and not peer.watched:
            peer.watched = True
            self._watch(peer, True)

    def drop(self, peer: Peer, now_ns: int) -> None:
        """End everything with one peer, and start towards it anew: what a later life of it, or the same one
        continued, needs."""
        self._end_connections(peer, now_ns)
        self.lib.sh_restart(self.nd, peer.section, self._pair_inc(self.section, peer.section))
        self.lib.sh_adopt(self.nd, peer.section)

    def _end_connections(self, peer: Peer, now_ns: int) -> None:
        for conn in [c for c in self.connections.values() if c.peer == peer.section]:
            opening = conn.state is State.OPENING
            conn.gone(now_ns)
            if opening:
                silent = peer_silent(peer.name, peer.section, self.url)
                why = went_away(peer.name) if peer.seen else silent
                self.emit("failed", conn, why)
            elif conn.state is State.OPEN:
                self._orphans.add(conn)
                self.emit("ready", conn, conn.look())
        peer.connections.clear()
        peer.waiting.clear()
        peer.answers.clear()
        peer.credits = self.settings.max_connects
        self.mail.discard(peer.section)

    def offence(self, section: int) -> None:
        """A peer broke a rule: after three its link is dropped, by the pump and not in the middle of what
        found it."""
        peer = self.peers[section]
        self.counts["violations"] += 1
        peer.violations += 1
        if peer.violations >= VIOLATIONS:
            self._condemned.add(section)
            self.stir()

    def _punish(self, peer: Peer, now_ns: int) -> None:
        """Drop the link, and do not adopt the peer, that is not listen to it, for a while: longer each
        time."""
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
            self.peers.refresh(peer, now_ns)
            if self.peers.locks is not None and not self.peers.killed(peer):
                peer.watched = (
                    False  # that was the former owner; this one is alive, and watched from the next sample on
                )
            elif peer.here:
                self.peers.declare_dead(peer, now_ns)
                self._lost(peer, now_ns)

    def _lost(self, peer: Peer, now_ns: int) -> None:
        self.counts["peers_lost"] += 1
        if not peer.claim or self.peers.killed(peer):
            self.handshake.last_messages(peer, now_ns)
        self.drop(peer, now_ns)

    def _sample(self, now_ns: int) -> None:
        for peer in self.peers.sample(now_ns):
            self._lost(peer, now_ns)
        for peer in self.peers.some:
            if peer.live and not peer.watched:
                self._watch_lock(peer)
        for section in list(self._tags):
            if now_ns >= self.peers[section].ignore_until_ns:
                self.tag_changed(self.peers[section], now_ns)
        for conn in [c for c in self._orphans if now_ns - c.orphaned_ns > self.settings.linger_s * 1e9]:
            conn.fail(
                ConnectionResetError(
                    104, f"peer {conn.remote} is gone, and its bytes were not read for linger_s"
                )
            )
            self.emit("ready", conn, 0)
        if self.settings.reap_after_s is not None:
            self._reap_silent(now_ns, int(self.settings.reap_after_s * 1e9))
        to_bury = self._bury(now_ns)
        self._look_for_others(now_ns)
        # A loop that sleeps is woken for this: seldom, as long as all is well.
        watchful = self._orphans or self._tags or self._strangers(now_ns) or self.peers.doubtful or to_bury
        self._sample_at(now_ns + (SAMPLE_NS if watchful else self._sample_ns))

    def _bury(self, now_ns: int) -> bool:
        """Tell those under other kernels, who cannot see whose lock fell: else each of them has to wait until
        it believes the beat. Is there somebody left to be buried?"""
        dead, more = self.peers.to_bury(now_ns)
        for peer in dead:
            self.memory.cas(self.layout.section(peer.section) + lay.CLAIM, peer.claim, 0)
            self.peers.refresh(peer, now_ns)
        return more

    def _look_for_others(self, now_ns: int) -> None:
        """Who waits for the answer of a peer whose beat stands still is told so when another of that name
        listens there whose beat moves: that one can be asked."""
        for peer in self.peers.some:
            if not self.peers.stale(peer, now_ns):
                continue
            for conn in [c for c in self.connections.values() if c.peer == peer.section]:
                if conn.state is State.OPENING and conn.remote[1]:
                    others, _ = self.listeners.elsewhere(peer.name, conn.remote[1], exclude=(peer.section,))
                    if any(not other.samples for other in others):
                        self.emit("silent", conn)

    def _strangers(self, now_ns: int) -> bool:
        """Is somebody about to attach, who does not say yet that it is there? (Or was killed meanwhile.)"""
        return any(p.coming and now_ns - p.beat_ns < COMING_NS for p in self.peers.some)

    def _reap_silent(self, now_ns: int, after_ns: int) -> None:
        load, seen = self.memory.load, self._reap
        for peer in self.peers.some:
            if peer.live or not peer.claim or peer.section == self.section:
                if seen:
                    seen.pop(peer.section, None)
                continue
            at = self.layout.section(peer.section)
            now = (peer.claim, load(at + lay.BEAT))
            if seen.get(peer.section, (0, 0, 0))[:2] != now:
                seen[peer.section] = (*now, now_ns)
            elif now_ns - seen[peer.section][2] >= after_ns:
                self.memory.cas(at + lay.CLAIM, peer.claim, 0)

    # -- connections

    def released(self, conn: Connection) -> None:
        """Give slot and ring back. Called once per connection."""
        self.stir()
        peer = self.peers.all[conn.peer]
        self._orphans.discard(conn)
        if conn.peer_slot < 0:
            if conn in peer.waiting:
                peer.waiting.remove(conn)
        elif peer.connections.get(conn.peer_slot) is conn:
            del peer.connections[conn.peer_slot]
        self.slots.give_back(conn, peer)

    def connect(self, section: int, port: int, *, local: tuple[str, int], remote: str) -> Connection:
        """Ask `section` for a connection to `port`. The answer is an event, connected or failed.

        Raises OSError (ENOBUFS) when slots or arena are exhausted, OSError (ENOSPC) when the disk is full,
        ConnectionRefusedError when nobody is there, ProtocolViolation while it is not listened to.
        """
        return self.handshake.connect(section, port, local=local, remote=remote)

    # -- names

    def listen(
        self, port: int, *, backlog: int = 100, reuse_port: bool = False, local_only: bool = False
    ) -> Listener:
        """Accept connections to `port` (0: one is chosen). Raises OSError (EADDRINUSE) when another of this
        name has it."""
        self.check()
        return self.listeners.open(port, backlog, reuse_port, local_only)

    def statistics(self) -> dict[str, int]:
        """Counters since attach, and what is held now."""
        if isinstance(self._failure, NodeClosedError) and not self.connections:
            base = {}
        else:
            base = {name: int(self.lib.sh_node_counter(self.nd, i)) for i, name in enumerate(OF_CORE)}
        return {
            **base,
            **self.counts,
            "connections": len(self.connections),
            "free_slots": len(self.free_slots),
            "arena_free_bytes": self.arena.free_bytes,
            "peers": sum(p.live for p in self.peers.all),
        }
