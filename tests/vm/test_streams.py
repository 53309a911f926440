"""asyncio streams between guests, and with the host, over the BAR2 of ivshmem-plain."""

from __future__ import annotations

import itertools
import mmap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shmsock.fabric import layout as lay
from shmsock.tools.qemu import Fleet, Ivshmem
from tests.vm.peers import Peer, PeerError, Peers, format_region

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


def assert_calm(*peers: Peer) -> None:
    """Nobody was taken for dead, nobody missed a bell, nothing is held any more."""
    for peer in peers:
        seen = peer.statistics()
        assert (seen["peers_lost"], seen["healed"], seen["violations"]) == (0, 0, 0), (peer.name, seen)
        assert (seen["state"], seen["peers"]) == ("attached", len(peers)), (peer.name, seen)


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_guests_and_host(two_guests: Pair, peers: Peers, uvloop: bool) -> None:
    a, b = peers(two_guests.a, two_guests.b, uvloop=uvloop)
    (host,) = peers(None, uvloop=uvloop)
    for guest in two_guests.a, two_guests.b:
        assert guest.run(["ls", "/sys/class/net"]).text == "lo"

    # what a program does: no region named, no name given
    assert b.ask("implicit_listen", port=6000) == "vm-b"
    assert a.ask("implicit_echo", host="vm-b", port=6000) == "hello from vm-b:6000"
    assert a.ask("implicit_listen", port=6001) == "vm-a"
    assert b.ask("implicit_echo", host="VM-A.shm.", port=6001) == "hello from vm-a:6001"
    with pytest.raises(PeerError, match=r"gaierror: .*no peer named 'vm-c'.*vm-a, vm-b"):
        a.ask("implicit_echo", host="vm-c", port=6000)
    with pytest.raises(PeerError, match=r"ConnectionRefusedError: .*\('vm-b', 6002\)"):
        a.ask("implicit_echo", host="vm-b", port=6002)
    a.finish()
    b.finish()

    # the same file is the host's: a third peer
    a, b = peers(two_guests.a, two_guests.b, uvloop=uvloop)
    host.attach(f"file:{two_guests.region}", name="host")
    for peer in a, b:
        peer.attach()
        assert peer.identity["region"].startswith("pci:0000:00:")
        # the kernel offers resource2_wc for a prefetchable BAR; whatever is mapped is fenced as if it were write-combining
        assert peer.identity["path"].endswith("/resource2_wc")
        assert peer.identity["write_combining"] is True
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


def test_nobody_is_thought_dead_under_load(two_guests: Pair, peers: Peers) -> None:
    """Two emulated processors on two that this test needs too, for several seconds, with the default settings."""
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


def test_two_format_at_once(two_guests: Pair, peers: Peers) -> None:
    a, b = peers(two_guests.a, two_guests.b)
    ids = set()
    for _ in range(6):
        with two_guests.region.open("r+b") as file, mmap.mmap(file.fileno(), two_guests.size) as memory:
            memory.madvise(mmap.MADV_REMOVE)
            both = [peer.start("attach") for peer in (a, b)]
            for peer, number in zip((a, b), both, strict=True):
                peer.identity = peer.result(number)
            assert memory[:8] == b"SHMSOCK1"
            ids.add(memory[lay.H_ID : lay.H_ID + 8])
        b.ask("listen", port=PORT)
        assert a.section != b.section
        assert a.ask("echo", host="vm-b", port=PORT, count=10)["count"] == 10
        assert_calm(a, b)
        for peer in a, b:
            peer.ask("detach")
    assert len(ids) == 6


def test_sixteen_peers(two_guests: Pair, peers: Peers) -> None:
    """Several processes of each kernel, as many as there are sections, and everyone talks with everyone."""
    url = format_region(two_guests.region, 16)
    crowd = peers(*[two_guests.a] * 5, *[two_guests.b] * 5, *[None] * 6)
    late = peers(None)[0]
    # claiming waits 20 ms: those who start together meet
    for peer, number in [(p, p.start("attach", region=None if p in crowd[:10] else url)) for p in crowd]:
        peer.identity = peer.result(number)
    assert sorted(peer.section for peer in crowd) == list(range(16))
    with pytest.raises(PeerError, match=r"RegionError: .*all 16 sections .*all their owners are alive"):
        late.attach(url, name="late")
    for peer in crowd:
        peer.ask("listen", port=PORT + peer.section)  # one name per machine, so a port for each
    for shift in range(16):
        running = [
            (one, one.start("echo", host=other.section, port=PORT + other.section, count=5))
            for one, other in zip(crowd, crowd[shift:] + crowd[:shift], strict=True)
        ]
        for peer, number in running:
            assert peer.result(number)["count"] == 5
    assert crowd[0].ask("echo", host="vm-b", port=PORT + crowd[7].section, count=5)["count"] == 5
    assert_calm(*crowd)
    crowd[12].finish()
    assert late.attach(url, name="late").section == crowd[12].section
    assert late.ask("echo", host=crowd[3].section, port=PORT + crowd[3].section, count=5)["count"] == 5


