"""Is a region still where it was found? What is told, and what is no reason to tell anything."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmsock.region import open_file
from shmsock.region import place as places
from shmsock.region.bar2 import open_pci
from shmsock.region.place import Place, holders, restart
from tests.region.conftest import AsUser, FakeSysfs

Change = Callable[[Path], object]


def another(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))


def unlink_and_make(path: Path) -> None:
    path.unlink()
    another(path)


def rename_over(path: Path) -> None:
    another(path.with_name("new"))
    path.with_name("new").rename(path)


def move_away(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def move_and_make(path: Path) -> None:
    move_away(path)
    another(path)


def move_and_link(path: Path) -> None:
    move_away(path)
    path.symlink_to(path.with_name("elsewhere"))  # links are not followed by who opens a region


def remove_directory(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


def unlink_with_another_name(path: Path) -> None:
    path.with_name("elsewhere").hardlink_to(path)
    path.unlink()


def file_for_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.write_bytes(b"")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture
def region(tmp_path: Path) -> Path:
    path = tmp_path / "shm" / "region"
    path.parent.mkdir()
    another(path)
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (os.unlink, "removed"),
        (unlink_and_make, "replaced"),
        (rename_over, "replaced"),
        (move_away, "moved"),
        (move_and_make, "replaced"),
        (move_and_link, "replaced"),
        (remove_directory, "removed"),
        (unlink_with_another_name, "moved"),
        (file_for_directory, "moved"),
        (make_directory, "replaced"),
    ],
)
def test_what_became_of_a_file(region: Path, change: Change, expected: str) -> None:
    with open_file(str(region)) as opened:
        assert opened.displaced() == ""
        change(region)
        assert opened.displaced() == expected


def test_back_where_it_was(region: Path) -> None:
    with open_file(str(region)) as opened:
        move_away(region)
        assert opened.displaced() == "moved"
        region.with_name("elsewhere").rename(region)
        assert opened.displaced() == ""


def test_by_a_link_to_its_directory(region: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(region.parent)
    other.mkdir()
    with open_file(str(link / "region")) as opened:
        assert opened.displaced() == ""
        link.unlink()
        link.symlink_to(other)
        assert opened.displaced() == "moved"
        another(other / "region")
        assert opened.displaced() == "replaced"


@pytest.mark.parametrize("change", [str, Path.touch, Path.stat, lambda path: os.truncate(path, 2 << 20)])
def test_the_same_file_all_along(region: Path, change: Change) -> None:
    with open_file(str(region)) as opened:
        change(region)
        assert opened.displaced() == ""


def test_by_a_descriptor_that_is_closed(region: Path) -> None:
    directory = os.open(region.parent, os.O_PATH)
    with open_file(f"/proc/self/fd/{directory}/region") as opened:
        os.close(directory)
        assert opened.displaced() == ""
        move_away(region)
        assert opened.displaced() == ""  # nobody can tell
        region.with_name("elsewhere").unlink()
        assert opened.displaced() == "removed"


def test_under_another_root(region: Path, forked: AsUser) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root to change the root")
    jail = region.parent.parent / "jail"
    (jail / region.parent.relative_to("/")).mkdir(parents=True)
    another(jail / region.relative_to("/"))
    os.unlink(jail / region.relative_to("/"))

    def look() -> tuple[str, str, str]:
        with open_file(str(region)) as opened:
            outside = os.open("/", os.O_PATH)
            os.chroot(jail)
            nothing_there = opened.displaced()
            another(region)
            another_there = opened.displaced()
            os.unlink(str(region)[1:], dir_fd=outside)
            return nothing_there, another_there, opened.displaced()

    assert forked(look) == ("", "", "removed")


def mounting(*arguments: bytes | int | None) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return int((libc.umount2 if len(arguments) == 2 else libc.mount)(*arguments)) == 0


def test_other_mounts(region: Path, forked: AsUser) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root to mount")
    other = region.parent.parent / "other"
    other.mkdir()
    clone_newns, ms_bind, rec_private, mnt_detach = 0x20000, 0x1000, 0x44000, 2

    def look() -> list[str]:
        seen = []
        assert ctypes.CDLL(None, use_errno=True).unshare(clone_newns) == 0
        assert mounting(b"none", b"/", None, rec_private, None)
        assert mounting(bytes(region.parent), bytes(other), None, ms_bind, None)
        with open_file(str(other / "region")) as opened, open_file(str(region)) as direct:
            seen.append(opened.displaced())
            assert mounting(bytes(other), mnt_detach)
            seen.append(opened.displaced())  # others find it where it is
            assert ctypes.CDLL(None, use_errno=True).unshare(clone_newns) == 0
            assert mounting(b"tmpfs", bytes(region.parent), b"tmpfs", 0, None)
            seen.append(direct.displaced())  # a mount of this process's own
            assert mounting(bytes(region.parent), mnt_detach)
            region.unlink()
            return [*seen, opened.displaced(), direct.displaced()]

    assert forked(look) == ["", "", "", "removed", "removed"]


def test_without_permission_to_look(shared: Path, as_nobody: AsUser) -> None:
    directory = shared / "closed"
    directory.mkdir(mode=0o755)
    path = directory / "region"
    another(path)
    path.chmod(0o666)
    os.chown(directory, 65534, 65534)

    def look() -> tuple[str, str]:
        with open_file(str(path)) as opened:
            handle = os.open(directory, os.O_RDONLY)
            os.chmod(directory, 0)
            closed = opened.displaced()
            os.chmod(directory, 0o700)
            os.unlink("region", dir_fd=handle)
            os.chmod(directory, 0)
            return closed, opened.displaced()

    assert as_nobody(look) == ("", "removed")
    directory.chmod(0o700)


def test_where_a_look_may_take_long(region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_file(str(region)) as opened:
        kind = opened.describe().filesystem
    assert kind in places.LOCAL
    assert not places.LOCAL & {"nfs", "nfs4", "cifs", "fuse", "9p", "virtiofs", "unknown"}
    monkeypatch.setattr("shmsock.region.file.LOCAL", places.LOCAL - {kind})
    with open_file(str(region)) as opened:
        region.unlink()
        assert opened.displaced() == ""


def test_after_close(region: Path) -> None:
    opened = open_file(str(region))
    opened.close()
    with pytest.raises(ValueError, match="is closed"):
        opened.displaced()


def test_a_device(sysfs: FakeSysfs) -> None:
    directory = sysfs.add(enabled=1)
    with open_pci("0000:00:04.0", sysfs=sysfs.root) as opened:
        assert opened.displaced() == ""
        directory.rename(directory.with_name("0000:00:05.0"))
        assert opened.displaced() == "moved"
        sysfs.add(enabled=1)
        assert opened.displaced() == "replaced"


# -- who holds what was removed


HOLD = """
import sys
from shmsock.region import open_file
with open_file(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(region: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HOLD, str(region)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process

    yield begin
    for process in started:
        process.communicate("")


def test_holders(region: Path, hold: Callable[[], subprocess.Popen[str]]) -> None:
    first, second = hold(), hold()
    assert holders(str(region)) == []
    inode = region.stat().st_ino
    with open_file(str(region)):  # one's own is known already
        unlink_and_make(region)
        third = hold()  # has the new one
        found = holders(str(region))
    assert {(holder.pid, holder.inode) for holder in found} == {(p.pid, inode) for p in (first, second)}
    assert third.pid not in {holder.pid for holder in found}
    assert holders(str(region) + "x") == holders(str(region.parent)) == holders("/nowhere/region") == []
    assert holders(str(region), within_s=0) == []
    text = restart(found, str(region))
    assert f"process {found[0].pid} (" in text
    assert text.endswith("still use the old one: restart them")
    assert restart(found[:1], str(region)).endswith("still uses the old one: restart it")


def test_a_place_of_anything(tmp_path: Path) -> None:
    status, fd = os.stat(tmp_path), os.open(tmp_path, os.O_PATH)
    try:
        assert Place(str(tmp_path), (status.st_dev, status.st_ino)).lost(fd) == ""
        assert Place(str(tmp_path), (0, 0)).lost(fd) == "replaced"
    finally:
        os.close(fd)
