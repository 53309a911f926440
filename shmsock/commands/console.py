"""The console of the subcommands, and sizes for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "human"]


def console(record: bool = False) -> Console:
    """Make what tables are printed on: a pipe does not fold them for its width."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(record=record)
    return Console(width=160, soft_wrap=True, record=record)


def human(size: int) -> str:
    """A size in the unit that suits it: "61.4 MiB"."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{size} bytes" if units[0] == "bytes" else f"{value:.4g} {units[0]}"
