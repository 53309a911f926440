"""`shmsock info`: show devices, and what lies in a region."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from shmsock import region as regions
from shmsock.commands.console import say, width
from shmsock.commands.group import Failed, message
from shmsock.commands.tables import Column, fitting, print_rows
from shmsock.errors import RegionError, other_memory
from shmsock.observe.describe import describe_device, describe_region
from shmsock.observe.snapshot import Content, OldFile, Section, inspect, old_files
from shmsock.region.place import restart
from shmsock.region.sizes import format_size, human
from shmsock.region.storage import disk_words

__all__ = ["info"]

COLOURS = {"silent": "yellow", "dead": "red"}
THERE = ("live", "silent", "attaching", "leaving")
PORTS = 8


@click.command()
@click.argument("region", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--all", "everything", is_flag=True, help="List the sections that were left, too.")
def info(region: str | None, as_json: bool, everything: bool) -> None:
    """Show shared memory devices, and what lies in REGION. Changes nothing.

    Without REGION: of all devices, and of SHMSOCK_REGION or, where there is no device, the default region.
    """
    devices = regions.find_devices()
    urls = [region] if region else regions.device_urls()
    chosen = os.environ.get("SHMSOCK_REGION")
    if not region and (chosen or not urls):
        first = chosen or regions.default_url()
        urls = urls if urls and first in ("auto", "pci:auto") else [first, *urls]
    found, problem = [], None
    for url in urls:
        try:
            with regions.open(url, writable=False) as opened:
                found.append({**describe_region(opened), "content": inspect(opened)})
        except OSError as error:
            problem = message(error)
            found.append({"url": url, "error": problem, **_old_files(url)})
    shown = regions.find_devices() or devices  # once more: opening one enables it
    if region and not region.startswith(("pci:", "vfio:")):
        shown = []
    elif region and "content" in found[0]:
        shown = [device for device in shown if device.url == found[0]["url"]]
    if as_json:
        click.echo(
            json.dumps(
                {"devices": [describe_device(d) for d in shown], "regions": found},
                default=asdict,
                indent=2,
            )
        )
    else:
        _print_info([describe_device(d) for d in shown], found, everything)
    if problem and len(urls) == 1:
        raise Failed(problem)
    for bad in found:
        if "error" in bad:
            click.echo(f"shmsock: {bad['error']}", err=True)
    if problem:
        sys.exit(1)


def _old_files(url: str) -> dict[str, Any]:
    """Find removed files of a region that cannot be opened: somebody may use them still."""
    try:
        kind, path = regions.parse_url(url)
    except RegionError:
        kind, path = "", ""
    return {"path": path, "old_files": old_files(path) if kind == "file" else []}


def _print_info(devices: list[dict[str, Any]], found: list[dict[str, Any]], everything: bool) -> None:
    for device in devices:
        say(device_lines(device))
    for region in found:
        if "content" in region:
            say(region_lines(region))
            _print_content(region["content"], everything)
        for old in region["old_files"]:
            say(old_file_lines(region["path"], old))
            if old.content:
                _print_content(old.content, everything)


def _print_content(content: Content, everything: bool) -> None:
    say(content_lines(content, everything))
    _print_sections(content, everything)


def device_lines(device: dict[str, Any]) -> Iterator[str]:
    """Tell of a device, much as lspci -v does."""
    yield f"{device['address']} {device['model']} [{device['ids']}] (rev {device['revision']:02x})"
    yield f"    Subsystem: {device['subsystem']}, class {device['class']}"
    enabled = "enabled" if device["enabled"] else "not enabled"
    decoding = "answers at its addresses" if device["decoding"] else "does not answer at its addresses"
    yield f"    Driver: {device['driver'] or 'none'}; {enabled}, {decoding}"
    names = ("registers", "MSI-X table", "the shared memory")
    for bar, name in zip(device["bars"], names, strict=True):
        yield f"    {bar['text']}" + (f"  {name}" if bar["size"] else "")


def region_lines(region: dict[str, Any]) -> Iterator[str]:
    """Tell how a region is mapped."""
    yield f"region {region['url']}: {format_size(region['size'])}"
    what = "memory of the ivshmem server at" if region["kind"] == "ivshmem" else "mapped from"
    where = f"    {what} {region['path']}"
    if region["kind"] in ("pci", "vfio"):
        yield where + ", to be used with the fences of write-combining memory"
    else:
        page = format_size(region["page_size"])
        known = human(region["allocated"])
        yield f"{where} ({region['file_system']}, pages of {page}, {known} of it allocated)"
        if region["dax"]:
            whole = format_size(region["file_size"])
            yield f"    made for --dax: the file has {whole}, as QEMU's size= must say"
        if words := disk_words(region["file_system"]):
            yield f"    {words}"
        yield f"    mode {region['mode']}, uid {region['uid']}, gid {region['gid']}" + (
            ""
            if region["section_locks"]
            else "; this file system knows no locks: the dead are found by their beat alone"
        )
    if bell := region["doorbell"]:
        lost = f"; {bell['lost']}" if bell["lost"] else ""
        yield f"    doorbell: we are peer {bell['id']}, with {_vectors(bell['vectors'])}{lost}"


def old_file_lines(path: str, old: OldFile) -> Iterator[str]:
    """Tell who holds a removed file; what lies in it comes next."""
    yield restart(old.held_by, path)
    if old.content is None:
        yield "    it cannot be looked into: be root, or their user"


def content_lines(content: Content, everything: bool) -> Iterator[str]:
    """Tell what lies in a region, but for the table of sections."""
    if content.state != "formatted":
        yield f"    {content.state}: {content.problem}"
        return
    yield (
        f"    format version {content.version}{f' by {content.release}' if content.release else ''}, "
        f"id {content.region_id}, {human(content.bytes or 0)}: "
        f"{content.peers} sections of {human(content.section_bytes)}, each with "
        f"up to {content.connections_per_peer} connections and {human(content.ring_bytes_per_peer)} for rings"
    )
    count = Counter(section.state for section in content.sections)
    hidden = " (--all lists them)" if count["left"] and not everything else ""
    yield "    sections: " + ", ".join(
        f"{number} {state}" + (f" by former owners{hidden}" if state == "left" else "")
        for state, number in count.most_common()
    )
    former = [s for s in content.sections if s.doorbell_gone and s.doorbell]
    if former:
        told = ", ".join(f"{s.doorbell['id']} of section {s.number}" for s in former if s.doorbell)
        yield (
            f"    doorbell {told}: of a former ivshmem server, and rung in vain; start the server, then "
            "all of its peers anew, guests included"
        )
    yield from (f"    {told}" for told in (content.upgrade, *(s.upgrade for s in content.sections)) if told)
    there = [section for section in content.sections if section.state in THERE]
    if len(there) == 1:
        yield f"    section {there[0].number} is alone: {other_memory()}"


def _print_sections(content: Content, everything: bool) -> None:
    """Print a row for each section that somebody owns, or owned. Where that is too wide, the last columns go
    into lines of their own."""
    unseen = ("free",) if everything else ("free", "left")
    sections = [section for section in content.sections if section.state not in unseen]
    if not sections:
        return
    names = {section.number: section.name for section in content.sections}
    titles = [*_WORDS, *_LISTS]
    rows = [_cells(section, names) for section in sections]
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    columns = [Column(titles[i], left=i > 0) for i in used]
    cells = [[row[i] or "-" * (i < len(_WORDS)) for i in used] for row in rows]
    room = width()
    if room is None or sum(w + 2 for _, w in fitting(columns, cells, None)) - 2 <= room - 4:
        print_rows(columns, cells, indent="    ", colours=COLOURS)
        return
    few = [n for n, i in enumerate(used) if i < len(_WORDS)]
    more = [[f"        {titles[i]} {row[i]}" for i in used if i >= len(_WORDS) and row[i]] for row in rows]
    shown = [[row[n] for n in few] for row in cells]
    print_rows([columns[n] for n in few], shown, more, indent="    ", colours=COLOURS)


_WORDS = ("section", "state", "name", "pid", "boot", "version")
_LISTS = ("woken by", "listens on", "connections", "publishes")


def _cells(section: Section, names: dict[int, str | None]) -> list[str]:
    return [
        str(section.number),
        section.state,
        section.name or "",
        "" if section.pid is None else str(section.pid),
        "here" if section.here else (section.boot or "")[:8],
        section.release or "",
        _woken_by(section),
        _ports(section),
        _connections(section, names),
        ", ".join(section.addresses),
    ]


def _woken_by(section: Section) -> str:
    """List all ways to wake the owner of a section: "doorbell 3 (2 vectors), futex"."""
    ways = ["futex"] if section.futex else []
    if bell := section.doorbell:
        ways.insert(0, f"doorbell {bell['id']} ({_vectors(bell['vectors'])})")
    return ", ".join(ways) or ("polling" if section.state in (*THERE, "dead") else "")


def _vectors(count: int) -> str:
    return "1 vector" if count == 1 else f"{count} vectors"


def _ports(section: Section) -> str:
    more = len(section.ports) - PORTS
    return ", ".join(map(str, section.ports[:PORTS])) + (f" and {more} more" if more > 0 else "")


def _connections(section: Section, names: dict[int, str | None]) -> str:
    """Count connections by peer: "3 with vm-b (1 closing)"."""
    count = Counter(c["peer_section"] for c in section.connections)
    ending = Counter(c["peer_section"] for c in section.connections if c["state"] == "closing")
    parts = []
    for peer, number in count.most_common(PORTS):
        closing = f" ({ending[peer]} closing)" if ending[peer] else ""
        parts.append(f"{number} with {names.get(peer) or f'section {peer}'}{closing}")
    return ", ".join(parts)
