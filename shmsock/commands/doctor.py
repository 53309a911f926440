"""`shmsock doctor`: find out what is wrong, why that matters, and how to mend it."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from shmsock.commands.params import check_environ

if TYPE_CHECKING:
    from shmsock.doctor.finding import Finding

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


@click.command()
@click.argument("region", required=False)
@click.option("--look", is_flag=True, help="Only look: attach to nothing, ask no peer.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(region: str | None, look: bool, as_json: bool) -> None:
    """Find out what is wrong, in guests and on hosts.

    Examines REGION; without it those that programs would use: SHMSOCK_REGION, all ivshmem devices, or the
    default region. Attaches to it for some seconds, to measure the memory and to ask every peer for an
    answer. As root it sees the QEMUs of the host, too.

    Exit status: 0 when nothing is wrong, or warnings only; 1 with errors; 2 for a wrong command line.
    """
    from shmsock.doctor.examine import examine
    from shmsock.doctor.finding import count

    check_environ()
    found = []
    for finding in examine(region, attach=not look):
        found.append(finding)
        if not as_json:
            for line in lines(finding):
                click.echo(line)
    errors, warnings = count(found, "error"), count(found, "warning")
    if as_json:
        told = {"errors": errors, "warnings": warnings, "findings": [asdict(finding) for finding in found]}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(_verdict(errors, warnings))
    if errors:
        sys.exit(1)


def lines(finding: Finding) -> Iterator[str]:
    """Tell of a finding, in the width of the terminal. What is to be copied stays as it is."""
    width = max(shutil.get_terminal_size().columns, 40)
    head = f"{finding.level:<8}{finding.name:<14} "
    first, *rest = _folded(finding.seen, width, len(head))
    yield click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level]) + f"{finding.name:<14} {first}"
    yield from (" " * len(head) + line for line in rest)
    if finding.level == "ok":
        return
    for title, text in ("why", finding.why), ("do", finding.mend):
        if text:
            told, *copied = text.split("\n")
            for number, line in enumerate(_folded(told, width, 13)):
                yield f"        {title + ':' if number == 0 else '':<5}{line}"
            yield from copied


def _folded(text: str, width: int, indent: int) -> list[str]:
    found = textwrap.wrap(text, max(width - indent, 20), break_long_words=False, break_on_hyphens=False)
    return found or [""]


def _verdict(errors: int, warnings: int) -> str:
    def number(n: int, what: str) -> str:
        return f"{n} {what}{'' if n == 1 else 's'}"

    if not errors and not warnings:
        return "nothing is wrong"
    return ", ".join(number(n, what) for n, what in ((errors, "error"), (warnings, "warning")) if n)
