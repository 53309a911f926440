"""Regions in persistent memory: streams between guests, and one file in three ways at once.

SHMSOCK_LONG=1: all tests of streams that guests with ivshmem pass.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from shmsock.guests.devices import Dax
from tests.commands.test_cli import good
from tests.doctor.test_doctor import not_well
from tests.vm import test_regions, test_streams
from tests.vm.peers import PeerError, Peers, assert_calm, format_region
from tests.vm.test_doctor import in_guest

if os.environ.get("SHMSOCK_LONG") == "1":
    from tests.vm.test_streams import *  # noqa: F403

if TYPE_CHECKING:
    from tests.vm.conftest import Pair, _Pairs

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PORT = 7000
RAW_SIZE = 16 << 20


@pytest.fixture
def two_guests(dax_pairs: _Pairs) -> Iterator[Pair]:
    """In place of the ones with ivshmem."""
    yield from dax_pairs.lend()


def test_guests_and_host_over_dax(two_guests: Pair, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_streams, "FILE", test_streams.FILE // 5)
    test_streams.test_guests_and_host(two_guests, peers, uvloop=False)


def test_death_is_seen_at_once_over_dax(two_guests: Pair, peers: Peers) -> None:
    """Locks on the device's file tell."""
    test_regions.test_death_is_seen_at_once_under_one_kernel(two_guests, peers)


def test_two_format_at_once_over_dax(two_guests: Pair, peers: Peers) -> None:
    test_regions.test_two_format_at_once(two_guests, peers)


def test_dax_ivshmem_and_host_over_one_file(two_guests: Pair, dax_pairs: _Pairs, peers: Peers) -> None:
    """vm-c has it as BAR2, by the printed arguments, and persistent memory that is not made for that."""
    url = format_region(two_guests.region)
    words = shlex.split(good("qemu-args", url))
    raw = dax_pairs.fleet.shared_file(RAW_SIZE)
    vm_c = dax_pairs.fleet.boot("vm-c", ivshmem=[Dax(raw, RAW_SIZE)], extra=words)
    try:
        a, b, c, host = peers(two_guests.a, two_guests.b, vm_c, None)
        host.attach(url, name="host")
        everybody = [a.attach(), b.attach("auto"), c.attach(), host]
        kinds = [peer.identity["region"].partition(":")[0] for peer in everybody]
        assert kinds == ["dax", "dax", "pci", "file"]
        for peer in everybody:
            peer.ask("listen", port=PORT)
        for one, other in itertools.permutations(everybody, 2):
            assert one.ask("echo", host=other.name, port=PORT, count=20)["count"] == 20
        for one, other in (a, c), (c, b), (host, c), (b, a):
            got = one.ask("swap", host=other.name, port=PORT, size=2_000_000, timeout=120)
            assert (got["sent"], got["received"]) == (got["there_received"], got["there_sent"])
        assert_calm(*everybody)
        for guest, what in (two_guests.a, "persistent memory dax:dax0.0 (62 MiB, nvdimm)"), (vm_c, "ivshmem"):
            findings = in_guest(guest)
            assert not_well(findings) == {}
            assert sum(what in finding["seen"] for finding in findings if finding["name"] == "device") == 1
            assert sum(finding["name"] == "round-trip" for finding in findings) == len(everybody)

        # /dev/pmem0 is there in vm-c, and mappings of it are copies: not a way to a region
        with pytest.raises(PeerError, match="is /dev/pmem0, a block device, whose mappings are copies"):
            c.ask("raw_read", region="dax:auto", offset=0, size=1)
        with pytest.raises(PeerError, match="a block device, whose mappings are copies in this guest's page"):
            c.ask("raw_read", region="/dev/pmem0", offset=0, size=1)
        with pytest.raises(PeerError, match="is a character device, of persistent memory: name it dax:dax0"):
            a.ask("raw_read", region="/dev/dax0.0", offset=0, size=1)
    finally:
        vm_c.kill()


def test_who_may_use_it(two_guests: Pair) -> None:
    as_nobody = ["setpriv", "--reuid", "65534", "--clear-groups", "shmsock", "info"]
    said = two_guests.a.run(as_nobody, check=False)
    assert said.returncode == 1
    assert b"uid 65534 (nobody) may not open /dev/dax0.0" in said.stderr
    assert b'SUBSYSTEM=="dax", ATTRS{uuid}=="73686d73-6f63-6b00-*", GROUP="shmsock"' in said.stderr
    two_guests.a.run(["chmod", "0666", "/dev/dax0.0"])
    shown = two_guests.a.run(as_nobody).text
    assert "region dax:dax0.0: 62 MiB" in shown
    assert "mapped from /dev/dax0.0 (nvdimm, pages of 2 MiB" in shown


def test_doctor_is_content(two_guests: Pair) -> None:
    format_region(two_guests.region)
    said = json.loads(two_guests.b.run(["shmsock", "doctor", "--json"]).text)
    levels = {(found["name"], found["level"]) for found in said["findings"]}
    assert {("device", "ok"), ("memory-type", "ok")} <= levels
    assert not {name for name, level in levels if level == "error"}
