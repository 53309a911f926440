"""`shmsock peers`: show who is attached to a region, and what each of them does."""

from __future__ import annotations

import click

from shmsock.commands.console import short
from shmsock.commands.info import COLOURS
from shmsock.commands.observing import (
    json_option,
    no_header_option,
    node_lines,
    opened,
    region_argument,
    tell,
    watch_option,
)
from shmsock.commands.tables import Column, print_rows
from shmsock.observe.rates import Node

__all__ = ["peers"]

COLUMNS = (
    Column("Section"),
    Column("State", left=True),
    Column("Name", left=True),
    Column("Process", 2),
    Column("Kernel", 4, left=True),
    Column("Loop", 3, left=True),
    Column("Version", 5, left=True),
    Column("Conns"),
    Column("Queued", 2),
    Column("In/s", 1),
    Column("Out/s", 1),
)


@click.command()
@region_argument
@click.option("-i", "--info", is_flag=True, help="Show more: ports, how it is woken, and what it counts.")
@no_header_option
@watch_option
@json_option
def peers(region: str | None, info: bool, no_header: bool, watch: float, as_json: bool) -> None:
    """Show who is attached, and what they do.

    Changes nothing. Kernel is "here" for processes of this one. A loop that sleeps is woken by its peers.
    Queued are the bytes for it that it has not read. Without REGION: the one that programs would use.
    """
    with opened(region, as_json) as watcher:
        view = watcher.watch(watch)
    if as_json:
        shown = view.as_json()
        del shown["connections"], shown["more_connections"]
        tell(shown)
        return
    rows = [_row(node) for node in view.nodes]
    print_rows(
        COLUMNS,
        rows,
        [list(node_lines(n)) for n in view.nodes] if info else [],
        heading=not no_header,
        colours=COLOURS,
    )
    if view.displaced:
        click.echo(f"shmsock: the file of this region was {view.displaced} meanwhile", err=True)


def _row(node: Node) -> list[str]:
    section = node.section
    return [
        str(section.number),
        section.state,
        section.name or "-",
        "-" if section.pid is None else str(section.pid),
        "here" if section.here else (section.boot or "-")[:8],
        "-" if section.state != "live" else "asleep" if node.asleep else "awake",
        section.release or "-",
        str(node.connections),
        short(node.queued_in, 1024),
        short(node.rates.get("bytes_in", 0)),
        short(node.rates.get("bytes_out", 0)),
    ]
