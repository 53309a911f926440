"""The tables that `shmsock bench` prints. They are to be read in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from shmsock.bench.compare import DISAGREE, reference
from shmsock.bench.measures import Column, Measure, Sweep
from shmsock.bench.pairs import Variant
from shmsock.bench.words import between, nanoseconds, ratio, times, verdict

__all__ = ["mark_table", "measure_table", "sweep_table"]


ODD = " !"
"""Beside the rounds of what is not to be trusted."""
NAME = 20
"""A name of so many characters is never folded; a longer one is, between words."""


def table(*headings: str, left: int = 1, least: int = 0) -> Table:
    """What is on the left may be folded between words, figures are not. `least`: of the first column."""
    made = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        is_left = number < left
        made.add_column(
            heading,
            justify="left" if is_left else "right",
            no_wrap=not is_left,
            overflow="fold",
            min_width=least if number == 0 else None,
        )
    return made


def titled(title: str, made: Table | Group, *below: str | None) -> Group:
    """A title is as wide as the terminal, not as its table."""
    return Group(Text(title, style="bold"), made, *(Text(text, style="dim") for text in below if text))


def folded(heading: str) -> str:
    """In two lines, of about one width."""
    if len(heading) <= 10:
        return heading
    breaks = [at for at, letter in enumerate(heading) if letter == " "] or [len(heading)]
    at = min(breaks, key=lambda at: abs(len(heading) - 2 * at))
    return f"{heading[:at]}\n{heading[at + 1 :]}"


def name_width(names: Iterable[str]) -> int:
    """Tell what names take at least, so that none of them is broken within a word."""
    return max(len(part) for name in names for part in ([name] if len(name) <= NAME else name.split()))


def cell_width(*cells: str) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


def fitting(widths: Sequence[int], room: int) -> int:
    """How many columns, from the left, fit: each has two spaces beside it."""
    taken = [sum(width + 2 for width in widths[:count]) for count in range(len(widths) + 1)]
    return max(count for count, total in enumerate(taken) if count == 0 or total <= room)


def compared(column: Column, seen: dict[str, Any] | None) -> tuple[str, str]:
    """Tell a ratio, and those of its rounds."""
    if seen is None:
        return "", ""
    more, less = ("faster", "slower") if column.less else ("as much", "less")
    told = f"{seen['ratio']:.3g}x" if column.cost else times(seen["ratio"], more, less)
    low, high = seen["low"], seen["high"]
    if high < 1 and not column.cost:
        low, high = 1 / high, 1 / low  # so many times slower, as what is told
    rounds = between(low, high) if len(seen["each"]) > 1 else ""
    return told, rounds + ("" if seen["agree"] else ODD)


def cache_lines(results: list[dict[str, Any]]) -> str | None:
    """Tell how long a cache line took there and back meanwhile; nothing where nobody knows."""
    seen = [r["cache_line_ns"] for r in results if r.get("cache_line_ns") is not None]
    if not seen:
        return None
    low, high = nanoseconds(min(seen)), nanoseconds(max(seen))
    return "A cache line took " + (low if low == high else f"{low} to {high}") + " there and back."


def measure_table(
    measure: Measure, variants: list[Variant], title: str, results: dict[str, Any], room: int = 80
) -> Group:
    """A row for each label. Figures for which there is no room are left out, which is said."""
    columns = [c for c in measure.columns if any(c.key in r for r in results.values())]
    bases = {v.label: reference(measure, v, variants, results) for v in variants}
    than = "its loop's" if measure.own_loop else next(filter(None, bases.values()), None)
    ratios = [c for c in columns if c.beside and not c.cost] if than and len(results) > 1 else []
    named = [f"beside\n{than}", "rounds"] if len(ratios) == 1 else [f"{c.heading}\nbeside" for c in ratios]
    beside = []
    for r in results.values():
        cells = [compared(c, r.get("beside", {}).get(c.key)) for c in ratios]
        beside.append([*cells[0]] if len(ratios) == 1 else [told for told, _ in cells])
    if len(ratios) == 1 and not any(row[1] for row in beside):
        named, beside = named[:1], [row[:1] for row in beside]
    heads = [folded(c.heading) for c in columns]
    rows = [[c.show(r[c.key]) if c.key in r else "" for c in columns] for r in results.values()]
    least = name_width(results)
    room -= 2 + least + sum(cell_width(*column) + 2 for column in zip(named, *beside, strict=True))
    shown = max(1, fitting([cell_width(*column) for column in zip(heads, *rows, strict=True)], room))
    made = table("", *heads[:shown], *named, least=least)
    for label, row, more in zip(results, rows, beside, strict=True):
        made.add_row(label, *row[:shown], *more)
    left_out = ", ".join(c.heading for c in columns[shown:])
    is_odd = any(cell.endswith(ODD) for row in beside for cell in row)
    return titled(
        title,
        made,
        cache_lines(list(results.values())),
        f"!: its rounds differ by more than {DISAGREE:g} times." if is_odd else None,
        f"Not shown, for the width: {left_out}." if left_out else None,
    )


def sweep_table(sweep: Sweep, title: str, results: dict[str, dict[str, Any]], room: int = 80) -> Group:
    """A row for each value, a column for each label; as many tables as it takes."""
    said = [sweep.say(value) for value in sweep.values]
    columns = [
        [folded(label), *(sweep.column.show(r[str(value)][sweep.column.key]) for value in sweep.values)]
        for label, r in results.items()
    ]
    made = []
    while columns:
        count = max(1, fitting([cell_width(*column) for column in columns], room - 2 - cell_width(*said)))
        made.append(table("", *(head for head, *_ in columns[:count]), least=cell_width(*said)))
        for what, *cells in zip(said, *(cells for _, *cells in columns[:count]), strict=True):
            made[-1].add_row(what, *cells)
        del columns[:count]
    lines = cache_lines([figures for r in results.values() for figures in r.values()])
    return titled(title, Group(*made), lines)


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
