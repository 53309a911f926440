"""Peers that die, come back, or were only away: what the survivors get to see, and what is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from shmsock.engine.settings import Settings
from shmsock.guests.qemu import GuestDied
from tests.vm.peers import Peer, PeerError, Peers, format_region

if TYPE_CHECKING:
    from tests.vm.conftest import Pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PORT = 7000
SIZE = 100_000
DEAD_AFTER_S = Settings().dead_after_s
AT_MOST_S = DEAD_AFTER_S + 3  # a second more where nothing is emulated


class Scene:
    """`victim` has written to each survivor and has been written to by each, and nobody has read."""

    def __init__(self, victim: Peer, survivors: list[Peer]) -> None:
        self.victim, self.survivors = victim, survivors
        self.before = [held(peer) for peer in survivors]
        self.lost = [int(peer.statistics()["peers_lost"]) for peer in survivors]
        victim.ask("listen", port=PORT)
        self.sha = []
        for peer in survivors:
            peer.ask("hold", key=1, host=victim.name, port=PORT, size=SIZE)
            self.sha.append(victim.event("published")["sha"])
            victim.ask("hold", key=peer.section, host=peer.name, port=PORT, size=SIZE)
            peer.event("published")

    def check(self, start: float) -> None:
        """The victim is gone since `start`."""
        reading = [peer.start("read_to_end", key=1) for peer in self.survivors]
        for peer, number, sha in zip(self.survivors, reading, self.sha, strict=True):
            got = peer.result(number)
            took = time.monotonic() - start
            assert got == {"bytes": SIZE, "sha": sha, "end": "ConnectionResetError"}
            print(f"{self.victim.name} is gone, {peer.name} was told after {took:.1f} s")
            assert took < AT_MOST_S
            assert peer.event("end")["error"] == "ConnectionResetError"  # the connection that it had opened
        for peer, before, lost in zip(self.survivors, self.before, self.lost, strict=True):
            wait_for(lambda p=peer: held(p), before)  # type: ignore[misc]
            assert peer.statistics()["peers_lost"] == lost + 1
        for one, other in zip(self.survivors, self.survivors[1:], strict=False):
            assert one.ask("echo", host=other.name, port=PORT, count=3)["count"] == 3


def held(peer: Peer) -> tuple[int, ...]:
    """What a node has in use: connections, slots, memory for rings."""
    seen = peer.statistics()
    return seen["connections"], seen["free_slots"], seen["arena_free_bytes"]


def wait_for(look: Callable[[], Any], wanted: Any, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, f"{seen}, expected {wanted}"
        time.sleep(0.05)


def survivors(two_guests: Pair, peers: Peers) -> list[Peer]:
    """vm-b and the host, in a region with room for one more: a leaked section would be missed at once."""
    url = format_region(two_guests.region, 3)
    b, host = peers(two_guests.b, None)
    b.attach()
    host.attach(url, name="host")
    for peer in b, host:
        peer.ask("listen", port=PORT)
    return [b, host]


def test_process_killed(two_guests: Pair, peers: Peers) -> None:
    left = survivors(two_guests, peers)
    for _ in range(3):
        (victim,) = (p.attach() for p in peers(two_guests.a))
        assert victim.section == 2
        scene = Scene(victim, left)
        victim.kill()
        scene.check(time.monotonic())
    url = f"file:{two_guests.region}"
    (host_victim,) = peers(None)
    # the guest's kernel knows that it died; from here it might as well be paused, and come back
    with pytest.raises(PeerError, match=r"all 3 sections .*silent are 2 \(vm-a\).*shmsock reap"):
        host_victim.attach(url, name="third")
    (leaving,) = (p.attach() for p in peers(two_guests.a))
    leaving.finish()
    host_victim.attach(url, name="third")
    assert host_victim.section == 2
    scene = Scene(host_victim, left)
    host_victim.kill()
    scene.check(time.monotonic())


def test_guest_reset_and_killed(two_guests: Pair, peers: Peers, boot_again: Callable[[], Pair]) -> None:
    left = survivors(two_guests, peers)
    guest, boots, machines = two_guests.a, set(), set()
    deaths = ["reset", "kill", "reset"]
    for death in deaths:
        (victim,) = (p.attach() for p in peers(guest))
        assert victim.section == 2  # the one of the life before
        assert victim.name == "vm-a"
        boots.add(victim.identity["boot"])
        machines.add(victim.identity["machine"])
        scene = Scene(victim, left)
        getattr(guest, death)()
        start = time.monotonic()
        if death == "kill":
            guest = boot_again().a
        scene.check(start)
        with pytest.raises(GuestDied):
            victim.statistics()
    assert len(boots) == len(deaths)
    assert len(machines) == 1


def test_guest_paused(two_guests: Pair, peers: Peers) -> None:
    left = survivors(two_guests, peers)
    (paused, late) = peers(two_guests.a, None)
    paused.attach()
    before = held(paused)
    scene = Scene(paused, left)
    start = time.monotonic()
    two_guests.a.stop()
    scene.check(start)
    with pytest.raises(PeerError, match="gaierror"):
        left[0].ask("echo", host="vm-a", port=PORT, count=1)
    with pytest.raises(PeerError, match=r"all 3 sections .*silent are 2 \(vm-a\).*shmsock reap"):
        late.attach(
            f"file:{two_guests.region}", name="late"
        )  # it may come back: its section is not to be had
    time.sleep(max(0.0, start + 2 * DEAD_AFTER_S - time.monotonic()))
    two_guests.a.cont()
    for peer in left:
        assert paused.ask("read_to_end", key=peer.section)["end"] == "ConnectionResetError"
        assert paused.event("end")["error"] == "ConnectionResetError"
    wait_for(lambda: held(paused), before)
    for peer in left:  # the same life goes on
        wait_for(lambda p=peer: p.statistics()["peers"], 3)  # type: ignore[misc]
        assert peer.ask("echo", host="vm-a", port=PORT, count=10)["count"] == 10
        assert paused.ask("echo", host=peer.name, port=PORT, count=10)["count"] == 10
        assert peer.statistics()["healed"] == 0
    assert paused.statistics()["healed"] == 0


def test_restarted_service_is_found_before_its_former_life_is_over(two_guests: Pair, peers: Peers) -> None:
    """Only the guest's own kernel knows that it was killed; to the others its beat stands still."""
    url = format_region(two_guests.region, 6)
    stays, former, again, fresh, late = peers(None, *[two_guests.a] * 2, None, two_guests.b)
    stays.attach(url, name="stays")
    former.attach(name="service")
    former.ask("listen", port=PORT)
    assert stays.ask("echo", host="service", port=PORT, count=3)["count"] == 3
    former.kill()
    again.attach(name="service")
    again.ask("listen", port=PORT)
    start = time.monotonic()
    assert stays.ask("echo", host="service", port=PORT, count=3)["count"] == 3
    fresh.attach(url, name="fresh")
    assert fresh.ask("echo", host="service", port=PORT, count=3)["count"] == 3
    took = time.monotonic() - start
    assert took < DEAD_AFTER_S  # of a silent peer it takes that to be sure
    wait_for(lambda: fresh.statistics()["peers"], 3)
    late.attach(name="late")
    assert late.statistics()["names"] == ["fresh", "late", "service", "stays"]
    assert late.ask("echo", host="service", port=PORT, count=3)["count"] == 3
