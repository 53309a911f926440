"""Holes, full disks and huge pages."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shmsock.errors import (
    RegionError,
    RegionFormatError,
)
from shmsock.region import storage
from shmsock.region.create import create_file
from shmsock.region.file import open_file
from tests.region.conftest import failing

MIB = 1 << 20


# -- storage


def test_ensure_fills_holes_and_keeps_bytes(shared: Path) -> None:
    name = shared / "sparse"
    with open(name, "wb") as new:
        new.truncate(MIB)
    with open_file(str(name)) as region:
        assert region.sparse
        region.ensure(8190, 4)
        assert region.describe().allocated == 8192
        region.mmap[8190:8194] = b"abcd"
        region.ensure(0, MIB)
        assert region.describe().allocated == MIB
        assert region.mmap[8190:8194] == b"abcd"
        region.ensure(MIB, 0)
    with open_file(str(name)) as region:
        assert not region.sparse


def test_ensure_without_fallocate(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_FALLOCATE", frozenset())
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    name = shared / "sparse"
    with open(name, "wb") as new:
        new.truncate(MIB)
    with open_file(str(name)) as region:
        region.mmap[8191] = 7
        try:
            region.ensure(8190, 4)
        except RegionError:
            pytest.skip("a kernel before 5.14 cannot populate")
        assert region.describe().allocated == 8192
        assert region.mmap[8191] == 7


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, MIB + 1), (MIB, 1), (5, -1), (2**63, 2**63)])
def test_ensure_outside(path: str, offset: int, length: int) -> None:
    with open_file(path) as region, pytest.raises(ValueError, match="outside"):
        region.ensure(offset, length)


def test_disk_full(shared: Path) -> None:
    room = os.statvfs(shared)
    name = shared / "huge"
    with open(name, "wb") as new:
        new.truncate(room.f_blocks * room.f_frsize * 2)
    with open_file(str(name)) as region:
        with pytest.raises(RegionError, match=r"disk full: .* are free") as caught:
            region.ensure(0, region.size)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(name)


def test_disk_full_without_fallocate(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def madvise(self, *args: int) -> None:
            raise OSError(errno.EFAULT, "would be a SIGBUS")

    with pytest.raises(OSError) as caught:
        storage.back(-1, Full(), "nfs", 0, 4096)  # type: ignore[arg-type]
    assert caught.value.errno == errno.ENOSPC


def test_truncated_while_in_use(shared: Path) -> None:
    name = shared / "shrinks"
    with open(name, "wb") as new:
        new.truncate(MIB)
    with open_file(str(name)) as region:
        os.truncate(name, 4096)
        with pytest.raises(RegionFormatError, match=r"truncated to 4 KiB .* expected 1 MiB"):
            region.ensure(0, MIB)
        assert os.stat(name).st_size == 4096


def test_filesystem() -> None:
    assert storage.filesystem("/dev/shm").type == "tmpfs"
    assert storage.filesystem("/proc").type == "proc"
    assert storage.filesystem("/proc", "/nonexistent").type == "unknown"
    assert storage.filesystem("/dev/shm").unit == mmap.PAGESIZE
    assert storage.FileSystem("hugetlbfs", 2 * MIB).unit == 2 * MIB


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "hugetlbfs", "unknown"])
def test_a_disk_is_warned_of_once(
    shared: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda file: storage.FileSystem(kind, 4096))
    name, disk = str(shared / "region"), kind in ("ext4", "xfs", "btrfs", "overlay")
    for _ in range(2):
        create_file(name, MIB, force=True)
    assert caplog.text.count(f"{name} lies on a disk ({kind})") == disk
    assert len(caplog.records) == disk


# -- huge pages


def test_huge_pages_missing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda fd: storage.FileSystem("hugetlbfs", 2 * MIB))
    os.truncate(path, 4 * MIB)
    monkeypatch.setattr("shmsock.region.base.Mapping", failing(errno.ENOMEM))
    with pytest.raises(RegionError, match=r"takes 2 huge pages of 2 MiB.*sysctl vm.nr_hugepages=") as caught:
        open_file(path)
    assert caught.value.errno == errno.ENOMEM


def test_huge_page_size_is_checked_before_mapping(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda fd: storage.FileSystem("hugetlbfs", 2 * MIB))
    monkeypatch.setattr("shmsock.region.base.Mapping", lambda *args, **kwargs: pytest.fail("mapped"))
    with pytest.raises(RegionFormatError, match=r"has 1 MiB, expected a multiple of the huge page, 2 MiB"):
        open_file(path)


def test_huge_page_hint(tmp_path: Path) -> None:
    pool = tmp_path / "hugepages-1048576kB"
    pool.mkdir()
    for name, count in {"nr": 4, "free": 3, "resv": 1}.items():
        (pool / f"{name}_hugepages").write_text(f"{count}\n")
    hint = storage.huge_page_hint(3 << 30, 1 << 30, str(tmp_path))
    assert "takes 3 huge pages of 1 GiB, and 2 of 4 are free" in hint
    assert f"echo 5 > {pool}/nr_hugepages" in hint
    assert "sysctl vm.nr_hugepages=2" in storage.huge_page_hint(3 * MIB, 2 * MIB, str(tmp_path))


HUGE = """
import os, sys
from shmsock.errors import RegionError
from shmsock.region.create import create_file
from shmsock.region.file import open_file
path = sys.argv[1] + "/region"
def free():
    with open("/proc/meminfo") as table:
        found = dict(line.split()[:2] for line in table)
    return int(found["HugePages_Free:"]) - int(found["HugePages_Rsvd:"])
try:
    print("size", create_file(path, 3 << 20))
except RegionError as error:
    print("error", error.errno, error)
    assert os.listdir(sys.argv[1]) == []
else:
    with open_file(path) as region:
        region.mmap[region.size - 1] = 1
        region.ensure(0, region.size)
        print(region.sparse, region.describe().filesystem, region.describe().page_size)
try:
    create_file(path, (free() + 1) << 21, force=True)
except RegionError as error:
    print("full", error.errno, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount")
def test_real_huge_pages(tmp_path: Path) -> None:
    """Whether there are huge pages or not: a region, or the command that reserves them."""
    script = f'mount -t hugetlbfs -o pagesize=2M none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    command = ["unshare", "-m", "sh", "-c", script, HUGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 32 or "Operation not permitted" in done.stderr:
        pytest.skip(f"hugetlbfs cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "vm.nr_hugepages=" in done.stdout
    assert f"size {4 * MIB}\nFalse hugetlbfs {2 * MIB}" in done.stdout or "error 12" in done.stdout
