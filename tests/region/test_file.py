"""Regions in files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shmsock.errors import (
    RegionError,
    RegionFormatError,
    RegionNotFoundError,
    RegionPermissionError,
)
from shmsock.region import base, file, storage
from shmsock.region.file import open_file
from tests.region.conftest import AsUser, failing

MIB = 1 << 20


# -- what works


def test_two_regions_share_memory(path: str) -> None:
    with open_file(path) as one, open_file(path) as two:
        one.mmap[5:8] = b"abc"
        assert two.mmap[5:8] == b"abc"
        assert (one.url, one.kind, one.path, one.size) == (f"file:{path}", "file", path, MIB)
        assert one.writable
        assert not one.write_combining
        assert one.identity == two.identity == (os.stat(path).st_dev, os.stat(path).st_ino)
        assert "1 MiB" in repr(one)
    assert one.closed
    assert "closed" in repr(one)


def test_relative_path_becomes_absolute(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.path.dirname(path))
    with open_file("region") as region:
        assert region.url == f"file:{path}"


def test_read_only(path: str) -> None:
    with open_file(path) as writer, open_file(path, writable=False) as reader:
        writer.lock_section(3)
        assert reader.section_locked(3)
        with pytest.raises(TypeError):
            reader.mmap[0] = 1
        with pytest.raises(RegionError, match="read-only"):
            reader.lock_section(4)
        with pytest.raises(RegionError, match="read-only"):
            reader.ensure(0, 1)


def test_describe(path: str) -> None:
    os.chmod(path, 0o640)
    with open_file(path) as region:
        seen = region.describe()
    assert (region.url, region.kind, region.size) == (f"file:{path}", "file", MIB)
    assert (seen.mode, seen.uid, seen.gid) == (0o640, os.geteuid(), os.getegid())
    assert seen.filesystem == storage.filesystem(path).type
    assert seen.allocated == MIB


def test_use_after_close(path: str) -> None:
    region = open_file(path)
    region.close()
    region.close()
    for use in (
        lambda: region.mmap[0],
        lambda: region.ensure(0, 1),
        lambda: region.lock_section(0),
        lambda: region.section_locked(0),
        region.describe,
        region.detach,
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert region.lock_fd == -1
    assert not region.can_lock


def test_close_with_a_buffer_in_use(path: str) -> None:
    region = open_file(path)
    region.lock_section(1)
    view = memoryview(region.mmap)
    with pytest.raises(BufferError, match="release"):
        region.close()
    with open_file(path) as other:
        assert other.section_locked(1)
    view.release()
    region.close()


def mappings(path: str) -> int:
    return Path("/proc/self/maps").read_text().count(path)


def test_regions_share_a_mapping(path: str) -> None:
    one, two, apart = open_file(path), open_file(path), open_file(path)
    one.share()
    two.share()
    assert two.mmap is one.mmap is not apart.mmap
    assert mappings(path) == 2
    one.lock_section(1)
    assert two.section_locked(1)
    view = memoryview(two.mmap)
    one.close()
    view[0] = 7
    assert apart.mmap[0] == 7
    with pytest.raises(BufferError, match="release"):
        two.close()
    three = open_file(path)
    three.share()
    assert three.mmap is two.mmap
    two.close()
    view.release()
    three.close()
    assert mappings(path) == 1
    with open_file(path) as again:  # not the one that is closed
        again.share()
        assert again.mmap[0] == 7
    apart.close()
    assert mappings(path) == 0


def test_only_the_same_memory_is_shared(path: str) -> None:
    with open_file(path) as one, open_file(path, writable=False) as other:
        one.share()
        other.share()
        assert one.mmap is not other.mmap
        os.unlink(path)
        Path(path).write_bytes(bytes(MIB))
        with open_file(path) as new:
            new.share()
            assert new.mmap is not one.mmap


def test_a_forked_child_shares_with_nobody_before(path: str, forked: AsUser) -> None:
    with open_file(path) as one, open_file(path) as two:
        one.share()
        two.share()

        def child() -> tuple[bool, int]:
            one.drop_inherited()
            with open_file(path) as own:
                own.share()
                own.mmap[0] = 3
                two.drop_inherited()
                return own.mmap[0] == 3, mappings(path)

        assert forked(child) == (True, 1)
        assert (one.mmap[0], two.mmap[0]) == (3, 3)


def test_a_forgotten_region_shares_no_more(path: str) -> None:
    region = open_file(path)
    region.share()
    with pytest.warns(ResourceWarning, match="unclosed region"):
        del region
    assert mappings(path) == 0


def test_forgotten_region_warns_and_frees(path: str) -> None:
    region = open_file(path)
    region.lock_section(1)
    with pytest.warns(ResourceWarning, match="unclosed region"):
        del region
    with open_file(path) as other:
        assert not other.section_locked(1)


# -- bad input


@pytest.mark.parametrize("writable", [True, False])
def test_missing(tmp_path: Path, writable: bool) -> None:
    name = str(tmp_path / "missing")
    with pytest.raises(RegionNotFoundError, match=r"does not exist.*shmsock create") as caught:
        open_file(name, writable=writable)
    assert isinstance(caught.value, FileNotFoundError)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, name)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(RegionNotFoundError, match="nor does the directory"):
        open_file(str(tmp_path / "missing" / "region"))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="is a directory, expected a regular file") as caught:
        open_file(str(tmp_path))
    assert caught.value.errno == errno.EISDIR


def test_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RegionError, match="named pipe") as caught:
        open_file(str(tmp_path / "fifo"))
    assert caught.value.errno == errno.EINVAL


def test_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
        with pytest.raises(RegionError, match="a socket"):
            open_file(str(tmp_path / "socket"))


def test_device() -> None:
    with pytest.raises(RegionError, match="character device"):
        open_file("/dev/zero")


def test_kind_changes_before_open(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lstat() saw is not what open() gets: a named pipe, and nobody at its other end."""
    regular = os.lstat(path)
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(os, "lstat", lambda name: regular)
    with pytest.raises(RegionError, match="named pipe"):
        open_file(str(tmp_path / "fifo"))
    os.symlink(path, tmp_path / "link")
    with pytest.raises(RegionError, match="symbolic link") as caught:
        open_file(str(tmp_path / "link"))
    assert caught.value.errno == errno.ELOOP


