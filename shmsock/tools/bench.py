"""`shmsock bench`: round trips and throughput beside TCP, in the same run, measured in turn."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shmsock.aio.attach import prepare_region
from shmsock.region import create_file
from shmsock.tools import bench_handlers
from shmsock.tools.child import Child, cpus, have_uvloop, python

__all__ = [
    "HANDLERS",
    "Variant",
    "bench_host",
    "bench_table",
    "describe",
    "in_turn",
    "machine",
    "marks_of",
    "measure",
    "medians",
    "print_marks",
    "private_region",
    "variants",
]

HANDLERS = Path(bench_handlers.__file__)
MEASURES = (("echo", "p50_us"), ("echo", "p99_us"), ("write", "mb_s"))
REFERENCE = "uvloop TCP"
STOCK = "stock asyncio on shmsock's uvloop loop"


@dataclass(frozen=True)
class Variant:
    """One thing that is measured."""

    module: str
    loop: str
    stock: bool = False
    """asyncio's own functions, on a loop that knows `.shm` hosts."""

    @property
    def is_tcp(self) -> bool:
        return self.module == "asyncio" and not self.stock

    @property
    def label(self) -> str:
        if self.is_tcp:
            return f"{self.loop} TCP"
        return f"stock asyncio on shmsock's {self.loop} loop" if self.stock else f"shmsock, {self.loop}"

    def role(self, role: str, *more: object) -> list[str]:
        stock = ("--shm-loop",) if self.stock else ()
        return python(HANDLERS, "--module", self.module, "--loop", self.loop, *stock, "--role", role, *more)


def variants() -> list[Variant]:
    """All that can be measured here."""
    loops = ["asyncio", "uvloop"] if have_uvloop() else ["asyncio"]
    kinds = (("asyncio", False), ("shmsock", False), ("asyncio", True))
    return [Variant(module, loop, stock) for loop in loops for module, stock in kinds]


@contextlib.contextmanager
def private_region(prefix: str, size: int = 64 << 20) -> Iterator[str]:
    """A region in a directory of its own, removed at the end; smaller where /dev/shm is."""
    prefix = f"shmsock-{prefix}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/dev/shm") as directory:
        room = os.statvfs(directory)
        while size > 8 << 20 and size * 2 > room.f_bavail * room.f_frsize:
            size //= 2
        path = os.path.join(directory, "region")
        create_file(path, size, prepare=partial(prepare_region, peers=8))
        yield path


def measure(
    variant: Variant, region: str, seconds: float, server_cpu: int, client_cpu: int
) -> dict[str, Any]:
    """One server, one client, both measures."""
    env = {"SHMSOCK_REGION": region, "SHMSOCK_NAME": "bench"}
    host = "127.0.0.1" if variant.is_tcp else "localhost.shm" if variant.stock else "localhost"
    with Child(variant.role("server", "--host", host, "--cpu", server_cpu), env) as server:
        port = server.line()["port"]
        to = ("--host", host, "--port", port, "--cpu", client_cpu, "--seconds", seconds)
        with Child(variant.role("client", *to), env) as client:
            return client.line()


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Over the rounds."""
    return {f"{kind}_{what}": statistics.median(r[kind][what] for r in rounds) for kind, what in MEASURES}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "shmsock": importlib.metadata.version("shmsock"),
        "load": round(os.getloadavg()[0], 1),
    }
    if have_uvloop():
        found["uvloop"] = importlib.metadata.version("uvloop")
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """Of the checkout that this package lies in, if it does."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        argv = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def bench_host(console: Console, rounds: int, seconds: float, placements: list[str]) -> dict[str, Any]:
    """Between two processes of this host: "two" cores, "one" core."""
    known = machine()
    console.print(describe(known))
    server, client, where = cpus()
    report: dict[str, Any] = {
        "machine": known,
        "rounds": rounds,
        "seconds": seconds,
        "results": {},
        "marks": [],
    }
    with private_region("bench") as region:
        for placement in placements:
            if placement == "two" and server == client:
                console.print("There is one CPU: no figures for two.")
                continue
            on = (server, client) if placement == "two" else (client, client)
            text = where if placement == "two" else f"both on CPU {client}"
            taken = in_turn(
                console,
                variants(),
                rounds,
                f"{placement} core",
                lambda v, on=on: measure(v, region, seconds, *on),
            )
            results = {label: {**medians(values), "rounds": values} for label, values in taken.items()}
            report["results"][placement] = results
            marks = marks_of(results, placement)
            report["marks"] += marks
            title = f"64 B round trip and 64 KiB writes, {text}; medians of {rounds} rounds of {seconds:g} s"
            console.print(bench_table(title, results))
            print_marks(console, marks)
    return report


