"""Making region files."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from shmsock.errors import (
    RegionError,
    RegionExistsError,
    RegionNotFoundError,
    RegionPermissionError,
)
from shmsock.region import create
from shmsock.region.base import Region
from shmsock.region.create import create_file, open_default
from shmsock.region.file import open_file
from tests.region.conftest import AsUser, failing

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
    with pytest.raises(RegionExistsError):
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


def test_force_keeps_the_file_that_qemu_may_have_mapped(path: str) -> None:
    Path(path).write_bytes(b"x" * MIB)
    inode = os.stat(path).st_ino
    with open_file(path) as user:
        assert create_file(path, MIB, mode=0o644, force=True) == MIB
        assert user.mmap[:] == bytes(MIB)
    assert os.stat(path).st_ino == inode
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644


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
