"""The links to all peers: their lives, and what it costs a peer to break the rules.

A link lives under two tags: the pair_inc that each side has adopted of the other (native/LAYOUT.md). Whoever
starts anew, or drops the other, changes its own, and the other adopts that.
"""

from __future__ import annotations

from collections.abc import Callable

from shmsock.engine.connection import ADOPTIONS_PER_S, OPEN, OPENING, Connection, Link
from shmsock.engine.home import Home
from shmsock.engine.peers import Peer, Peers
from shmsock.engine.slots import Slots
from shmsock.errors import peer_silent, went_away

__all__ = ["Links"]

SECOND_NS = 1_000_000_000


class Links:
    """One Link per section, the own one included."""

    home: Home
    peers: Peers
    slots: Slots[Connection]

    def __init__(
        self,
        home: Home,
        peers: Peers,
        slots: Slots[Connection],
        watch: Callable[[Peer, bool], None],
        sample_soon: Callable[[int], None],
    ) -> None:
        """`watch`: watch the lock of that peer's section, or stop it. `sample_soon`: have the beats sampled
        soon after this moment."""
        self.home, self.peers, self.slots = home, peers, slots
        self._watch, self._sample_soon = watch, sample_soon
        self.all: list[Link] = [Link(home, i) for i in range(home.layout.peers)]
        self.late: set[int] = set()  # peers whose tag changed while they were ignored

    def __getitem__(self, section: int) -> Link:
        return self.all[section]

    def start(self) -> None:
        """Begin a life of each link, under a tag that no former owner of this section had."""
        for link in self.all:
            self._restart(link)

    def _restart(self, link: Link) -> None:
        """Begin a new life of the link, under a random pair_inc that is neither 0 nor the present one."""
        home = self.home
        old = home.layout.tag(home.section, link.section)
        while (fresh := home.rng.getrandbits(32)) in (0, old):
            pass
        home.lib.sh_restart(home.nd, link.section, fresh)

    def tag_changed(self, section: int, now_ns: int) -> None:
        """Adopt the peer's new pair_inc, ten times a second at most: it restarted, or dropped us, or is new.
        Else leave it for adopt_late()."""
        link = self.all[section]
        if now_ns >= link.ignore_until_ns:
            if len(link.adoptions) < ADOPTIONS_PER_S or now_ns - link.adoptions[0] >= SECOND_NS:
                link.adoptions.append(now_ns)
                self.adopt(section, now_ns)
                return
            link.ignore_until_ns = link.adoptions[0] + SECOND_NS
        self.late.add(section)

    def adopt_late(self, now_ns: int) -> None:
        """Adopt the tags that changed while their peers were ignored, of those that are not any more."""
        for section in list(self.late):
            if now_ns >= self.all[section].ignore_until_ns:
                self.tag_changed(section, now_ns)

    def adopt(self, section: int, now_ns: int) -> None:
        """End what belonged to the peer's former life, and listen to its present one."""
        home, peer = self.home, self.peers[section]
        self.late.discard(section)
        self._end(section, now_ns)
        adopted = self._adopt(section)
        home.counts["adoptions"] += adopted
        self.peers.refresh(peer, now_ns)
        if home.trace and adopted:
            home.trace("adopts a new life of section %d (%s)", section, peer.name)
        elif home.trace:
            home.trace("adopts no life of section %d: %s", section, self.refusal(section))
        self.watch_lock(peer)
        if not peer.live:  # its tag may come before its state says that it is there
            self._sample_soon(now_ns)

    def _adopt(self, section: int) -> bool:
        """Adopt the peer's tag, unless one of both has to be upgraded first: then nothing that it says is
        heard, until it has another tag."""
        home, link = self.home, self.all[section]
        tag = home.layout.tag(section, home.section)
        link.terms = home.layout.terms(section)  # SYNC FEATURES: behind the tag; partner: write_identity()
        link.features = self.peers.me.terms.shared(link.terms)
        if self.refusal(section):
            return False
        if home.lib.sh_adopt(home.nd, section) != tag:  # it began anew meanwhile: maybe with other terms
            self._restart(link)
        return True

    def refusal(self, section: int) -> str:
        """Say why there is no link, and which side is to be upgraded; "": there may be one."""
        who = f"peer {self.peers[section].name!r} (section {section}) runs"
        return self.peers.me.terms.refuses(self.all[section].terms, who)

    def watch_lock(self, peer: Peer) -> None:
        """Have the lock of a live peer's section watched, once in each life of it."""
        if peer.live and not peer.watched:
            peer.watched = True
            self._watch(peer, True)

    def unwatch_lock(self, peer: Peer) -> None:
        """Have the lock of the peer's section watched no more, until the section's next life."""
        self._watch(peer, False)

    def drop(self, section: int, now_ns: int) -> None:
        """End everything with one peer, and start towards it anew: what a later life of it, or the same one
        continued, needs."""
        if self.home.trace:
            self.home.trace("drops the link to section %d (%s)", section, self.peers[section].name)
        self._end(section, now_ns)
        self._restart(self.all[section])
        self._adopt(section)

    def punish(self, section: int, now_ns: int) -> None:
        """Drop the link, and do not adopt the peer for a while (nothing it says is heard): 1 s, and twice as
        long each time, up to 60."""
        link = self.all[section]
        if self.home.trace:
            self.home.trace("does not listen to section %d for %d s: violations", section, link.backoff_s)
        self._end(section, now_ns)
        self._restart(link)
        self.late.add(section)
        self.home.condemned.discard(section)
        link.violations = 0
        link.ignore_until_ns = now_ns + link.backoff_s * SECOND_NS
        link.backoff_s = min(link.backoff_s * 2, 60)

    def _end(self, section: int, now_ns: int) -> None:
        """End all connections with the peer: those that wait for an answer fail, open ones become orphans, of
        which what is there can still be read."""
        home, peer = self.home, self.peers[section]
        for conn in [c for c in self.slots.connections.values() if c.peer == section]:
            opening = conn.state is OPENING
            conn.gone(now_ns)
            if opening:
                silent = peer_silent(peer.name, section, home.url)
                home.emit(conn.failed, went_away(peer.name) if peer.seen else silent)
            elif conn.state is OPEN:
                home.emit(conn.ready, conn.settle(home.lib.sh_poll(conn.ep)))
        home.lib.sh_end_closing(home.nd, section)
