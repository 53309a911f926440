"""`shmsock bench`: every measure over shared memory and over what else there is, in turn, in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shmsock.bench import floor
from shmsock.bench.child import cpus
from shmsock.bench.hogs import hogs
from shmsock.bench.machine import describe, machine, note_load
from shmsock.bench.marks import judge
from shmsock.bench.measures import Measure, Sweep
from shmsock.bench.pairs import Variant, peers, private_region
from shmsock.bench.results import combine, of_peers
from shmsock.bench.tables import mark_table, measure_table, sweep_table
from shmsock.engine.settings import Settings

__all__ = ["Bench", "Host", "Place", "Take", "bench"]

Take = Callable[[Variant, float], dict[str, Any]]
"""Measures one variant once, for so many seconds."""


class Place(Protocol):
    """The machines that the two ends are on."""

    name: str
    """By which marks are told apart."""

    def variants(self, measure: Measure) -> list[Variant]: ...

    def where(self, measure: Measure) -> str | None:
        """For a title; None: not to be measured here, and that was said."""

    def open(self, measure: Measure) -> Any:
        """A context that gives a Take."""

    def cache_line_ns(self) -> float | None: ...


class Host:
    """Processes of this host."""

    name = "host"

    def __init__(self, console: Console, prefix: str = "bench") -> None:
        self.console, self.prefix = console, prefix
        self.server, self.client, self.pinned = cpus()

    @cached_property
    def has_floor(self) -> bool:
        """Can the C loop over the ring be measured here?"""
        return self.server != self.client and floor.available()

    def variants(self, measure: Measure) -> list[Variant]:
        return [*measure.variants(), *([Variant("floor")] if measure.floor and self.has_floor else [])]

    def where(self, measure: Measure) -> str | None:
        if measure.placement == "two" and self.server == self.client:
            self.console.print(f"There is one CPU: no figures of {measure.name!r} for two.")
            return None
        return {
            "two": self.pinned,
            "one": f"both on CPU {self.client}",
            "free": "wherever the kernel put them",
        }[measure.placement]

    @contextmanager
    def open(self, measure: Measure) -> Iterator[Take]:
        pins: dict[str, tuple[int | None, int | None]] = {
            "two": (self.server, self.client),
            "one": (self.client, self.client),
            "free": (None, None),
        }
        cpus = pins[measure.placement]

        def take(variant: Variant, seconds: float) -> dict[str, Any]:
            if variant.module == "floor":
                return floor.run(measure.kind, *cpus, seconds, Settings.ring_bytes)
            found = peers(variant, region, seconds, cpus, *measure.ends, clients=measure.clients)
            each = [measure.figures(client) for client in found]
            return each[0] if measure.clients == 1 else of_peers(each)

        beside = {cpu for cpu in cpus if measure.hogs and cpu is not None}
        with private_region(self.prefix, measure.region_bytes, measure.sections) as region, hogs(beside):
            yield take

    def cache_line_ns(self) -> float | None:
        """Measure these two CPUs, now: virtual ones move."""
        return floor.cache_line_ns()


@dataclass
class Bench:
    """A run: so many rounds of so many seconds."""

    console: Console
    place: Place
    rounds: int
    seconds: float
    report: dict[str, Any] = field(default_factory=dict)

    def run(self, measures: Sequence[Measure], sweeps: Sequence[Sweep] = ()) -> None:
        """All of them, each with its table."""
        with progress(self.console) as bar:
            steps = [m for m in measures] + [m for sweep in sweeps for m in sweep.measures()]
            task = bar.add_task("", total=sum(len(self.place.variants(m)) * self.rounds for m in steps))

            def step(text: str, by: int = 1) -> None:
                bar.update(task, description=text, advance=by)

            for measure in measures:
                self._measure(measure, step)
            for sweep in sweeps:
                self._sweep(sweep, step)

    def _measure(self, measure: Measure, step: Callable[..., None]) -> None:
        where = self.place.where(measure)
        variants = self.place.variants(measure)
        if where is None:
            return
        results = self._take(measure, variants, step)
        title = f"{measure.title}, {where}; {self._times()}"
        self.console.print(measure_table(measure, variants, title, results))
        kept = {"title": measure.title, "where": where, "results": results}
        self.report.setdefault("measures", {})[measure.name] = kept

    def _sweep(self, sweep: Sweep, step: Callable[..., None]) -> None:
        found: dict[str, dict[str, Any]] = {}
        where = None
        for value, measure in zip(sweep.values, sweep.measures(), strict=True):
            where = self.place.where(measure)
            if where is None:
                return
            for label, figures in self._take(measure, self.place.variants(measure), step).items():
                found.setdefault(label, {})[str(value)] = figures
        self.console.print(sweep_table(sweep, f"{sweep.title}, {where}; {self._times()}", found))
        kept = {"title": sweep.title, "where": where, "figure": sweep.column.key, "results": found}
        self.report.setdefault("sweeps", {})[sweep.name] = kept

    def _times(self) -> str:
        rounds = f"medians of {self.rounds} rounds" if self.rounds > 1 else "one round"
        return f"{rounds} of {self.seconds:g} s"

    def _take(self, measure: Measure, variants: list[Variant], step: Callable[..., None]) -> dict[str, Any]:
        """Every variant once per round."""
        taken: dict[str, list[dict[str, Any]]] = {variant.label: [] for variant in variants}
        lines: dict[str, list[float]] = {variant.label: [] for variant in variants}
        with self.place.open(measure) as take:
            for number in range(self.rounds):
                for variant in variants:
                    step(f"{measure.name}: round {number + 1} of {self.rounds}, {variant.label}", 0)
                    if (line := self.place.cache_line_ns()) is not None:
                        lines[variant.label].append(line)
                    taken[variant.label].append(take(variant, self.seconds))
                    step("", 1)
        results = {label: combine(rounds) for label, rounds in taken.items()}
        for label, seen in lines.items():
            results[label]["cache_line_ns"] = statistics.median(seen) if seen else None
        return results

    def judge(self) -> list[dict[str, Any]]:
        """Beside the marks that this run says something about."""
        marks = judge(self.report.get("measures", {}), self.place.name)
        if marks:
            self.console.print(mark_table(marks))
        self.report["marks"] = marks
        return marks


def progress(console: Console) -> Progress:
    """On a terminal; it goes when all is done."""
    return Progress(
        TextColumn("  {task.description:<56}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def bench(
    console: Console,
    place: Place,
    rounds: int,
    seconds: float,
    measures: Sequence[Measure],
    sweeps: Sequence[Sweep] = (),
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures, prints and judges; gives all of it for --json."""
    known = machine()
    console.print(describe(known))
    run = Bench(console, place, rounds, seconds)
    run.report = {"machine": known, **(more or {}), "rounds": rounds, "seconds": seconds}
    run.run(measures, sweeps)
    run.judge()
    note_load(console, known)
    return run.report
