"""Making region files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsock.errors import (
    RegionError,
    RegionExistsError,
    RegionNotFoundError,
    RegionPermissionError,
)
from shmsock.region import create, locks
from shmsock.region.base import Region
from shmsock.region.create import create_file, open_default
from shmsock.region.file import open_file
from shmsock.region.processes import Users
from tests.region.conftest import NOBODY, AsUser, failing

MIB = 1 << 20


def write(name: Path, content: bytes) -> None:
    name.write_bytes(content)


# -- making files


def test_create(tmp_path: Path) -> None:
    name = str(tmp_path / "new")
    seen: list[Region] = []

    def prepare(region: Region) -> None:
        assert not os.path.exists(name)
        region.mmap[0:5] = b"magic"
        seen.append(region)

    old = os.umask(0o077)
    try:
        assert create_file(name, MIB - 1, mode=0o660, prepare=prepare) == MIB
    finally:
        os.umask(old)
    assert seen[0].closed
    status = os.stat(name)
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert (status.st_size, status.st_nlink) == (MIB, 1)
    assert status.st_blocks * 512 >= MIB
    assert Path(name).read_bytes()[:5] == b"magic"
    assert os.listdir(tmp_path) == ["new"]


def test_create_refuses_what_exists(tmp_path: Path, path: str) -> None:
    with pytest.raises(RegionExistsError, match="--force") as caught:
        create_file(path, MIB)
    assert isinstance(caught.value, FileExistsError)
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(RegionExistsError, match="no regular file, choose another path"):
        create_file(str(tmp_path / "link"), MIB)
    with pytest.raises(RegionError, match="symbolic link"):
        create_file(str(tmp_path / "link"), MIB, force=True)


def test_create_loses_a_race(tmp_path: Path) -> None:
    name = tmp_path / "new"
    with pytest.raises(RegionExistsError):
        create_file(str(name), MIB, prepare=lambda region: write(name, b"theirs"))
    assert name.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("taken", [False, True])
def test_create_without_hard_links(tmp_path: Path, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    name = tmp_path / "new"
    if taken:
        with pytest.raises(RegionExistsError):
            create_file(str(name), MIB, prepare=lambda region: write(name, b"theirs"))
        assert name.read_text() == "theirs"
    else:
        create_file(str(name), MIB)
        assert name.stat().st_size == MIB
    assert os.listdir(tmp_path) == ["new"]


# What opens a file, and maps it or not, until its input ends.
USER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapping = mmap.mmap(fd, 4096) if sys.argv[2] == "map" else None
if mapping:
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def user_of(path: str, how: str, uid: int | None = None) -> Iterator[int]:
    """Another process that uses a file: its number. `how`: "map" or "open"."""
    argv = [sys.executable, "-c", USER, path, how]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=uid
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.communicate()


@pytest.mark.parametrize("size", [MIB, 2 * MIB])
@pytest.mark.parametrize("content", [b"", b"x" * MIB], ids=["blank", "full"])
def test_force_refuses_a_file_that_is_mapped(path: str, content: bytes, size: int) -> None:
    Path(path).write_bytes(content or bytes(MIB))
    before = os.stat(path)
    with user_of(path, "map") as pid:
        with pytest.raises(RegionError, match=rf"in use by process {pid} \(python.*\): stop") as caught:
            create_file(path, size, force=True)
        assert caught.value.errno == errno.EBUSY
        assert os.path.samestat(os.stat(path), before)
        assert os.listdir(os.path.dirname(path)) == ["region"]
    create_file(path, size, force=True)


def test_force_refuses_a_file_that_is_mapped_meanwhile(path: str) -> None:
    with contextlib.ExitStack() as later:

        def prepare(region: Region) -> None:
            later.enter_context(user_of(path, "map"))

        with pytest.raises(RegionError, match="in use by process"):
            create_file(path, MIB, force=True, prepare=prepare)
    assert os.listdir(os.path.dirname(path)) == ["region"]


@pytest.mark.parametrize("how", ["section", "server"])
def test_force_refuses_a_file_that_is_locked(path: str, how: str) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        assert locks.try_lock(fd, 5 if how == "section" else locks.SERVER_LOCK)
        with pytest.raises(RegionError, match="lock of section 5" if how == "section" else "ivshmem server"):
            create_file(path, MIB, force=True)
    finally:
        os.close(fd)
    create_file(path, MIB, force=True)


@pytest.mark.parametrize("size", [4096, MIB, 2 * MIB])
def test_force_never_takes_the_old_file(path: str, size: int) -> None:
    """Who has it open, or by another name, keeps that and does not come into the new one."""
    Path(path).write_bytes(b"x" * MIB)
    os.link(path, f"{path}-too")
    with user_of(path, "open"):
        create_file(path, size, mode=0o644, force=True)
    assert not os.path.samestat(os.stat(path), os.stat(f"{path}-too"))
    assert Path(f"{path}-too").read_bytes() == b"x" * MIB
    assert Path(path).read_bytes() == bytes(size)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644


@pytest.mark.parametrize("mode", [0o666, 0o600])
@pytest.mark.parametrize("size", [0, MIB])
def test_force_refuses_a_file_of_somebody_else(shared: Path, mode: int, size: int) -> None:
    name = shared / "region"
    name.write_bytes(bytes(size))
    name.chmod(mode)
    if os.geteuid():
        pytest.skip("takes root to give a file away")
    os.chown(name, NOBODY, NOBODY)
    with pytest.raises(RegionExistsError, match=rf"belongs to uid {NOBODY} .*, have it removed, or"):
        create_file(str(name), MIB)  # and no word of --force
    with pytest.raises(RegionPermissionError, match=rf"owned by somebody else: uid {NOBODY}"):
        create_file(str(name), MIB, force=True)
    assert (name.stat().st_uid, name.stat().st_size) == (NOBODY, size)
    assert os.listdir(shared) == ["region"]


def test_force_keeps_the_group(shared: Path) -> None:
    name = shared / "region"
    name.write_bytes(bytes(MIB))
    if os.geteuid():
        pytest.skip("takes root to give a file to any group")
    os.chown(name, -1, 4242)
    create_file(str(name), MIB, force=True, mode=0o660)
    assert (name.stat().st_gid, stat.S_IMODE(name.stat().st_mode)) == (4242, 0o660)


def test_force_says_whom_it_could_not_see(shared: Path, as_nobody: AsUser) -> None:
    """Nobody may not look into root's processes, and is refused when one has the file open."""
    name = shared / "region"
    name.write_bytes(bytes(MIB))
    os.chown(name, NOBODY, NOBODY)
    before = os.stat(name)
    with user_of(str(name), "map"):
        error, code = as_nobody(lambda: create_file(str(name), MIB, force=True))
        assert code == errno.EBUSY
        assert "somebody who could not be seen" in str(error)
        assert os.path.samestat(os.stat(name), before)
    assert as_nobody(lambda: create_file(str(name), MIB, force=True)) == MIB


