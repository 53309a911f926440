"""asyncio streams between guests, and with the host, over the BAR2 of ivshmem-plain."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from tests.vm.peers import Peer, PeerError, Peers, assert_calm, format_region

if TYPE_CHECKING:
    from tests.vm.conftest import Pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

FILE = 20_000_000
PORT = 7000


def swap(one: Peer, other: Peer, size: int) -> None:
    """Files of `size` bytes both ways at once; `other` listens on PORT."""
    got = one.ask("swap", host=other.name, port=PORT, size=size, timeout=120)
    assert got["sent"] == got["there_received"]
    assert got["received"] == got["there_sent"]
    assert got["sent"] != got["received"]


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_guests_and_host(two_guests: Pair, peers: Peers, uvloop: bool) -> None:
    a, b, host = peers(two_guests.a, two_guests.b, None, uvloop=uvloop)
    for guest in two_guests.a, two_guests.b:
        assert guest.run(["ls", "/sys/class/net"]).text == "lo"

    # what a program does: no region named, no name given
    assert b.ask("implicit_listen", port=6000) == "vm-b"
    assert a.ask("implicit_echo", host="vm-b", port=6000) == "hello from vm-b:6000"
    assert a.ask("implicit_listen", port=6001) == "vm-a"
    assert b.ask("implicit_echo", host="VM-A.shm.", port=6001) == "hello from vm-a:6001"
    with pytest.raises(PeerError, match=r"gaierror: .*no peer named 'vm-c' is attached to .*attached: vm-b"):
        a.ask("implicit_echo", host="vm-c", port=6000)
    with pytest.raises(PeerError, match=r"ConnectionRefusedError: .*\('vm-b', 6002\)"):
        a.ask("implicit_echo", host="vm-b", port=6002)

    # the same file is the host's: a third peer
    host.attach(f"file:{two_guests.region}", name="host")
    for peer in a, b:
        peer.attach()
        if two_guests.kind == "pci":
            assert peer.identity["region"].startswith("pci:0000:00:")
            # offered as BAR2 is prefetchable; whichever is mapped, it is fenced as if it were write-combining
            assert peer.identity["path"].endswith("/resource2_wc")
        else:
            assert (peer.identity["region"], peer.identity["path"]) == ("dax:dax0.0", "/dev/dax0.0")
        assert peer.identity["write_combining"] is (two_guests.kind == "pci")
        assert peer.identity["can_lock"] is True
        assert ("uvloop" in peer.identity["loop"]) == uvloop
    assert (a.name, b.name, host.name) == ("vm-a", "vm-b", "host")
    assert host.identity["write_combining"] is False
    assert a.identity["peers"] == 16
    assert len({peer.identity["boot"] for peer in (a, b, host)}) == 3
    assert len({peer.identity["machine"] for peer in (a, b, host)}) == 3
    for peer in a, b, host:
        peer.ask("listen", port=PORT)
    swap(a, b, FILE)
    swap(b, host, FILE // 4)
    swap(host, a, FILE // 4)
    assert a.ask("echo", host="vm-b", port=PORT, count=2000, timeout=120)["count"] == 2000
    for one, other in itertools.permutations((a, b, host), 2):
        assert one.ask("echo", host=other.name, port=PORT, count=100)["count"] == 100
    assert_calm(a, b, host)


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_two_thousand_connections(two_guests: Pair, peers: Peers, uvloop: bool) -> None:
    format_region(two_guests.region, peers=4)
    a, b = (peer.attach() for peer in peers(two_guests.a, two_guests.b, uvloop=uvloop))
    b.ask("listen", port=PORT)
    before = [held(peer) for peer in (a, b)]
    assert a.ask("many", host="vm-b", port=PORT, count=2000, timeout=240) == 2000
    deadline = time.monotonic() + 60
    while (now := [held(peer) for peer in (a, b)]) != before:
        assert time.monotonic() < deadline, f"{before} before, {now} now"
    assert_calm(a, b)


def held(peer: Peer) -> list[int]:
    counts = peer.ask("statistics")
    return [counts[name] for name in ("connections", "free_slots", "arena_free_bytes")]


def test_nobody_is_thought_dead_under_load(two_guests: Pair, peers: Peers) -> None:
    """Two busy emulated machines on two processors that others use too, with the default settings."""
    a, b = (peer.attach() for peer in peers(two_guests.a, two_guests.b))
    for peer in a, b:
        peer.ask("listen", port=PORT)
    start, rounds = time.monotonic(), 0
    while time.monotonic() < start + 8:
        rounds += 1
        running = [
            (one, one.start("swap", host=other.name, port=PORT, size=3_000_000))
            for one, other in ((a, b), (b, a), (a, b), (b, a))
        ]
        for peer, number in running:
            got = peer.result(number, timeout=120)
            assert (got["sent"], got["received"]) == (got["there_received"], got["there_sent"])
    assert rounds
    assert_calm(a, b)


def test_localhost_is_this_guest(two_guests: Pair, peers: Peers) -> None:
    a, also_a, b = (p.attach() for p in peers(two_guests.a, two_guests.a, two_guests.b))
    a.ask("listen", port=7001, host="localhost")
    a.ask("listen", port=7002)
    b.ask("listen", port=7003)
    for host, port in ("localhost", 7001), ("127.0.0.1", 7001), ("vm-a", 7001), ("localhost", 7002):
        assert also_a.ask("echo", host=host, port=port, count=10)["count"] == 10
        assert a.ask("echo", host=host, port=port, count=10)["count"] == 10
    assert b.ask("echo", host="vm-a", port=7002, count=10)["count"] == 10
    not_there: list[tuple[Peer, str | int, int]] = [
        (b, "vm-a", 7001),  # bound to localhost: not from the other machine
        (b, a.section, 7001),
        (b, "localhost", 7001),  # localhost is vm-b here
        (b, "localhost", 7002),
        (a, "localhost", 7003),
        (also_a, "localhost", 7003),
    ]
    for peer, where, port in not_there:
        with pytest.raises(PeerError, match="ConnectionRefusedError"):
            peer.ask("echo", host=where, port=port, count=1)
    with pytest.raises(PeerError, match=r"OSError: .*\('vm-a', 7001\) is already in use"):
        also_a.ask("listen", port=7001)
    b.ask("listen", port=7001)  # another machine's ports are its own
