"""What `make bench-vm` does, in short. (`bench serve` and `connect` between guests: test_readme.py.)"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shmsock.bench.pairs import OURS, TCP, UDP
from tests.commands.test_cli import good

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

MEASURES = ["echo", "datagram"] if os.environ.get("SHMSOCK_LONG") == "1" else ["echo"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to make a bridge")
def test_every_way_beside_virtio_net(tmp_path: Path) -> None:
    """TCP, ivshmem-plain, ivshmem-doorbell and persistent memory in the same two guests."""
    page = tmp_path / "page.html"
    what = ("--only", ",".join(MEASURES), "--rounds", 1, "--seconds", "0.1", "--marks", "--html", page)
    said = good("bench", "--vm", "--doorbells", "--dax", *what)
    report = json.loads(page.with_suffix(".json").read_text())
    assert list(report["measures"]) == MEASURES
    ours = [OURS, f"{OURS}, doorbells", f"{OURS}, dax"]
    for name, measure in report["measures"].items():
        assert list(measure["results"]) == [UDP if name == "datagram" else TCP, *ours]
    echo = report["measures"]["echo"]["results"]
    for label in ours:
        assert echo[label]["host_us"] > 0 < echo[label]["cpu_us"]
        assert set(echo[label]["beside"]) == {"p50_us", "cpu_us", "host_us"}
    assert {mark["who"] for mark in report["marks"] if mark["measure"] == "echo"} == {OURS}
    assert report["qemu"].startswith("QEMU emulator version")
    told = [report["memory"][label].partition(":")[0] for label in ours]
    assert told == ["pci", "vfio", "dax"]
    assert all("a load" in text for text in report["memory"].values())
    (probe,) = report["probe"]
    assert [probe[end]["machine"]["kernel"] for end in ("client", "server")] == [report["guest_kernel"]] * 2
    assert "vm-a to vm-b, TCP over virtio-net" in said
    assert [found["who"] for found in report["verdict"]] == ours
    assert "doorbells" in page.read_text()
