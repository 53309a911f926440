"""`shmsock bench`: every measure over shared memory and over what else there is, in turn, in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shmsock.bench import floor
from shmsock.bench.child import cpus
from shmsock.bench.compare import beside
from shmsock.bench.hogs import hogs
from shmsock.bench.machine import describe, machine, note_load, now
from shmsock.bench.marks import judged
from shmsock.bench.measures import Measure, Sweep
from shmsock.bench.pairs import Variant, peers, private_region
from shmsock.bench.results import combine, of_peers
from shmsock.bench.tables import mark_table, measure_table, sweep_table
from shmsock.bench.verdict import say_verdict
from shmsock.engine.settings import Settings

__all__ = ["Bench", "Host", "Place", "Take", "bench", "judge"]

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
class Taken:
    """The rounds of a measure so far: of each variant what was found, and how fast cache lines were."""

    measure: Measure
    where: str
    variants: list[Variant]
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lines: dict[str, list[float]] = field(default_factory=dict)

    def results(self) -> dict[str, Any]:
        results = {label: combine(rounds) for label, rounds in self.found.items()}
        for label in results:
            seen = self.lines.get(label)
            results[label]["cache_line_ns"] = statistics.median(seen) if seen else None
        beside(self.measure, self.variants, results)
        return results


@dataclass
class Bench:
    """A run: so many rounds of so many seconds. With a probe, one of all measures in each round, and they
    are as far apart as can be; else one measure after another."""

    console: Console
    place: Place
    rounds: int
    seconds: float
    probe: Callable[[], dict[str, Any]] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def run(self, measures: Sequence[Measure], sweeps: Sequence[Sweep] = ()) -> None:
        """All of them, each with its table."""
        swept = [sweep.measures() for sweep in sweeps]
        plan = self._plan([*measures, *(m for each in swept for m in each)])
        shown = [(partial(self._show, measure), [measure]) for measure in measures]
        shown += [(partial(self._show_sweep, *each), each[1]) for each in zip(sweeps, swept, strict=True)]
        with progress(self.console) as bar:
            task = bar.add_task("", total=sum(len(taken.variants) for taken in plan.values()) * self.rounds)

            def step(text: str, by: int = 1) -> None:
                bar.update(task, description=text, advance=by)

            if self.probe is not None:
                measured = sum(len(taken.variants) * taken.measure.times for taken in plan.values())
                self._tell(
                    f"{self.rounds} rounds, with {self.rounds * measured * self.seconds:.0f} s of measuring"
                )
                for number in range(self.rounds):
                    self.report.setdefault("probe", []).append(self.probe())
                    for taken in plan.values():
                        self._take(taken, [number], step)
                    self._tell(f"round {number + 1} of {self.rounds} is done")
            for show, parts in shown:
                known = [plan[part.name] for part in parts if part.name in plan]
                if len(known) < len(parts):
                    continue  # not to be measured here
                if self.probe is None:
                    for taken in known:
                        self._take(taken, range(self.rounds), step)
                show(known)

    def _tell(self, text: str) -> None:
        """Say on stderr how far it is, where no terminal shows a bar."""
        if not self.console.is_terminal:
            click.echo(text, err=True)

    def _plan(self, measures: Sequence[Measure]) -> dict[str, Taken]:
        wheres = [(measure, self.place.where(measure)) for measure in measures]
        return {m.name: Taken(m, where, self.place.variants(m)) for m, where in wheres if where is not None}

    def _take(self, taken: Taken, numbers: Sequence[int], step: Callable[..., None]) -> None:
        """Every variant once in each of these rounds."""
        measure = taken.measure
        with self.place.open(measure) as take:
            for number, variant in product(numbers, taken.variants):
                step(f"{measure.name} {number + 1}/{self.rounds}, {variant.label}", 0)
                if (line := self.place.cache_line_ns()) is not None:
                    taken.lines.setdefault(variant.label, []).append(line)
                found = take(variant, self.seconds * measure.times)
                taken.found.setdefault(variant.label, []).append(found)
                step("", 1)

    def _show(self, measure: Measure, known: list[Taken]) -> None:
        (taken,) = known
        results = taken.results()
        title = f"{measure.title}, {taken.where}; {self._times(measure)}"
        self.console.print(measure_table(measure, taken.variants, title, results, self.console.width))
        kept = {"title": measure.title, "where": taken.where, "results": results}
        self.report.setdefault("measures", {})[measure.name] = kept

    def _show_sweep(self, sweep: Sweep, measures: list[Measure], known: list[Taken]) -> None:
        found: dict[str, dict[str, Any]] = {}
        for value, taken in zip(sweep.values, known, strict=True):
            for label, figures in taken.results().items():
                found.setdefault(label, {})[str(value)] = figures
        title = f"{sweep.title}, {known[0].where}; {self._times(sweep.measure)}"
        self.console.print(sweep_table(sweep, title, found, self.console.width))
        kept = {"title": sweep.title, "where": known[0].where, "figure": sweep.column.key, "results": found}
        self.report.setdefault("sweeps", {})[sweep.name] = kept

    def _times(self, measure: Measure) -> str:
        rounds = f"medians of {self.rounds} rounds" if self.rounds > 1 else "one round"
        return f"{rounds} of {self.seconds * measure.times:g} s"


def judge(console: Console, report: dict[str, Any]) -> None:
    """Beside the marks that this run says something about."""
    report["marks"] = judged(report.get("measures", {}), report["place"])
    if report["marks"]:
        console.print(mark_table(report["marks"]))


def progress(console: Console) -> Progress:
    """On a terminal; it goes when all is done. The bar has what the words leave of the line."""
    return Progress(
        TextColumn("  {task.description:<36}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
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
    probe: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measures and prints; gives all of it for --json."""
    known = machine()
    console.print(describe(known))
    run = Bench(console, place, rounds, seconds, probe)
    run.report = {
        "machine": known,
        "began": now(),
        "place": place.name,
        **(more or {}),
        "rounds": rounds,
        "seconds": seconds,
    }
    run.run(measures, sweeps)
    note_load(console, known)
    if probe is not None:
        say_verdict(console, run.report)
    return run.report