def test_localhost_is_this_guest(two_guests: Pair, peers: Peers) -> None:
    a, also_a, b = (p.attach() for p in peers(two_guests.a, two_guests.a, two_guests.b))
    a.ask("listen", port=7001, host="localhost")
    a.ask("listen", port=7002)
    b.ask("listen", port=7003)
    for host, port in ("localhost", 7001), ("127.0.0.1", 7001), ("vm-a", 7001), ("localhost", 7002):
        assert also_a.ask("echo", host=host, port=port, count=10)["count"] == 10
        assert a.ask("echo", host=host, port=port, count=10)["count"] == 10
    assert b.ask("echo", host="vm-a", port=7002, count=10)["count"] == 10
    for peer, host, port in (
        (b, "vm-a", 7001),  # bound to localhost: not from the other machine
        (b, a.section, 7001),
        (b, "localhost", 7001),  # localhost is vm-b here
        (b, "localhost", 7002),
        (a, "localhost", 7003),
        (also_a, "localhost", 7003),
    ):
        with pytest.raises(PeerError, match="ConnectionRefusedError"):
            peer.ask("echo", host=host, port=port, count=1)
    with pytest.raises(PeerError, match=r"OSError: .*\('vm-a', 7001\) is already in use"):
        also_a.ask("listen", port=7001)
    b.ask("listen", port=7001)  # another machine's ports are its own


def test_death_is_seen_at_once_under_one_kernel(two_guests: Pair, peers: Peers) -> None:
    """Locks on sysfs' resource2 tell, without any waiting for a beat."""
    a, also_a, b = (p.attach() for p in peers(two_guests.a, two_guests.a, two_guests.b))
    also_a.ask("listen", port=PORT)
    a.ask("hold", key=1, host="localhost", port=PORT, size=50_000)
    sha = also_a.event("published")["sha"]
    reading = a.start("read_to_end", key=1)
    before = a.statistics()["peers_lost"]
    start = time.monotonic()
    also_a.kill()
    got = a.result(reading)
    took = time.monotonic() - start
    assert got == {"bytes": 50_000, "sha": sha, "end": "ConnectionResetError"}
    assert took < 1.5, took  # dead_after_s is 3
    assert a.statistics()["peers_lost"] == before + 1
    assert b.statistics()["state"] == "attached"


def test_choosing_a_device(fleet: Fleet, peers: Peers) -> None:
    """Two devices, then one, then none."""
    files = [fleet.shared_file(16 << 20), fleet.shared_file(8 << 20)]
    guest = fleet.boot(
        "vm-c", ivshmem=[Ivshmem(files[0], 16 << 20, addr="0x10"), Ivshmem(files[1], 8 << 20, addr="0x11")]
    )
    (peer,) = peers(guest)
    both = r"2 ivshmem devices found.*pci:0000:00:10.0 \(16 MiB\), pci:0000:00:11.0 \(8 MiB\); name the one"
    with pytest.raises(PeerError, match=both):  # nothing in either
        peer.attach("pci:auto")
    peer.attach("pci:00:11.0")  # formats it
    assert peer.identity["region"] == "pci:0000:00:11.0"
    peer.ask("detach")
    assert magic(files) == [False, True]
    peer.attach("pci:auto")  # the only one that holds a region
    assert peer.identity["region"] == "pci:0000:00:11.0"
    (host,) = (p.attach(f"file:{files[1]}", name="host") for p in peers(None))
    host.ask("listen", port=PORT)
    assert peer.ask("echo", host="host", port=PORT, count=10)["count"] == 10
    peer.ask("detach")
    format_region(files[0])
    with pytest.raises(PeerError, match=both):  # a region in each
        peer.attach()
    peer.attach("pci:0000:00:10.0")
    assert peer.identity["region"] == "pci:0000:00:10.0"
    peer.ask("detach")
    with pytest.raises(PeerError, match=r"no PCI device at 0000:00:12.0; ivshmem devices here: pci:0000:00:10.0"):
        peer.attach("pci:0000:00:12.0")
    with pytest.raises(PeerError, match=r"PCI device 0000:00:00.0 is 8086:29c0, expected 1af4:1110"):
        peer.attach("pci:0000:00:00.0")
    guest.run(["sh", "-c", "echo 1 > /sys/bus/pci/devices/0000:00:10.0/remove"])
    peer.attach()
    assert peer.identity["region"] == "pci:0000:00:11.0"
    assert peer.ask("echo", host="host", port=PORT, count=10)["count"] == 10
    peer.ask("detach")
    guest.run(["sh", "-c", "echo 1 > /sys/bus/pci/devices/0000:00:11.0/remove"])
    with pytest.raises(PeerError, match=r"RegionNotFoundError: .*no ivshmem device .* -device ivshmem-plain,memdev="):
        peer.attach("pci:auto")
    peer.attach()  # without a device everybody has a region of their own
    assert peer.identity["region"] == "file:/dev/shm/shmsock-0"


def magic(files: list[Path]) -> list[bool]:
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append(file.read(8) == b"SHMSOCK1")
    return found
