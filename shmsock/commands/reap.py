"""`shmsock reap`: free the sections of the dead, and of the silent when a person says so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click

from shmsock import region as regions
from shmsock.address import boot_id
from shmsock.engine import attach
from shmsock.engine.layout import read_layout
from shmsock.engine.memory import Memory, native_core
from shmsock.errors import command, region_error
from shmsock.observe.snapshot import Section, sections
from shmsock.region.base import Region

__all__ = ["Reaped", "reap", "reap_region"]


@click.command()
@click.argument("region", required=False)
@click.option(
    "--section",
    "wanted",
    multiple=True,
    metavar="N",
    help="A silent section to free, by number or name; repeatable.",
)
@click.option("--yes", is_flag=True, help="Do not ask before freeing a silent section.")
@click.option(
    "--watch",
    type=click.FloatRange(1, 600),
    default=3.0,
    show_default=True,
    help="Seconds for which a beat must stand still.",
)
def reap(region: str | None, wanted: tuple[str, ...], yes: bool, watch: float) -> None:
    """Free the sections of REGION whose owners are gone. Those proven dead, and silent ones that you name."""
    with regions.open(region) as opened:
        done = reap_region(opened, wanted, None if yes else _confirm, watch)
    for line in done.lines():
        click.echo(line)
    if done.refused:
        sys.exit(1)


def _confirm(section: Section) -> bool:
    return click.confirm(
        f"Section {section.number} ({section.title}) is silent. If its owner comes back, it finds its "
        "connections lost. Free it?",
        err=True,
    )


@dataclass
class Reaped:
    """The outcome. `region`: its URL."""

    region: str
    freed: list[Section] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    silent: list[Section] = field(default_factory=list)
    """Left alone, as nobody named them."""

    def lines(self) -> Iterator[str]:
        for section in self.freed:
            why = "its owner is dead" if section.state == "dead" else "silent, and freed by hand"
            yield f"freed section {section.number} ({section.title}): {why}"
        yield from self.refused
        for section in self.silent:
            yield (
                f"section {section.number} ({section.title}) is silent, and nothing proves its owner dead: "
                f"`{command('reap', self.region, f'--section {section.number}')}` frees it"
            )
        if not self.freed and not self.refused and not self.silent:
            yield "nothing to free: every section is free or has a living owner"


def reap_region(
    region: Region, wanted: tuple[str, ...], confirm: Callable[[Section], bool] | None, watch_s: float
) -> Reaped:
    """`wanted`: silent sections, by number or name; `confirm` None: do not ask.

    Raises RegionError when one of them is not there, or is alive.
    """
    memory = Memory(native_core(), region.mmap, write_combining=region.write_combining)
    try:
        try:
            layout = read_layout(memory)
        except OSError as error:
            error.filename = region.path
            raise
        seen = sections(layout, region)
        chosen = _choose(seen, wanted)
        done = Reaped(region.url)
        words = {}  # the claims that were confirmed: nobody else's, should a section change hands meanwhile
        for section in chosen:
            if section.state == "silent" and confirm is not None and not confirm(section):
                done.refused.append(f"section {section.number} is left as it is")
            elif section.state == "silent":
                words[section.number] = layout.claim(section.number)

        def force(found: attach.Seen) -> bool:
            return words.get(found.section) == found.claim

        steps, freed = attach.reap(layout, region, boot_id(), force=force, watch_s=watch_s), []
        try:
            while True:
                time.sleep(next(steps))
        except StopIteration as end:
            freed = [found.section for found in end.value]
        done.freed = [section for section in seen if section.number in freed]
        for section in chosen:
            if section.number not in freed and (section.number in words or section.state == "dead"):
                done.refused.append(
                    f"section {section.number} ({section.title}) was not freed: its beat moves again"
                )
        named = {section.number for section in chosen}
        done.silent = [
            s
            for s in seen
            if s.state == "silent" and s.number not in named and not region.section_locked(s.number)
        ]
        return done
    finally:
        memory.release()


def _choose(seen: list[Section], wanted: tuple[str, ...]) -> list[Section]:
    chosen = []
    for text in wanted:
        owned = [s for s in seen if s.state not in ("free", "left")]
        found = [s for s in owned if text in (str(s.number), s.name)]
        if not found:
            known = ", ".join(f"{s.number} ({s.name or 'no name'}, {s.state})" for s in owned) or "none"
            raise region_error(2, f"no section {text!r} has an owner; those that have: {known}")
        gone = [s for s in found if s.state in ("silent", "dead")]
        if not gone:
            raise region_error(
                16,
                f"section {found[0].number} ({found[0].title}) is {found[0].state}: stop it first",
            )
        chosen += [s for s in gone if s not in chosen]
    return chosen
