"""`shmsock bench --vm`: between two guests, shmsock over ivshmem beside virtio-net in the same two."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from shmsock.aio.attach import prepare_region
from shmsock.bench.child import have_uvloop, python
from shmsock.bench.measures import Measure, Sweep, with_cost
from shmsock.bench.pairs import DAX, DOORBELLS, Variant, checked
from shmsock.bench.runner import Take, bench
from shmsock.errors import region_error
from shmsock.guests.devices import Bridge, Dax, Device, IvshmemDoorbell, Tap
from shmsock.guests.image import QEMU
from shmsock.guests.pair import GuestsFailed, boot_pair
from shmsock.guests.qemu import Fleet, GuestError, GuestUnavailable
from shmsock.region import create_file
from shmsock.region.sizes import format_size

__all__ = ["bench_guests", "explained"]

LINE_S = 120.0
SLOT = 0x10
"""On the PCI bus, of the device with doorbells."""
DAX_BYTES = 128 << 20
BOTH_LOOPS = ("echo", "datagram", "bulk")
"""Measures that are taken on every loop that was asked for."""


def bench_guests(
    console: Console,
    rounds: int,
    seconds: float,
    measures: Sequence[Measure],
    sweeps: Sequence[Sweep] = (),
    *,
    doorbells: bool = False,
    dax: bool = False,
    loops: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure ivshmem-plain, and ivshmem-doorbell and persistent memory if asked to, beside virtio-net.
    `loops`: of the measures that most depend on it. Raises OSError: no root, packages that are missing, a
    guest that died."""
    if os.geteuid():
        raise region_error(
            1,
            "virtio-net to compare with takes a bridge and tap interfaces: run `shmsock bench --vm` as root",
        )
    with explained(), ExitStack() as stack:
        socket = stack.enter_context(_doorbell_server()) if doorbells else None
        bridge, fleet = stack.enter_context(Bridge()), stack.enter_context(Fleet())
        guests = Guests(console, fleet, [bridge.tap(), bridge.tap()], socket, dax, loops)
        costing = [with_cost(measure) for measure in measures]
        return bench(console, guests, rounds, seconds, costing, sweeps, guests.known(), guests.probe)


@contextmanager
def explained() -> Iterator[None]:
    """Raise GuestsFailed, which a user can read, for what keeps guests from running."""
    try:
        yield
    except GuestUnavailable as error:
        raise GuestsFailed(f"{error}; or run `make demo-vm`, which installs them") from error
    except GuestError as error:
        raise GuestsFailed(f"{error}") from error


