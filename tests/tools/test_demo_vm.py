"""`shmsock demo-vm`, with less to do, and `info` and `bench` where there is a device."""

from __future__ import annotations

import json
import os

import pytest

from shmsock.tools import demo_vm, guest_image
from shmsock.tools.qemu import Fleet, GuestError, Ivshmem
from tests.test_cli import bad, good


@pytest.mark.vm
@pytest.mark.timeout(300)
def test_demo_vm() -> None:
    said = good("demo-vm", "--megabytes", 4, "--echoes", 200)
    for guest in ("vm-a", "vm-b"):
        assert f"{guest}: no network device; /sys/class/net has only lo" in said
        assert f"host to {guest}" in said
    assert "200 echoes of 64 B" in said
    assert said.count("at both ends") == 4
    assert "NO" not in said.split()


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to make a bridge")
def test_bench_vm() -> None:
    said = good("bench", "--vm", "--rounds", 1, "--seconds", "0.2")
    assert "uvloop TCP" in said
    assert "echo, p50_us" in said  # judged by its mark


@pytest.mark.vm
@pytest.mark.timeout(300)
def test_info_tells_two_devices_apart() -> None:
    with Fleet() as fleet:
        files = [fleet.shared_file(size) for size in (16 << 20, 4 << 20)]
        good("create", files[0], "--size", "16M", "--force")
        devices = [Ivshmem(file, file.stat().st_size) for file in files]
        guest = fleet.boot("vm-i", ivshmem=devices)
        said = json.loads(guest.run(["shmsock", "info", "--json"]).text)
        first, second = said["devices"]
        assert first["address"] < second["address"]
        assert (first["model"], first["ids"], first["driver"]) == ("ivshmem-plain", "1af4:1110", None)
        assert first["enabled"]
        assert [bar["size"] for bar in first["bars"]] == [256, 0, 16 << 20]
        assert [bar["size"] for bar in second["bars"]] == [256, 0, 4 << 20]
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


def test_demo_vm_without_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_image, "missing", lambda: ["qemu-system-x86"])
    assert "sudo apt-get install qemu-system-x86" in bad("demo-vm")


def test_demo_vm_guest_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies(Fleet):
        def __init__(self) -> None:
            raise GuestError("the guest died")

    monkeypatch.setattr(demo_vm, "Fleet", Dies)
    assert bad("demo-vm") == "shmsock: the guest died\n"
