"""Regions in files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmsock.errors import (
    ForkedError,
    RegionError,
    RegionExistsError,
    RegionFormatError,
    RegionNotFoundError,
    RegionPermissionError,
)
from shmsock.region import base, create, file, storage
from shmsock.region.base import Region
from shmsock.region.create import create_file, open_default
from shmsock.region.file import open_file

MIB = 1 << 20
AsUser = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A region file of 1 MiB, in the directory that is checked for leaks."""
    name = tmp_path / "region"
    name.write_bytes(bytes(MIB))
    return str(name)


def failing_mmap(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def write(name: Path, content: bytes) -> None:
    name.write_bytes(content)


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
    assert (seen.url, seen.size, seen.mode, seen.uid) == (f"file:{path}", MIB, 0o640, os.geteuid())
    assert seen.filesystem == storage.filesystem(path).type
    assert seen.allocated == MIB
    assert seen.device is None


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


def test_forgotten_region_warns_and_frees(path: str) -> None:
    region = open_file(path)
    region.lock_section(1)
    with pytest.warns(ResourceWarning, match="unclosed region"):
        del region
    with open_file(path) as other:
        assert not other.section_locked(1)


# -- locks


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
    with open_file(path) as region, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
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
    monkeypatch.setattr(fcntl, "fcntl", failing_mmap(errno.ENOLCK))
    with open_file(path) as region:
        assert not region.can_lock
        assert region.lock_fd == -1
        assert region.lock_section(1)
        assert not region.section_locked(1)
        region.unlock_section(1)


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
    monkeypatch.setattr(os, "posix_fallocate", failing_mmap(errno.EOPNOTSUPP))
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
    monkeypatch.setattr("shmsock.region.base.Mapping", failing_mmap(code))
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
    def replace(fd: int, size: int, writable: bool) -> Any:
        os.unlink(path)
        Path(path).write_bytes(bytes(MIB))
        return base.map_bytes(fd, size, writable)

    monkeypatch.setattr(file, "map_bytes", replace)
    with pytest.raises(RegionError, match="replaced") as caught:
        open_file(path)
    assert caught.value.errno == errno.ESTALE


def test_locks_fail_oddly(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing_mmap(errno.EIO))
    with pytest.raises(OSError):
        open_file(path)


# -- huge pages


def test_huge_pages_missing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda fd: storage.FileSystem("hugetlbfs", 2 * MIB))
    os.truncate(path, 4 * MIB)
    monkeypatch.setattr("shmsock.region.base.Mapping", failing_mmap(errno.ENOMEM))
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
    monkeypatch.setattr(os, "link", failing_mmap(errno.EPERM))
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
