"""`shmsock bench --vm`: between two guests, shmsock over ivshmem beside virtio-net in the same two."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from shmsock.bench.child import have_uvloop, python
from shmsock.bench.measures import Measure
from shmsock.bench.pairs import DOORBELLS, Variant, checked
from shmsock.bench.runner import Take, bench
from shmsock.errors import region_error
from shmsock.guests.pair import GuestsFailed, boot_pair
from shmsock.guests.qemu import Bridge, Fleet, GuestError, GuestUnavailable, IvshmemDoorbell, Tap

__all__ = ["bench_guests", "explained"]

LINE_S = 120.0
SLOT = 0x10
"""On the PCI bus, of the device with doorbells."""


def bench_guests(
    console: Console, rounds: int, seconds: float, measures: Sequence[Measure], doorbells: bool = False
) -> dict[str, Any]:
    """`doorbells`: measure an ivshmem-doorbell device as well. Raises OSError: no root, packages that are
    missing, a guest that died."""
    if os.geteuid():
        raise region_error(
            1,
            "virtio-net to compare with takes a bridge and tap interfaces: run `shmsock bench --vm` as root",
        )
    with explained(), ExitStack() as stack:
        socket = stack.enter_context(_doorbell_server()) if doorbells else None
        bridge, fleet = stack.enter_context(Bridge()), stack.enter_context(Fleet())
        guests = Guests(console, fleet, [bridge.tap(), bridge.tap()], socket)
        more = {"virtualization": guests.client.accel, "guest_kernel": fleet.kernel.version}
        return bench(console, guests, rounds, seconds, measures, more=more)


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

    def __init__(self, console: Console, fleet: Fleet, taps: list[Tap], socket: Path | None) -> None:
        self.taps = taps
        loop = "uvloop" if have_uvloop() else "asyncio"
        self.what = [Variant("asyncio", loop), Variant("shmsock", loop)]
        if socket is None:
            (self.client, self.server), _ = boot_pair(console, fleet, net=taps)
            return
        device = IvshmemDoorbell(socket, addr=f"{SLOT:#x}").arguments(1)
        more = {"net": taps, "iommu": [True] * 2, "extra": [device] * 2}
        (self.client, self.server), _ = boot_pair(console, fleet, **more)
        plain, bells = self._regions(console)
        self.what[1:] = [Variant("shmsock", loop, region=plain)]
        self.what += [Variant("shmsock", loop, region=bells, note=DOORBELLS)]

    def variants(self, measure: Measure) -> list[Variant]:
        return self.what

    def where(self, measure: Measure) -> str:
        return "vm-a to vm-b, TCP over virtio-net"

    def cache_line_ns(self) -> None:
        """The guests' CPUs are emulated, or wherever the host puts them."""

    @contextmanager
    def open(self, measure: Measure) -> Iterator[Take]:
        yield partial(self._take, measure)

    def _regions(self, console: Console) -> tuple[str, str]:
        """Name the plain device, and the one with doorbells, which is bound to vfio-pci."""
        bells = f"0000:00:{SLOT:02x}.0"
        for guest in (self.client, self.server):
            devices = json.loads(guest.run(["shmsock", "info", "--json"]).text)["devices"]
            guest.run(["shmsock", "bind", "--yes", bells])
        plain = next(device["address"] for device in devices if device["address"] != bells)
        console.print(f"  beside it ivshmem-doorbell, one vector, at {bells}, bound to vfio-pci")
        return f"pci:{plain}", f"vfio:{bells}"

    def _take(self, measure: Measure, variant: Variant, seconds: float) -> dict[str, Any]:
        address = self.taps[1].ip if variant.is_tcp else self.server.name
        # What takes long to import, a guest imports once; TCP's ends have nothing of shmsock.
        own = ("shmsock.aio.attach", "shmsock.aio.endpoints") if variant.is_shmsock else ()
        how: dict[str, Any] = {
            "env": variant.environment,
            "modules": (variant.loop, "argparse", "json", *own),
        }
        with self.server.start(role(variant, "server", "--host", address), **how) as serving:
            port = json.loads(serving.readline(LINE_S))["port"]
            to = ("--host", address, "--port", port, "--seconds", seconds, *measure.ends)
            said = self.client.run(role(variant, "client", *to), timeout=LINE_S + 10 * seconds, **how).text
            serving.close_stdin()
            serving.wait(LINE_S, check=True)
        return measure.figures(checked(variant, json.loads(said)))


def role(variant: Variant, name: str, *more: object) -> list[str]:
    """In a guest "python" is this interpreter."""
    return ["python", *variant.role(name, *more)[1:]]
