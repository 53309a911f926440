"""Guests for tests. A test that fails shows the serial log of every guest that was up."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shmsock.guests.devices import Device
from shmsock.guests.qemu import Dax, Fleet, Guest, Ivshmem
from shmsock.region import create_file, open_file
from tests.vm.peers import Peers

PAIR_SIZE = 64 << 20

_up: list[Fleet] = []


class Pair(NamedTuple):
    """Two guests with one region and no network; `region` is the host's path to it."""

    a: Guest
    b: Guest
    region: Path
    size: int
    kind: str = "pci"
    """Of the region in both guests: pci or dax."""
    origin: int = 0
    """Where in the file the region begins."""


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Guests of one test's own."""
    with Fleet() as fleet:
        _up.append(fleet)
        yield fleet
        _up.remove(fleet)


class _Pairs:
    """vm-a and vm-b, kept from test to test; a guest that a test has spoilt is booted anew."""

    def __init__(self, fleet: Fleet, kind: str = "pci") -> None:
        self.fleet, self.kind = fleet, kind
        self.region = fleet.shared_file(PAIR_SIZE)
        device = Ivshmem(self.region, PAIR_SIZE)
        self.devices: dict[str, Device] = {"vm-a": device, "vm-b": device}
        if kind == "dax":
            create_file(str(self.region), PAIR_SIZE, dax=True, force=True)
            self.devices = {
                "vm-a": Dax(self.region, PAIR_SIZE, "nvdimm"),
                "vm-b": Dax(self.region, PAIR_SIZE, "virtio-pmem"),
            }
        with open_file(str(self.region)) as region:
            self.origin = region.origin
        self.guests: dict[str, Guest] = {}

    def get(self) -> Pair:
        for name, device in self.devices.items():
            guest = self.guests.get(name)
            if guest is None or not guest.alive:
                self.guests[name] = self.fleet.boot(name, ivshmem=[device])
        return Pair(self.guests["vm-a"], self.guests["vm-b"], self.region, PAIR_SIZE, self.kind, self.origin)

    def lend(self) -> Iterator[Pair]:
        """For one test."""
        _up.append(self.fleet)
        try:
            yield self.get()
        finally:
            _up.remove(self.fleet)
            self.clean()

    def clean(self) -> None:
        """No command runs, and the region holds zeroes, for the next test."""
        for guest in self.guests.values():
            try:
                if guest.paused:
                    guest.cont()
                guest.kill_commands()
            except Exception:
                guest.kill()
        with self.region.open("r+b") as file, mmap.mmap(file.fileno(), PAIR_SIZE) as memory:
            memory.madvise(mmap.MADV_REMOVE, self.origin)


@pytest.fixture(scope="session")
def _pairs() -> Iterator[_Pairs]:
    with Fleet() as fleet:
        yield _Pairs(fleet)


@pytest.fixture(scope="module")
def dax_pairs() -> Iterator[_Pairs]:
    """As for `two_guests`, with the region as persistent memory: vm-a has an NVDIMM, vm-b virtio-pmem."""
    with Fleet() as fleet:
        yield _Pairs(fleet, "dax")


@pytest.fixture
def two_guests(_pairs: _Pairs) -> Iterator[Pair]:
    """vm-a and vm-b, sharing 64 MiB of zeroes through ivshmem-plain; no network. Booted once per session."""
    yield from _pairs.lend()


@pytest.fixture
def boot_again(_pairs: _Pairs) -> Callable[[], Pair]:
    """For a test that killed one of its `two_guests`: boots it again, over the region as it is."""
    return _pairs.get


@pytest.fixture
def peers() -> Iterator[Peers]:
    """Starts workers in guests and on the host, see peers.py."""
    peers = Peers()
    yield peers
    peers.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for fleet in _up:
            report.sections.extend(fleet.report())
    return report
