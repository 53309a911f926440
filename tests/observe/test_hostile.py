"""Who looks at a region that is hostile, half written, or gone under its eyes: it is shown, or told of in one
line; nothing hangs, nothing is written."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmsock.commands import ss
from shmsock.engine import layout as lay
from shmsock.engine.layout import Layout, read_layout
from shmsock.engine.memory import Memory, native_core
from shmsock.observe.rates import Watcher
from shmsock.region import open_file
from tests.observe.conftest import Process, command, said, seen

Start = Callable[..., Process]
LOOKS = (["ss", "--json"], ["peers", "-i"], ["top", "-n", "1", "-d", "0.5"], ["metrics"], ["info"])


@contextmanager
def words_of(path: Path) -> Iterator[Layout]:
    """A region, for who keeps to no rules."""
    with open_file(str(path)) as region:
        memory = Memory(native_core(), region.mmap)
        try:
            yield read_layout(memory)
        finally:
            memory.release()


def scribble(layout: Layout, rng: random.Random, count: int) -> None:
    """Store nonsense into words of sections: identities, pairs, slots."""
    memory = layout.memory
    for _ in range(count):
        section = rng.randrange(layout.peers)
        at, slot = layout.section(section), layout.slot(section, rng.randrange(8))
        where = rng.choice((at + 8 * rng.randrange(512), slot + 8 * rng.randrange(24), at + lay.SLOTS_USED))
        where = rng.choice((where, layout.pair(section, rng.randrange(layout.peers)) + 8 * rng.randrange(32)))
        old = memory.load(where)
        word = rng.choice((rng.getrandbits(64), (1 << 64) - 1, 0, old ^ 1 << rng.randrange(64), old + 1))
        memory.store(where, word % (1 << 64))


def test_nonsense_is_shown(region: Path, start: Start) -> None:
    start("vm-b")
    start("vm-a", "vm-b")
    with words_of(region) as layout:
        scribble(layout, random.Random(1), 2000)
    for arguments in LOOKS:
        text = said(*arguments, region)
        assert all(line.isprintable() for line in text.splitlines())


def test_nonsense_that_comes_while_it_is_looked_at(region: Path) -> None:
    over, looks = threading.Event(), 0
    with words_of(region) as layout:
        rng = random.Random(3)

        def hostile() -> None:
            while not over.is_set():
                scribble(layout, rng, 100)

        thread = threading.Thread(target=hostile)
        thread.start()
        try:
            with open_file(str(region), writable=False) as opened, Watcher(opened) as watcher:
                for looks in range(30):  # noqa: B007
                    watcher.look()
                    view = watcher.view()
                    json.dumps(view.as_json())
                    assert all(rate >= 0 for node in view.nodes for rate in node.rates.values())
                    assert all(c.queued >= 0 for c in view.connections)
        finally:
            over.set()
            thread.join()
    assert looks == 29


def test_more_slots_than_anybody_has(region: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a liar says of a million connections costs no more than some."""
    start("vm-b")
    with words_of(region) as layout:
        memory = layout.memory
        memory.store(layout.section(0) + lay.SLOTS_USED, (1 << 64) - 1)
        for slot in range(layout.slots):
            memory.store(layout.slot(0, slot) + lay.SLOT_LINK, 7 << 40 | 200 << 32 | slot << 16 | 1 << 8)
            memory.store(layout.slot(0, slot) + lay.SLOT_TX_WORD, 7 << 40 | 12345)
        view = seen("ss", region)
        assert len(view["connections"]) == layout.slots
        assert {c["state"] for c in view["connections"]} == {"orphaned"}  # section 200 is nobody's
        assert {c["sent"]["queued"] for c in view["connections"]} == {None}  # and no ring can hold that
        done = command("ss", region, "--limit", "10")
        assert done.stdout.count("\n") == 11
        assert done.stderr == f"shmsock: {layout.slots - 10} more are not shown: --limit\n"
        lines = said("top", region, "-n", "1", "--limit", "10").splitlines()
        assert lines[-1] == f"... and {layout.slots - 10} more"
        monkeypatch.setattr(ss, "MOST", 200)
        done = command("ss", region, "-s", "--limit", "50")
        assert done.exit_code == 0
        assert "connections: 100 (100 orphaned)" in done.stdout
        assert done.stderr == "shmsock: only the first 100 connections were looked at\n"
        assert seen("ss", region, "--limit", "50")["more_connections"]


def test_names_and_processes_that_are_none(region: Path, start: Start) -> None:
    start("vm-b")
    with words_of(region) as layout:
        layout.memory.write(layout.section(0) + lay.NAME, b"\x1b[31mred\n".ljust(64, b"\0"))
    for arguments in LOOKS:
        text = said(*arguments, region)
        assert "\x1b" not in text
        assert "red" not in text


@pytest.mark.parametrize("size", [0, 4096, 100_000])
def test_a_file_that_got_smaller(region: Path, size: int) -> None:
    with open_file(str(region), writable=False) as opened, Watcher(opened) as watcher:
        watcher.look()
        os.truncate(region, size)
        with pytest.raises(OSError, match="was made smaller while it was looked at"):
            watcher.look()


def test_a_region_that_is_made_anew(region: Path) -> None:
    with open_file(str(region), writable=False) as opened, Watcher(opened) as watcher:
        watcher.look()
        with open(region, "r+b") as file:
            file.seek(lay.H_ID)
            word = int.from_bytes(file.read(8), "little") ^ 1 << 60
            file.seek(lay.H_ID)
            file.write(word.to_bytes(8, "little"))
        with pytest.raises(OSError, match="was formatted anew while it was looked at"):
            watcher.look()


def test_a_file_that_was_moved(region: Path) -> None:
    with open_file(str(region), writable=False) as opened, Watcher(opened) as watcher:
        os.rename(region, f"{region}.old")
        try:
            watcher.look()
            assert watcher.view().displaced == "moved"
        finally:
            os.rename(f"{region}.old", region)


def test_holes_stay_holes(region: Path) -> None:
    before = region.stat().st_blocks
    for arguments in LOOKS:
        said(*arguments, region)
    assert region.stat().st_blocks == before


def test_a_stopped_process_is_silent(region: Path, start: Start) -> None:
    server = start("vm-b")
    server.process.send_signal(signal.SIGSTOP)
    try:
        while (peer := seen("peers", region)["peers"][0])["state"] != "silent":
            pass
        assert peer["name"] == "vm-b"
    finally:
        server.process.send_signal(signal.SIGCONT)
    while seen("peers", region)["peers"][0]["state"] != "live":
        pass
