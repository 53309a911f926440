"""The engine: one process's side of a region. It knows no event loop and no clock: `now_ns` (monotonic
nanoseconds) is an argument, what happened is left in `events`, and when it wants to be called again it tells
the core (sh_due).

A byte's way does not lead through here: Connection.write and .read go straight to C. Here the parts are put
together, and what happens seldom is done: a node attaches and leaves, peers die, and slow surveys make all of
it robust.

    settings, layout, memory <- home <- peers, slots <- wakes, listeners, connection <- links <- handshake
    <- datagrams <- engine

Each part is given those that it uses, and knows none above it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from shmsock.address import Address
from shmsock.engine import layout as lay
from shmsock.engine.attach import Claim, Locks
from shmsock.engine.connection import STALE, Connection, State
from shmsock.engine.counters import OF_CORE
from shmsock.engine.datagrams import Datagrams
from shmsock.engine.handshake import Handshake
from shmsock.engine.home import Home
from shmsock.engine.layout import Identity, Layout
from shmsock.engine.links import Links
from shmsock.engine.listeners import LOCAL, Listener, Listeners
from shmsock.engine.memory import Memory
from shmsock.engine.peers import Peer, Peers
from shmsock.engine.settings import Settings
from shmsock.engine.slots import Slots, Storage
from shmsock.engine.trace import NOTABLE, Trace
from shmsock.engine.wakes import Wakes
from shmsock.errors import NodeClosedError, node_closed, peer_gone
from shmsock.native._core import lib
from shmsock.region.doorbell import Doorbell

__all__ = ["Engine"]

EV_SLOT: int = lib.SH_EV_SLOT
EV_ADOPT: int = lib.SH_EV_ADOPT
EV_ACCEPTED: int = lib.SH_EV_ACCEPTED
EV_CONNECTED: int = lib.SH_EV_CONNECTED
EV_REFUSED: int = lib.SH_EV_REFUSED
SAMPLE_NS = 75_000_000  # a bit less than a beat, which is what wakes a sleeping loop for it
SAFETY_NS = 1_000_000_000
COMING_NS = 5_000_000_000
ALONE_NS = 30_000_000_000
EVENTS_PER_PASS = 64


class Engine:
    """One process's side of a region, attached to one section. connect() and listen() raise what they
    name; everything else that happens comes as events.

    `events` holds what is to be told, oldest first: each a call and its argument, to be made after the pass.
    """

    home: Home
    claim: Claim
    name: str
    section: int
    settings: Settings
    ffi: Any
    layout: Layout
    lib: Any
    memory: Memory
    nd: Any
    counts: dict[str, int]
    events: deque[tuple[Callable[[Any], object], Any]]
    connect: Callable[..., Connection]
    connect_again: Callable[[Any, int], Connection | None]
    owed: tuple[Any, ...]
    private: Any
    handshake: Handshake
    datagrams: Datagrams

    def __init__(
        self,
        layout: Layout,
        claim: Claim,
        identity: Identity,
        *,
        settings: Settings | None = None,
        rng: random.Random | None = None,
        storage: Storage | None = None,
        watch: Callable[[Peer, bool], None] | None = None,
        locks: Locks | None = None,
        doorbell: Doorbell | None = None,
        futex: bool = False,
        addresses: Sequence[Address] = (),
        now_ns: int = 0,
    ) -> None:
        """Attach to the section of `claim`. `storage`: of a file with holes. `watch`: see Links. `futex`:
        words of this mapping can be waited for. `addresses`: see publish()."""
        us = settings or Settings()
        self.home = home = Home(layout, claim.section, identity.name, us, rng or random.SystemRandom())
        self.claim, self.section, self.name, self.settings = claim, home.section, home.name, us
        self.layout, self.memory, self.ffi, self.lib, self.nd = (
            layout,
            layout.memory,
            home.ffi,
            home.lib,
            home.nd,
        )
        self.private, self.counts, self.events, self.owed = home.private, home.counts, home.events, home.owed
        #: Set by the driver: called when the node is over, when it has been alone long, and once a second.
        self.on_down: Callable[[OSError], object] = lambda why: None
        self.on_alone: Callable[[], object] = lambda: None
        self.once_a_second: Callable[[], object] = lambda: None

        self.peers: Peers = Peers(home, identity, locks)
        self.slots: Slots[Connection] = Slots(home, storage)
        self.connections: dict[int, Connection] = self.slots.connections
        self.wakes: Wakes = Wakes(home, self.peers, doorbell, futex)
        self.peers.changed = self._peer_changed
        self.listeners: Listeners = Listeners(home, self.peers, self._ports_of_connections)
        self.links: Links = Links(
            home, self.peers, self.slots, watch or (lambda peer, on: None), self._sample_soon
        )
        self.handshake = Handshake(home, self.peers, self.links, self.slots, self.listeners)
        #: Ask a section for a connection, or the one that was found before: see Handshake.
        self.connect, self.connect_again = self.handshake.connect, self.handshake.connect_again
        self.datagrams = Datagrams(home, self.peers, self.listeners, self.slots, self.connect)
        self.handshake.accept = self.datagrams.accept
        home.down = self._down

        self._out = self.ffi.new("uint64_t[]", EVENTS_PER_PASS)
        self._sample_ns = int(min(max(us.dead_after_s / 3 * 1e9, SAMPLE_NS), SAFETY_NS))
        self._reap: dict[int, tuple[int, int, int]] = {}
        self._alone_ns: int | None = None  # since when it has listened and nobody was there
        self._told_alone = False
        self._traced: dict[str, int] = {}
        self._next_safety = now_ns + SAFETY_NS
        self._sample_at(now_ns)
        #: Connections that are being opened, and that are not worth waiting for when the peer is silent.
        self.impatient: set[Connection] = set()
        self.published: Sequence[Address] = ()
        self._changes = 0
        self._attach(identity, addresses, now_ns)

    def _ports_of_connections(self) -> set[int]:
        return {conn.local[1] for conn in self.connections.values()}

    # -- life

    def _attach(self, identity: Identity, addresses: Sequence[Address], now_ns: int) -> None:
        lib, us = self.lib, self.settings
        lib.sh_node_claim(self.nd, self.claim.word)
        lib.sh_node_settings(self.nd, us.hold_us * 1000, us.busy_poll_us * 1000, 1000)
        at = self.layout.section(self.section)
        self.memory.store(at + lay.STATE, 0)  # a former life's must not vouch for what is half written
        self._life = life = self.home.rng.getrandbits(63) | 1
        self.layout.write_identity(self.section, replace(identity, claim=self.claim.word), life)
        self.publish(addresses)
        self.wakes.announce()
        self.links.start()
        self.memory.fence()
        self.memory.store(at + lay.STATE, lay.LIVE)
        if self.home.trace:
            self.home.trace(
                "attached as process %d, to sections of %d slots", identity.pid, self.layout.slots
            )
        self.peers.refresh_all(now_ns)

    def publish(self, addresses: Sequence[Address]) -> None:
        """Say that these are addresses of this machine: others that know nothing but such an address may
        connect through memory. Only the first few are told (layout.ADDRESSES)."""
        self.published, self._changes = addresses[: lay.ADDRESSES], self._changes + 1
        if self.home.alive and not self.home.is_inert():
            self.layout.publish(self.section, self._life, self._changes, self.published)

    def left_server(self, ids: list[int], now_ns: int) -> None:
        """Take in that the ivshmem server says these peers of it are gone."""
        for peer in self.wakes.left(ids):
            self.peers.forsake(peer, now_ns)
            self._sample_at(now_ns)

    def leave(self) -> None:
        """Close what is open as a process's end would, and give the section back. What was published stays
        readable."""
        try:
            if self.alive and not self.home.is_inert():
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
        if not self.home.is_inert():
            # no clock is common to all machines: count departures, so that the oldest is reused first
            latest = max(self.layout.departure(i) for i in range(self.layout.peers))
            memory.store(at + lay.LEFT, (latest + 1) & 0xFFFFFFFFFFFFFFFF)
            memory.store(at + lay.STATE, lay.GONE)
            memory.fence()
            self.layout.swap_claim(self.section, self.claim.word, 0)

    def abandon(self, why: OSError) -> None:
        """Have every call fail from now on, and store nothing more: in a forked child, or when the section
        was lost."""
        self.home.end(why)
        self.peers.locks = None  # they are the parent's, or another's

    def failure(self) -> OSError:
        """Return the error that says why this node may not touch the region any more."""
        return self.home.failure()

    @property
    def address(self) -> int:
        """The address of `nd`, what C calls sh_node."""
        return int(self.ffi.cast("uintptr_t", self.nd))

    @property
    def alive(self) -> bool:
        return self.home.alive

    def check(self) -> None:
        """Raise when this node is over: NodeClosedError, or what else ended it."""
        self.home.check()

    def _down(self, why: OSError) -> None:
        self.home.end(why)
        for conn in list(self.connections.values()):
            conn.error = why
            if conn.state is State.OPENING:
                self.home.emit(conn.failed, why)
            else:
                self.home.emit(conn.ready, 0)
            conn.state = State.FREE
        self.connections.clear()
        self.datagrams.down(why)
        self.home.emit(self.down, why)

    def _peer_changed(self, peer: Peer) -> None:
        self.wakes.update(peer)
        others = [p for p in self.peers.all if p.section != self.section and (p.live or p.coming)]
        self.lib.sh_others(self.nd, len(others))

    # -- events, to be emitted

    def down(self, why: OSError) -> None:
        """Tell the driver that this node is over."""
        self.on_down(why)

    def alone(self, _: None = None) -> None:
        """Tell the driver, once, that this node has listened for half a minute and saw nobody."""
        self.on_alone()

    # -- the pump

    def poll(self) -> list[int] | None:
        """Make the core's part of a pass. Returns what it found, for attend(); None: this node is over."""
        n = self.lib.sh_pump(self.nd, self._out, EVENTS_PER_PASS) if self.home.alive else STALE
        return None if n == STALE else self._out[0:n]

    def attend(self, words: list[int] | None, now_ns: int, unlocked: int = 0) -> None:
        """Make the engine's part of a pass: do what follows from the words that poll() returned. `unlocked`:
        a mask of sections whose lock fell (Heartbeat.unlocked)."""
        if words is None:
            if self.home.alive:
                self._down(self.failure())
            return
        condemned = self.home.condemned
        if self._act(words, now_ns):  # one may succeed a killed one: who waits for that is to know now
            unlocked |= self.peers.fallen()
        if unlocked:
            self._lost_locks(unlocked, now_ns)
        if now_ns >= self._next_sample or now_ns >= self._next_safety:
            self._survey(now_ns)
        if condemned:
            for section in list(condemned):
                self.links.punish(section, now_ns)

    def _act(self, words: list[int], now_ns: int) -> bool:
        """Do what follows from events of the core (enum sh_event). Returns whether a peer began anew."""
        newcomers = False
        for word in words:
            kind, what, more = word >> 24 & 0xFF, word & 0xFFFFFF, word >> 32
            if kind == EV_SLOT:
                conn = self.connections.get(what)
                if conn and conn.gen == more >> 8:
                    conn.inspect(more & 0xFF)
            elif kind == EV_ACCEPTED:
                self.handshake.accepted(what, more, now_ns, self.home.emit)
                conn = self.connections.get(what & 0xFFFF)
                if conn and not self.lib.sh_ep_is_open(conn.ep):  # the link ended meanwhile
                    conn.gone(now_ns)
            elif kind == EV_CONNECTED:
                self.handshake.answered(what, more >> 8, more & 0xFF, 0)
            elif kind == EV_REFUSED:
                self.handshake.answered(what, more >> 8, -1, more & 0xFF)
            elif kind == EV_ADOPT:
                newcomers = True
                self.links.tag_changed(what, now_ns)
            else:
                self.links[what].offence(more)
        return newcomers

    @property
    def quiet(self) -> bool:
        """Whether nothing is owed a pass."""
        return not any(self.owed) and bool(self.lib.sh_quiet(self.nd))

    # -- what is done now and then, whatever was heard

    def _sample_at(self, now_ns: int) -> None:
        self._next_sample = now_ns
        self.lib.sh_due(self.nd, min(now_ns, self._next_safety))

    def _sample_soon(self, now_ns: int) -> None:
        self._sample_at(min(self._next_sample, now_ns + SAMPLE_NS))

    def _survey(self, now_ns: int) -> None:
        safety = now_ns >= self._next_safety - SAMPLE_NS
        if safety or now_ns >= self._next_sample:  # one wakeup for both
            self._sample(now_ns)
        if safety:
            self._next_safety = now_ns + SAFETY_NS
            self._sample_at(self._next_sample)
            self.lib.sh_sweep(self.nd)
            self.once_a_second()
            if self.home.trace:
                self._trace_counts(self.home.trace)
            if self.peers.alone:
                self._note_alone(now_ns)
            self.lib.sh_safety(self.nd)

    def _trace_counts(self, trace: Trace) -> None:
        now = self.statistics()
        gained = [
            f"{n} +{now[n] - self._traced.get(n, 0)}" for n in NOTABLE if now[n] > self._traced.get(n, 0)
        ]
        self._traced = now
        if gained:
            trace("in the last second: %s", ", ".join(gained))

    def _note_alone(self, now_ns: int) -> None:
        """Notice, once, that this node listens and nobody comes: one on other memory than its peers looks
        healthy, and is alone. One that listens for this machine only, or is used by itself, is alone on
        purpose."""
        waits = any(not listener.flags & LOCAL for listener in self.listeners)
        if not waits or self.connections or self.counts["accepted"] or self.counts["connected"]:
            self._alone_ns = None
        elif self._alone_ns is None:
            self._alone_ns = now_ns
        elif now_ns - self._alone_ns >= ALONE_NS and not self._told_alone:
            self._told_alone = True
            self.home.emit(self.alone)

    def _lost_locks(self, mask: int, now_ns: int) -> None:
        peers = self.peers
        for section in (i for i in range(self.layout.peers) if mask >> i & 1):
            peer = peers[section]
            self.links.unwatch_lock(peer)
            peers.refresh(peer, now_ns)
            if peers.locks is not None and not peers.killed(peer):
                # the lock was a former owner's: this one is alive, and is watched from the next sample on
                peer.watched = False
            elif peer.here:
                peers.declare_dead(peer, now_ns)
                self._lost(peer, now_ns)

    def _lost(self, peer: Peer, now_ns: int) -> None:
        self.counts["peers_lost"] += 1
        if not peer.claim or self.peers.killed(peer):
            # All of them: one may be the answer to a connection whose bytes are there already.
            for _ in range(4):
                n = self.lib.sh_messages(self.nd, peer.section, self._out, EVENTS_PER_PASS)
                self._act(self._out[0:n], now_ns)
        self.links.drop(peer.section, now_ns)

    def _sample(self, now_ns: int) -> None:
        for peer in self.peers.sample(now_ns):
            self._lost(peer, now_ns)
        for peer in self.peers.some:
            self.links.watch_lock(peer)
        self.links.adopt_late(now_ns)
        orphans = self.slots.orphans
        for conn in [c for c in orphans if now_ns - c.orphaned_ns > self.settings.linger_s * 1e9]:
            conn.fail(peer_gone(conn.remote))
            self.home.emit(conn.ready, 0)
        if self.settings.reap_after_s is not None:
            self._reap_silent(now_ns, int(self.settings.reap_after_s * 1e9))
        to_bury = self._bury(now_ns)
        self._find_others(now_ns)
        self._tell_impatient(now_ns)
        # Each sample wakes a loop that sleeps: often only while somebody is in doubt.
        watchful = orphans or self.links.late or self._strangers(now_ns) or self.peers.doubtful or to_bury
        watchful = watchful or self.impatient
        self._sample_at(now_ns + (SAMPLE_NS if watchful else self._sample_ns))

    def _bury(self, now_ns: int) -> bool:
        """Set the claim of killed peers to 0, for nodes under other kernels: those cannot see whose lock
        fell, and would have to wait until the beat tells. Returns whether there are more to bury."""
        dead, more = self.peers.to_bury(now_ns)
        for peer in dead:
            self.layout.swap_claim(peer.section, peer.claim, 0)
            self.peers.refresh(peer, now_ns)
        return more

    def _find_others(self, now_ns: int) -> None:
        """Tell connections that wait for the answer of a peer whose beat stands still, when another of that
        name has the port and beats: that one can be asked."""
        for peer in self.peers.some:
            if not self.peers.stale(peer, now_ns):
                continue
            for conn in [c for c in self.connections.values() if c.peer == peer.section]:
                if conn.state is State.OPENING and conn.remote[1]:
                    others, _ = self.listeners.elsewhere(peer.name, conn.remote[1], exclude=(peer.section,))
                    if any(not other.samples for other in others):
                        self.home.emit(conn.silent)

    def _tell_impatient(self, now_ns: int) -> None:
        """Tell connections that have another way when the beat of their peer stands still."""
        for conn in [c for c in self.impatient if self.peers.silent(self.peers[c.peer], now_ns)]:
            self.home.emit(conn.silent)

    def _strangers(self, now_ns: int) -> bool:
        """Is somebody about to attach, and not there yet? (It may have been killed meanwhile.)"""
        return any(p.coming and now_ns - p.beat_ns < COMING_NS for p in self.peers.some)

    def _reap_silent(self, now_ns: int, after_ns: int) -> None:
        seen = self._reap
        for peer in self.peers.some:
            if peer.live or not peer.claim or peer.section == self.section:
                if seen:
                    seen.pop(peer.section, None)
                continue
            now = (peer.claim, self.layout.beat(peer.section))
            if seen.get(peer.section, (0, 0, 0))[:2] != now:
                seen[peer.section] = (*now, now_ns)
            elif now_ns - seen[peer.section][2] >= after_ns:
                self.layout.swap_claim(peer.section, peer.claim, 0)

    # -- for users of the engine

    def listen(
        self, port: int, *, backlog: int = 100, reuse_port: bool = False, local_only: bool = False
    ) -> Listener:
        """Accept connections to `port` (0: one is chosen). Raises OSError (EADDRINUSE) when another of this
        name has it."""
        self.check()
        return self.listeners.open(port, backlog, reuse_port, local_only)

    def hasten(self, conn: Connection) -> None:
        """Look often whether the peer beats, until the caller takes the connection out of `impatient`."""
        self.impatient.add(conn)
        now_ns = self.home.now()
        self._tell_impatient(now_ns)  # it may be known that it does not
        self._sample_soon(now_ns)

    def statistics(self) -> dict[str, int]:
        """Return the counters since attach, and what is held now, by name."""
        if isinstance(self.home.ended, NodeClosedError) and not self.connections:
            base = {}
        else:
            base = {name: int(self.lib.sh_node_counter(self.nd, i)) for i, name in enumerate(OF_CORE)}
        return {
            **base,
            **self.counts,
            "connections": len(self.connections),
            "free_slots": self.slots.free_slots,
            "arena_free_bytes": self.slots.free_bytes,
            "peers": sum(p.live for p in self.peers.all),
        }
