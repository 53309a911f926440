"""Regions by URL."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shmsock import region
from shmsock.errors import (
    RegionError,
    RegionExistsError,
    RegionFormatError,
    RegionNotFoundError,
    RegionPermissionError,
    RegionUrlError,
)
from shmsock.region import bar2, create, pci, sizes

if TYPE_CHECKING:
    from .conftest import FakeSysfs

MIB = 1 << 20


@pytest.fixture
def default(shared: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the default region is, instead of this user's own."""
    name = str(shared / "shmsock-default")
    monkeypatch.setattr(region, "default_region", lambda: name)
    monkeypatch.delenv("SHMSOCK_REGION", raising=False)
    return name


# -- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 << 30), ("64M", 64 << 20), ("1GiB", 1 << 30), ("1gb", 1 << 30), ("512 KiB", 512 << 10),
        ("4096", 4096), ("4096b", 4096), (" 1t ", 1 << 40), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert sizes.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "1.5G", "-1M", "0", "2X", "1 M B", "0x10", "9" * 30, "9" * 19 + "T", -4, 0]
)
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match="is no size"):
        sizes.parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1000, "1000 bytes"), (1536, "1536 bytes"), (1 << 28, "256 MiB"), (1 << 52, "4096 TiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert sizes.format_size(size) == text


def test_round_up() -> None:
    assert [sizes.round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


# -- URLs


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("/dev/shm/x", ("file", "/dev/shm/x")),
        ("file:/dev/shm/x", ("file", "/dev/shm/x")),
        ("file:///dev/shm/x", ("file", "/dev/shm/x")),
        ("//dev/shm/x", ("file", "/dev/shm/x")),
        ("/odd:name", ("file", "/odd:name")),
        (Path("/dev/shm/x"), ("file", "/dev/shm/x")),
        ("pci:auto", ("pci", "auto")),
        ("pci:0000:00:04.0", ("pci", "0000:00:04.0")),
        ("pci:00:04.0", ("pci", "0000:00:04.0")),
        ("ivshmem:/run/ivshmem.sock", ("ivshmem", "/run/ivshmem.sock")),
        ("ivshmem:///run/s", ("ivshmem", "/run/s")),
    ],
)
def test_urls(url: str, parsed: tuple[str, str]) -> None:
    assert region.parse_url(url) == parsed


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "is no region URL: expected /path"),
        ("region", "relative path is not"),
        ("./region", "relative path is not"),
        ("file:region", "relative path"),
        ("file:", "relative path"),
        ("ivshmem:s", "relative path"),
        ("ivshmem://host/s", "names a host"),
        ("file://host/x", "names a host"),
        ("/x\0y", "no region URL"),
        ("pci:", "no PCI address"),
        ("pci:4", "no PCI address"),
        ("pci:../../x", "no PCI address"),
        ("tcp:/x", "unknown kind 'tcp'"),
        ("PCI:auto", "unknown kind 'PCI'"),
    ],
)
def test_no_urls(url: str, says: str) -> None:
    with pytest.raises(RegionUrlError, match=says) as caught:
        region.open(url)
    assert isinstance(caught.value, ValueError)
    assert caught.value.errno == errno.EINVAL
    assert "pci:auto" in str(caught.value)


@pytest.mark.parametrize("url", [3, b"/dev/shm/x"])
def test_urls_are_str(url: Any) -> None:
    with pytest.raises(TypeError):
        region.open(url)


# -- opening


def test_open_file(path: str) -> None:
    for url in (path, f"file:{path}", Path(path)):
        with region.open(url) as opened:
            assert opened.url == f"file:{path}"


def test_open_pci(sysfs: FakeSysfs) -> None:
    sysfs.add()
    for url in ("pci:auto", "pci:00:04.0"):
        with region.open(url, sysfs=sysfs.root) as opened:
            assert opened.url == "pci:0000:00:04.0"