@pytest.mark.parametrize("seen", [False, None])
def test_force_where_the_kernel_does_not_tell(
    path: str, seen: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(create, "open_elsewhere", lambda fd: seen)
    monkeypatch.setattr(create, "users_of", lambda fd: Users([], [], 7))
    create_file(path, MIB, force=True)
    said = "7 processes of other users could not be seen"
    assert caplog.text.count(said) == (seen is None)  # once, though it looks again before it replaces


@pytest.mark.parametrize("step", ["open_file", "_publish"])
@pytest.mark.parametrize("force", [False, True])
def test_names_that_are_swapped(
    shared: Path, step: str, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory that others may write to, what has a name need not be what was given it."""
    theirs, name = shared / "theirs", shared / "region"
    theirs.write_bytes(bytes(MIB))
    if force:
        name.write_bytes(bytes(MIB))
    real = getattr(create, step) if step == "open_file" else os.rename if force else os.link

    def swapping(temporary: str, *args: Any, **kwargs: Any) -> Any:
        os.unlink(temporary)
        shutil.copy(theirs, temporary)
        return real(temporary, *args, **kwargs)

    monkeypatch.setattr(create if step == "open_file" else os, real.__name__, swapping)
    with pytest.raises(RegionError, match="replaced by somebody else") as caught:
        create_file(str(name), MIB, force=force)
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("size", [4096, 2 * MIB])
def test_force_replaces_a_file_of_another_size(path: str, size: int) -> None:
    with open_file(path) as user:
        create_file(path, size, force=True)
        assert user.mmap[MIB - 1] == 0  # no SIGBUS
    assert os.stat(path).st_size == size
    assert os.listdir(os.path.dirname(path)) == ["region"]


def test_force_replaces_an_empty_file(path: str) -> None:
    os.truncate(path, 0)
    create_file(path, MIB, force=True)
    assert os.stat(path).st_size == MIB


@pytest.mark.parametrize("size", [MIB, 2 * MIB])
def test_force_asks_first(path: str, size: int) -> None:
    Path(path).write_bytes(b"x" * MIB)

    def check(region: Region) -> None:
        assert region.mmap[0:1] == b"x"
        raise RegionError(errno.EBUSY, "somebody beats")

    with pytest.raises(RegionError, match="somebody beats"):
        create_file(path, size, force=True, check=check)
    assert Path(path).read_bytes() == b"x" * MIB


@pytest.mark.parametrize("error", [RegionError(errno.EIO, "no"), KeyboardInterrupt()])
def test_nothing_is_left_when_formatting_fails(tmp_path: Path, error: BaseException) -> None:
    def prepare(region: Region) -> None:
        raise error

    with pytest.raises(type(error)):
        create_file(str(tmp_path / "new"), MIB, prepare=prepare)
    with pytest.raises(type(error)):
        open_default(str(tmp_path / "new"), prepare=prepare)
    assert os.listdir(tmp_path) == []


def test_create_on_a_full_disk(shared: Path) -> None:
    room = os.statvfs(shared)
    name = str(shared / "huge")
    with pytest.raises(RegionError, match="disk full") as caught:
        create_file(name, room.f_blocks * room.f_frsize * 2)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == name
    assert ".tmp" not in str(caught.value)
    assert os.listdir(shared) == []


def test_create_too_large(tmp_path: Path) -> None:
    with pytest.raises(RegionError):
        create_file(str(tmp_path / "new"), (1 << 62) - 4096)
    assert os.listdir(tmp_path) == []


def test_create_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        create_file(str(tmp_path / "new"), 0)


def test_create_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RegionNotFoundError, match="nor does the directory"):
        create_file(str(tmp_path / "a" / "new"), MIB)
    with pytest.raises(RegionError, match=r"cannot make /proc/new|no files can be made"):
        create_file("/proc/new", MIB)


def test_create_without_permission(shared: Path, as_nobody: AsUser) -> None:
    shared.chmod(0o755)
    error, code = as_nobody(lambda: create_file(str(shared / "new"), MIB))
    assert type(error) is RegionPermissionError
    assert code == errno.EACCES
    assert "belongs to uid 0 (root), mode 0755" in str(error)


# -- the default region


def test_default_is_made_sparse_and_private(shared: Path) -> None:
    name = str(shared / "shmsock-0")
    with open_default(name, prepare=lambda region: region.ensure(0, 4096)) as region:
        assert region.size == 256 * MIB
        assert region.sparse
        assert region.path == name
        assert region.describe().allocated == 4096
        assert region.describe().mode == 0o600
        with open_default(name, prepare=lambda region: pytest.fail("formatted again")) as again:
            assert again.identity == region.identity
    assert os.listdir(shared) == ["shmsock-0"]


def test_default_is_not_made_unasked(shared: Path) -> None:
    with pytest.raises(RegionNotFoundError):
        open_default(str(shared / "shmsock-0"), create=False)
    with pytest.raises(RegionNotFoundError, match="nor does the directory"):
        open_default(str(shared / "missing" / "shmsock-0"))


def test_default_made_by_many_at_once(shared: Path) -> None:
    name = str(shared / "shmsock-0")
    barrier = threading.Barrier(8)
    found: list[tuple[tuple[int, int], bytes]] = []

    def prepare(region: Region) -> None:
        region.ensure(0, 4096)
        region.mmap[0:8] = os.urandom(8)
        barrier.wait(10)  # all of them find nothing, and make one

    def work() -> None:
        with open_default(name, size=MIB, prepare=prepare) as region:
            found.append((region.identity, region.mmap[0:8]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(shared) == ["shmsock-0"]


@pytest.mark.parametrize("mode", [0o660, 0o604, 0o620])
def test_default_open_to_others(shared: Path, mode: int) -> None:
    name = shared / "shmsock-0"
    name.write_bytes(bytes(MIB))
    name.chmod(mode)
    with pytest.raises(RegionPermissionError, match=f"has mode {mode:04o}, expected 0600"):
        open_default(str(name))


def test_default_of_somebody_else(shared: Path, as_nobody: AsUser) -> None:
    name = shared / "shmsock-0"
    name.write_bytes(bytes(MIB))
    name.chmod(0o600)
    error, code = as_nobody(lambda: open_default(str(name)))
    assert type(error) is RegionPermissionError
    assert code == errno.EACCES
    assert "owned by somebody else: uid 0 (root), expected uid 65534" in str(error)
    assert "SHMSOCK_REGION" in str(error)
    os.chown(name, 65534, 65534)
    with pytest.raises(RegionPermissionError, match="owned by somebody else"):
        open_default(str(name))


def test_default_swapped_between_look_and_open(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shared / "shmsock-0"
    name.write_bytes(bytes(MIB))
    name.chmod(0o600)
    looked = os.lstat(name)
    name.chmod(0o666)
    monkeypatch.setattr(os, "lstat", lambda path: looked)
    with pytest.raises(RegionPermissionError, match="mode 0666"):
        open_default(str(name))


def test_default_as_link_or_directory(shared: Path) -> None:
    (shared / "real").write_bytes(bytes(MIB))
    (shared / "link").symlink_to(shared / "real")
    with pytest.raises(RegionError, match="symbolic link"):
        open_default(str(shared / "link"))
    with pytest.raises(RegionError, match="is a directory"):
        open_default(str(shared))


def test_default_that_vanishes_again_and_again(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(temporary: str, path: str) -> None:
        raise RegionExistsError(errno.EEXIST, "was there a moment ago")

    monkeypatch.setattr(create, "_publish", publish)
    with pytest.raises(RegionError, match="comes and goes"):
        open_default(str(shared / "shmsock-0"), size=MIB)
    assert os.listdir(shared) == []
