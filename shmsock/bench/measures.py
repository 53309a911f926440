"""The measures of `shmsock bench`, by name: what the ends do, over what, and which figures are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shmsock.bench import pairs as over
from shmsock.bench.pairs import Variant
from shmsock.bench.results import have_histograms
from shmsock.bench.words import (
    amount,
    count,
    duration,
    microseconds,
    nbytes,
    percent,
    rate,
    seconds,
    share,
    speed,
)

__all__ = [
    "BOTH",
    "IDLE",
    "MEASURES",
    "PLAIN",
    "SPORADIC",
    "SUITE",
    "SWEEPS",
    "VM",
    "VM_SWEEPS",
    "Column",
    "Measure",
    "chosen",
    "with_cost",
]


@dataclass(frozen=True)
class Column:
    """A figure and how it is told."""

    heading: str
    key: str
    show: Callable[[float], str]
    less: bool = True
    """Is better."""
    beside: bool = False
    """Told as a ratio as well."""
    cost: bool = False
    """The ratio is how many times as much it takes."""


LATENCY = tuple(
    Column(heading, key, microseconds, beside=key == "p50_us")
    for heading, key in (("p50", "p50_us"), ("p99", "p99_us"), ("p99.9", "p999_us"), ("max", "max_us"))
)
SPEED = (
    Column("throughput", "mb_s", speed, less=False, beside=True),
    Column("writes", "per_s", rate, less=False),
)
MESSAGES = (Column("messages", "per_s", rate, less=False, beside=True),)
RATE = (Column("rate", "per_s", rate, less=False, beside=True), *(replace(c, beside=False) for c in LATENCY))
COST = (
    Column("CPU/op", "cpu_us", microseconds, beside=True, cost=True),
    Column("CPU/GB", "cpu_s_gb", seconds, beside=True, cost=True),
    Column("host/op", "host_us", microseconds, beside=True, cost=True),
    Column("host/GB", "host_s_gb", seconds, beside=True, cost=True),
)
OF_MEAN = Column("slowest of the mean", "slowest_of_mean", share, less=False)
BESIDE = (*LATENCY, Column("p50 alone", "alone_p50_us", microseconds))
SIDES = tuple(Column(f"CPU of {side}", f"{side}_cpu", percent) for side in ("client", "server"))
QUIET = tuple(
    Column(f"{heading} of {side}", f"{side}_{key}", show)
    for side in ("client", "server")
    for heading, key, show in (
        ("CPU", "cpu", percent),
        ("kernel", "system", percent),
        ("sleeps", "sleeps_s", rate),
    )
)
MEMORY = (
    Column("arena", "arena_bytes", nbytes),
    Column("Python's heap", "heap_bytes", nbytes),
    Column("asyncio's own objects", "own_bytes", nbytes),
    Column("beyond them", "beyond_bytes", nbytes),
)
FAIR = (
    Column("all together", "per_s", rate, less=False, beside=True),
    Column("slowest", "slowest_s", rate, less=False),
    replace(OF_MEAN, heading="of the mean"),
)


@dataclass(frozen=True)
class Measure:
    name: str
    title: str
    kind: str
    """The name that the ends have for it."""
    variants: Callable[[], list[Variant]]
    columns: tuple[Column, ...] = LATENCY
    arguments: tuple[object, ...] = ()
    placement: str = "two"
    """Both processes on "two" cores, on "one", or "free" to move."""
    hogs: bool = False
    """With a process beside each end that wants the same CPU all the time."""
    own_loop: bool = False
    """The ratio is taken beside the kernel's network on the same loop, not beside uvloop's TCP."""
    region_bytes: int = 64 << 20
    sections: int = 4
    clients: int = 1
    floor: bool = False
    """The C loop over the ring measures this too."""
    times: float = 1
    """So often the seconds of the others: it takes longer until it has something to tell."""

    @property
    def ends(self) -> tuple[object, ...]:
        """The arguments of its clients, and of its servers."""
        histogram = ("--histogram",) if have_histograms() else ()
        return ("--measure", self.kind, *self.arguments, *histogram)

    @property
    def timed(self) -> bool:
        """Does it keep the time of each round trip?"""
        return self.kind != "sporadic" and any(column.key == "p50_us" for column in self.columns)

    def figures(self, found: dict[str, Any]) -> dict[str, Any]:
        """Pick its figures from what a client says; of several kinds the names tell which."""
        kinds = self.kind.split(",")
        return {kind: found[kind] for kind in kinds} if len(kinds) > 1 else costing(found[self.kind])


def costing(found: dict[str, Any]) -> dict[str, Any]:
    """Add the CPU time of an operation, or of a GB, where it is known how busy the processes were."""
    for key, of_op, of_gb in (("cpu", "cpu_us", "cpu_s_gb"), ("host_cpu", "host_us", "host_s_gb")):
        if key in found and "mb_s" in found:
            found[of_gb] = found[key] / 100 * 1000 / found["mb_s"]
        elif key in found and "per_s" in found:
            found[of_op] = found[key] / 100 * (1e6 / found["per_s"] + found.get("thought_us", 0))
    return found


def with_cost(measure: Measure) -> Measure:
    """The same, with the CPU time that it takes."""
    of_kinds = {"sporadic": LATENCY[:2], "echo": LATENCY[:3], "datagram": LATENCY[:3], "idle": SIDES}
    told = of_kinds.get(measure.kind, measure.columns[:1])
    usage = () if measure.kind in ("sporadic", "idle", "datagram") else ("--usage",)
    return replace(
        measure,
        columns=(*told, *COST),
        arguments=(*measure.arguments, *usage),
        times=4 if measure.kind == "idle" else measure.times,
    )


ECHO = Measure("echo", "64 B round trip", "echo", over.all_streams, floor=True)
BULK = Measure("bulk", "64 KiB writes one way", "write", over.all_streams, SPEED, floor=True)
MANY = Measure(
    "many",
    "Echoes on 64 connections at once",
    "many",
    over.with_unix,
    RATE,
    ("--connections", 64),
    region_bytes=256 << 20,
)
THINKS = (0, 100, 1_000, 10_000, 100_000)
"""Microseconds between two echoes."""
SPORADIC = tuple(
    Measure(
        f"think-{duration(us).replace(' ', '')}" + ("-free" if placement == "free" else ""),
        f"64 B round trip, {duration(us)} after the one before" if us else "64 B round trip, no pauses",
        "sporadic",
        over.streams,
        (*LATENCY[:2], *SIDES),
        ("--think", us),
        placement,
    )
    for placement in ("two", "free")
    for us in THINKS
)
IDLE = tuple(
    Measure(
        name,
        f"{told} idle connections",
        "idle",
        over.streams,
        QUIET,
        ("--connections", count),
        region_bytes=256 << 20,
    )
    for name, told, count in (("idle", "Ten", 10), ("idle-10000", "Ten thousand", 10_000))
)
ONE = (
    replace(ECHO, name="one-core", placement="one", variants=over.variants, floor=False),
    replace(BULK, name="one-core-bulk", placement="one", variants=over.variants, floor=False),
)
HOGS = tuple(
    replace(measure, name=f"hogs{end}", title=f"{measure.title} beside CPU hogs", hogs=True, own_loop=True)
    for end, measure in (
        ("", replace(ECHO, variants=over.streams, floor=False)),
        ("-one-core", replace(ONE[0], variants=over.streams)),
        ("-protocol", Measure("", "64 B round trip of protocols", "protocol-echo", over.streams)),
        (
            "-protocol-one-core",
            Measure("", "64 B round trip of protocols", "protocol-echo", over.streams, placement="one"),
        ),
    )
)
PLAIN = (
    replace(ECHO, variants=over.variants, floor=False),
    replace(BULK, variants=over.variants, floor=False),
)
"""The measures that are taken when nothing is asked for."""
BOTH = Measure(
    "both",
    "64 B round trip and 64 KiB writes",
    "echo,write",
    over.variants,
    (
        *(replace(c, key=f"echo_{c.key}") for c in LATENCY[:2]),
        replace(SPEED[0], heading="writes", key="write_mb_s"),
    ),
)
"""For the demo."""
SUITE = (
    ECHO,
    Measure("readline", "32 B lines, there and back", "readline", over.with_unix),
    Measure("protocol", "64 B round trip of protocols", "protocol-echo", over.streams, own_loop=True),
    Measure("datagram", "64 B round trip of datagrams", "datagram", over.datagrams, own_loop=True),
    Measure("anyio", "64 B round trip of anyio's streams", "echo", over.of_anyio, own_loop=True),
    BULK,
    Measure("protocol-bulk", "64 KiB writes of protocols one way", "protocol-write", over.streams, SPEED),
    Measure(
        "one-write",
        "One write of 100 MB",
        "one-write",
        over.streams,
        SPEED,
        ("--block", 100_000_000),
        own_loop=True,
    ),
    Measure(
        "buffered",
        "64 KiB writes to a BufferedProtocol",
        "buffered-write",
        over.streams,
        SPEED,
        own_loop=True,
    ),
    Measure(
        "sendfile",
        "A file of 10 MB by sendfile()",
        "sendfile",
        over.of_files,
        SPEED,
        ("--block", 10_000_000),
        own_loop=True,
    ),
    Measure(
        "drain", "64 B writes one way, each with drain()", "write", over.with_unix, MESSAGES, ("--block", 64)
    ),
    Measure(
        "connect-10000",
        "10,000 connects at once, a byte each way",
        "connect-at-once",
        over.short,
        RATE,
        ("--connections", 10_000),
        region_bytes=256 << 20,
    ),
    Measure("connect", "Connect, one byte each way, close", "connect", over.with_unix, RATE),
    Measure("connect-protocol", "The same, by protocols", "protocol-connect", over.streams, RATE),
    MANY,
    Measure(
        "many-1000",
        "Echoes on 1,000 connections at once",
        "many",
        over.short,
        (*RATE, OF_MEAN),
        ("--connections", 1000),
        region_bytes=256 << 20,
    ),
    Measure(
        "many-1000-protocol",
        "Echoes on 1,000 connections of protocols at once",
        "protocol-many",
        over.short,
        (*RATE, OF_MEAN),
        ("--connections", 1000),
        region_bytes=256 << 20,
    ),
    Measure(
        "beside",
        "64 B round trip beside 10,000 idle connections",
        "beside",
        over.short,
        BESIDE,
        ("--connections", 10_000),
        region_bytes=256 << 20,
    ),
    *ONE,
    *HOGS,
    *(m for m in SPORADIC if m.name in ("think-1ms", "think-10ms")),
    Measure(
        "peers",
        "8 peers that talk to one, 64 B round trips",
        "echo",
        over.short,
        FAIR,
        region_bytes=128 << 20,
        sections=16,
        clients=8,
    ),
    Measure(
        "memory",
        "What an idle connection takes in its client",
        "memory",
        over.streams,
        MEMORY,
        ("--connections", 100),
        region_bytes=256 << 20,
    ),
)


@dataclass(frozen=True)
class Sweep:
    """One figure of one measure, for several values of an argument."""

    name: str
    title: str
    measure: Measure
    argument: str
    values: tuple[int, ...]
    column: Column
    say: Callable[[float], str]

    def measures(self) -> list[Measure]:
        more = self.measure.arguments
        return [
            replace(self.measure, name=f"{self.name}-{value}", arguments=(*more, self.argument, value))
            for value in self.values
        ]


SIZES = (1, 8, 64, 512, 4096, 32768, 262144, 1 << 20)
CONNECTIONS = (1, 4, 16, 64, 250, 1000)
SWEEPS = (
    Sweep(
        "sizes",
        "One way, by the size of a write",
        replace(BULK, variants=over.with_unix, floor=False),
        "--block",
        SIZES,
        SPEED[0],
        amount,
    ),
    Sweep(
        "connections",
        "Echoes a second, by the number of connections at once",
        replace(MANY, variants=over.with_unix, arguments=()),
        "--connections",
        CONNECTIONS,
        RATE[0],
        count,
    ),
)
MEASURES = {m.name: m for m in (*SUITE, *SPORADIC, *IDLE)}
VM = tuple(
    replace(MEASURES[name], own_loop=True)
    for name in (
        *("echo", "datagram", "bulk", "drain", "connect", "many"),
        *(m.name for m in SPORADIC[: len(THINKS)]),
        "idle",
    )
)
"""Between guests."""
VM_SWEEPS = (replace(SWEEPS[0], values=(64, 512, 4096, 32768, 262144)),)


def chosen(names: str) -> tuple[list[Measure], list[Sweep]]:
    """Choose by a list with commas. Raises ValueError, which says what there is."""
    sweeps = {sweep.name: sweep for sweep in SWEEPS}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in MEASURES and name not in sweeps]:
        raise ValueError(
            f"no measure {', '.join(map(repr, unknown))}; there are {', '.join((*MEASURES, *sweeps))}"
        )
    if not wanted:
        raise ValueError(f"no measure was named; there are {', '.join((*MEASURES, *sweeps))}")
    measures = [MEASURES[name] for name in MEASURES if name in wanted]
    return measures, [sweep for name, sweep in sweeps.items() if name in wanted]
