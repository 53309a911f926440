"""`shmsock doctor` where QEMUs are: on the host, and in guests, healthy ones and broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsock.guests.qemu import Fleet, Guest, Ivshmem, IvshmemDoorbell
from shmsock.hypervisors.qemu import plain
from shmsock.region.sizes import short_size
from tests.commands.test_cli import good
from tests.doctor.test_doctor import not_well, only, wrong

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SIZE = 16 << 20
MODULES = ("shmsock.cli", "shmsock.commands.doctor", "shmsock.doctor.examine")
COMMAND = "import sys; from shmsock.cli import main; main()"


def in_guest(guest: Guest, *arguments: str, **how: Any) -> list[dict[str, Any]]:
    """What doctor says there."""
    argv = ["python", "-c", COMMAND, "doctor", "--json", *arguments]
    done = guest.run(argv, modules=MODULES, check=False, timeout=90, **how)
    assert done.returncode in (0, 1), done
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    assert done.returncode == any(f["level"] == "error" for f in findings)
    return findings


# -- on the host: QEMUs that run, and whose guest never boots


@pytest.fixture
def qemu() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a QEMU with these arguments, and waits until it is there."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        argv = ["qemu-system-x86_64", "-M", "q35", "-m", "64", "-nodefaults", "-display", "none", "-S"]
        process = subprocess.Popen(
            [*argv, "-qmp", "stdio", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert b"QMP" in process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_qemus_of_the_host(fleet: Fleet, qemu: Callable[..., subprocess.Popen[bytes]]) -> None:
    path = fleet.shared_file(SIZE)
    good("create", path, "--size", short_size(SIZE), "--force")
    healthy = qemu(*plain(path, SIZE))
    assert wrong(path) == {}
    assert f"mapped and shared by process {healthy.pid} (qemu-system" in good("doctor", path, "--look")

    private = [word.replace("share=on", "share=off") for word in plain(path, SIZE)]
    alone = qemu(*private)
    found = only(wrong(path), "qemu-private")
    assert found["seen"].startswith(f"process {alone.pid} (qemu-system")
    assert "share=on" in found["mend"]
    alone.kill()
    alone.wait()

    short = qemu(*plain(path, SIZE // 2))
    found = only(wrong(path), "qemu-size")
    assert f"process {short.pid} (qemu-system" in found["seen"]
    assert "has 8 MiB of the 16 MiB" in found["seen"]
    assert "size=16M" in found["mend"]
    short.kill()
    short.wait()

    path.unlink()
    good("create", path, "--size", short_size(SIZE))
    found = wrong(path)
    assert set(found) == {"replaced", "qemu-deleted"}
    assert f"process {healthy.pid} (qemu-system" in found["qemu-deleted"]["seen"]
    assert "stop and start its guest" in found["qemu-deleted"]["mend"]
    said = json.loads(good("doctor", fleet.shared_file(SIZE), "--look", "--json"))
    assert [healthy.pid in f["data"]["pids"] for f in said["findings"] if f["name"] == "qemu-elsewhere"]


# -- in a guest with broken devices (healthy guests: test_regions.py)


class _House:
    """A guest with five devices, of which one is healthy."""

    def __init__(self, fleet: Fleet, socket: Path) -> None:
        good_one, large, lonely = (fleet.shared_file(SIZE) for _ in range(3))
        for path in good_one, large, lonely:
            good("create", path, "--size", short_size(SIZE), "--force")
        private = plain(lonely, SIZE, name="lonely", addr="0x12")
        self.guest = fleet.boot(
            "vm-d",
            ivshmem=[
                Ivshmem(good_one, SIZE, addr="0x10"),
                Ivshmem(large, SIZE // 2, addr="0x11"),
                IvshmemDoorbell(socket, 1, addr="0x13"),
            ],
            extra=[word.replace("share=on", "share=off") for word in private],
        )
        self.lonely = lonely


@pytest.fixture(scope="module")
def house() -> Iterator[_House]:
    with Fleet() as fleet:
        socket = fleet.directory / "ivshmem.sock"
        argv = [sys.executable, "-m", "shmsock", "ivshmem-server", "--socket", str(socket)]
        argv += ["--region", "memfd", "--size", str(SIZE)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                server.stderr.readline()
                yield _House(fleet, socket)
            finally:
                server.terminate()


def test_a_guest_with_broken_devices(house: _House) -> None:
    """One run tells of all of them, and of each the right thing."""
    findings = in_guest(house.guest)
    of: dict[str, Any] = {}
    for finding in findings:
        if finding["level"] in ("warning", "error"):
            of.setdefault(finding["region"], set()).add(finding["name"])
    assert of == {
        "pci:0000:00:11.0": {"bar"},  # size= is less than the file's
        "pci:0000:00:13.0": {"iommu"},  # a doorbell, and no IOMMU
    }
    (bar,) = (f for f in findings if f["name"] == "bar")
    assert "the region has 16 MiB, and 8 MiB of it are here" in bar["seen"]
    assert "size=16M" in bar["mend"]
    assert findings[0]["seen"].startswith("a guest, ")  # whatever its root was made with
    (iommu,) = (f for f in findings if f["name"] == "iommu")
    assert "-device intel-iommu,intremap=on" in iommu["mend"]
    assert only(wrong(house.lonely), "qemu-private")  # in that guest everything looks healthy


def test_a_guest_s_user_without_permission(house: _House) -> None:
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "shmsock", "doctor", "--look"]
    done = house.guest.run([*argv, "pci:00:10.0", "--json"], check=False, timeout=90)
    found = not_well(json.loads(done.stdout)["findings"])["permission"]
    assert "uid 65534 (nobody) may not " in found["seen"]
    assert 'ATTR{device}=="0x1110"' in found["mend"]  # the udev rule


def test_a_guest_with_a_driver_and_then_without_devices(house: _House) -> None:
    """The last test of this guest."""
    script = (
        "modprobe uio_pci_generic; cd /sys/bus/pci; "
        "echo uio_pci_generic > devices/0000:00:10.0/driver_override; "
        "echo 0000:00:10.0 > drivers_probe; readlink devices/0000:00:10.0/driver"
    )
    assert "uio_pci_generic" in house.guest.run(["sh", "-c", script]).text
    found = not_well([f for f in in_guest(house.guest, "--look") if f["region"] == "pci:0000:00:10.0"])
    assert "0000:00:10.0 is bound to uio_pci_generic" in found["driver"]["seen"]
    assert "driver/unbind" in found["driver"]["mend"]
    remove = "for device in /sys/bus/pci/devices/0000:00:1[0-3].0; do echo 1 > $device/remove; done"
    house.guest.run(["sh", "-c", remove])
    found = only(not_well(in_guest(house.guest, "--look")), "device")
    assert "no ivshmem device (PCI 1af4:1110) is here" in found["seen"]
    assert "-device ivshmem-plain" in found["mend"]