def test_symbolic_link(tmp_path: Path, path: str) -> None:
    os.symlink(path, tmp_path / "link")
    with pytest.raises(RegionError, match="symbolic link, expected a regular file") as caught:
        open_file(str(tmp_path / "link"))
    assert caught.value.errno == errno.ELOOP
    os.symlink(tmp_path, tmp_path / "directory")
    open_file(str(tmp_path / "directory" / "region")).close()


def test_file_as_directory(path: str) -> None:
    with pytest.raises(RegionError, match="not a directory"):
        open_file(f"{path}/region")


def test_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="File name too long"):
        open_file(str(tmp_path / ("x" * 300)))


@pytest.mark.parametrize(("size", "seen"), [(0, "is empty"), (100, "has 100 bytes")])
def test_too_small(path: str, size: int, seen: str) -> None:
    os.truncate(path, size)
    with pytest.raises(RegionFormatError, match=f"{seen}, expected at least 4 KiB"):
        open_file(path)


def test_smaller_than_the_caller_wants(path: str) -> None:
    with pytest.raises(RegionFormatError, match="expected at least 2 MiB"):
        open_file(path, minimum=2 * MIB)


def test_no_permission(shared: Path, as_nobody: AsUser) -> None:
    name = shared / "region"
    name.write_bytes(bytes(4096))
    name.chmod(0o600)
    error, code = as_nobody(lambda: open_file(str(name)))
    assert type(error) is RegionPermissionError
    assert code == errno.EACCES
    assert "uid 0 (root), mode 0600" in str(error)
    assert "uid 65534" in str(error)
    assert "0660" in str(error)
    shared.chmod(0o700)
    error, _ = as_nobody(lambda: open_file(str(name)))
    assert "a directory on the way" in str(error)


def test_read_only_for_others(shared: Path, as_nobody: AsUser) -> None:
    name = shared / "region"
    name.write_bytes(bytes(4096))
    name.chmod(0o644)

    def read() -> tuple[bool, bool]:
        with open_file(str(name), writable=False) as region:
            return region.section_locked(0), region.can_lock

    assert as_nobody(read) == (False, True)
    error, _ = as_nobody(lambda: open_file(str(name)))
    assert "for reading and writing" in str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to write there")
def test_file_system_that_cannot_map() -> None:
    name = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.access(name, os.W_OK):
        pytest.skip(f"{name} is not there or read-only")
    with pytest.raises(RegionError, match=r"file system \(sysfs\) that cannot map") as caught:
        open_file(name)
    assert caught.value.errno == errno.ENODEV
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENODEV, "cannot map files"),
        (errno.ENOMEM, "ulimit"),
        (errno.EACCES, "no permission to map"),
        (errno.EAGAIN, "cannot map the 1 MiB"),
    ],
)
def test_mmap_fails(path: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmsock.region.base.Mapping", failing(code))
    with pytest.raises(RegionError, match=says) as caught:
        open_file(path)
    assert (caught.value.errno, caught.value.filename) == (code, path)


def test_shrinks_while_it_is_mapped(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mmap.mmap

    def shrink(fd: int, size: int, **kwargs: Any) -> Any:
        os.truncate(path, 4096)
        return real(fd, size, **kwargs)

    monkeypatch.setattr("shmsock.region.base.Mapping", shrink)
    with pytest.raises(RegionFormatError, match="truncated"):
        open_file(path)


def test_replaced_while_it_is_opened(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(fd: int, size: int, writable: bool, offset: int) -> Any:
        os.unlink(path)
        Path(path).write_bytes(bytes(MIB))
        return base.map_bytes(fd, size, writable, offset)

    monkeypatch.setattr(file, "map_bytes", replace)
    with pytest.raises(RegionError, match="replaced") as caught:
        open_file(path)
    assert caught.value.errno == errno.ESTALE


def test_locks_fail_oddly(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO))
    with pytest.raises(OSError):
        open_file(path)
