"""How peers wake each other, pair by pair: by a doorbell where both have one, by a futex where both run under
one kernel, else by nobody, and the heartbeat polls.

A futex wakes the heartbeat, which wakes the loop.

A kick by doorbell that never arrived is found out by the core (wake.c, sh_lost): such a peer is polled like
one that cannot kick, until a doorbell of its comes through.
"""

from __future__ import annotations

from collections.abc import Callable

from shmsock.engine import layout as lay
from shmsock.engine.home import Home
from shmsock.engine.peers import Peer, Peers
from shmsock.native._core import lib
from shmsock.region.doorbell import Doorbell

__all__ = ["Wakes"]

NONE: int = lib.SH_WAKE_OUT_NONE
FUTEX: int = lib.SH_WAKE_OUT_FUTEX
EVENTFD: int = lib.SH_WAKE_OUT_EVENTFD
REGISTER: int = lib.SH_WAKE_OUT_REGISTER
LOST: int = lib.SH_WAKE_OUT_LOST
BY_FUTEX: int = lib.SH_WAKE_IN_FUTEX
BY_DOORBELL: int = lib.SH_WAKE_IN_DOORBELL


class Wakes:
    """How one node is woken and wakes others. `doorbell`: ours, if any; `futex`: words of this mapping can be
    waited for."""

    futex: bool
    home: Home
    peers: Peers

    def __init__(self, home: Home, peers: Peers, doorbell: Doorbell | None, futex: bool) -> None:
        self.home, self.peers, self.doorbell, self.futex = home, peers, doorbell, futex

    def announce(self) -> None:
        """Publish in our section how we can be kicked."""
        bell, home = self.doorbell, self.home
        at = home.layout.section(home.section) + lay.DOORBELL
        home.memory.store(at, bell.id << 32 | bell.vectors if bell else 0)

    def _id(self, peer: Peer) -> int | None:
        """Return the id of the peer's doorbell; None when it has none that we can reach. A peer with our own
        id is on another server, from before a restart."""
        if self.doorbell is None or peer.doorbell is None or peer.doorbell[0] == self.doorbell.id:
            return None
        return peer.doorbell[0]

    def _by_futex(self, peer: Peer) -> bool:
        who, me = peer.who, self.peers.me
        return (
            self.futex
            and who is not None
            and bool(who.flags & lay.FLAG_FUTEX)
            and who.boot_id == me.boot_id != bytes(16)
            and who.file == me.file
        )

    def way(self, peer: Peer) -> str:
        """Tell how the peer wakes us: "doorbell", "futex" or "polling"."""
        if self.home.lib.sh_must_poll(self.home.nd, peer.section):
            return "polling"
        return "doorbell" if self._id(peer) is not None else "futex"

    def way_out(self, peer: Peer) -> str:
        """Tell how we wake the peer: "doorbell", "futex" or "nothing"."""
        if self._id(peer) is not None:
            return "doorbell"
        return "futex" if self._by_futex(peer) else "nothing"

    def of_all(self, way: Callable[[Peer], str]) -> dict[str, str]:
        """Ask way() or way_out() of all other live peers. Returns the answers by name."""
        if not self.home.alive:
            return {}
        return {p.name: way(p) for p in self.peers.all if p.live and p.section != self.peers.own}

    def update(self, peer: Peer) -> None:
        """Settle anew how the peer and this node wake each other. Called when what it depends on has changed:
        a life of the peer, its doorbell, ours, or what the server said."""
        lib, nd, number = self.home.lib, self.home.nd, self._id(peer)
        if peer.section == self.peers.own:
            return  # this node is awake when it would kick itself
        reach = self.doorbell.reach(number) if self.doorbell and number is not None else None
        there = peer.live or peer.coming
        if not there:
            lib.sh_set_wake_out(nd, peer.section, NONE, -1, 0, 0)
        elif reach is not None:
            kind = EVENTFD if reach.kind == "eventfd" else REGISTER
            lib.sh_set_wake_out(nd, peer.section, kind, reach.fd, reach.offset, reach.value)
        elif number is not None:  # of another server, or not announced to us yet
            lib.sh_set_wake_out(nd, peer.section, LOST, -1, 0, 0)
        else:
            lib.sh_set_wake_out(nd, peer.section, FUTEX if self._by_futex(peer) else NONE, -1, 0, 0)
        wake_in = (BY_DOORBELL if number is not None else 0) | (BY_FUTEX if self._by_futex(peer) else 0)
        lib.sh_set_wake_in(nd, peer.section, wake_in, int(there))
        if there and self.home.trace:
            ways = self.way(peer), self.way_out(peer)
            self.home.trace("section %d (%s) wakes us by %s, we it by %s", peer.section, peer.name, *ways)

    def update_all(self) -> None:
        for peer in self.peers.all:
            self.update(peer)

    def withdraw(self) -> None:
        """Tell the others that our doorbell is gone, or is not listened to for now; they are polled from now
        on. Some go on kicking by it for a moment: nothing hears that."""
        self.doorbell = None
        self.announce()
        self.update_all()

    def restore(self, doorbell: Doorbell) -> None:
        """Tell the others that our doorbell is listened to again."""
        self.doorbell = doorbell
        self.announce()
        self.update_all()

    def left(self, ids: list[int]) -> list[Peer]:
        """Take in that the server says these ids are gone. Returns the peers whose they were."""
        gone = [p for p in self.peers.all if p.live and self._id(p) in ids]
        self.update_all()
        return gone
