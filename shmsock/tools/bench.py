"""`shmsock bench`: round trips and throughput beside TCP, in the same run, measured in turn."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
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
    "REFERENCE",
    "THROUGHPUT",
    "Kind",
    "Variant",
    "bench_host",
    "bench_table",
    "describe",
    "in_turn",
    "machine",
    "marks_of",
    "measure",
    "medians",
    "note_load",
    "print_marks",
    "private_region",
    "reference",
    "times",
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
    region: str = ""
    """Which, where there are several; `note` tells them apart."""
    note: str = ""

    @property
    def is_tcp(self) -> bool:
        return self.module == "asyncio" and not self.stock

    @property
    def label(self) -> str:
        if self.is_tcp:
            return f"{self.loop} TCP"
        if self.stock:
            return f"stock asyncio on shmsock's {self.loop} loop"
        return f"shmsock, {self.loop}" + (f", {self.note}" if self.note else "")

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
    variant: Variant,
    region: str,
    seconds: float,
    server_cpu: int | None,
    client_cpu: int | None,
    *more: object,
) -> dict[str, Any]:
    """One server, one client, all measures; `more` says which. A CPU of None: wherever the kernel likes."""
    env = {"SHMSOCK_REGION": region, "SHMSOCK_NAME": "bench"}
    host = "127.0.0.1" if variant.is_tcp else "localhost.shm" if variant.stock else "localhost"
    pins = [("--cpu", cpu) if cpu is not None else () for cpu in (server_cpu, client_cpu)]
    with Child(variant.role("server", "--host", host, *pins[0]), env) as server:
        port = server.line()["port"]
        to = ("--host", host, "--port", port, *pins[1], "--seconds", seconds)
        with Child(variant.role("client", *to, *more), env) as client:
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


@dataclass(frozen=True)
class Kind:
    """What is measured, and how it is told."""

    title: str
    arguments: tuple[object, ...]
    """Of the client."""
    rounds: int
    seconds: float
    """Unless the user says otherwise."""
    placements: tuple[str, ...]
    variants: Callable[[], list[Variant]]
    medians: Callable[[list[dict[str, Any]]], dict[str, Any]]
    table: Callable[[str, dict[str, Any]], Table]
    marks_of: Callable[[dict[str, Any], str], list[dict[str, Any]]]
    print_marks: Callable[[Console, list[dict[str, Any]]], None]

    def show(
        self, console: Console, where: str, taken: dict[str, Any], rounds: int, seconds: float
    ) -> dict[str, Any]:
        results = {label: {**self.medians(values), "rounds": values} for label, values in taken.items()}
        times = f"medians of {rounds} rounds" if rounds > 1 else "one round"
        console.print(self.table(f"{self.title}, {where}; {times} of {seconds:g} s", results))
        return results

    def judge(self, console: Console, results: dict[str, Any], placement: str) -> list[dict[str, Any]]:
        marks = self.marks_of(results, placement)
        self.print_marks(console, marks)
        return marks


def bench_host(
    console: Console, rounds: int, seconds: float, placements: list[str], kind: Kind | None = None
) -> dict[str, Any]:
    """Between two processes of this host: on "two" cores, on "one" core, or "free" to move."""
    kind = kind or THROUGHPUT
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
            on, text = {
                "two": ((server, client), where),
                "one": ((client, client), f"both on CPU {client}"),
                "free": ((None, None), "wherever the kernel put them"),
            }[placement]
            taken = in_turn(
                console,
                kind.variants(),
                rounds,
                kind.title if placement == "free" else f"{placement} core",
                lambda v, on=on: measure(v, region, seconds, *on, *kind.arguments),
            )
            report["results"][placement] = kind.show(console, text, taken, rounds, seconds)
            report["marks"] += kind.judge(console, report["results"][placement], placement)
    note_load(console, known)
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


THROUGHPUT = Kind(
    title="64 B round trip and 64 KiB writes",
    arguments=(),
    rounds=5,
    seconds=1.0,
    placements=("two", "one"),
    variants=variants,
    medians=medians,
    table=bench_table,
    marks_of=marks_of,
    print_marks=print_marks,
)


def note_load(console: Console, known: dict[str, Any]) -> None:
    """What else the machine did meanwhile is in all figures."""
    known["load_after"] = load = round(os.getloadavg()[0], 1)
    if load > 2 * known["cpus"]:
        console.print(
            f"  The machine did other work (load {load} on {known['cpus']} CPUs): times are longer than they "
            "need be, and a guest takes the CPU time that others had for its own."
        )


def describe(known: dict[str, Any]) -> str:
    parts = [f"{known['cpu']} ({known['cpus']} CPUs)", f"Linux {known['kernel']}", known["python"]]
    parts += [f"uvloop {known['uvloop']}"] if "uvloop" in known else ["no uvloop"]
    parts += [f"shmsock {known['shmsock']}" + (f" at {known['commit']}" if "commit" in known else "")]
    return ", ".join(parts) + f", load {known['load']}"
