"""ivshmem-doorbell through vfio in real guests: bound by the command, rung by each other, given back."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from shmsock.guests.qemu import Fleet, Guest, Ivshmem, IvshmemDoorbell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SIZE = 16 << 20
SECONDS = 20  # for an interrupt that comes
DOORBELL, PLAIN, SHARED = (f"0000:00:{slot}" for slot in ("10.0", "11.0", "12.1"))
"""With two vectors; ivshmem-plain; with two, and a neighbour in its IOMMU group."""

# A process that does as it is told, line by line.
PROCESS = """
import json, os, select, sys
from shmsock import region
from shmsock.commands.bind import plan_bind, plan_unbind
opened = None
for line in sys.stdin:
    what, *rest = json.loads(line)
    answer = None
    try:
        if what == "open":
            opened = region.open(rest[0], writable=rest[1])
            bell = opened.doorbell
            answer = [opened.url, opened.size, opened.can_lock, bell and bell.id, bell and bell.vectors]
        elif what == "close":
            if opened is not None:
                opened.close()
        elif what == "bind":
            plan_bind(rest[0], noiommu=rest[1:] == [True]).apply()
        elif what == "unbind":
            plan_unbind(rest[0]).apply()
        elif what == "put":
            opened.mmap[rest[0]] = rest[1]
        elif what == "get":
            answer = opened.mmap[rest[0]]
        elif what == "lock":
            answer = opened.lock_section(rest[0])
        elif what == "ring":
            peer, vector, register = *rest, opened.doorbell.reach(rest[0])
            os.pwrite(register.fd, (register.value | vector).to_bytes(4, "little"), register.offset)
        elif what == "kicks":
            select.select([opened.doorbell.fd], [], [], rest[0])
            answer = opened.doorbell.drain()
        elif what == "files":
            answer = [fd for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{fd}")]
    except OSError as error:
        answer = {"error": type(error).__name__, "errno": error.errno, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Failed(Exception):
    def __init__(self, error: str, errno: int, message: str) -> None:
        super().__init__(f"{error}: {message}")
        self.errno = errno


class Process:
    """PROCESS in a guest."""

    def __init__(self, guest: Guest) -> None:
        self.command = guest.start(["python", "-c", PROCESS], modules=["shmsock.commands.bind"])

    def ask(self, *words: Any) -> Any:
        self.command.send(json.dumps(words).encode() + b"\n")
        answer = json.loads(self.command.readline(timeout=60))
        if isinstance(answer, dict):
            raise Failed(**answer)
        return answer

    def open(self, url: str = f"vfio:{DOORBELL}", *, writable: bool = True) -> Any:
        return self.ask("open", url, writable)

    def end(self) -> None:
        self.command.close_stdin()
        assert self.command.wait().returncode == 0

    def kill(self) -> None:
        self.command.kill(signal.SIGKILL)
        self.command.wait()


class House(NamedTuple):
    a: Guest
    b: Guest
    bare: Guest
    """Without an IOMMU."""


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with Fleet() as fleet:
        socket = fleet.directory / "ivshmem.sock"
        memory = ["--region", "memfd", "--size", str(SIZE), "--vectors", "2"]
        argv = [sys.executable, "-m", "shmsock", "ivshmem-server", "--socket", str(socket), *memory]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                server.stderr.readline()
                plain = fleet.shared_file(SIZE)
                yield House(
                    fleet.boot("vm-a", iommu=True, ivshmem=[IvshmemDoorbell(socket, 2, addr="0x10")]),
                    fleet.boot(
                        "vm-b",
                        iommu=True,
                        ivshmem=[
                            IvshmemDoorbell(socket, 2, addr="0x10"),
                            Ivshmem(plain, SIZE, addr="0x11"),
                            IvshmemDoorbell(socket, 2, addr="0x12.1"),
                        ],
                        extra=["-device", "virtio-rng-pci,addr=0x12.0,multifunction=on"],
                    ),
                    fleet.boot("vm-c", ivshmem=[IvshmemDoorbell(socket, 2, addr="0x10")]),
                )
            finally:
                server.terminate()


class Processes(NamedTuple):
    """Two in vm-a, of which the second may be killed, and one in vm-b."""

    a: Process
    also_a: Process
    b: Process


@pytest.fixture(scope="module")
def processes(house: House) -> Processes:
    """In both guests the device is bound to vfio-pci."""
    found = Processes(Process(house.a), Process(house.a), Process(house.b))
    said = house.a.run(["shmsock", "bind", "--yes", DOORBELL], timeout=180).text
    assert f"echo {DOORBELL} > /sys/bus/pci/drivers_probe\ndone\n" in said.replace("    ", "")
    assert f"SHMSOCK_REGION=vfio:{DOORBELL}" in said
    found.b.ask("bind", DOORBELL)
    return found


@pytest.fixture(autouse=True)
def closed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "processes" in request.fixturenames:
        for process in request.getfixturevalue("processes"):
            if process.command.running:
                process.ask("close")
                assert process.ask("files") == []


def test_two_guests(processes: Processes) -> None:
    a, _, b = processes
    url, size, can_lock, a_id, vectors = a.open("vfio:00:10.0")
    assert (url, size, can_lock, vectors) == (f"vfio:{DOORBELL}", SIZE, True, 2)
    _, _, _, b_id, vectors = b.open()
    assert (a_id != b_id, vectors) == (True, 2)
    a.ask("put", SIZE - 1, 201)
    assert b.ask("get", SIZE - 1) == 201
    for one, other, number in (a, b, b_id), (b, a, a_id):
        for vector in 0, 1:
            one.ask("ring", number, vector)
            assert other.ask("kicks", SECONDS) == 1
    a.ask("ring", 9999, 0)  # nobody: dropped
    for process in a, b:
        assert process.ask("kicks", 0) == 0


def test_one_at_a_time(processes: Processes) -> None:
    """Whoever has it keeps the others out; when it is given back, or its owner killed, the next one can."""
    a, also_a, b = processes
    _, _, _, a_id, _ = a.open()
    _, _, _, b_id, _ = b.open()
    assert a.ask("lock", 3)
    with pytest.raises(Failed, match=r"in use by process \d+ \(python\), and vfio gives it to one") as caught:
        also_a.open()
    assert caught.value.errno == errno.EBUSY
    a.ask("put", 0, 77)
    assert also_a.open(writable=False) == [f"vfio:{DOORBELL}", SIZE, True, None, None]  # to look at, as root
    assert also_a.ask("get", 0) == 77
    also_a.ask("close")
    b.ask("ring", a_id, 1)
    assert a.ask("kicks", SECONDS) == 1
    with pytest.raises(Failed, match=r"in use by process \d+ \(python\): stop that first"):
        also_a.ask("unbind", DOORBELL)
    with pytest.raises(Failed, match=f"claimed by vfio-pci: use it as vfio:{DOORBELL}"):
        also_a.open(f"pci:{DOORBELL}")

    def works(process: Process) -> None:
        assert process.open("pci:auto")[:4] == [f"vfio:{DOORBELL}", SIZE, True, a_id]
        assert process.ask("lock", 3)
        process.ask("ring", b_id, 0)
        assert b.ask("kicks", SECONDS) == 1
        b.ask("ring", a_id, 0)
        assert process.ask("kicks", SECONDS) == 1

    a.ask("close")
    works(also_a)
    also_a.kill()
    works(a)


def test_given_back(house: House, processes: Processes) -> None:
    a = processes.a
    shown = json.loads(house.a.run(["shmsock", "info", "--json", f"vfio:{DOORBELL}"]).text)
    assert [device["driver"] for device in shown["devices"]] == ["vfio-pci"]
    assert [region["kind"] for region in shown["regions"]] == ["vfio"]
    a.open()
    a.ask("put", SIZE - 1, 17)
    a.ask("close")
    said = house.a.run(["shmsock", "unbind", "--yes", DOORBELL], timeout=180).text
    assert f"echo > /sys/bus/pci/devices/{DOORBELL}/driver_override" in said
    with pytest.raises(Failed, match=r"not bound to vfio-pci \(its driver: none\)"):
        a.open()
    assert a.open("pci:auto")[0] == f"pci:{DOORBELL}"
    assert a.ask("get", SIZE - 1) == 17
    with pytest.raises(Failed, match=r"in use through sysfs \(.*\) by process \d+ \(python, this one\)"):
        a.ask("bind", DOORBELL)
    a.ask("close")
    a.ask("bind", DOORBELL)
    assert a.open()[0] == f"vfio:{DOORBELL}"


def test_devices_that_will_not_do(house: House, processes: Processes) -> None:
    bind = "echo vfio-pci > /sys/bus/pci/devices/{0}/driver_override; echo {0} > /sys/bus/pci/drivers_probe"
    house.b.run(["sh", "-c", bind.format(PLAIN) + ";" + bind.format(SHARED)])
    b = processes.b
    with pytest.raises(Failed, match=r"has no interrupts \(MSI-X vectors\).*ivshmem-doorbell,vectors=1"):
        b.open(f"vfio:{PLAIN}")
    assert b.open(f"vfio:{PLAIN}", writable=False) == [f"vfio:{PLAIN}", SIZE, True, None, None]  # to look at
    assert b.ask("get", 0) == 0
    b.ask("close")
    for what in "open", "bind":
        with pytest.raises(Failed, match=r"group \d+ .* is 0000:00:12.0 \(1af4:1005, virtio-pci\)") as caught:
            b.ask(what, SHARED if what == "bind" else f"vfio:{SHARED}", what == "open")
        assert caught.value.errno == errno.EBUSY


def test_no_iommu(house: House) -> None:
    process = Process(house.bare)
    refused = house.bare.run(["shmsock", "bind", "--yes", DOORBELL], timeout=180, check=False)
    assert refused.returncode == 1
    assert b"-device intel-iommu,intremap=on" in refused.stderr
    with pytest.raises(Failed, match="no IOMMU, which vfio needs"):
        process.open()
    assert process.open("pci:auto")[0] == f"pci:{DOORBELL}"
    process.ask("close")
    with pytest.raises(Failed, match="CONFIG_VFIO_NOIOMMU is off"):  # this kernel's, that is
        process.ask("bind", DOORBELL, True)
    assert process.open("pci:auto")[0] == f"pci:{DOORBELL}"
    process.end()
