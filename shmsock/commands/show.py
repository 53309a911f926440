"""`shmsock info` and `shmsock create` in words."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shmsock.commands.content import Content, OldFile, Section
from shmsock.errors import other_memory
from shmsock.region.place import restart
from shmsock.region.sizes import format_size
from shmsock.region.storage import disk_words

__all__ = [
    "alone_lines",
    "console",
    "content_lines",
    "device_lines",
    "former_lines",
    "human",
    "made_lines",
    "old_file_lines",
    "qemu_options",
    "region_lines",
    "section_table",
]

COLOURS = {"live": "green", "silent": "yellow", "dead": "red", "attaching": "cyan", "leaving": "cyan"}
PORTS = 8


def console(record: bool = False) -> Console:
    """Tables are not folded for the width of a pipe."""
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


def device_lines(device: dict[str, Any]) -> Iterator[str]:
    """Much as lspci -v prints it."""
    yield f"{device['address']} {device['model']} [{device['ids']}] (rev {device['revision']:02x})"
    yield f"    Subsystem: {device['subsystem']}, class {device['class']}"
    enabled = "enabled" if device["enabled"] else "not enabled"
    decoding = "answers at its addresses" if device["decoding"] else "does not answer at its addresses"
    yield f"    Driver: {device['driver'] or 'none'}; {enabled}, {decoding}"
    names = ("registers", "MSI-X table", "the shared memory")
    for bar, name in zip(device["bars"], names, strict=True):
        yield f"    {bar['text']}" + (f"  {name}" if bar["size"] else "")


def region_lines(region: dict[str, Any]) -> Iterator[str]:
    """How it is mapped."""
    yield f"region {region['url']}: {format_size(region['size'])}"
    what = "memory of the ivshmem server at" if region["kind"] == "ivshmem" else "mapped from"
    where = f"    {what} {region['path']}"
    if region["kind"] in ("pci", "vfio"):
        yield where + ", to be used with the fences of write-combining memory"
    else:
        page = format_size(region["page_size"])
        known = human(region["allocated"])
        yield f"{where} ({region['file_system']}, pages of {page}, {known} of it allocated)"
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
    """Before what lies in it."""
    yield restart(old.held_by, path)
    if old.content is None:
        yield "    it cannot be looked into: be root, or their user"


def content_lines(content: Content) -> Iterator[str]:
    """What lies in it, but for the table of sections."""
    if content.state != "formatted":
        yield f"    {content.state}: {content.problem}"
        return
    yield (
        f"    format version {content.version}, id {content.region_id}, {human(content.bytes or 0)}: "
        f"{content.peers} sections of {human(content.section_bytes)}, each with "
        f"{content.connections_per_peer} connections and {human(content.ring_bytes_per_peer)} for rings"
    )
    count = Counter(section.state for section in content.sections)
    yield "    sections: " + ", ".join(f"{number} {state}" for state, number in count.most_common())


def former_lines(content: Content) -> Iterator[str]:
    """Of those whose doorbell is a former server's."""
    former = [s for s in content.sections if s.doorbell_gone and s.doorbell]
    if former:
        told = ", ".join(f"{s.doorbell['id']} of section {s.number}" for s in former if s.doorbell)
        yield (
            f"    doorbell {told}: of a former ivshmem server, and rung in vain; start the server, then "
            "all of its peers anew, guests included"
        )


def alone_lines(content: Content) -> Iterator[str]:
    """When one peer alone is attached."""
    there = [section for section in content.sections if section.state in COLOURS and section.state != "dead"]
    if len(there) == 1:
        yield f"    section {there[0].number} is alone: {other_memory()}"


def section_table(content: Content) -> Table | None:
    """One row per section that somebody owns or owned; None: there are none."""
    rows = [section for section in content.sections if section.state != "free"]
    if not rows:
        return None
    names = {section.number: section.name for section in content.sections}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("    section", justify="right")
    for column in ("state", "name", "pid", "boot", "woken by", "listens on", "connections"):
        table.add_column(column, overflow="fold")
    for section in rows:
        state = Text(section.state, style=COLOURS.get(section.state, "dim"))
        boot = (section.boot or "")[:8] + (" (here)" if section.here else "")
        table.add_row(
            str(section.number),
            state,
            section.name or "-",
            "-" if section.pid is None else str(section.pid),
            boot,
            _woken_by(section),
            _ports(section),
            _connections(section, names),
        )
    return table


def _woken_by(section: Section) -> str:
    """All that it offers: which it is, depends on who wakes it. "doorbell 3 (2 vectors), futex"."""
    ways = ["futex"] if section.futex else []
    if bell := section.doorbell:
        ways.insert(0, f"doorbell {bell['id']} ({_vectors(bell['vectors'])})")
    return ", ".join(ways) or ("polling" if section.state in COLOURS else "")


def _vectors(count: int) -> str:
    return "1 vector" if count == 1 else f"{count} vectors"


def _ports(section: Section) -> str:
    more = len(section.ports) - PORTS
    return ", ".join(map(str, section.ports[:PORTS])) + (f" and {more} more" if more > 0 else "")


def _connections(section: Section, names: dict[int, str | None]) -> str:
    """How many with whom: "3 with vm-b (1 closing)"."""
    count = Counter(c["peer_section"] for c in section.connections)
    ending = Counter(c["peer_section"] for c in section.connections if c["state"] == "closing")
    parts = []
    for peer, number in count.most_common(PORTS):
        closing = f" ({ending[peer]} closing)" if ending[peer] else ""
        parts.append(f"{number} with {names.get(peer) or f'section {peer}'}{closing}")
    return ", ".join(parts)


def qemu_options(path: str, size: int) -> str:
    """What gives the region to a guest as BAR2."""
    file = path.replace(",", ",,")
    return (
        f"-object memory-backend-file,size={_qemu_size(size)},mem-path={file},share=on,id=HMB "
        "-device ivshmem-plain,memdev=HMB"
    )


def _qemu_size(size: int) -> str:
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


def made_lines(path: str, content: Content, mode: int) -> Iterator[str]:
    """What `shmsock create` made."""
    size = content.bytes or 0
    yield f"made {path}: {format_size(size)}, mode {mode:04o}, all of it allocated"
    yield (
        f"    for {content.peers} peers; each has {human(content.section_bytes)}, of it "
        f"{human(content.ring_bytes_per_peer)} for rings, up to {content.connections_per_peer} connections"
    )
    if size & (size - 1):
        larger = 1 << size.bit_length()
        yield (
            "    for processes of this host; to give it to guests, its size must be a power of two, "
            f"such as {format_size(larger)}"
        )
    else:
        yield "    to give it to a guest of QEMU:"
        yield f"        {qemu_options(path, size)}"
    yield "    to use it on this host:"
    yield f"        SHMSOCK_REGION={path}"
