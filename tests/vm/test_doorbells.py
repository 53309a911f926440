"""Guests on ivshmem-doorbell with our server, and the host as one more peer of it: all of it without
spinning, and what can go wrong with doorbells and who hands them out."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsock.guests.qemu import Fleet, Guest, IvshmemDoorbell
from tests.vm.peers import MODULES, Peer, Peers, format_region
from tests.vm.test_deaths import held, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SIZE = 64 << 20
PORT = 7000
ADDRESS = "0000:00:10.0"
VFIO = f"vfio:{ADDRESS}"
FACES = Path(__file__).with_name("faces.py")
STILL = {"busy_poll_us": 0, "hot_us": 0}
"""No spinning at all: who waits sleeps, and is rung."""
SECONDS = 120.0
BULK = 4 << 20
QUICK_S = 0.05
"""More than a round trip takes where bells are looked at, and half of what it takes where only beats are."""
NEVER_S = 60.0
"""For dead_after_s: it is not by silence that somebody's end is known."""


class House:
    """A server, and two guests that are its peers. What a test has spoilt is made anew for the next."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.file = fleet.shared_file(SIZE)
        self.socket = fleet.directory / "ivshmem.sock"
        self.server: subprocess.Popen[str] | None = None
        self.guests: dict[str, Guest] = {}
        self.unbound: list[Guest] = []
        self.spoilt = False
        """The guests' server is not the one that runs: nobody can give it back to them."""

    @property
    def file_url(self) -> str:
        return f"file:{self.file}"

    @property
    def url(self) -> str:
        return f"ivshmem:{self.socket}"

    def serve(self) -> None:
        words = ["--socket", str(self.socket), "--region", str(self.file), "--peers", "4"]
        argv = [sys.executable, "-m", "shmsock", "ivshmem-server", *words]
        server = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        said = server.stderr.readline() + server.stderr.readline()
        assert "room for" in said, said + server.stderr.read()
        self.server = server

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.kill()
        self.server.wait()
        assert self.server.stderr is not None
        self.server.stderr.close()
        self.server = None
        self.spoilt = True

    def get(self) -> tuple[Guest, Guest]:
        if self.spoilt:
            for guest in self.guests.values():
                guest.kill()
            self.spoilt = False
        if self.server is None:
            self.serve()
        self.boot()
        bind = ["python", "-m", "shmsock", "bind", "--yes", ADDRESS]
        for command in [guest.start(bind, modules=MODULES) for guest in self.unbound]:
            with command:
                command.wait(check=True)
        self.unbound.clear()
        return self.guests["vm-a"], self.guests["vm-b"]

    def boot(self) -> None:
        """Those that are not there; it does not wait for them."""
        for name in "vm-a", "vm-b":
            if name not in self.guests or not self.guests[name].alive:
                device = IvshmemDoorbell(self.socket, addr="0x10")
                self.guests[name] = self.fleet.boot(name, iommu=True, ivshmem=[device])
                self.unbound.append(self.guests[name])

    def clean(self, sections: int = 4) -> None:
        """No command runs any more, and the region is as new, with no section too many."""
        for guest in self.guests.values():
            if guest.alive:
                guest.kill_commands()
        with self.file.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as memory:
            memory.madvise(mmap.MADV_REMOVE)
        format_region(self.file, sections)

    def close(self) -> None:
        if self.server is not None:
            self.kill_server()


@pytest.fixture(scope="module")
def _house() -> Iterator[House]:
    with Fleet() as fleet:
        house = House(fleet)
        yield house
        house.close()


@pytest.fixture
def house(_house: House) -> Iterator[House]:
    _house.get()
    yield _house
    _house.clean()


def attached(
    peers: Peers, house: House, *, settings: dict[str, Any], host: dict[str, Any] | None = None
) -> list[Peer]:
    """vm-a (asyncio), vm-b (uvloop), and the host as their server's third peer, with settings of its own."""
    a, b = house.get()
    vm_a, on_host = peers(a, None)
    (vm_b,) = peers(b, uvloop=True)
    vm_a.attach(VFIO, settings=settings)
    vm_b.attach(VFIO, settings=settings)
    on_host.attach(house.url, name="host", settings={**settings, **(host or {})})
    made = [vm_a, vm_b, on_host]
    for peer in made:
        peer.ask("listen", port=PORT)
    return made


