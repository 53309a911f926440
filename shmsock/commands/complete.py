"""Values that a shell completes: regions, PCI addresses, peers, sections, measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
from click.shell_completion import CompletionItem

__all__ = ["attach_values"]

Items = Iterator[CompletionItem]


def attach_values(command: click.Command) -> None:
    """Have the parameters of `command` complete what is there, by the names that all commands use."""
    for param in command.params:
        if param.name in _VALUES:
            param.type = _Completed(_VALUES[param.name])
    for sub in command.commands.values() if isinstance(command, click.Group) else ():
        attach_values(sub)


class _Completed(click.ParamType[str]):
    """Text, with the values that `items` finds. Nothing else is asked of it: no command runs here."""

    name = "text"

    def __init__(self, items: Callable[[click.Context, str], Items]) -> None:
        self._items = items

    def shell_complete(
        self, context: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            return list(self._items(context, incomplete))
        except OSError:
            return []


def _regions(context: click.Context, incomplete: str) -> Items:
    from shmsock import region as regions

    if incomplete.startswith(("/", ".", "~")):
        yield CompletionItem(incomplete, type="file")
        return
    known = {regions.default_url(): "used when none is named"}
    known |= {device.url: device.model for device in regions.find_devices()}
    for url, what in known.items():
        if not (url.startswith("file:") and regions.is_missing(url)):
            yield from _starting(incomplete, url.removeprefix("file:"), what)


def _addresses(context: click.Context, incomplete: str) -> Items:
    from shmsock.region import find_devices

    for device in find_devices():
        yield from _starting(incomplete, device.address, device.model)


def _peers(context: click.Context, incomplete: str) -> Items:
    for section in _sections(context):
        if section.state not in ("free", "left", "dead") and section.name:
            yield from _starting(incomplete, section.name, f"section {section.number}")


def _numbers(context: click.Context, incomplete: str) -> Items:
    for section in _sections(context):
        if section.state not in ("free", "left"):
            yield from _starting(incomplete, str(section.number), section.name)


def _measures(context: click.Context, incomplete: str) -> Items:
    from shmsock.bench.measures import MEASURES, SWEEPS

    before, comma, last = incomplete.rpartition(",")
    chosen = before.split(",")
    titles = {m.name: m.title for m in MEASURES.values()} | {sweep.name: sweep.title for sweep in SWEEPS}
    for name, title in titles.items():
        if name.startswith(last) and name not in chosen:
            yield CompletionItem(before + comma + name, help=title)


def _sections(context: click.Context):  # type: ignore[no-untyped-def]
    """Read who is attached to the region that the command line names; none: the usual one."""
    from shmsock import region as regions
    from shmsock.observe.snapshot import inspect

    with regions.open(context.params.get("region"), writable=False) as opened:
        return inspect(opened, 0).sections


def _starting(incomplete: str, value: str, what: str | None) -> Items:
    if value.startswith(incomplete):
        yield CompletionItem(value, help=what)


_VALUES = {
    "address": _addresses,
    "host": _peers,
    "only": _measures,
    "region": _regions,
    "wanted": _numbers,
    "words": _peers,
}
"""By the names of parameters."""
