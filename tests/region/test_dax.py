"""Regions that guests can have as persistent memory: where they lie in a file, and which devices have one."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from shmsock import region
from shmsock.errors import RegionError, RegionFormatError, RegionNotFoundError
from shmsock.region import info_block
from shmsock.region.dax import choose_dax, find_dax
from tests.region.conftest import FakeSysfs

SIZE = 8 << 20
UNIT = info_block.UNIT
OURS = "73686d73-6f63-6b00-7d14-37dc994a1125"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "region"
    assert region.create_file(str(path), SIZE, dax=True) == SIZE
    return path


def test_the_region_follows_the_block(made: Path) -> None:
    with region.open_file(str(made)) as opened:
        assert (opened.origin, opened.size) == (UNIT, SIZE - UNIT)
        opened.mmap[:5] = b"first"
        opened.mmap[-4:] = b"last"
        assert opened.peek(5) == b"first"
        assert not opened.is_zero()
        assert not opened.is_zero(8)
    data = made.read_bytes()
    assert (data[UNIT : UNIT + 5], data[-4:]) == (b"first", b"last")
    assert (data[:4096].count(0), data[8192:UNIT].count(0)) == (4096, UNIT - 8192)


def test_it_has_no_holes(made: Path) -> None:
    assert made.stat().st_blocks * 512 >= SIZE
    block = made.read_bytes()[4096:8192]
    made.unlink()
    with made.open("wb") as file:
        os.truncate(file.fileno(), SIZE)
        os.pwrite(file.fileno(), block, 4096)
    with region.open_file(str(made), writable=False) as opened:
        assert opened.origin == UNIT
    assert made.stat().st_blocks * 512 < SIZE
    with region.open_file(str(made)) as opened:
        assert opened.holes is None
    assert made.stat().st_blocks * 512 >= SIZE


def test_in_bar2(made: Path, sysfs: FakeSysfs) -> None:
    sysfs.add(size=SIZE)
    with region.open("pci:auto", sysfs=sysfs.root) as opened:
        assert opened.size == SIZE
    resource = Path(sysfs.root, "bus/pci/devices/0000:00:04.0/resource2")
    data = bytearray(made.read_bytes())
    data[UNIT : UNIT + 5] = b"first"
    resource.write_bytes(data)
    with region.open("pci:auto", sysfs=sysfs.root, prefer_wc=False) as opened:
        assert (opened.size, opened.mmap[:5]) == (SIZE - UNIT, b"first")


def test_a_region_at_the_beginning_is_the_region(made: Path) -> None:
    """Whatever its bytes look like further on."""
    with made.open("r+b") as file:
        file.write(b"SHMSOCK1")
    with region.open_file(str(made)) as opened:
        assert (opened.origin, opened.size) == (0, SIZE)


@pytest.mark.parametrize("at", [0, 48, 4095])
def test_a_block_that_is_broken_is_none(made: Path, at: int) -> None:
    with made.open("r+b") as file:
        file.seek(4096 + at)
        seen = file.read(1)[0]
        file.seek(4096 + at)
        file.write(bytes([seen ^ 1]))
    with region.open_file(str(made)) as opened:
        assert (opened.origin, opened.size) == (0, SIZE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("<Q56", SIZE), ("<Q56", 1 << 63), ("<Q56", UNIT + 1), ("<I76", 4096), ("<I80", SIZE)],
)
def test_a_block_of_another_size_is_refused(made: Path, field: str, value: int) -> None:
    block = bytearray(made.read_bytes()[4096:8184])
    struct.pack_into(field[:2], block, int(field[2:]), value)
    with made.open("r+b") as file:
        file.seek(4096)
        file.write(block + info_block._checksum(bytes(block)))
    with pytest.raises(RegionFormatError, match="info block of persistent memory that does not fit 8 MiB"):
        region.open_file(str(made))


def test_memory_for_a_file_system_is_refused(made: Path) -> None:
    block = bytearray(made.read_bytes()[4096:8184])
    block[:16] = b"NVDIMM_PFN_INFO\0"
    with made.open("r+b") as file:
        file.seek(4096)
        file.write(block + info_block._checksum(bytes(block)))
    with pytest.raises(RegionFormatError, match="is memory for a file system"):
        region.open_file(str(made))


@pytest.mark.parametrize("size", [UNIT, 5 << 20, 1 << 20])
def test_sizes_that_cannot_be(tmp_path: Path, size: int) -> None:
    with pytest.raises(RegionError, match=r"expected a multiple of 2 MiB, from 4 MiB on"):
        region.create_file(str(tmp_path / "region"), size, dax=True)
    assert not list(tmp_path.iterdir())


# -- devices, as a kernel 6.1 shows them


def add(sysfs: FakeSysfs, bus: str, number: int = 0, uuid: str = OURS, driver: str = "device_dax") -> Path:
    root = Path(sysfs.root)
    parent = root / "devices" / bus / f"ndbus{number}/region{number}/dax{number}.1"
    device = parent / f"dax{number}.0"
    device.mkdir(parents=True)
    (parent / "uuid").write_text(f"{uuid}\n")
    for name, text in {"size": SIZE - UNIT, "align": UNIT, "dev": f"253:{number}"}.items():
        (device / name).write_text(f"{text}\n")
    (device / "driver").symlink_to(root / "bus/dax/drivers" / driver)
    devices = root / "bus/dax/devices"
    devices.mkdir(parents=True, exist_ok=True)
    (devices / device.name).symlink_to(device)
    return device


def test_devices_are_found(sysfs: FakeSysfs) -> None:
    assert region.default_url({}, sysfs=sysfs.root).startswith("file:")
    add(sysfs, "LNXSYSTM:00/ACPI0012:00")
    assert region.default_url({}, sysfs=sysfs.root) == "auto"
    add(sysfs, "pci0000:00/0000:00:01.0/virtio0", 1, "00000000-0000-0000-0000-000000000001", "kmem")
    ours, other = find_dax(sysfs.root)
    assert (ours.url, ours.backing, ours.size, ours.align) == ("dax:dax0.0", "nvdimm", SIZE - UNIT, UNIT)
    assert (other.backing, other.driver, other.ours) == ("virtio-pmem", "kmem", False)
    assert choose_dax(sysfs.root) == ours
    assert region.device_urls(sysfs.root) == ["dax:dax0.0"]
    sysfs.add()
    assert region.device_urls(sysfs.root) == ["dax:dax0.0", "pci:0000:00:04.0"]
    assert region.default_url({}, sysfs=sysfs.root) == "auto"


def test_devices_that_cannot_be_used(sysfs: FakeSysfs) -> None:
    with pytest.raises(RegionNotFoundError, match="`shmsock qemu-args --dax nvdimm` prints"):
        region.open("dax:auto", sysfs=sysfs.root)
    add(sysfs, "ACPI0012:00", 3, "00000000-0000-0000-0000-000000000001", "kmem")
    with pytest.raises(
        RegionNotFoundError, match=r"dax:dax3\.0 \(6 MiB, nvdimm\), which shmsock did not make"
    ):
        region.open("dax:auto", sysfs=sysfs.root)
    with pytest.raises(RegionError, match="has the driver kmem, expected device_dax") as caught:
        region.open("dax:/dev/dax3.0", sysfs=sysfs.root)
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(RegionNotFoundError, match=r"no device dax0\.0 found: there is dax:dax3\.0"):
        region.open("dax:dax0.0", sysfs=sysfs.root)
    for number in 1, 2:
        add(sysfs, "ACPI0012:00", number)
    with pytest.raises(RegionNotFoundError, match=r"/dev/dax1\.0 is not there, though the device is"):
        region.open("dax:dax1.0", sysfs=sysfs.root)
    with pytest.raises(RegionError, match="2 regions in persistent memory found, expected one") as caught:
        region.open("dax:auto", sysfs=sysfs.root)
    assert caught.value.errno == errno.ENOTUNIQ


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bus/nd/devices/namespace0.0/type", "there is persistent memory without a driver"),
        (
            "block/pmem0/size",
            "there is /dev/pmem0, a block device, whose mappings are copies in the page cache",
        ),
        ("bus/nd/devices/dax0.1/namespace", "its driver is missing: as root, `modprobe -a nd_pmem dax_pmem"),
    ],
)
def test_what_there_is_instead_is_told(sysfs: FakeSysfs, path: str, message: str) -> None:
    file = Path(sysfs.root, path)
    file.parent.mkdir(parents=True)
    file.write_text("namespace0.0\n")
    with pytest.raises(RegionNotFoundError, match=message):
        region.open("dax:auto", sysfs=sysfs.root)
