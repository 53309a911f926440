"""The tables that `shmsock bench` prints."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

from shmsock.bench.measures import Column, Measure, Sweep
from shmsock.bench.pairs import TCP, Variant
from shmsock.bench.words import nanoseconds, ratio, times, verdict

__all__ = ["mark_table", "measure_table", "sweep_table"]


def table(title: str, *headings: str, left: int = 1) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="left" if number < left else "right")
    return made


def reference(
    measure: Measure, variant: Variant, variants: list[Variant], results: dict[str, Any]
) -> str | None:
    """Beside what a figure is told: the kernel's network on the same loop, else uvloop's TCP."""
    kernels = [v for v in variants if v.is_tcp and v.label in results]
    if measure.own_loop:
        return next((v.label for v in kernels if v.loop == variant.loop), None)
    return TCP if TCP in results else next((v.label for v in kernels), None)


def compared(column: Column, ours: float, theirs: float) -> str:
    if not ours or not theirs:
        return ""
    return (
        times(theirs / ours, "faster", "slower") if column.less else times(ours / theirs, "as much", "less")
    )


def measure_table(measure: Measure, variants: list[Variant], title: str, results: dict[str, Any]) -> Table:
    columns = [c for c in measure.columns if any(c.key in r for r in results.values())]
    bases = {v.label: reference(measure, v, variants, results) for v in variants}
    than = "its loop's" if measure.own_loop else next(iter(bases.values()), None)
    compare = [c for c in columns if c.beside] if than else []
    headings = [*(c.heading for c in columns), *(f"{c.heading} beside {than}" for c in compare)]
    made = table(title, "", *headings, "cache line")
    for label, r in results.items():
        base = bases.get(label)
        other = results[base] if base and base != label else {}
        made.add_row(
            label,
            *(c.show(r[c.key]) if c.key in r else "" for c in columns),
            *(compared(c, r.get(c.key, 0), other.get(c.key, 0)) for c in compare),
            nanoseconds(r.get("cache_line_ns")),
        )
    return made


def sweep_table(sweep: Sweep, title: str, results: dict[str, dict[str, Any]]) -> Table:
    """A row for each value, a column for each label; below them the round trip of a cache line meanwhile."""
    labels = list(results)
    made = table(title, "", *labels, "cache line")
    for value in sweep.values:
        found = [results[label][str(value)] for label in labels]
        lines = [r["cache_line_ns"] for r in found if r.get("cache_line_ns") is not None]
        cells = [sweep.column.show(r[sweep.column.key]) for r in found]
        made.add_row(sweep.say(value), *cells, nanoseconds(median(lines) if lines else None))
    return made


def mark_table(marks: list[dict[str, Any]]) -> Table:
    made = table("Marks", "", "who", "beside", "wanted", "seen", "", left=3)
    for mark in marks:
        beside = " or ".join(mark["than"])
        parts = bool(beside)  # else it is a figure, and no ratio
        wanted = (
            f"at most {ratio(mark['at_most'], parts)}"
            if "at_most" in mark
            else f"at least {ratio(mark['at_least'], parts)}"
        )
        if "than_figure" in mark:
            beside = f"its {mark['than_figure']}"
        what = f"{mark['measure']}, {mark['figure']}"
        seen = ratio(mark["seen"], parts)
        made.add_row(what, mark["who"], beside, wanted, seen, verdict(mark["met"]))
    return made