def converse(one: Peer, other: Peer, *, echoes: int = 300, size: int = 4_000_000) -> None:
    """Echo, bulk both ways, datagrams."""
    assert one.ask("echo", host=other.name, port=PORT, count=echoes)["count"] == echoes
    got = one.ask("swap", host=other.name, port=PORT, size=size)
    assert (got["sent"], got["received"]) == (got["there_received"], got["there_sent"])
    sizes = [1, 0, 64, 1000, 65507, *[32] * (echoes // 3)]
    assert one.ask("echo_datagrams", host=other.name, port=PORT, sizes=sizes) == sizes


def woken_by(*peers: Peer) -> None:
    """All know of each other, and of their doorbells."""
    for peer in peers:
        ways = {other.name: "doorbell" for other in peers if other is not peer}
        wait_for(lambda p=peer: p.statistics()["woken_by"], ways)  # type: ignore[misc]


def ids(*peers: Peer) -> list[int | None]:
    return [peer.statistics()["doorbell"] for peer in peers]


def logged(peer: Peer, text: str) -> str:
    """Wait until the peer has logged a line with that text, and return it."""
    while text not in (line := str(peer.event("log")["text"])):
        pass
    return line


def test_no_spinning(house: House, peers: Peers) -> None:
    """Three peers of the server, and one that has its memory alone."""
    vm_a, vm_b, host = three = attached(peers, house, settings=STILL)
    woken_by(*three)
    assert len({*ids(*three)} - {None}) == 3
    for peer in three:
        peer.ask("listen_datagrams", port=PORT)
    before = {peer.name: peer.statistics() for peer in three}
    for one, other in (vm_a, vm_b), (vm_b, host), (host, vm_a):
        converse(one, other)
    for peer in three:
        seen = peer.statistics()
        print(peer.name, {k: seen[k] for k in ("kicks", "suppressed", "received", "spurious", "healed")})
        assert (seen["healed"], seen["violations"], seen["doorbell_lost"]) == (0, 0, "")
        # Each echo woke both ends, but for those that were answered before who asked was asleep: a guest's
        # mostly are, by the host.
        assert seen["received"] - before[peer.name]["received"] > 100
        assert seen["kicks"] - before[peer.name]["kicks"] > (0 if peer is host else 100)

    (plain,) = peers(None)
    plain.attach(house.file_url, name="plain", settings=STILL)
    plain.ask("listen", port=PORT)
    plain.ask("listen_datagrams", port=PORT)
    ways = {"vm-a": "polling", "vm-b": "polling", "host": "futex"}
    wait_for(lambda: plain.statistics()["woken_by"], ways)
    for peer in three:
        way = "futex" if peer is host else "polling"
        wait_for(lambda p=peer: p.statistics()["woken_by"].get("plain"), way)  # type: ignore[misc]
    for one, other in (plain, vm_a), (vm_b, plain), (plain, host), (host, vm_b):
        converse(one, other, echoes=60, size=1_000_000)
    for peer in (*three, plain):
        seen = peer.statistics()
        assert (seen["healed"], seen["peers"], seen["peers_lost"]) == (0, 4, 0), (peer.name, seen)
    assert ids(plain) == [None]
    woken = host.statistics()["woken_by"]
    assert woken == {"vm-a": "doorbell", "vm-b": "doorbell", "plain": "futex"}


def test_trio(house: House) -> None:
    """In both guests, without spinning."""
    a, b = house.get()
    with b.start(
        ["python", FACES, "calm", "serve", "trio"], modules=MODULES
    ) as serving:  # in a guest, pci:auto finds vfio:
        serving.readline(SECONDS)
        ask: list[str | Path] = ["python", FACES, "calm", "ask", "trio", "vm-b", ""]
        said = a.run(ask, timeout=SECONDS, modules=MODULES)
        done, asked = json.loads(said.text)
        assert done == ["ShmStream", "datagrams"]
        assert asked["woken_by"] == {"vm-b": "doorbell"}
        serving.close_stdin()
        _, served = json.loads(serving.readline(SECONDS))
        serving.wait(SECONDS, check=True)
    for seen in asked, served:
        assert (seen["region"], seen["healed"], seen["spin_hits"]) == (VFIO, 0, 0)
        assert min(seen["kicks"], seen["received"]) > 100


def test_few_doorbells_when_hot(house: House, peers: Peers) -> None:
    """(Not from a guest to the host: where guests are emulated, their writes are so far apart that the host
    sleeps in between.)"""
    # Staying hot for long: where others take the CPUs, a writer stands still for some ms now and then.
    vm_a, vm_b, host = three = attached(peers, house, settings={"hot_us": 5000})
    woken_by(*three)
    for one, other in (vm_a, vm_b), (vm_b, vm_a), (host, vm_a):
        found = []
        for _ in range(5):  # where others take the CPUs, the two cannot stay hot: once they can
            before = [peer.statistics() for peer in (one, other)]
            got = one.ask("give", host=other.name, port=PORT, size=BULK, piece=1024)
            assert got == {"bytes": BULK, "wrong": False, "end": ""}
            after = [peer.statistics() for peer in (one, other)]
            assert [seen["healed"] for seen in after] == [0, 0]
            found.append(
                {
                    key: sum(new[key] - old[key] for new, old in zip(after, before, strict=True))
                    for key in ("kicks", "suppressed", "writes")
                }
            )
            if found[-1]["kicks"] * 100 < found[-1]["writes"]:
                break
        else:
            pytest.fail(f"{one.name} to {other.name}, too many doorbells: {found}")
        print(f"{one.name} to {other.name}: {found}")
        assert found[-1]["suppressed"] > 0


def files(peer: Peer) -> int:
    """How many a process of the host has open."""
    return len(os.listdir(f"/proc/{peer.process.process.pid}/fd"))  # type: ignore[union-attr]


def test_guest_killed_while_it_writes(house: House, peers: Peers) -> None:
    """The server tells the host at once; the other guest finds it out. Later it comes back."""
    house.clean(sections=3)
    vm_a, vm_b, host = three = attached(peers, house, settings=STILL, host={"dead_after_s": NEVER_S})
    woken_by(*three)
    _, old, _ = ids(*three)
    before = held(host), files(host)
    host.ask("hold", key=1, host="vm-b", port=PORT, size=100_000)
    sha = vm_b.event("published")["sha"]
    vm_a.ask("keep", key=1, host="host", port=PORT)
    vm_a.ask("keep", key=2, host="vm-b", port=PORT)
    drinking = host.start("drink", host="vm-b", port=PORT)
    host.event("reading")
    house.guests["vm-b"].kill()
    start = time.monotonic()
    got = host.result(drinking)
    took = time.monotonic() - start
    print(f"the host was told after {took:.2f} s, and had read {got['bytes']} bytes")
    assert (got["end"], got["wrong"]) == ("ConnectionResetError", False)
    assert took < 10  # dead_after_s is a minute
    assert host.ask("read_to_end", key=1) == {"bytes": 100_000, "sha": sha, "end": "ConnectionResetError"}
    assert host.statistics()["peers_lost"] == 1
    wait_for(lambda: files(host), before[1] - 1)  # that eventfd
    house.boot()
    vm_a.ask("ping", key=1, count=20)
    wait_for(lambda: vm_a.statistics()["peers_lost"], 1)
    assert vm_a.ask("read_to_end", key=2)["end"] == "ConnectionResetError"
    vm_a.ask("drop", key=1)
    wait_for(lambda: held(host), before[0])

    _, b = house.get()
    (again,) = peers(b)
    again.attach(VFIO, settings=STILL)
    assert again.section == vm_b.section
    again.ask("listen", port=PORT)
    again.ask("listen_datagrams", port=PORT)
    woken_by(vm_a, again, host)
    assert ids(again) != [old]
    assert files(host) == before[1]
    for peer in vm_a, host:
        converse(peer, again, echoes=60, size=500_000)
    for peer in vm_a, again, host:
        assert peer.statistics()["healed"] == 0, peer.name


def test_server_killed(house: House, peers: Peers) -> None:
    """Open connections live on, and whoever comes to its successor reaches all."""
    vm_a, vm_b, host = three = attached(peers, house, settings=STILL)
    woken_by(*three)
    for peer in three:
        peer.ask("listen_datagrams", port=PORT)
    pairs = [(vm_a, vm_b), (vm_b, host), (host, vm_a)]
    for one, other in pairs:
        one.ask("keep", key=1, host=other.name, port=PORT)
        one.ask("ping", key=1, count=10)
    house.kill_server()
    assert "start the server and all of its peers anew" in logged(host, "goes on without doorbells")
    seen = host.statistics()
    assert (seen["doorbell"], seen["woken_by"]) == (None, {"vm-a": "polling", "vm-b": "polling"})
    assert f"the ivshmem server at {house.socket} has gone" in seen["doorbell_lost"]
    for guest, neighbour in (vm_a, "vm-b"), (vm_b, "vm-a"):
        ways = {"host": "polling", neighbour: "doorbell"}
        wait_for(lambda g=guest: g.statistics()["woken_by"], ways)  # type: ignore[misc]
    for one, other in pairs:
        assert one.ask("ping", key=1, count=50) < QUICK_S
        converse(one, other, echoes=30, size=200_000)

    house.serve()
    (new,) = peers(None)
    new.attach(house.url, name="new", settings=STILL)
    new.ask("listen", port=PORT)
    new.ask("listen_datagrams", port=PORT)
    for other in three:
        converse(new, other, echoes=30, size=200_000)
        converse(other, new, echoes=30, size=200_000)
    for one, _ in pairs:
        one.ask("ping", key=1, count=10)
        one.ask("drop", key=1)
    for peer in (*three, new):
        seen = peer.statistics()
        assert (seen["peers"], seen["peers_lost"], seen["violations"]) == (4, 0, 0), (peer.name, seen)
    # The ids of the two servers have nothing to do with each other. Nor do the host's looks help any more.
    host.ask("detach")
    for guest in vm_a, vm_b:
        wait_for(lambda g=guest: "host" in g.statistics()["woken_by"], False)  # type: ignore[misc]
        for one, other in (new, guest), (guest, new):
            one.ask("keep", key=2, host=other.name, port=PORT)
            one.ask("ping", key=2, count=5)
            took = one.ask("ping", key=2, count=20)
            print(
                f"{one.name} to {other.name}: {took * 1000:.1f} ms",
                one.statistics()["woken_by"],
                other.statistics()["woken_by"],
            )
            assert took < QUICK_S
            one.ask("drop", key=2)
