"""The tables that `shmsock bench` prints. They are to be read in a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from shmsock.bench.compare import reference
from shmsock.bench.measures import Column, Measure, Sweep
from shmsock.bench.pairs import Variant
from shmsock.bench.words import between, nanoseconds, ratio, times, verdict

__all__ = ["mark_table", "measure_table", "sweep_table"]


def table(*headings: str, left: int = 1) -> Table:
    """What is on the left may be folded between words, figures are not."""
    made = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        is_left = number < left
        made.add_column(heading, justify="left" if is_left else "right", no_wrap=not is_left, overflow="fold")
    return made


def titled(title: str, made: Table, *below: str | None) -> Group:
    """A title is as wide as the terminal, not as its table."""
    return Group(Text(title, style="bold"), made, *(Text(text, style="dim") for text in below if text))


def folded(heading: str) -> str:
    """In lines of a figure's width."""
    return heading.replace(" ", "\n") if len(heading) > 10 else heading


def compared(column: Column, seen: dict[str, Any] | None) -> tuple[str, str]:
    """Tell a ratio, and those of its rounds."""
    if seen is None:
        return "", ""
    more, less = ("faster", "slower") if column.less else ("as much", "less")
    told = f"{seen['ratio']:.3g}x" if column.cost else times(seen["ratio"], more, less)
    rounds = between(seen["low"], seen["high"]) if len(seen["each"]) > 1 else ""
    return told, rounds + ("" if seen["agree"] else " !")


def cache_lines(results: list[dict[str, Any]]) -> str | None:
    """Tell how long a cache line took there and back meanwhile; nothing where nobody knows."""
    seen = [r["cache_line_ns"] for r in results if r.get("cache_line_ns") is not None]
    if not seen:
        return None
    low, high = nanoseconds(min(seen)), nanoseconds(max(seen))
    return "A cache line took " + (low if low == high else f"{low} to {high}") + " there and back."


def measure_table(measure: Measure, variants: list[Variant], title: str, results: dict[str, Any]) -> Group:
    columns = [c for c in measure.columns if any(c.key in r for r in results.values())]
    bases = {v.label: reference(measure, v, variants, results) for v in variants}
    than = "its loop's" if measure.own_loop else next(filter(None, bases.values()), None)
    ratios = [c for c in columns if c.beside and not c.cost] if than and len(results) > 1 else []
    named = [f"beside\n{than}", "rounds"]
    if len(ratios) != 1:
        named = [folded(f"{c.heading} beside") for c in ratios]
    made = table("", *(folded(c.heading) for c in columns), *named)
    for label, r in results.items():
        cells = [compared(c, r.get("beside", {}).get(c.key)) for c in ratios]
        told = cells[0] if len(ratios) == 1 else [told for told, _ in cells]
        made.add_row(label, *(c.show(r[c.key]) if c.key in r else "" for c in columns), *told)
    return titled(title, made, cache_lines(list(results.values())))


def sweep_table(sweep: Sweep, title: str, results: dict[str, dict[str, Any]]) -> Group:
    """A row for each value, a column for each label."""
    made = table("", *(label.replace(" ", "\n") for label in results))
    for value in sweep.values:
        found = [r[str(value)] for r in results.values()]
        made.add_row(sweep.say(value), *(sweep.column.show(r[sweep.column.key]) for r in found))
    return titled(title, made, cache_lines([figures for r in results.values() for figures in r.values()]))


def mark_table(marks: list[dict[str, Any]]) -> Group:
    made = table("", "who", "beside", "wanted", "seen", "", left=3)
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
    return titled("Marks", made)
