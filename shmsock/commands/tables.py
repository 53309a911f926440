"""Tables in text: of each column as much room as it takes, and the less important ones only where there is
room."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import click

from shmsock.commands.console import say, width

__all__ = ["Column", "Row", "cut", "fitting", "laid_out", "print_rows"]

LEAST = 8


class Column(NamedTuple):
    """A column of a table. The higher `rank`, the sooner it is left out where there is no room for it."""

    title: str
    rank: int = 0
    left: bool = False
    least: int = 0
    """What it takes, whatever is in it."""
    cut: bool = False
    """May it be cut where there is no room for it, nor for it to be left out?"""


Row = Sequence[str]


def fitting(columns: Sequence[Column], rows: Sequence[Row], room: int | None) -> list[tuple[int, int]]:
    """Choose columns for so much room: the index of each, and its width. As long as they do not fit, those of
    the highest rank are left out; those of rank 0 stay."""
    chosen = list(range(len(columns)))
    wide = [
        max(c.least, len(c.title), max((len(row[i]) for row in rows), default=0))
        for i, c in enumerate(columns)
    ]
    while room is not None and sum(wide[i] + 2 for i in chosen) - 2 > room:
        worst = max(chosen, key=lambda i: (columns[i].rank, i))
        if not columns[worst].rank:
            _cut_down(
                wide, [i for i in chosen if columns[i].cut], sum(wide[i] + 2 for i in chosen) - 2 - room
            )
            break
        chosen.remove(worst)
    return [(i, wide[i]) for i in chosen]


def _cut_down(wide: list[int], among: list[int], much: int) -> None:
    """Make the widest of these narrower, by so much in all as far as they can be."""
    while much > 0 and among and max(wide[i] for i in among) > LEAST:
        wide[max(among, key=lambda i: wide[i])] -= 1
        much -= 1


def cut(text: str, room: int) -> str:
    """Return as much of a text as there is room for, and a sign where there was more."""
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…"[:room]


def laid_out(
    columns: Sequence[Column],
    row: Row,
    chosen: Sequence[tuple[int, int]],
    colours: Mapping[str, str] | None = None,
) -> str:
    """Return the line of a row. `colours`: of cells, by what they say."""
    cells = []
    for i, wide in chosen:
        text = cut(row[i], wide)
        text = text.ljust(wide) if columns[i].left else text.rjust(wide)
        colour = (colours or {}).get(row[i])
        cells.append(click.style(text, fg=colour) if colour else text)
    return "  ".join(cells).rstrip()


def print_rows(
    columns: Sequence[Column],
    rows: Sequence[Row],
    more: Sequence[Iterable[str]] = (),
    *,
    heading: bool = True,
    indent: str = "",
    colours: Mapping[str, str] | None = None,
) -> None:
    """Print a table, as wide as there is room. `more`: lines that follow each row. `colours`: see laid_out();
    a terminal shows them."""
    columns_there = width()
    chosen = fitting(columns, rows, None if columns_there is None else columns_there - len(indent))
    plain = False if os.environ.get("NO_COLOR") else None
    if heading:
        click.echo(indent + laid_out(columns, [c.title for c in columns], chosen))
    for n, row in enumerate(rows):
        click.echo(indent + laid_out(columns, row, chosen, colours), color=plain)
        if more:
            say(more[n])
