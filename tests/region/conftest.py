"""What the region tests share: nothing leaks, and some things look different to another user."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534


def open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed them
    return found


def mappings(path: str) -> int:
    return Path("/proc/self/maps").read_text().count(path)


@pytest.fixture(autouse=True)
def no_leaks(tmp_path: Path) -> Iterator[None]:
    """After each test: no descriptor more than before, and nothing of its directory mapped."""
    gc.collect()
    before = open_files()
    yield
    gc.collect()
    assert open_files() == before
    assert mappings(str(tmp_path)) == 0


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory in shared memory that every user can enter and write."""
    directory = Path(tempfile.mkdtemp(prefix="shmsock-test-", dir="/dev/shm"))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


def in_child(function: Callable[[], Any], uid: int | None = None) -> Any:
    """What `function` returns, or the exception that it raises, in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            try:
                answer = function()
            except BaseException as error:
                answer = (error, getattr(error, "errno", None))
            os.write(write, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data)


@pytest.fixture
def forked() -> Callable[[Callable[[], Any]], Any]:
    return in_child


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], Any]], Any]:
    """Run something as another user; takes root."""
    if os.geteuid() != 0:
        pytest.skip("takes root to become another user")
    return lambda function: in_child(function, NOBODY)
