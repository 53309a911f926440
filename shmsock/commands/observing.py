"""What the commands that look at a region have in common: opening it, and what is told of a node."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from shmsock import region as regions
from shmsock.commands.console import short
from shmsock.commands.group import Failed, message
from shmsock.observe.rates import Node, Watcher
from shmsock.observe.snapshot import BEAT_S, MOST, inspect
from shmsock.region.pci import PciDevice
from shmsock.region.sizes import human

__all__ = [
    "errors_told",
    "json_option",
    "no_header_option",
    "node_lines",
    "opened",
    "region_argument",
    "tell",
    "watch_option",
]

_F = TypeVar("_F", bound=Callable[..., Any])
PORTS = 12

region_argument = click.argument("region", required=False, metavar="[REGION]")
json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")
no_header_option = click.option("-H", "--no-header", is_flag=True, help="Leave the headings out.")
watch_option = click.option(
    "--watch",
    type=click.FloatRange(BEAT_S),
    default=BEAT_S,
    show_default=True,
    help="Seconds to watch it, for rates and for who is alive.",
)


@contextlib.contextmanager
def errors_told(as_json: bool) -> Iterator[None]:
    """Print an error as JSON, too, for who asked for that: {"error": ...}."""
    try:
        yield
    except (OSError, Failed) as error:
        text = message(error) if isinstance(error, OSError) else error.message
        if as_json and not isinstance(error, BrokenPipeError):
            tell({"error": text})
        raise


@contextlib.contextmanager
def opened(url: str | None, as_json: bool = False, most: int = MOST) -> Iterator[Watcher]:
    """Open a region to be looked at: the one that programs would use if none is named. `most`: slots. Raises
    Failed when there is nothing in it to be seen."""
    with errors_told(as_json), regions.open(url, writable=False, probe=_is_formatted) as region:
        try:
            watcher = Watcher(region, most=most)
        except OSError:
            content = inspect(region, 0)
            raise Failed(f"region {region.url} is {content.state}: {content.problem}") from None
        with watcher:
            yield watcher


def _is_formatted(device: PciDevice) -> bool:
    try:
        with regions.open(device.url, writable=False) as region:
            return inspect(region, 0).state == "formatted"
    except OSError:
        return False


def tell(document: dict[str, Any]) -> None:
    """Print JSON, on one line."""
    click.echo(json.dumps(document))


def node_lines(node: Node) -> Iterator[str]:
    """Tell more of a node than a row can: ports, and what it counts."""
    section = node.section
    bits = f", features {', '.join(map(str, section.features))}" if section.features else ""
    yield f"    runs shmsock {section.release}{bits}"
    if section.upgrade:
        yield f"    {section.upgrade}"
    if section.ports:
        rest = len(section.ports) - PORTS
        ports = ", ".join(map(str, section.ports[:PORTS])) + (f" and {rest} more" if rest > 0 else "")
        yield f"    listens on {ports}"
    if section.addresses:
        yield f"    publishes {', '.join(section.addresses)}"
    ways = ["a futex"] if section.futex else []
    if section.doorbell:
        gone = ", of a server that is gone" if section.doorbell_gone else ""
        ways.insert(0, f"doorbell {section.doorbell['id']} ({section.doorbell['vectors']} vectors{gone})")
    yield f"    woken by {' or '.join(ways) or 'polling'}; rings of {human(node.ring_bytes)} in use"
    r = node.rates
    if "reads" not in r:
        yield "    its version shows no counters"
        return
    spins = r["spin_hits"] + r["spin_misses"]
    paid = f", {r['spin_hits'] / spins:.0%} paid" if spins else ""
    yield (
        f"    in a second: {short(r['reads'])} reads, {short(r['writes'])} writes, "
        f"{short(spins)} spins{paid}; "
        f"{short(r['sleeps'])} sleeps, {short(r['received'])} wakeups by peers, {short(r['spurious'])} for "
        f"nothing; {short(r['kicks'])} kicks given; {short(r['pumps'])} passes"
    )
    yield (
        f"    since it attached: {human(node.counts['bytes_in'])} received, "
        f"{human(node.counts['bytes_out'])} sent"
        + (f"; {node.counts['healed']} wakeups were lost" if node.counts["healed"] else "")
    )
