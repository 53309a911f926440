"""Regions in guests: who formats BAR2, how many fit in, which device is meant, what one kernel knows."""

from __future__ import annotations

import itertools
import json
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shmsock.engine import layout as lay
from shmsock.guests.qemu import Fleet, Guest, Ivshmem
from tests.commands.test_cli import bad
from tests.doctor.test_doctor import not_well, only, wrong
from tests.vm.peers import PeerError, Peers, assert_calm, format_region
from tests.vm.test_doctor import in_guest

if TYPE_CHECKING:
    from tests.vm.conftest import Pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PORT = 7000


def test_two_format_at_once(two_guests: Pair, peers: Peers) -> None:
    a, b = peers(two_guests.a, two_guests.b)
    ids = set()
    for _ in range(6):
        with two_guests.region.open("r+b") as file, mmap.mmap(file.fileno(), two_guests.size) as memory:
            memory.madvise(mmap.MADV_REMOVE, two_guests.origin)
            both = [peer.start("attach") for peer in (a, b)]
            for peer, number in zip((a, b), both, strict=True):
                peer.identity = peer.result(number)
            header = memory[two_guests.origin : two_guests.origin + lay.HEADER]
            assert header[:8] == b"SHMSOCK1"
            ids.add(header[lay.H_ID : lay.H_ID + 8])
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
    crowd = peers(*[two_guests.a] * 3, *[two_guests.b] * 3, *[None] * 10)
    late = peers(None)[0]
    # claiming waits 20 ms: those who start together meet
    for peer, number in [(p, p.start("attach", region=None if p in crowd[:6] else url)) for p in crowd]:
        peer.identity = peer.result(number)
    assert sorted(peer.section for peer in crowd) == list(range(16))
    with pytest.raises(PeerError, match=r"RegionError: .*all 16 sections .*all their owners are alive"):
        late.attach(url, name="late")
    for peer in crowd:
        peer.ask("listen", port=PORT + peer.section)  # one name per machine, so a port for each
    running = [
        (one, one.start("echo", host=other.section, port=PORT + other.section, count=5))
        for one, other in itertools.product(crowd, crowd)  # oneself included
    ]
    for peer, number in running:
        assert peer.result(number)["count"] == 5
    assert crowd[0].ask("echo", host="vm-b", port=PORT + crowd[4].section, count=5)["count"] == 5
    assert_calm(*crowd)
    crowd[12].finish()
    assert late.attach(url, name="late").section == crowd[12].section
    assert late.ask("echo", host=crowd[2].section, port=PORT + crowd[2].section, count=5)["count"] == 5


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


def test_doctor_in_two_healthy_guests(two_guests: Pair, peers: Peers) -> None:
    """In both, and on the host: nothing is wrong, and all answer."""
    a, b, host = peers(two_guests.a, two_guests.b, None)
    a.attach()
    b.attach()
    host.attach(f"file:{two_guests.region}", name="host")
    for guest in two_guests.a, two_guests.b:
        findings = in_guest(guest)
        assert not_well(findings) == {}
        answers = {f["data"]["name"]: f["data"] for f in findings if f["name"] == "round-trip"}
        assert set(answers) == {"vm-a", "vm-b", "host"}
        assert answers["host"]["woken_by"] == "polling"
        assert answers[guest.name]["here"]
        (device,) = (f for f in findings if f["name"] == "device")
        assert "ivshmem-plain: BAR2 of 64 MiB, driver none" in device["seen"]
        (memory,) = (f for f in findings if f["name"] == "memory-type")
        assert memory["data"]["type"] == "write-back"
    assert wrong(two_guests.region, look=False) == {}
    two_guests.b.stop()
    try:
        found = only(wrong(two_guests.region), "peer-silent", "warning")
        assert "(vm-b, process " in found["seen"]
    finally:
        two_guests.b.cont()


@pytest.fixture(scope="module")
def of_two() -> Iterator[tuple[Guest, list[Path]]]:
    """A guest with two devices, and their files."""
    with Fleet() as fleet:
        files = [fleet.shared_file(16 << 20), fleet.shared_file(8 << 20)]
        devices = [
            Ivshmem(f, f.stat().st_size, addr=at) for f, at in zip(files, ("0x10", "0x11"), strict=True)
        ]
        yield fleet.boot("vm-c", ivshmem=devices), files


def test_info_tells_two_devices_apart(of_two: tuple[Guest, list[Path]], peers: Peers) -> None:
    guest, files = of_two
    message = bad("create", files[0], "--size", "16M", "--force")  # the guest would be left with the old one
    assert f"is in use by process {guest.process.pid} (qemu-system" in message
    (host,) = peers(None)
    host.attach(f"file:{files[0]}", name="host")  # nobody has formatted it yet
    said = json.loads(guest.run(["shmsock", "info", "--json"]).text)
    first, second = said["devices"]
    assert first["address"] < second["address"]
    assert (first["model"], first["ids"], first["driver"]) == ("ivshmem-plain", "1af4:1110", None)
    assert first["enabled"]
    assert [bar["size"] for bar in first["bars"]] == [256, 0, 16 << 20]
    assert [bar["size"] for bar in second["bars"]] == [256, 0, 8 << 20]
    assert [region["content"]["state"] for region in said["regions"]] == ["formatted", "unformatted"]
    text = guest.run(["shmsock", "info"]).text
    assert text.count("ivshmem-plain [1af4:1110] (rev 01)") == 2
    assert "[size=16 MiB]  the shared memory" in text
    assert "pages" not in text
    one = guest.run(["shmsock", "info", f"pci:{second['address']}"]).text
    assert one.count("ivshmem-plain") == 1
    assert "unformatted: " in one
    done = guest.run(["shmsock", "info", "pci:auto"], check=False)
    assert done.returncode == 1
    assert b"2 ivshmem devices found, expected one" in done.stderr


def test_choosing_a_device(of_two: tuple[Guest, list[Path]], peers: Peers) -> None:
    """Two devices, then one, then none."""
    guest, files = of_two
    for path in files:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory.madvise(mmap.MADV_REMOVE)
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
    with pytest.raises(
        PeerError, match=r"no PCI device at 0000:00:12.0; ivshmem devices here: pci:0000:00:10.0"
    ):
        peer.attach("pci:0000:00:12.0")
    with pytest.raises(PeerError, match=r"PCI device 0000:00:00.0 is 8086:29c0, expected 1af4:1110"):
        peer.attach("pci:0000:00:00.0")
    guest.run(["sh", "-c", "echo 1 > /sys/bus/pci/devices/0000:00:10.0/remove"])
    peer.attach()
    assert peer.identity["region"] == "pci:0000:00:11.0"
    assert peer.ask("echo", host="host", port=PORT, count=10)["count"] == 10
    peer.ask("detach")
    guest.run(["sh", "-c", "echo 1 > /sys/bus/pci/devices/0000:00:11.0/remove"])
    with pytest.raises(
        PeerError, match=r"RegionNotFoundError: .*no ivshmem device .* -device ivshmem-plain,memdev="
    ):
        peer.attach("pci:auto")
    peer.attach()  # without a device everybody has a region of their own
    assert peer.identity["region"] == "file:/dev/shm/shmsock-0"
    guest.run(["sh", "-c", "echo 1 > /sys/bus/pci/rescan"])


def magic(files: list[Path]) -> list[bool]:
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append(file.read(8) == b"SHMSOCK1")
    return found
