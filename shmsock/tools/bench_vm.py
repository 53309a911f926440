"""`shmsock bench --vm`: between two guests, shmsock over ivshmem beside virtio-net in the same two."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from shmsock.errors import region_error
from shmsock.tools.bench import THROUGHPUT, Kind, Variant, describe, in_turn, machine, note_load
from shmsock.tools.bench_sporadic import DOORBELLS
from shmsock.tools.child import have_uvloop, python
from shmsock.tools.demo_vm import DemoFailed, boot_pair
from shmsock.tools.qemu import Bridge, Fleet, Guest, GuestError, GuestUnavailable, IvshmemDoorbell, Tap

__all__ = ["bench_guests"]

LINE_S = 120.0
SLOT = 0x10
"""On the PCI bus, of the device with doorbells."""


def bench_guests(
    console: Console, rounds: int, seconds: float, kind: Kind = THROUGHPUT, doorbells: bool = False
) -> dict[str, Any]:
    """`doorbells`: measure an ivshmem-doorbell device as well. Raises OSError: no root, packages that are
    missing, a guest that died."""
    if os.geteuid():
        raise region_error(
            1,
            "virtio-net to compare with takes a bridge and tap interfaces: run `shmsock bench --vm` as root",
        )
    try:
        with ExitStack() as stack:
            socket = stack.enter_context(_doorbell_server()) if doorbells else None
            bridge, fleet = stack.enter_context(Bridge()), stack.enter_context(Fleet())
            return _Bench(console, fleet, [bridge.tap(), bridge.tap()], socket).run(rounds, seconds, kind)
    except GuestUnavailable as error:
        raise DemoFailed(f"{error}; or run `make demo-vm`, which installs them") from error
    except GuestError as error:
        raise DemoFailed(f"{error}") from error


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
                    raise DemoFailed("the ivshmem server ended: " + "".join(said).strip())
                yield path
            finally:
                process.terminate()


class _Bench:
    def __init__(self, console: Console, fleet: Fleet, taps: list[Tap], socket: Path | None) -> None:
        self.console, self.fleet, self.taps, self.socket = console, fleet, taps, socket

    def run(self, rounds: int, seconds: float, kind: Kind) -> dict[str, Any]:
        known = machine()
        self.console.print(describe(known))
        loop = "uvloop" if have_uvloop() else "asyncio"
        what = [Variant("asyncio", loop), Variant("shmsock", loop)]
        if self.socket is None:
            (client, server), _ = boot_pair(self.console, self.fleet, net=self.taps)
        else:
            device = IvshmemDoorbell(self.socket, addr=f"{SLOT:#x}").arguments(1)
            more = {"net": self.taps, "iommu": [True] * 2, "extra": [device] * 2}
            (client, server), _ = boot_pair(self.console, self.fleet, **more)
            plain, bells = self._regions([client, server])
            what[1:] = [Variant("shmsock", loop, region=plain)]
            what += [Variant("shmsock", loop, region=bells, note=DOORBELLS)]
        taken = in_turn(
            self.console,
            what,
            rounds,
            "two guests",
            lambda v: self._measure(v, client, server, seconds, *kind.arguments),
        )
        results = kind.show(self.console, "vm-a to vm-b, TCP over virtio-net", taken, rounds, seconds)
        marks = kind.judge(self.console, results, "vm")
        note_load(self.console, known)
        return {
            "machine": known,
            "accelerator": client.accel,
            "guest_kernel": self.fleet.kernel.version,
            "rounds": rounds,
            "seconds": seconds,
            "results": {"vm": results},
            "marks": marks,
        }

    def _regions(self, guests: list[Guest]) -> tuple[str, str]:
        """Of the plain device and of the one with doorbells, which is bound to vfio-pci."""
        bells = f"0000:00:{SLOT:02x}.0"
        for guest in guests:
            devices = json.loads(guest.run(["shmsock", "info", "--json"]).text)["devices"]
            guest.run(["shmsock", "bind", "--yes", bells])
        plain = next(device["address"] for device in devices if device["address"] != bells)
        self.console.print(f"  beside it ivshmem-doorbell, one vector, at {bells}, bound to vfio-pci")
        return f"pci:{plain}", f"vfio:{bells}"

    def _measure(
        self, variant: Variant, client: Guest, server: Guest, seconds: float, *more: object
    ) -> dict[str, Any]:
        address = self.taps[1].ip if variant.is_tcp else server.name
        env = {"SHMSOCK_REGION": variant.region} if variant.region else {}
        with server.start(role(variant, "server", "--host", address), env=env) as serving:
            port = json.loads(serving.readline(LINE_S))["port"]
            to = ("--host", address, "--port", port, "--seconds", seconds, *more)
            said = client.run(role(variant, "client", *to), timeout=LINE_S + 10 * seconds, env=env).text
            serving.close_stdin()
            serving.wait(LINE_S, check=True)
        found: dict[str, Any] = json.loads(said)
        return found


def role(variant: Variant, name: str, *more: object) -> list[str]:
    """In a guest "python" is this interpreter."""
    return ["python", *variant.role(name, *more)[1:]]
