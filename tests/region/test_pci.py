"""ivshmem devices: finding them and mapping BAR2, over a made-up sysfs."""

from __future__ import annotations

import errno
import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shmsock.errors import RegionError, RegionNotFoundError, RegionPermissionError
from shmsock.region import pci, udev
from shmsock.region.bar2 import open_pci
from shmsock.region.pci import choose_device, find_devices, normalize_address, read_device
from tests.region.conftest import AsUser, failing

if TYPE_CHECKING:
    from .conftest import FakeSysfs

MIB = 1 << 20
ADDRESS = "0000:00:04.0"


# -- addresses


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0000:00:04.0", "0000:00:04.0"),
        ("00:04.0", "0000:00:04.0"),
        ("00:1F.7", "0000:00:1f.7"),
        (" 0001:0a:04.0 ", "0001:0a:04.0"),
        ("10000:e1:00.0", "10000:e1:00.0"),
    ],
)
def test_addresses(given: str, expected: str) -> None:
    assert normalize_address(given) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "00:04", "00:04.8", "00:20.0", "00:04.0/..", "0:04.0", "../x", "\u0660"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is no PCI address"):
        normalize_address(text)


# -- finding


def test_device_as_sysfs_shows_it(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:02.0", ids=(0x1AF4, 0x1045))
    sysfs.add("0000:00:05.0", doorbell=True, size=2 << 30, enabled=1, decoding=False, driver="vfio-pci")
    sysfs.add("0000:00:04.0", revision=0)
    plain, doorbell = find_devices(sysfs.root)
    assert (plain.address, plain.model, plain.revision) == (ADDRESS, "ivshmem-plain", 0)
    assert not plain.doorbell
    assert (plain.enabled, plain.decoding, plain.driver, plain.numa_node) == (0, True, None, -1)
    assert plain.mappable == ("resource2_wc", "resource2")
    assert (plain.subsystem, plain.class_code) == ((0x1AF4, 0x1100), 0x050000)
    assert plain.is_ivshmem
    assert doorbell.model == "ivshmem-doorbell"
    assert (doorbell.enabled, doorbell.decoding, doorbell.driver) == (1, False, "vfio-pci")
    assert len(doorbell.bars) == 6
    assert doorbell.memory.size == 2 << 30
    assert doorbell.memory.prefetchable
    assert doorbell.memory.wide
    assert [str(bar) for bar in doorbell.bars[:4]] == [
        "Region 0: Memory at febd1000 (32-bit, non-prefetchable) [size=256 bytes]",
        "Region 1: Memory at febd0000 (32-bit, non-prefetchable) [size=4 KiB]",
        "Region 2: Memory at 800000000 (64-bit, prefetchable) [size=2 GiB]",
        "Region 3: none",
    ]


def test_unassigned_and_port_bars() -> None:
    assert str(pci.Bar(2, 0, MIB, 0x2014220C)) == (
        "Region 2: Memory at <unassigned> (64-bit, prefetchable) [size=1 MiB]"
    )
    assert str(pci.Bar(4, 0xC000, 64, 0x40101)) == "Region 4: I/O ports at c000 [size=64 bytes]"


def test_real_sysfs() -> None:
    """Whatever devices this machine has, they can be read."""
    root = Path("/sys/bus/pci/devices")
    for device in root.iterdir() if root.is_dir() else ():
        assert read_device(device.name).address == device.name
    find_devices()


def test_devices_that_cannot_be_read_are_left_out(sysfs: FakeSysfs) -> None:
    (sysfs.add("0000:00:03.0") / "resource").unlink()
    (sysfs.add("0000:00:05.0") / "resource").write_text("garbage\n")
    (sysfs.add("0000:00:06.0") / "vendor").write_text("\n")
    (sysfs.devices / "0000:00:07.0").mkdir()
    sysfs.add(ADDRESS)
    assert [device.address for device in find_devices(sysfs.root)] == [ADDRESS]


def test_details_that_cannot_be_read_have_defaults(sysfs: FakeSysfs) -> None:
    directory = sysfs.add()
    for name in ("config", "revision", "numa_node", "enable", "class", "subsystem_vendor"):
        (directory / name).unlink()
    device = read_device(ADDRESS, sysfs.root)
    assert (device.decoding, device.revision, device.numa_node, device.enabled) == (False, 0, -1, 0)


# -- choosing


def test_the_one(sysfs: FakeSysfs) -> None:
    sysfs.add()
    assert choose_device(sysfs.root, lambda device: pytest.fail("no need to ask")).address == ADDRESS


def test_none(sysfs: FakeSysfs, tmp_path: Path) -> None:
    with pytest.raises(RegionNotFoundError, match=r"no ivshmem device.*-device ivshmem.*file:") as caught:
        choose_device(sysfs.root)
    assert caught.value.errno == errno.ENODEV
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(RegionNotFoundError, match="a container without sysfs"):
        choose_device(str(tmp_path / "missing"))


def test_several(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:04.0")
    sysfs.add("0000:00:05.0", size=2 << 30)
    listed = r"2 ivshmem devices.*pci:0000:00:04.0 \(1 MiB\), pci:0000:00:05.0 \(2 GiB\).*SHMSOCK_REGION"
    with pytest.raises(RegionError, match=listed) as caught:
        choose_device(sysfs.root)
    assert caught.value.errno == errno.ENOTUNIQ
    for answer in (True, False):
        with pytest.raises(RegionError, match=listed):
            choose_device(sysfs.root, lambda device, answer=answer: answer)  # type: ignore[misc]


def test_several_with_a_probe(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:04.0")
    sysfs.add("0000:00:05.0", size=2 * MIB)

    def probe(device: pci.PciDevice) -> bool:
        if device.address == "0000:00:04.0":
            raise RegionError(errno.EACCES, "no permission")
        return True

    assert choose_device(sysfs.root, probe).address == "0000:00:05.0"


# -- opening


def test_open(sysfs: FakeSysfs) -> None:
    directory = sysfs.add()
    with open_pci(ADDRESS, sysfs=sysfs.root) as region:
        assert (region.url, region.kind, region.size) == (f"pci:{ADDRESS}", "pci", MIB)
        assert region.path == f"{directory}/resource2_wc"
        assert region.write_combining
        assert not region.sparse
        assert region.device.enabled == 1
        region.ensure(0, MIB)
        with pytest.raises(ValueError, match="outside"):
            region.ensure(1, MIB)
        region.mmap[0] = 7
        seen = region.describe()
        assert (seen.allocated, seen.filesystem) == (MIB, "sysfs")
    assert (directory / "enable").read_text() == "1\n"
    assert (directory / "resource2_wc").read_bytes()[0] == 7


def test_open_what_is_enabled(sysfs: FakeSysfs) -> None:
    directory = sysfs.add(enabled=3)
    (directory / "enable").chmod(0o444)
    open_pci(ADDRESS, sysfs=sysfs.root).close()
    assert (directory / "enable").read_text() == "3\n"


def test_uncached_only(sysfs: FakeSysfs) -> None:
    directory = sysfs.add(wc=False)
    with open_pci(ADDRESS, sysfs=sysfs.root) as region:
        assert region.path == f"{directory}/resource2"


def test_both_mappings_are_one_region(sysfs: FakeSysfs) -> None:
    """Locks and identity do not depend on which of the files is mapped; nor do fences."""
    directory = sysfs.add()
    with (
        open_pci(ADDRESS, sysfs=sysfs.root) as wc,
        open_pci(ADDRESS, sysfs=sysfs.root, prefer_wc=False) as uncached,
    ):
        assert uncached.path == f"{directory}/resource2"
        assert uncached.write_combining
        assert wc.identity == uncached.identity
        assert wc.lock_section(5)
        assert uncached.section_locked(5)
        assert not uncached.lock_section(5)


def test_read_only(sysfs: FakeSysfs) -> None:
    sysfs.add()
    with open_pci(ADDRESS, sysfs=sysfs.root, writable=False) as region, pytest.raises(TypeError):
        region.mmap[0] = 1


# -- bad input


def test_absent(sysfs: FakeSysfs) -> None:
    with pytest.raises(RegionNotFoundError, match=r"no PCI device at 0000:00:09.0.*here: none") as caught:
        open_pci("0000:00:09.0", sysfs=sysfs.root)
    assert caught.value.errno == errno.ENODEV
    sysfs.add()
    with pytest.raises(RegionNotFoundError, match=f"here: pci:{ADDRESS}"):
        open_pci("0000:00:09.0", sysfs=sysfs.root)


def test_another_kind_of_device(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:02.0", ids=(0x8086, 0x10D3))
    sysfs.add()
    with pytest.raises(RegionNotFoundError, match=f"is 8086:10d3, expected 1af4:1110.*pci:{ADDRESS}"):
        open_pci("0000:00:02.0", sysfs=sysfs.root)


def test_unreadable(sysfs: FakeSysfs) -> None:
    (sysfs.add() / "resource").write_text("garbage\n")
    with pytest.raises(RegionError, match="cannot read about PCI device"):
        open_pci(ADDRESS, sysfs=sysfs.root)


@pytest.mark.parametrize(("size", "seen"), [(0, "no BAR2"), (1024, "1 KiB")])
def test_too_small(sysfs: FakeSysfs, size: int, seen: str) -> None:
    sysfs.add(size=size)
    with pytest.raises(RegionError, match=f"has {seen}, expected at least 4 KiB"):
        open_pci(ADDRESS, sysfs=sysfs.root)


def test_no_room_in_the_address_space(sysfs: FakeSysfs) -> None:
    sysfs.add(unassigned=True)
    with pytest.raises(RegionError, match="pci=realloc") as caught:
        open_pci(ADDRESS, sysfs=sysfs.root)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize("name", ["resource2", "resource2_wc"])
def test_size_differs_from_the_table(sysfs: FakeSysfs, name: str) -> None:
    directory = sysfs.add()
    os.truncate(directory / name, 4096)
    with pytest.raises(RegionError, match="has 4 KiB, expected 1 MiB") as caught:
        open_pci(ADDRESS, sysfs=sysfs.root, prefer_wc=name.endswith("wc"))
    assert caught.value.errno == errno.EIO


def test_cannot_enable(shared_sysfs: FakeSysfs, as_nobody: AsUser) -> None:
    """The kernel asks for CAP_SYS_ADMIN, so the rule has to enable the device itself."""
    directory = shared_sysfs.add(decoding=False)
    error, code = as_nobody(lambda: open_pci(ADDRESS, sysfs=shared_sysfs.root))
    assert type(error) is RegionPermissionError
    assert code == errno.EACCES
    assert "is not enabled, and uid 65534" in str(error)
    assert udev.pci_rule() in str(error)
    assert (directory / "enable").read_text() == "0\n"


def test_firmware_enabled_it(shared_sysfs: FakeSysfs, as_nobody: AsUser) -> None:
    directory = shared_sysfs.add()
    for name in ("resource2", "resource2_wc"):
        (directory / name).chmod(0o666)

    def use() -> tuple[str, int]:
        with open_pci(ADDRESS, sysfs=shared_sysfs.root) as region:
            return region.url, region.device.enabled

    assert as_nobody(use) == (f"pci:{ADDRESS}", 0)


def test_permission_for_the_plain_file_only(shared_sysfs: FakeSysfs, as_nobody: AsUser) -> None:
    directory = shared_sysfs.add(enabled=1)
    (directory / "resource2").chmod(0o666)
    (directory / "resource2_wc").chmod(0o600)

    def use() -> str:
        with open_pci(ADDRESS, sysfs=shared_sysfs.root) as region:
            return region.path

    assert as_nobody(use) == f"{directory}/resource2"


def test_no_permission(shared_sysfs: FakeSysfs, as_nobody: AsUser) -> None:
    directory = shared_sysfs.add(enabled=1)
    for name in ("resource2", "resource2_wc"):
        (directory / name).chmod(0o600)
    error, code = as_nobody(lambda: open_pci(ADDRESS, sysfs=shared_sysfs.root))
    assert type(error) is RegionPermissionError
    assert code == errno.EACCES
    assert f"may not open {directory}/resource2" in str(error)
    assert udev.pci_rule() in str(error)


def test_udev_rule() -> None:
    rule = udev.pci_rule("users")
    assert "\n" not in rule
    assert {"ACTION", "SUBSYSTEM", "ATTR{vendor}", "ATTR{device}", "ATTR{enable}", "RUN"} == set(
        re.findall(r'(?:^|, )([A-Z]+(?:\{[a-z]+\})?)(?:==|!=|\+=|=)"', rule)
    )
    assert 'ATTR{enable}="1"' in rule
    assert '"/bin/chgrp users %S%p/resource2 %S%p/resource2_wc"' in rule


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (
            errno.EBUSY,
            RegionError,
            rf"claimed by vfio-pci: use it as vfio:{ADDRESS}.*`shmsock unbind {ADDRESS}`",
        ),
        (errno.EPERM, RegionPermissionError, "udev"),
        (errno.EROFS, RegionPermissionError, "read-only"),
        (errno.EIO, RegionError, "cannot enable"),
    ],
)
def test_enable_fails(
    sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[RegionError], says: str
) -> None:
    sysfs.add(driver="vfio-pci")
    monkeypatch.setattr(os, "write", failing(code))
    with pytest.raises(RegionError, match=says) as caught:
        open_pci(ADDRESS, sysfs=sysfs.root)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.EROFS, "read-only"), (errno.ENOENT, "removed just now"), (errno.EMFILE, "Too many open files")],
)
@pytest.mark.parametrize("name", ["resource2", "resource2_wc"])
def test_open_fails(
    sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch, name: str, code: int, says: str
) -> None:
    sysfs.add(enabled=1)
    monkeypatch.setattr(os, "open", failing(code, os.open, name))
    if (name, code) == ("resource2_wc", errno.EROFS):
        open_pci(ADDRESS, sysfs=sysfs.root).close()
    else:
        with pytest.raises(RegionError, match=says):
            open_pci(ADDRESS, sysfs=sysfs.root)


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.EPERM, RegionPermissionError, r"locked down, as with Secure Boot"),
        (errno.EINVAL, RegionError, r"claimed by uio_ivshmem.*IO_STRICT_DEVMEM.*driver/unbind"),
        (errno.EBUSY, RegionError, r"claimed by uio_ivshmem.*IO_STRICT_DEVMEM.*driver/unbind"),
        (errno.ENOMEM, RegionError, r"cannot map the 1 MiB"),
    ],
)
def test_mmap_fails(
    sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[RegionError], says: str
) -> None:
    sysfs.add(enabled=1, driver="uio_ivshmem")
    monkeypatch.setattr("shmsock.region.base.Mapping", failing(code))
    with pytest.raises(RegionError, match=says) as caught:
        open_pci(ADDRESS, sysfs=sysfs.root)
    assert type(caught.value) is kind
    assert code in (caught.value.errno, errno.EINVAL)


def test_lockdown_is_shown(sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs.add(enabled=1)
    security = Path(sysfs.root) / "kernel/security"
    security.mkdir(parents=True)
    (security / "lockdown").write_text("none [integrity] confidentiality\n")
    monkeypatch.setattr("shmsock.region.base.Mapping", failing(errno.EPERM))
    with pytest.raises(RegionPermissionError, match=r"lockdown: none \[integrity\]"):
        open_pci(ADDRESS, sysfs=sysfs.root)


def test_removed_while_it_is_opened(sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = sysfs.add()

    def map_and_remove(*args: Any, **kwargs: Any) -> mmap.mmap:
        (directory / "vendor").unlink()
        return mmap.mmap(*args, **kwargs)

    monkeypatch.setattr("shmsock.region.base.Mapping", map_and_remove)
    with pytest.raises(RegionNotFoundError, match="no PCI device at"):
        open_pci(ADDRESS, sysfs=sysfs.root)
