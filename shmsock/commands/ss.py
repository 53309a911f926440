"""`shmsock ss`: show the connections of a region, as ss(8) does those of the kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import click

from shmsock.commands.console import say, short
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
from shmsock.observe.connections import Connection, Way
from shmsock.observe.rates import Node, View
from shmsock.observe.snapshot import MOST
from shmsock.region.sizes import human

__all__ = ["ss"]

COLUMNS = (
    Column("State", left=True),
    Column("Recv-Q"),
    Column("Send-Q"),
    Column("Local", left=True),
    Column("Peer", left=True),
    Column("In/s", 1),
    Column("Out/s", 1),
)
LIMIT = 5000


@click.command()
@region_argument
@click.option("-n", "--name", "host", metavar="NAME", help="Only connections of this peer, as seen from it.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), help="Only those with this port at an end.")
@click.option("-t", "--streams", is_flag=True, help="Only streams.")
@click.option("-u", "--datagrams", is_flag=True, help="Only links that carry datagrams.")
@click.option("-l", "--listening", is_flag=True, help="Show the ports that are listened on instead.")
@click.option(
    "-i", "--info", is_flag=True, help="Show more: rings, who waits for what, and what peers count."
)
@click.option("-s", "--summary", is_flag=True, help="Show only how many there are.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=LIMIT,
    show_default=True,
    metavar="N",
    help="How many are shown at the most.",
)
@no_header_option
@watch_option
@json_option
def ss(
    region: str | None,
    host: str | None,
    port: int | None,
    streams: bool,
    datagrams: bool,
    listening: bool,
    info: bool,
    summary: bool,
    limit: int,
    no_header: bool,
    watch: float,
    as_json: bool,
) -> None:
    """Show connections, what waits in them, and rates.

    Changes nothing. Local is the side that opened a connection. Recv-Q counts the bytes that lie in the ring
    for it, Send-Q those that it wrote and its peer has not read yet. Without REGION: the one that programs
    would use.
    """
    with opened(region, as_json, max(MOST, 4 * limit)) as watcher:
        view = watcher.watch(watch)
    found = _chosen(view, host, port, streams, datagrams)
    if as_json:
        shown = view.as_json()
        shown["connections"] = [c.as_json() for c in found]
        tell(shown)
    elif summary:
        say(_summary(view, found, len(found) == len(view.connections)))
    elif listening:
        _print_listening(view, host, port, not no_header)
    else:
        found.sort(key=lambda c: (c.local.name or "", c.local.section, c.local.port or 0, c.remote.title))
        more = [list(_lines(c)) for c in found[:limit]] if info else []
        print_rows(COLUMNS, [_row(c) for c in found[:limit]], more, heading=not no_header)
        if len(found) > limit:
            click.echo(f"shmsock: {len(found) - limit} more are not shown: --limit", err=True)
        if info:
            for node in view.nodes:
                if host in (None, node.section.name):
                    say([f"{node.section.title}, section {node.section.number}:", *node_lines(node)])
    if view.more and not as_json:
        click.echo(f"shmsock: only the first {len(view.connections)} connections were looked at", err=True)
    if view.displaced:
        click.echo(f"shmsock: the file of this region was {view.displaced} meanwhile", err=True)


def _chosen(
    view: View, name: str | None, port: int | None, streams: bool, datagrams: bool
) -> list[Connection]:
    found = view.connections
    if name is not None:
        ours = {
            node.section.number
            for node in view.nodes
            if name in (node.section.name, str(node.section.number))
        }
        if not ours:
            there = ", ".join(sorted({node.section.name or "?" for node in view.nodes})) or "nobody"
            raise click.UsageError(f"no peer {name!r} in the region: there are {there}")
        found = [
            c if c.local.section in ours else c.seen_from(c.remote.section)
            for c in found
            if {c.local.section, c.remote.section} & ours
        ]
    if port is not None:
        found = [c for c in found if port in (c.local.port, c.remote.port)]
    if streams != datagrams:
        found = [c for c in found if c.datagrams == datagrams]
    return list(found)


def _row(c: Connection) -> list[str]:
    return [
        f"{c.state} dgrams" if c.datagrams else c.state,
        _queue(c.received),
        _queue(c.sent),
        c.local.title,
        c.remote.title,
        short(c.received.rate or 0),
        short(c.sent.rate or 0),
    ]


def _queue(way: Way) -> str:
    return "?" if way.queued is None else str(way.queued)


def _lines(c: Connection) -> Iterator[str]:
    def ends(end_slot: int | None, section: int, generation: int | None) -> str:
        life = "" if generation is None else f" (life {generation})"
        return f"section {section}" + ("" if end_slot is None else f" slot {end_slot}{life}")

    near, far = c.local, c.remote
    yield f"    in: {_way(c.received)}; out: {_way(c.sent)}"
    yield (
        f"    {ends(near.slot, near.section, near.generation)} with "
        f"{ends(far.slot, far.section, far.generation)}"
    )


def _way(way: Way) -> str:
    said = [f"ring of {human(way.ring)}" if way.ring else "no ring"]
    said += ["writer waits for room"] * way.waits + ["reader was told"] * way.told
    said += ["FIN"] * way.fin + ["reset"] * way.reset + ["closed"] * way.done
    return ", ".join(said)


def _summary(view: View, found: list[Connection], whole: bool) -> Iterator[str]:
    streams = [c for c in found if not c.datagrams]
    states = ", ".join(f"{n} {s}" for s, n in Counter(c.state for c in streams).most_common())
    yield f"connections: {len(streams)}" + (f" ({states})" if states else "")
    yield f"links for datagrams: {len(found) - len(streams)}"
    yield f"waiting in rings: {human(sum(c.queued for c in found))}"
    rate = sum(n.rates.get("bytes_out", 0) for n in view.nodes) if whole else sum(c.rate for c in found)
    yield f"moved in a second: {human(round(rate))}"
    yield f"ports listened on: {sum(len(node.section.ports) for node in view.nodes)}"


def _print_listening(view: View, name: str | None, port: int | None, heading: bool) -> None:
    def ports(node: Node) -> list[int]:
        return [p for p in node.section.ports if port in (None, p)]

    rows = [
        [
            f"{node.section.name or 'section'}:{p}",
            str(node.section.number),
            str(node.section.pid or "-"),
            node.section.state,
        ]
        for node in view.nodes
        if name in (None, node.section.name, str(node.section.number))
        for p in ports(node)
    ]
    columns = (Column("Local", left=True), Column("Section"), Column("Process"), Column("Owner", left=True))
    print_rows(columns, rows, heading=heading)
