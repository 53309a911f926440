"""One lock per section: who has it, and when it goes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from typing import Any

import pytest

from shmsock.errors import (
    ForkedError,
)
from shmsock.region import base
from shmsock.region.file import open_file
from tests.region.conftest import AsUser, failing

MIB = 1 << 20


def test_locks_exclude_each_other(path: str) -> None:
    with open_file(path) as one, open_file(path) as two:
        assert one.can_lock
        assert one.lock_fd >= 0
        assert one.lock_section(7)
        assert one.lock_section(7)
        assert not one.section_locked(7)
        assert two.section_locked(7)
        assert not two.lock_section(7)
        assert two.lock_section(8)
        one.unlock_section(7)
        one.unlock_section(7)
        two.unlock_section(63)
        assert two.lock_section(7)


def test_locks_survive_other_descriptors(path: str) -> None:
    """POSIX locks would be gone as soon as any descriptor of the file is closed."""
    with open_file(path) as one, open_file(path) as two:
        one.lock_section(0)
        with open(path, "rb"):
            pass
        with open_file(path):
            pass
        assert two.section_locked(0)


def test_lock_goes_with_close_though_the_mapping_stays(path: str) -> None:
    with open_file(path) as other:
        region = open_file(path)
        region.lock_section(0)
        mapping = region.detach()
        assert not other.section_locked(0)
        mapping[0] = 1
        mapping.close()


def test_lock_goes_with_the_process(path: str) -> None:
    code = (
        "import sys, os\nfrom shmsock.region.file import open_file\n"
        "region = open_file(sys.argv[1]); print(region.lock_section(9), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, path]
    with (
        open_file(path) as region,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        assert region.section_locked(9)
        child.kill()
        child.wait()
        assert not region.section_locked(9)


def test_forked_child_drops_without_unlocking(path: str, forked: AsUser) -> None:
    with open_file(path) as region, open_file(path) as observer:
        region.lock_section(2)

        def child() -> Any:
            region.drop_inherited()
            region.drop_inherited()
            try:
                _ = region.mmap
            except ForkedError as error:
                gone = str(error)
            region.close()
            return gone, region.closed, base.Region.__repr__(region)

        gone, closed, _ = forked(child)
        assert "fork" in gone
        assert closed
        assert observer.section_locked(2)
        assert region.mmap[0] == 0


@pytest.mark.parametrize("how", ["close", "del"])
def test_forked_child_cannot_unlock(path: str, forked: AsUser, how: str) -> None:
    holder = [open_file(path)]
    holder[0].lock_section(2)
    with open_file(path) as observer:

        def child() -> bool:
            if how == "close":
                holder[0].close()
            else:
                holder.clear()
            return observer.section_locked(2)

        assert forked(child)
        assert observer.section_locked(2)
        holder[0].close()


def test_parent_unlocks_though_a_child_has_a_copy(path: str) -> None:
    region = open_file(path)
    region.lock_section(2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        region.close()
        with open_file(path) as observer:
            assert not observer.section_locked(2)
    finally:
        os.close(read)
        os.close(write)
        os.waitpid(child, 0)


def test_child_with_a_buffer_in_use_drops(path: str, forked: AsUser) -> None:
    with open_file(path) as region:
        view = memoryview(region.mmap)

        def child() -> int:
            region.drop_inherited()
            return view[0]

        assert forked(child) == 0
        view.release()


def test_file_without_locks(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.ENOLCK))
    with open_file(path) as region:
        assert not region.can_lock
        assert region.lock_fd == -1
        assert region.lock_section(1)
        assert not region.section_locked(1)
        region.unlock_section(1)
