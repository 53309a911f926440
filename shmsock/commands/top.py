"""`shmsock top`: a region as it is now, once a second; keys choose what is shown."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from shmsock.commands.console import short, width
from shmsock.commands.observing import opened, region_argument
from shmsock.commands.tables import Column, cut, fitting, laid_out
from shmsock.observe.connections import Connection, Way
from shmsock.observe.rates import Node, View, Watcher
from shmsock.observe.snapshot import BEAT_S

if TYPE_CHECKING:
    from rich.text import Text
from shmsock.region.sizes import human

__all__ = ["top"]

BARS = " ▁▂▃▄▅▆▇"  # not a full one: it would touch the line above
KEYS = "q quit   s sort   r turn round   p peers   c connections   space hold   + - pace"
SORTS = ("rate", "queued", "in", "out", "name", "state")
COLOURS = {
    "silent": "yellow",
    "dead": "red",
    "orphaned": "red",
    "to write": "yellow",
    "peer": "yellow",
    "both": "yellow",
}
PEERS = (
    Column("Section", 2),
    Column("Name", left=True, cut=True),
    Column("State", left=True),
    Column("Process", 4),
    Column("Kernel", 7, left=True),
    Column("Loop", 3, left=True, least=6),
    Column("Conns", least=5),
    Column("Queued", 2, least=6),
    Column("In/s", least=5),
    Column("Out/s", least=5),
    Column("Reads/s", 5, least=5),
    Column("Writes/s", 6, least=5),
    Column("Spin hits", 4, least=5),
    Column("Sleeps/s", 4, least=5),
    Column("Woken/s", 5, least=5),
    Column("Kicks/s", 5, least=5),
    Column("Passes/s", 8, least=5),
    Column("Lost", 3, least=4),
    Column("Rings", 8, least=5),
    Column("In and out", 9, left=True, least=20),
)
CONNECTIONS = (
    Column("State", left=True, least=11),
    Column("Local", left=True, cut=True),
    Column("Peer", left=True, cut=True),
    Column("Recv-Q", least=6),
    Column("Send-Q", least=6),
    Column("In/s", least=5),
    Column("Out/s", least=5),
    Column("Rings", 4, least=11),
    Column("Waits", 3, left=True, least=9),
    Column("Slots", 5, left=True),
)


class Choice:
    """What the user wants to see."""

    def __init__(self, sort: str, interval: float) -> None:
        self.sort, self.interval = sort, interval
        self.reverse = self.held = self.over = self.changed = False
        self.peers = self.connections = True

    def key(self, key: str) -> None:
        """Do what a key asks for."""
        self.changed = True
        if key in "qQ\x03\x04":
            self.over = True
        elif key in "s>":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key in "S<":
            self.sort = SORTS[SORTS.index(self.sort) - 1]
        elif key == "r":
            self.reverse = not self.reverse
        elif key == "p":
            self.peers = not self.peers or not self.connections
        elif key == "c":
            self.connections = not self.connections or not self.peers
        elif key == " ":
            self.held = not self.held
        elif key in "+=":
            self.interval = max(self.interval / 2, BEAT_S)
        elif key == "-":
            self.interval = min(self.interval * 2, 60.0)
        else:
            self.changed = False


@click.command()
@region_argument
@click.option("--sort", type=click.Choice(SORTS), default="rate", show_default=True, help="What comes first.")
@click.option("-r", "--reverse", is_flag=True, help="The other way round.")
@click.option(
    "-d",
    "--interval",
    type=click.FloatRange(BEAT_S, 60),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    metavar="N",
    help="How many connections are printed at the most. A terminal shows as many as fit.",
)
@click.option("-n", "--count", type=click.IntRange(1), help="End after so many looks; each is printed.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a line for each look.")
def top(
    region: str | None,
    sort: str,
    reverse: bool,
    interval: float,
    limit: int,
    count: int | None,
    as_json: bool,
) -> None:
    """Show peers and connections, live.

    Changes nothing. Keys: q ends it, s sorts by something else, r turns the order round, p and c show peers
    or connections only, space holds it, + and - change the pace. Without a terminal, or with --count, each
    look is printed.
    """
    choice = Choice(sort, interval)
    choice.reverse = reverse
    with opened(region, as_json) as watcher:
        if as_json or count or not (sys.stdin.isatty() and sys.stdout.isatty()):
            _print(watcher, choice, count, as_json, limit)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _live(watcher, choice)


def _print(watcher: Watcher, choice: Choice, count: int | None, as_json: bool, limit: int) -> None:
    looks = 0
    while count is None or looks < count:
        view = watcher.watch(choice.interval)
        looks += 1
        if as_json:
            click.echo(json.dumps(view.as_json()))
        else:
            from rich.console import Console

            wide = width() or 200
            console = Console(width=wide, color_system="auto" if sys.stdout.isatty() else None)
            for line in screen(view, choice, wide, None, limit):
                line.rstrip()
                console.print(line, no_wrap=True, crop=False)
        sys.stdout.flush()


def _live(watcher: Watcher, choice: Choice) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()
    with _keys() as fd, Live(console=console, screen=True, auto_refresh=False, transient=True) as live:

        def show(view: View) -> None:
            lines = screen(view, choice, console.width, console.height)
            live.update(Group(*lines), refresh=True)

        def idle(seconds: float) -> bool:
            if select.select([fd], [], [], seconds)[0]:
                for key in os.read(fd, 64).decode("utf-8", "replace") or "q":
                    choice.key(key)
            return choice.over or choice.changed

        view = watcher.watch(BEAT_S, idle)
        while not choice.over:
            choice.changed = False
            show(view)
            if choice.held:
                idle(3600)
            else:
                after = watcher.watch(choice.interval, idle)
                view = view if choice.changed else after


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Have the terminal give each key at once."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# -- what is shown


def screen(view: View, choice: Choice, wide: int, high: int | None, limit: int = 0) -> list[Text]:
    """Return the lines, as many as fit: none is wider than `wide`. `high` None: all peers, and `limit`
    connections."""
    lines = [*_head(view, choice, wide)]
    room = None if high is None else max(high - len(lines) - 1, 0)
    both = choice.peers and choice.connections
    if choice.peers:
        part = room if not both or room is None else max(min(len(view.nodes) + 2, room // 2), 0)
        lines += _table(PEERS, *_peers(view, choice), wide, part)
        room = None if high is None else max(high - len(lines) - 1, 0)
    if choice.connections:
        lines += _table(CONNECTIONS, *_connections(view, choice, limit if room is None else room), wide, room)
    if high is not None:
        from rich.text import Text

        lines = lines[: high - 1]
        lines += [Text("")] * (high - 1 - len(lines))
        lines.append(Text(cut(KEYS, wide), style="dim"))
    return lines


def _head(view: View, choice: Choice, wide: int) -> Iterator[Text]:
    from rich.text import Text

    content = view.content
    states = Counter(section.state for section in content.sections)
    there = ", ".join(
        f"{states[s]} {s}" for s in ("live", "silent", "dead", "attaching", "leaving") if states[s]
    )
    clock = time.strftime("%H:%M:%S", time.localtime(view.taken))
    pace = "held" if choice.held else f"every {choice.interval:g} s"
    right = f"{clock}  {pace}, by {choice.sort}{' (reverse)' * choice.reverse}"
    left = f"shmsock  {view.url}  {human(content.bytes or 0)}"
    left = cut(left, max(wide - len(right) - 2, 0))
    yield Text(cut(left.ljust(wide - len(right)) + right, wide), style="bold")
    kinds = Counter(c.state for c in view.connections if not c.datagrams)
    counts = ", ".join(
        f"{kinds[s]} {s}" for s in ("open", "half-closed", "opening", "closing", "orphaned") if kinds[s]
    )
    links = sum(c.datagrams for c in view.connections)
    said = f"peers: {there or 'none'} of {content.peers}   connections: {counts or 'none'}"
    said += f"   datagram links: {links}" if links else ""
    said += "   (and more)" if view.more else ""
    said += f"   region file {view.displaced}!" if view.displaced else ""
    yield Text(cut(said, wide))
    moved = view.history[-1]
    begin = f"moved: {short(moved[-1])}B/s "
    end = f" most {short(max(moved))}B/s"
    yield Text(cut(begin + spark(moved, max(min(wide - len(begin) - len(end), 120), 0)) + end, wide))


def spark(values: Sequence[float], wide: int) -> str:
    """Draw values as bars, the last one at the right; the highest one that is shown is a full bar."""
    shown = list(values)[-wide:] if wide > 0 else []
    most = max(shown, default=0.0)
    bars = [BARS[0] if v <= 0 else BARS[max(1, round(v / most * (len(BARS) - 1)))] for v in shown]
    return "".join(bars).rjust(wide)


def _peers(view: View, choice: Choice) -> tuple[list[list[str]], int]:
    keys: dict[str, Callable[[Node], Any]] = {
        "rate": lambda n: -(n.rates.get("bytes_in", 0) + n.rates.get("bytes_out", 0)),
        "queued": lambda n: -n.queued_in,
        "in": lambda n: -n.rates.get("bytes_in", 0),
        "out": lambda n: -n.rates.get("bytes_out", 0),
        "name": lambda n: n.section.name or "",
        "state": lambda n: n.section.state,
    }
    nodes = sorted(view.nodes, key=lambda n: (keys[choice.sort](n), n.section.number), reverse=choice.reverse)
    return [_peer(node, view) for node in nodes], len(nodes)


def _peer(node: Node, view: View) -> list[str]:
    section, rates = node.section, node.rates

    def rate(name: str) -> str:
        return short(rates[name]) if name in rates else "-"

    spins = rates.get("spin_hits", 0) + rates.get("spin_misses", 0)
    return [
        str(section.number),
        section.name or f"section {section.number}",
        section.state,
        "-" if section.pid is None else str(section.pid),
        "here" if section.here else (section.boot or "-")[:8],
        "-" if section.state != "live" else "asleep" if node.asleep else "awake",
        str(node.connections + node.links),
        short(node.queued_in, 1024),
        rate("bytes_in"),
        rate("bytes_out"),
        rate("reads"),
        rate("writes"),
        f"{rates['spin_hits'] / spins:.0%}" if spins else "-",
        rate("sleeps"),
        rate("received"),
        rate("kicks"),
        rate("pumps"),
        str(node.counts.get("healed", "-")),
        short(node.ring_bytes, 1024),
        spark(view.history[section.number], 20),
    ]


def _connections(view: View, choice: Choice, room: int) -> tuple[list[list[str]], int]:
    keys: dict[str, Callable[[Connection], Any]] = {
        "rate": lambda c: -c.rate,
        "queued": lambda c: -c.queued,
        "in": lambda c: -(c.received.rate or 0),
        "out": lambda c: -(c.sent.rate or 0),
        "name": lambda c: c.local.title,
        "state": lambda c: c.state,
    }
    found = sorted(
        view.connections,
        key=lambda c: (keys[choice.sort](c), c.local.section, c.local.slot or 0),
        reverse=choice.reverse,
    )
    return [_connection(c) for c in found[:room]], len(found)


def _connection(c: Connection) -> list[str]:
    def queue(way: Way) -> str:
        return "?" if way.queued is None else short(way.queued, 1024)

    waits = {(True, True): "both", (True, False): "to write", (False, True): "peer"}
    slot = "-" if c.remote.slot is None else str(c.remote.slot)
    return [
        "datagrams" if c.datagrams and c.state == "open" else c.state,
        c.local.title,
        c.remote.title,
        queue(c.received),
        queue(c.sent),
        short(c.received.rate or 0),
        short(c.sent.rate or 0),
        f"{short(c.received.ring, 1024)}/{short(c.sent.ring, 1024)}",
        waits.get((c.sent.waits, c.received.waits), ""),
        f"{c.local.section}.{c.local.slot} {c.remote.section}.{slot}",
    ]


def _table(
    columns: Sequence[Column], rows: list[list[str]], count: int, wide: int, room: int | None
) -> Iterator[Text]:
    from rich.text import Text

    if room is not None and room < 2:
        return
    kept = rows if room is None else rows[: room - 1 if count < room else room - 2]
    chosen = fitting(columns, rows, wide)
    yield Text(cut(laid_out(columns, [c.title for c in columns], chosen), wide).ljust(wide), style="reverse")
    for row in kept:
        line = Text(cut(laid_out(columns, row, chosen), wide))
        at = 0
        for i, cell in chosen:
            if columns[i].title in ("State", "Waits") and row[i] in COLOURS:
                line.stylize(COLOURS[row[i]], at, at + cell)
            at += cell + 2
        yield line
    if len(kept) < count:
        yield Text(cut(f"... and {count - len(kept)} more", wide), style="dim")