def test_open_pci_by_probe(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:04.0")
    directory = sysfs.add("0000:00:05.0")
    (directory / "resource2").write_bytes(b"magic".ljust(MIB))

    def probe(device: pci.PciDevice) -> bool:
        with bar2.open_pci(device.address, sysfs=sysfs.root, prefer_wc=False) as tried:
            return tried.mmap[:5] == b"magic"

    with region.open("pci:auto", sysfs=sysfs.root, probe=probe) as opened:
        assert opened.url == "pci:0000:00:05.0"


def test_bar_as_a_file(sysfs: FakeSysfs, tmp_path: Path) -> None:
    """People know it by its path; mapped as a file it would get the wrong fences."""
    directory = sysfs.add()
    (tmp_path / "link").symlink_to(directory)
    for name in (directory / "resource2", directory / "resource2_wc", tmp_path / "link" / "resource2"):
        with pytest.raises(RegionUrlError, match=r"name it pci:0000:00:04\.0"):
            region.open(name)
    assert pci.resource_address("/dev/shm/resource2") is None


# -- the default


def test_default_url(sysfs: FakeSysfs, default: str) -> None:
    assert region.default_url({}, sysfs=sysfs.root) == f"file:{default}"
    sysfs.add()
    assert region.default_url({}, sysfs=sysfs.root) == "pci:auto"
    assert region.default_url({"SHMSOCK_REGION": "/x"}, sysfs=sysfs.root) == "/x"


def test_default_file(sysfs: FakeSysfs, default: str) -> None:
    with pytest.raises(RegionNotFoundError):
        region.open(sysfs=sysfs.root)
    with pytest.raises(RegionNotFoundError):
        region.open(sysfs=sysfs.root, create_default=True, writable=False)
    with region.open(sysfs=sysfs.root, create_default=True) as made:
        assert made.url == f"file:{default}"
    with region.open(f"file:{default}", writable=False) as opened:
        assert opened.size == create.DEFAULT_SIZE
    os.chmod(default, 0o644)
    for writable in (True, False):
        with pytest.raises(RegionPermissionError, match="expected 0600"):
            region.open(default, writable=writable)


def test_create_default_makes_nothing_else(tmp_path: Path, default: str) -> None:
    with pytest.raises(RegionNotFoundError):
        region.open(tmp_path / "missing", create_default=True)
    assert os.listdir(tmp_path) == []


def test_default_device(sysfs: FakeSysfs, default: str) -> None:
    sysfs.add()
    with region.open(sysfs=sysfs.root) as opened:
        assert opened.url == "pci:0000:00:04.0"
    sysfs.add("0000:00:05.0")
    with pytest.raises(RegionError, match="2 ivshmem devices"):
        region.open(sysfs=sysfs.root)


def test_environment(path: str, default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", path)
    with region.open() as opened:
        assert opened.path == path
    monkeypatch.setenv("SHMSOCK_REGION", "nonsense")
    with pytest.raises(RegionUrlError, match="SHMSOCK_REGION: 'nonsense' is no region URL"):
        region.open()


# -- raw bytes


def test_raw_bytes(path: str) -> None:
    with region.open_region(path) as memory:
        assert isinstance(memory, memoryview)
        assert (len(memory), memory.format, memory.readonly) == (MIB, "B", False)
        memory[0] = 1
        memory[4:8] = b"abcd"
    assert Path(path).read_bytes()[:8] == b"\1\0\0\0abcd"
    with pytest.raises(ValueError, match="released"):
        memory[0]


def test_raw_bytes_take_one_descriptor(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with region.open_region(path):
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the one that mmap.mmap keeps
    assert len(os.listdir("/proc/self/fd")) == before


def test_raw_slice_outlives_the_view(path: str) -> None:
    with region.open_region(path) as memory:
        memory[9] = 5
        part = memory[8:16]
    assert part[1] == 5
    part.release()


def test_first_raw_bytes(path: str) -> None:
    with region.open_region(path, size=100) as memory:
        assert len(memory) == 100
    for size in (0, -1, MIB + 1):
        with pytest.raises(RegionFormatError, match=f"expected the {size} bytes"):
            region.open_region(path, size=size)


def test_read_only_raw_bytes(path: str) -> None:
    with region.open_region(path, writable=False) as memory:
        assert memory.readonly


def test_raw_bytes_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        region.open_region(tmp_path / "missing")


USER = """
import asyncio, sys, shmsock
async def main():
    async with shmsock.attach(sys.argv[1], name="vm-a"):
        print("attached", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""


@pytest.mark.parametrize("size", [None, 8])
def test_raw_bytes_of_a_region_in_use(shm_region: Path, size: int | None) -> None:
    argv = [sys.executable, "-c", USER, str(shm_region)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "attached\n"
        with pytest.raises(RegionExistsError, match=rf"attached are vm-a \(process {user.pid}\): ") as caught:
            region.open_region(shm_region, size=size)
        assert caught.value.filename == str(shm_region)
        with region.open_region(shm_region, writable=False, size=size) as memory:
            assert bytes(memory[:8]) == b"SHMSOCK1"
        user.communicate()


def test_raw_bytes_of_a_formatted_region(shm_region: Path) -> None:
    with pytest.raises(RegionExistsError, match=r"nobody is attached: .* force=True"):
        region.open_region(shm_region)
    with region.open_region(shm_region, force=True) as memory:
        memory[16:24] = b"\xff" * 8  # no id
    with pytest.raises(RegionExistsError, match="nobody is attached"):
        region.open_region(shm_region)
    with region.open_region(shm_region, force=True) as memory:
        memory[7:8] = b"2"  # of another version
    with pytest.raises(RegionExistsError):
        region.open_region(shm_region)
    with region.open_region(shm_region, force=True) as memory:
        memory[0] = 0
    region.open_region(shm_region).release()


def test_names_that_are_none(shm_region: Path) -> None:
    """Nothing that lies there can make a message more than a line."""
    with region.open(shm_region) as opened:
        at = 4096
        opened.mmap[at : at + 8] = b"\1" * 8
        opened.mmap[at + 0x100 : at + 0x10E] = b"a\nb: \x1b[31m red"
    with pytest.raises(RegionExistsError, match=r"attached are no name \(process 0\): "):
        region.open_region(shm_region)