def in_turn(
    console: Console, what: list[Variant], rounds: int, title: str, take: Any
) -> dict[str, list[dict[str, Any]]]:
    """Every variant once per round."""
    taken: dict[str, list[dict[str, Any]]] = {variant.label: [] for variant in what}
    with console.status("") as status:
        for number in range(rounds):
            for variant in what:
                status.update(f"{title}: round {number + 1} of {rounds}, {variant.label}")
                taken[variant.label].append(take(variant))
    return taken


def reference(results: dict[str, Any]) -> str | None:
    """What the ratios are taken against: uvloop's TCP, else asyncio's."""
    return next((label for label in (REFERENCE, "asyncio TCP") if label in results), None)


def bench_table(title: str, results: dict[str, Any]) -> Table:
    base = reference(results)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("p50", "p99", f"p50 beside {base}", "64 KiB writes", f"beside {base}"):
        table.add_column(column, justify="right")
    for label, r in results.items():
        ratios = ["", ""]
        if base and label != base:
            ratios = [
                times(results[base]["echo_p50_us"] / r["echo_p50_us"], "faster", "slower"),
                times(r["write_mb_s"] / results[base]["write_mb_s"], "as much", "less"),
            ]
        rate = (
            f"{r['write_mb_s'] / 1000:.2f} GB/s" if r["write_mb_s"] >= 1000 else f"{r['write_mb_s']:.0f} MB/s"
        )
        table.add_row(
            label, f"{r['echo_p50_us']:.1f} us", f"{r['echo_p99_us']:.1f} us", ratios[0], rate, ratios[1]
        )
    return table


def times(ratio: float, more: str, less: str) -> str:
    """ "12x faster", "1.3x slower"."""
    value, word = (ratio, more) if ratio >= 1 else (1 / ratio, less)
    return f"{value:.3g}x {word}"


def marks_of(results: dict[str, Any], placement: str) -> list[dict[str, Any]]:
    """What this version is held to, and whether this run shows it."""
    ours, tcp = results.get("shmsock, uvloop"), results.get(REFERENCE)
    if not ours or not tcp:
        return []
    least = {"two": (25.0, 5.0), "one": (1.0, 1.0), "vm": (10.0, None)}[placement]
    wanted = [(REFERENCE, tcp, ours, least)]
    if placement == "two" and (stock := results.get(STOCK)):
        wanted.append(("shmsock, uvloop", ours, stock, (0.8, 0.8)))
    found = []
    for than, base, it, (echo, write) in wanted:
        seen = base["echo_p50_us"] / it["echo_p50_us"], it["write_mb_s"] / base["write_mb_s"]
        for what, mark, ratio in (("echo", echo, seen[0]), ("write", write, seen[1])):
            if mark is not None:
                row = {"where": placement, "what": what, "than": than, "at_least": mark, "seen": ratio}
                found.append({**row, "met": ratio >= mark})
    return found


def print_marks(console: Console, marks: list[dict[str, Any]]) -> None:
    for mark in marks:
        what = "64 B p50" if mark["what"] == "echo" else "64 KiB writes"
        met = "[green]met[/]" if mark["met"] else "[red]missed[/]"
        if mark["than"] == REFERENCE:
            aim = f"{what} at least {mark['at_least']:g}x better than {REFERENCE}: {mark['seen']:.1f}x"
        else:
            least = f"at least {mark['at_least']:.0%} of {mark['than']}"
            aim = f"{what} of stock asyncio {least}: {mark['seen']:.0%}"
        console.print(f"  mark: {aim}, {met}")


def describe(known: dict[str, Any]) -> str:
    parts = [f"{known['cpu']} ({known['cpus']} CPUs)", f"Linux {known['kernel']}", known["python"]]
    parts += [f"uvloop {known['uvloop']}"] if "uvloop" in known else ["no uvloop"]
    parts += [f"shmsock {known['shmsock']}" + (f" at {known['commit']}" if "commit" in known else "")]
    return ", ".join(parts) + f", load {known['load']}"