@contextmanager
def _doorbell_server() -> Iterator[Path]:
    """A server for ivshmem-doorbell devices, and the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="shmsock-bench-") as directory:
        path = Path(directory, "socket")
        what = ("--socket", path, "--region", "memfd", "--size", "64M")
        argv = python("-m", "shmsock", "ivshmem-server", *what)
        # It says a few lines, far less than a pipe takes.
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                assert process.stderr is not None
                said = []
                for line in process.stderr:
                    said.append(line)
                    if "listening on" in line:
                        break
                else:
                    raise GuestsFailed("the ivshmem server ended: " + "".join(said).strip())
                yield path
            finally:
                process.terminate()


class Guests:
    """Two guests, one process in each."""

    name = "vm"

    def __init__(
        self,
        console: Console,
        fleet: Fleet,
        taps: list[Tap],
        socket: Path | None,
        dax: bool,
        loops: Sequence[str],
    ) -> None:
        self.fleet, self.taps = fleet, taps
        self.loops = [loop for loop in loops if loop != "uvloop" or have_uvloop()]
        devices: list[Device] = []
        if socket is not None:
            devices.append(IvshmemDoorbell(socket, addr=f"{SLOT:#x}"))
        if dax:
            path = fleet.shared_file(DAX_BYTES)
            create_file(str(path), DAX_BYTES, dax=True, force=True, prepare=prepare_region)
            devices.append(Dax(path, DAX_BYTES))
        iommu = [socket is not None] * 2
        (self.client, self.server), _ = boot_pair(console, fleet, devices, net=taps, iommu=iommu)
        loop = "uvloop" if have_uvloop() else "asyncio"
        self.what = [Variant("asyncio", loop), *self._regions(console, loop, socket is not None, dax)]

    def known(self) -> dict[str, Any]:
        """For the report."""
        said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
        return {
            "virtualization": self.client.accel,
            "guest_kernel": self.fleet.kernel.version,
            "qemu": said.splitlines()[0],
            "network": "virtio-net, " + ("vhost" if self.taps[0].vhost else "moved by QEMU, without vhost"),
            "memory": {v.label: self._memory(v) for v in self.what if v.is_shmsock},
        }

    def variants(self, measure: Measure) -> list[Variant]:
        loops = self.loops if measure.name in BOTH_LOOPS else ()
        udp = measure.kind == "datagram"
        return [
            replace(v, loop=loop, udp=udp and v.is_tcp)
            for loop in loops or [self.what[0].loop]
            for v in self.what
        ]

    def where(self, measure: Measure) -> str:
        return f"vm-a to vm-b, {'UDP' if measure.kind == 'datagram' else 'TCP'} over virtio-net"

    def cache_line_ns(self) -> None:
        """The guests' CPUs are emulated, or wherever the host puts them."""

    @contextmanager
    def open(self, measure: Measure) -> Iterator[Take]:
        def take(variant: Variant, seconds: float) -> dict[str, Any]:
            found, host_cpu = self._take(variant, seconds, *measure.ends)
            found[measure.kind]["host_cpu"] = host_cpu
            return measure.figures(found)

        yield take

    def probe(self) -> dict[str, Any]:
        """Do both guests run all the time?"""
        found: dict[str, Any] = self._take(self.what[1], 1, "--measure", "probe")[0]["probe"]
        return found

    def _regions(self, console: Console, loop: str, bells: bool, dax: bool) -> list[Variant]:
        """Each has a name where there are several. The device with doorbells is bound to vfio-pci."""
        if not bells and not dax:
            return [Variant("shmsock", loop)]
        doorbell = f"0000:00:{SLOT:02x}.0"
        devices = json.loads(self.client.run(["shmsock", "info", "--json"]).text)["devices"]
        plain = next(device["address"] for device in devices if device["address"] != doorbell)
        found = [Variant("shmsock", loop, region=f"pci:{plain}")]
        if bells:
            for guest in (self.client, self.server):
                guest.run(["shmsock", "bind", "--yes", doorbell])
            console.print(f"  beside it ivshmem-doorbell, one vector, at {doorbell}, bound to vfio-pci")
            found.append(Variant("shmsock", loop, region=f"vfio:{doorbell}", note=DOORBELLS))
        if dax:
            console.print(f"  beside it persistent memory (nvdimm), {format_size(DAX_BYTES)}, as dax:auto")
            found.append(Variant("shmsock", loop, region="dax:auto", note=DAX))
        return found

    def _memory(self, variant: Variant) -> str:
        """How the guests have a region."""
        ends = self._take(variant, 1, "--measure", "probe")[0]["probe"].values()
        return " and ".join(dict.fromkeys(f"{end['region']}, {end['memory']}" for end in ends))

    def _take(self, variant: Variant, seconds: float, *ends: object) -> tuple[dict[str, Any], float]:
        """What the client says, and how much of a CPU both QEMUs took meanwhile, in percent."""
        address = self.taps[1].ip if variant.is_tcp else self.server.name
        # What takes long to import, a guest imports once; TCP's ends have nothing of shmsock.
        own = ("shmsock.aio.attach", "shmsock.aio.endpoints") if variant.is_shmsock else ()
        how: dict[str, Any] = {
            "env": variant.environment,
            "modules": (variant.loop, "argparse", "json", *own),
        }
        with self.server.start(role(variant, "server", "--host", address, *ends), **how) as serving:
            port = said(variant, serving.readline(LINE_S))["port"]
            to = ("--host", address, "--port", port, "--seconds", seconds, *ends, "--wait")
            with self.client.start(role(variant, "client", *to), **how) as asking:
                said(variant, asking.readline(LINE_S))
                cpu, start = self._host_cpu(), time.monotonic()
                asking.send(b"go\n")
                found = checked(variant, said(variant, asking.readline(LINE_S + 20 * seconds)))
                took = time.monotonic() - start
                cpu = self._host_cpu() - cpu
                asking.wait(LINE_S, check=True)
            serving.close_stdin()
            serving.wait(LINE_S, check=True)
        return found, cpu / took * 100

    def _host_cpu(self) -> float:
        """Seconds that both QEMUs have used, with the kernel's threads that move packets for them."""
        pids = [guest.process.pid for guest in (self.client, self.server)]
        return sum(cpu_seconds(pid) for pid in (*pids, *vhosts(pids)))


def vhosts(pids: Sequence[int]) -> list[int]:
    """Find the kernel's threads for these processes; those of Linux 6.4 and later are threads of theirs."""
    names = {f"vhost-{pid}" for pid in pids}
    found = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if file.read_text().strip() in names and int(file.parent.name) not in pids:
                found.append(int(file.parent.name))
    return found


def cpu_seconds(pid: int) -> float:
    """What a process has used, all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def said(variant: Variant, line: str) -> dict[str, Any]:
    """Raises GuestsFailed with what an end could not do."""
    found: dict[str, Any] = json.loads(line)
    if next(iter(found), "") == "error":
        raise GuestsFailed(f"{variant.label}: {found['error']}")
    return found


def role(variant: Variant, name: str, *more: object) -> list[str]:
    """In a guest "python" is this interpreter."""
    return ["python", *variant.role(name, *more)[1:]]
