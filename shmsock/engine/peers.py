"""Who is there: one Peer per section. Beats are sampled once a second (more often where `dead_after_s` is
below 3), and at each beat while somebody is in doubt; the clock is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from shmsock.address import Address
from shmsock.engine import layout as lay
from shmsock.engine.attach import Locks
from shmsock.engine.home import Home
from shmsock.engine.layout import Identity

__all__ = ["Peer", "Peers"]

SAMPLES = 10
BEAT_NS = 100_000_000
FORSAKEN_SAMPLES, FORSAKEN_NS = 3, 425_000_000  # 3 samples, and more than two beats of 0.2 s
STALE_NS = 250_000_000  # more than one such beat
SILENT_NS = 500_000_000
UNSEEN_NS = 1_000_000_000  # a peer that was never seen to beat is waited for less long


class Peer:
    """What this node knows of one section's owner."""

    def __init__(self, section: int) -> None:
        self.section = section
        self.incarnation = 0
        self.claim = 0
        self.who: Identity | None = None
        self.name: str = f"section-{section}"
        self.locked = False  # this process would see it if the lock of its section fell
        self.live = False
        self.coming = False  # about to say that it is there: it may kick before that
        self.here = False  # was live, and sample() has not returned it as gone yet
        self.watched = False  # the heartbeat was asked to watch its lock
        self.doorbell: tuple[int, int] | None = None  # id and vectors, as it says
        self.addresses: frozenset[Address] = frozenset()  # of its machine, as it says; see Peers.claiming()
        self.published: tuple[int, int] = (0, 0)  # the life and the word that they were read of
        #: life, live or coming, and its doorbell, as `changed` was last told of
        self.told: tuple[object, ...] = (0, False, None)
        self.forsaken = False  # the server says that its id is gone: dead, if its beat is still as well
        self.beat = -1
        self.beat_ns = 0
        self.seen = False  # it has beaten, or sent something, in this life
        self.samples = 0
        self.lagging = False


