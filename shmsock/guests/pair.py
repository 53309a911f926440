"""Two guests on one region, as demonstrations and benchmarks want them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from shmsock.aio.attach import prepare_region
from shmsock.guests.devices import Device
from shmsock.guests.qemu import Fleet, Guest, Ivshmem
from shmsock.region import open_file
from shmsock.region.sizes import format_size

__all__ = ["GuestsFailed", "boot_pair"]

REGION_BYTES = 256 << 20
MEMORY_MB = 640


class GuestsFailed(OSError):
    """Said to the user as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)
        self.strerror = message


def boot_pair(
    console: Console, fleet: Fleet, beside: Sequence[Device] = (), **more: Any
) -> tuple[list[Guest], str]:
    """vm-a and vm-b, up and running on one formatted region; and the path of that on this host. Both have the
    devices `beside` it, too; of each of `more` one."""
    path = fleet.shared_file(REGION_BYTES)
    with open_file(str(path)) as region:
        region.allocate()
        prepare_region(region)
    start = time.monotonic()
    guests: list[Guest] = []
    with console.status("booting two guests"):
        for name in ("vm-a", "vm-b"):
            own = {key: value[len(guests)] for key, value in more.items()}
            device = Ivshmem(path, REGION_BYTES)
            guests.append(fleet.boot(name, ivshmem=[device, *beside], memory_mb=MEMORY_MB, **own))
        for guest in guests:
            guest.wait_ready()
    accel = {"tcg": "software emulation (TCG): only ratios mean anything", "kvm": "KVM"}[guests[0].accel]
    console.print(
        f"Two guests booted in {time.monotonic() - start:.0f} s: Linux {fleet.kernel.version}, one CPU each, "
        f"ivshmem-plain with {format_size(REGION_BYTES)}, {accel}."
    )
    return guests, str(path)
