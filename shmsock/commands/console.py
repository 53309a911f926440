"""The console of the subcommands: as wide as the terminal, or as COLUMNS says. And sizes for people."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "say", "short", "width"]


def width() -> int | None:
    """Return how many columns there are. None: a pipe, of which nobody has said so: lines stay whole."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def console(record: bool = False) -> Console:
    """Make what tables are printed on: a pipe does not fold them for its width, unless COLUMNS says so."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(record=record)
    columns = width()
    return Console(width=columns or 160, soft_wrap=columns is None, record=record)


def say(lines: Iterable[str]) -> None:
    """Print lines, folded between words where they are too wide; what follows is indented further."""
    columns = width()
    for line in lines:
        if columns is None or len(line) <= columns:
            click.echo(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        click.echo(
            textwrap.fill(
                line.strip(),
                columns,
                initial_indent=indent,
                subsequent_indent=indent + "    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


def short(number: float, step: int = 1000) -> str:
    """A number in 5 characters at most: "0", "812", "1.2k", "34M"; `step` 1024: a size, "64K"."""
    value, units = float(number), ["", "k" if step == 1000 else "K", "M", "G", "T", "P", "E"]
    while value >= step - 0.5 and len(units) > 1:
        value /= step
        del units[0]
    if not units[0]:
        return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    return (f"{value:.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}") + units[0]
