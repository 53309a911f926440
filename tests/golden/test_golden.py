"""Regions that released versions have written are read by this one: looked at, attached to, taken over."""

from __future__ import annotations

import asyncio
import lzma
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import shmsock
from shmsock import region as regions
from shmsock.address import boot_id
from shmsock.engine import layout as lay
from shmsock.engine.features import OWN, release_text
from shmsock.engine.layout import Layout, read_layout
from shmsock.engine.memory import Memory, native_core
from shmsock.observe.rates import Watcher
from shmsock.observe.snapshot import Content, inspect
from tests.golden.scenes import BACK, DATAGRAMS, SCENES, THERE
from tests.golden.versions import HERE

REGIONS = HERE / "regions"
VERSIONS = sorted(folder.name for folder in REGIONS.iterdir() if folder.name[0].isdigit())
OLD_LAYOUTS = sorted(folder.name for folder in REGIONS.glob("layout-*"))
every = pytest.mark.parametrize("scene", SCENES)
of_each = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def path() -> Iterator[str]:
    with TemporaryDirectory(dir="/dev/shm") as folder:
        yield f"{folder}/region"


def restore(path: str, version: str, scene: str) -> None:
    Path(path).write_bytes(lzma.decompress((REGIONS / version / f"{scene}.xz").read_bytes()))


def killed_here(path: str) -> None:
    """Have all owners be processes of this machine that were killed just now: nobody holds their locks."""
    with regions.open(path) as opened:
        memory = Memory(native_core(), opened.mmap)
        layout: Layout = read_layout(memory)
        for at in map(layout.section, range(layout.peers)):
            memory.write(at + lay.BOOT, boot_id())
            memory.write(at + lay.DEV, struct.pack("<2Q", *opened.identity))
        memory.release()


def seen(path: str) -> Content:
    with regions.open(path, writable=False) as opened:
        return inspect(opened, 0.01)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readexactly(5))
    writer.close()


async def talk(path: str, *where: int | None) -> list[int]:
    """Two nodes of this version, in those sections, and an echo between them. Returns the sections."""
    async with (
        shmsock.attach(path, name="new-a", section=where[0]) as a,
        shmsock.attach(path, name="new-b", section=where[1]) as b,
    ):
        server = await shmsock.start_server(echo, None, 7000, node=b)
        reader, writer = await shmsock.open_connection("new-b", 7000, node=a)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        server.close()
        return [a.engine.section, b.engine.section]


def test_this_version_has_written_some() -> None:
    assert release_text(OWN.release) in VERSIONS
    assert len(VERSIONS) > 1
    assert [f"layout-{n}" for n in range(1, lay.VERSION)] == OLD_LAYOUTS


@of_each
@every
def test_are_looked_at(path: str, version: str, scene: str) -> None:
    restore(path, version, scene)
    content = seen(path)
    told = None if version == "0.1.0" else version
    assert (content.state, content.version, content.release) == ("formatted", 5, told)
    there = [(s.state, s.name, s.ports) for s in content.sections if s.state != "free"]
    assert (
        there
        == {
            "idle": [("left", "vm-a", [])],
            "live": [("silent", "vm-a", [7000])],
            "busy": [("silent", "vm-a", there[0][2]), ("silent", "vm-b", [7000, 7001])],
            "left": [("silent", "vm-a", []), ("left", "vm-b", [])],
        }[scene]
    )
    for section in content.sections:
        if section.state == "silent":
            assert section.release == (told or "0.1")
            assert section.upgrade == ""
    with regions.open(path, writable=False) as opened, Watcher(opened) as watcher:
        found = watcher.watch(0).connections
    streams = [c for c in found if not c.datagrams]
    if scene == "busy":
        (stream,), (link,) = streams, [c for c in found if c.datagrams]
        assert stream.remote.port == 7000
        assert (stream.sent.queued, stream.received.queued) == (len(THERE), len(BACK))
        assert link.sent.queued == sum(8 + len(datagram) for datagram in DATAGRAMS)
    else:
        assert len(streams) == (scene == "left")


@of_each
@every
def test_are_attached_to(path: str, version: str, scene: str) -> None:
    """Beside those that are silent: they may be of other machines that are paused."""
    restore(path, version, scene)
    silent = [s.number for s in seen(path).sections if s.state == "silent"]
    assert not set(asyncio.run(talk(path, None, None))) & set(silent)
    assert [s.number for s in seen(path).sections if s.state == "silent"] == silent


@of_each
@every
def test_are_taken_over(path: str, version: str, scene: str) -> None:
    restore(path, version, scene)
    killed_here(path)
    assert {s.state for s in seen(path).sections} <= {"dead", "left", "free"}
    assert asyncio.run(talk(path, 0, 1)) == [0, 1]
    assert asyncio.run(talk(path, 1, 0)) == [1, 0]


@pytest.mark.parametrize("layout", OLD_LAYOUTS)
def test_those_of_older_layouts_are_refused(path: str, layout: str) -> None:
    restore(path, layout, "live")
    told = (
        re.escape(f"format version {layout[-1]}, this shmsock knows 5")
        + ".*`shmsock create --force` makes it"
    )
    with pytest.raises(shmsock.RegionFormatError, match=told):
        asyncio.run(talk(path, None, None))
    content = seen(path)
    assert (content.state, content.version) == ("broken", int(layout[-1]))
    assert re.search(told, content.problem)
    with regions.open(path, writable=False) as opened, pytest.raises(shmsock.RegionFormatError, match=told):
        Watcher(opened)