class Peers:
    """The owners of all sections. The own one is a peer too, as a node may connect to itself."""

    home: Home
    layout: lay.Layout
    locks: Locks | None
    own: int
    alone: bool

    def __init__(self, home: Home, identity: Identity, locks: Locks | None = None) -> None:
        """`identity`: the own one. `locks`: of the region's file, None where there are none."""
        self.home, self.layout, self.own, self.locks = home, home.layout, home.section, locks
        self.pin: Mapping[str, int] = home.settings.pin or {}
        self.me = identity
        self.dead_after_ns: int = int(home.settings.dead_after_s * 1e9)
        #: Told of each peer that came, went or changed its doorbell.
        self.changed: Callable[[Peer], None] = lambda peer: None
        self._here = 0  # mask of sections whose owners may be under this kernel, as the core knows it
        self._unread = 0  # mask of sections that looked different and were not read yet
        self.all: list[Peer] = [Peer(i) for i in range(self.layout.peers)]
        self._survey, self._beat = self.layout.survey()
        self.alone = True  # nobody else has been seen so far
        self.some: list[Peer] = []  # those of whom there is, or was, something to be told

    def __getitem__(self, section: int) -> Peer:
        return self.all[section]

    def refresh(self, peer: Peer, now_ns: int) -> None:
        """Look whether the section has an owner, and who. Reads few words unless a new life began."""
        layout, section = self.layout, peer.section
        claim = layout.claim(section)
        if not claim and not peer.claim:
            return  # nobody was there, and nobody is
        life, state = layout.life(section), layout.state(section)
        peer.claim, peer.doorbell = claim, layout.doorbell(section)
        if life != peer.incarnation:
            peer.incarnation = life
            peer.who = who = layout.identity(section)
            believed = who is not None and self.pin.get(who.name, peer.section) == peer.section
            peer.name = who.name if who and believed else f"section-{peer.section}"
            peer.locked = (
                who is not None
                and self.locks is not None
                and peer.section != self.own
                and who.lock_tells(self.me.boot_id, self.locks.identity)
            )
            peer.beat, peer.beat_ns, peer.samples = layout.beat(section), now_ns, 0
            peer.live = peer.watched = peer.forsaken = peer.seen = False
        peer.coming = peer.who is not None and bool(peer.claim) and state == 0
        if peer.who is None or not peer.claim or state not in (lay.LIVE, lay.LEAVING):
            peer.live = False
        elif peer.samples == 0:
            peer.live = peer.here = True
            if peer.section != self.own:
                self.alone = False
        here = self._may_be_here(peer)
        if here != bool(self._here >> section & 1):
            self._here ^= 1 << section
            self.home.lib.sh_here(self.home.nd, self._here)
        self.note(peer)
        self._tell(peer)

    def note(self, peer: Peer) -> None:
        """Have sample() look at that peer from now on."""
        if peer not in self.some:
            self.some.append(peer)

    def met(self, peer: Peer) -> None:
        """Note that a connection to the peer is open. Even if its identity makes no sense, there is something
        to end when it falls silent."""
        if not peer.here:
            peer.here = True
            self.note(peer)

    def _tell(self, peer: Peer) -> None:
        now = (peer.incarnation, peer.live or peer.coming, peer.doorbell)
        if now != peer.told:
            peer.told = now
            if self.home.trace:
                there = "live" if peer.live else "coming" if peer.coming else "gone"
                bell = f", doorbell {peer.doorbell[0]}" if peer.doorbell else ""
                self.home.trace("section %d (%s) is %s%s", peer.section, peer.name, there, bell)
            self.changed(peer)

    def refresh_all(self, now_ns: int) -> None:
        if changed := self._survey():
            for peer in self.all:
                if changed >> peer.section & 1:
                    if self.home.lib.sh_inspect(self.home.nd, peer.section):
                        self.refresh(peer, now_ns)
                    else:
                        self._unread |= 1 << peer.section

    def sample(self, now_ns: int) -> list[Peer]:
        """Compare every beat with the last sample. Returns the peers that are gone since the last: left, or
        silent too long."""
        gone = []
        self.refresh_all(now_ns)
        unread, self._unread = self._unread, 0
        for peer in self.all if unread else ():
            if unread >> peer.section & 1:
                self.refresh(peer, now_ns)
        for peer in self.some[:]:
            beat = self._beat(peer.section)
            if peer.section != self.own and peer.live:
                if beat != peer.beat:
                    self._moved(peer, beat, now_ns)
                else:
                    peer.samples += 1
                    longest = self.dead_after_ns if peer.seen else min(self.dead_after_ns, UNSEEN_NS)
                    silent = peer.samples >= SAMPLES and now_ns - peer.beat_ns >= longest
                    still = peer.samples >= FORSAKEN_SAMPLES and now_ns - peer.beat_ns >= FORSAKEN_NS
                    if silent or (peer.forsaken and still):
                        peer.live = False
                        self._tell(peer)
            elif self._thought_dead(peer) and beat != peer.beat:
                self._came_back(peer, beat, now_ns)
            if peer.here and not peer.live:  # noticed here, or by somebody else before
                peer.here = False
                gone.append(peer)
        return gone

    def _thought_dead(self, peer: Peer) -> bool:
        return not peer.live and peer.who is not None and bool(peer.claim) and peer.section != self.own

    def _came_back(self, peer: Peer, beat: int, now_ns: int) -> None:
        """Take a peer for live again: it beats, as a stopped process or VM was continued."""
        peer.beat, peer.beat_ns, peer.samples, peer.seen = beat, now_ns, 0, True
        self.refresh(peer, now_ns)

    def came_back(self, now_ns: int) -> bool:
        """Look whether a peer beats again that was thought dead at the last sample; asked before a look-up
        fails."""
        found = False
        for peer in filter(self._thought_dead, self.some):
            beat = self.layout.beat(peer.section)
            if beat != peer.beat:
                self._came_back(peer, beat, now_ns)
                found |= peer.live
        return found

    def stale(self, peer: Peer, now_ns: int) -> bool:
        """Is it live, as far as is known, though its beat stands still for longer than it should?"""
        return peer.live and peer.samples >= FORSAKEN_SAMPLES and now_ns - peer.beat_ns >= STALE_NS

    def silent(self, peer: Peer, now_ns: int) -> bool:
        """Is it stale for so long that who has another way should take that? (Longer than a busy machine may
        keep a beat from coming.)"""
        return self.stale(peer, now_ns) and now_ns - peer.beat_ns >= SILENT_NS

    def to_bury(self, now_ns: int) -> tuple[list[Peer], bool]:
        """Find the peers whose lock fell and whose beat stands still besides: dead, for every observer.
        Returns them, and whether there are others whose beat has to be watched longer. (A fallen lock alone
        proves nothing where two VMs share a boot id.)"""
        fallen = [
            p
            for p in filter(self._thought_dead, self.some)
            if p.who and p.who.claim == p.claim and self.killed(p)
        ]
        dead = [p for p in fallen if now_ns - p.beat_ns >= FORSAKEN_NS]
        return dead, len(dead) < len(fallen)

    def _moved(self, peer: Peer, beat: int, now_ns: int) -> None:
        """Note that the beat moved. Samples may be further apart than beats: if it made fewer than there was
        time for, the peer fell silent between two samples. Then its silence counts from that moment, and it
        is sampled more often."""
        beats, time = (beat - peer.beat) & 0xFFFFFFFFFFFFFFFF, now_ns - peer.beat_ns
        peer.lagging = peer.beat >= 0 and not peer.lagging and (beats + 3) * BEAT_NS < time
        peer.beat_ns = peer.beat_ns + beats * BEAT_NS if peer.lagging else now_ns
        peer.beat, peer.samples, peer.forsaken, peer.seen = beat, 0, False, True

    def heard(self, peer: Peer, now_ns: int) -> None:
        """Take a peer for live that has sent something: it was stopped and thought dead, and after it was
        continued its loop was quicker than its beat. Not if its lock tells that it was killed."""
        if peer.samples and not self.killed(peer):
            peer.samples, peer.beat_ns = 0, now_ns
            self.refresh(peer, now_ns)
        self.refresh_all(now_ns)

    def declare_dead(self, peer: Peer, now_ns: int) -> None:
        """Take the peer for dead at once, as its lock fell."""
        beat = self.layout.beat(peer.section)
        peer.seen |= beat != peer.beat
        peer.beat, peer.beat_ns = beat, now_ns
        peer.live, peer.here, peer.samples = False, False, max(peer.samples, 1)
        self._tell(peer)

    def forsake(self, peer: Peer, now_ns: int) -> None:
        """Note that the ivshmem server says the peer's id is gone. A peer whose beat goes on was merely
        dropped by the server."""
        peer.forsaken, peer.samples, peer.beat_ns = True, 0, now_ns
        peer.beat = self.layout.beat(peer.section)

    @property
    def doubtful(self) -> bool:
        """Is there one whose beat stood still at the last sample?"""
        return any(p.live and (p.samples or p.lagging or p.forsaken) for p in self.some)

    def same_kernel(self, peer: Peer) -> bool:
        """Is it proven to run under this kernel, by the lock of its section that somebody holds? (Its boot id
        can be copied by anybody who has read it.) Where the file knows no locks, only for the own node."""
        return self._may_be_here(peer) and not self.killed(peer)

    def _may_be_here(self, peer: Peer) -> bool:
        return peer.section == self.own or (
            peer.locked and peer.who is not None and peer.who.claim == peer.claim
        )

    def named(self, name: str | None, *, local: bool = False) -> list[Peer]:
        """List the live peers of that name (None: any of the own machine), own section included. Killed ones
        are found out here at once: a program that is restarted after a crash shall not meet its own ghost."""
        here = name is None or local
        return [
            p
            for p in self.some
            if p.live
            and (name is None or p.name == name)
            and (not here or self._may_be_here(p))
            and not self.killed(p)
        ]

    def claiming(self, address: Address, now_ns: int) -> list[Peer]:
        """List the live peers that publish this address, own section included, but for silent ones."""
        return [
            p
            for p in self.some
            if p.live
            and address in self.addresses_of(p)
            and not self.silent(p, now_ns)
            and not self.killed(p)
        ]

    def addresses_of(self, peer: Peer) -> frozenset[Address]:
        """Return the addresses that a peer publishes."""
        now = (peer.incarnation, self.layout.published_word(peer.section))
        if now != peer.published:
            word, peer.addresses = self.layout.published(peer.section, peer.incarnation)
            peer.published = peer.incarnation, word
        return peer.addresses

    def of_one_machine(self, peers: list[Peer]) -> bool:
        """Do all of these say that they run under one kernel? Several machines may not have one address."""
        boots = {p.who.boot_id if p.who else b"" for p in peers}
        return len(peers) < 2 or (len(boots) == 1 and bytes(16) not in boots)

    def killed(self, peer: Peer) -> bool:
        """Is it proven dead by its lock, whatever its beat says?"""
        return peer.locked and self.locks is not None and not self.locks.section_locked(peer.section)

    def fallen(self) -> int:
        """Return a mask of the sections whose owner is taken for live, and whose lock fell."""
        return sum(1 << p.section for p in self.some if p.here and self.killed(p))

    def there(self) -> list[Peer]:
        """List the live peers, own section included; killed ones are found out at once."""
        return [p for p in self.some if p.live and not self.killed(p)]

    def names(self) -> Iterable[str]:
        """List the names of all live peers."""
        return {p.name for p in self.there()}
