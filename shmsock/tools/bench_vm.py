"""`shmsock bench --vm`: between two guests, shmsock over ivshmem beside virtio-net in the same two."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console

from shmsock.errors import region_error
from shmsock.tools.bench import (
    Variant,
    bench_table,
    describe,
    in_turn,
    machine,
    marks_of,
    medians,
    print_marks,
)
from shmsock.tools.child import have_uvloop
from shmsock.tools.demo_vm import DemoFailed, boot_pair
from shmsock.tools.qemu import Bridge, Fleet, Guest, GuestError, GuestUnavailable, Tap

__all__ = ["bench_guests"]

LINE_S = 120.0


def bench_guests(console: Console, rounds: int, seconds: float) -> dict[str, Any]:
    """Raises OSError: no root, packages that are missing, a guest that died."""
    if os.geteuid():
        raise region_error(
            1,
            "virtio-net to compare with takes a bridge and tap interfaces: run `shmsock bench --vm` as root",
        )
    try:
        with Bridge() as bridge, Fleet() as fleet:
            return _Bench(console, fleet, [bridge.tap(), bridge.tap()]).run(rounds, seconds)
    except GuestUnavailable as error:
        raise DemoFailed(f"{error}; or run `make demo-vm`, which installs them") from error
    except GuestError as error:
        raise DemoFailed(f"{error}") from error


class _Bench:
    def __init__(self, console: Console, fleet: Fleet, taps: list[Tap]) -> None:
        self.console, self.fleet, self.taps = console, fleet, taps

    def run(self, rounds: int, seconds: float) -> dict[str, Any]:
        known = machine()
        self.console.print(describe(known))
        (client, server), _ = boot_pair(self.console, self.fleet, net=self.taps)
        loop = "uvloop" if have_uvloop() else "asyncio"
        what = [Variant("asyncio", loop), Variant("shmsock", loop)]
        taken = in_turn(
            self.console, what, rounds, "two guests", lambda v: self._measure(v, client, server, seconds)
        )
        results = {label: {**medians(values), "rounds": values} for label, values in taken.items()}
        marks = marks_of(results, "vm")
        title = f"vm-a to vm-b: TCP is over virtio-net; medians of {rounds} rounds of {seconds:g} s"
        self.console.print(bench_table(title, results))
        print_marks(self.console, marks)
        return {
            "machine": known,
            "accelerator": client.accel,
            "guest_kernel": self.fleet.kernel.version,
            "rounds": rounds,
            "seconds": seconds,
            "results": {"vm": results},
            "marks": marks,
        }

    def _measure(self, variant: Variant, client: Guest, server: Guest, seconds: float) -> dict[str, Any]:
        address = self.taps[1].ip if variant.is_tcp else server.name
        with server.start(role(variant, "server", "--host", address)) as serving:
            port = json.loads(serving.readline(LINE_S))["port"]
            to = ("--host", address, "--port", port, "--seconds", seconds)
            said = client.run(role(variant, "client", *to), timeout=LINE_S + 4 * seconds).text
            serving.close_stdin()
            serving.wait(LINE_S, check=True)
        found: dict[str, Any] = json.loads(said)
        return found


def role(variant: Variant, name: str, *more: object) -> list[str]:
    """In a guest "python" is this interpreter."""
    return ["python", *variant.role(name, *more)[1:]]
