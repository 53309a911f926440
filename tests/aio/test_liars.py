"""Peers that write what is not so into their sections, or into others', as whoever maps a region can."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import shmsock
from shmsock.fabric import layout as lay
from shmsock.fabric.layout import Layout, read_layout
from shmsock.fabric.memory import Memory, native_core
from tests.aio.conftest import Run, until
from tests.aio.processes import Child


@contextmanager
def memory_of(path: str) -> Iterator[Layout]:
    """All words of a region, for who keeps to no rules."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        memory = Memory(native_core(), mapping)
        try:
            yield read_layout(memory)
        finally:
            memory.release()


def is_locked(path: Path) -> bool:
    """By another process than the one that asks."""
    if not (child := os.fork()):
        try:
            with path.open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        except BlockingIOError:
            os._exit(1)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 1


def test_no_descriptor_is_touched_that_a_section_names(run: Run, region: str, tmp_path: Path) -> None:
    """Whatever stands in the identity of a peer, and in the words beside it: a process keeps its record
    locks, which the kernel drops when any descriptor of the file is closed, and nobody rings its eventfds."""
    database = tmp_path / "database"
    database.touch()
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    with open(f"/proc/self/fdinfo/{bell}", encoding="ascii") as file:
        ident = next(int(line.split()[1]) for line in file if line.startswith("eventfd-id")) + 1

    async def main() -> None:
        with memory_of(region) as layout, database.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            async with Child("serve", region, "b") as child, shmsock.attach(region, name="a") as node:
                await child.says("ready")
                _reader, writer = await shmsock.open_connection("b", 7000, node=node)
                peer = node.find("b", 7000, ())
                at, load, store = layout.section(peer.section), layout.memory.load, layout.memory.store
                for fd, number in ((file.fileno(), 1), (bell, ident)):
                    store(at + lay.PID, os.getpid())
                    for word in (lay.DOORBELL + 8, *range(0x198, lay.LISTENER, 8), 0xE0, 0xE8, 0xF0, 0xF8):
                        store(at + word, fd << 32 | number)
                    store(at + lay.INCARNATION, life := load(at + lay.INCARNATION) ^ 2)
                    await until(lambda life=life: peer.incarnation == life)  # type: ignore[misc]
                    await asyncio.sleep(0)
                    _again, back = await shmsock.open_connection("b", 7000, node=node)
                    back.close()
                    await back.wait_closed()
                    assert is_locked(database)
                    try:
                        raise AssertionError(f"the eventfd holds {os.eventfd_read(bell)}")
                    except BlockingIOError:
                        pass
                writer.close()

    try:
        run(main())
    finally:
        os.close(bell)
