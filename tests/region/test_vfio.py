"""Regions through vfio, over a made-up sysfs and a kernel of our own (fake_vfio.py)."""

from __future__ import annotations

import errno
import os
import platform
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from shmsock import region
from shmsock.errors import RegionError, RegionNotFoundError, RegionPermissionError
from shmsock.region import bar2, iommu, pci, vfio, vfio_ioctl
from shmsock.region.doorbell import Reach
from tests.region.conftest import AsUser, FakeSysfs, failing
from tests.region.fake_vfio import (
    ADDRESS,
    BAR0,
    BAR2,
    DOORBELL,
    OURS,
    POSITION,
    SIZE,
    FakeVfio,
    put_in_group,
)


@pytest.fixture
def fake(sysfs: FakeSysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVfio:
    return install(FakeVfio(sysfs, tmp_path), monkeypatch)


def install(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> FakeVfio:
    monkeypatch.setattr(vfio_ioctl, "ioctl", fake.ioctl)
    return fake


def take(fake: FakeVfio, **options: Any) -> vfio.VfioRegion:
    return vfio.open_vfio(ADDRESS, sysfs=fake.sysfs.root, dev=str(fake.dev), **options)


def bell(opened: vfio.VfioRegion) -> vfio.VfioDoorbell:
    assert opened.doorbell is not None
    return opened.doorbell


def refused(fake: FakeVfio, says: str, code: int | None = None) -> RegionError:
    """It cannot be opened, and nothing is left of the attempt."""
    with pytest.raises(RegionError, match=says) as caught:
        take(fake)
    if code is not None:
        assert caught.value.errno == code
    assert fake.irqs == []
    return caught.value


# -- what works


def test_open(fake: FakeVfio) -> None:
    with take(fake) as opened:
        assert (opened.url, opened.kind, opened.size) == (f"vfio:{ADDRESS}", "vfio", SIZE)
        assert opened.path == str(fake.group)
        assert opened.write_combining
        assert not opened.sparse
        opened.mmap[17] = 7
        assert fake.read(BAR2 + 17, 1) == b"\7"
        assert fake.calls == [("container",), ("iommu", 3), ("irqs", 2, 6)]
        assert fake.command == 0x107
        assert opened.describe().filesystem == "sysfs"


def test_doorbell(fake: FakeVfio) -> None:
    with take(fake) as opened:
        doorbell = bell(opened)
        assert (doorbell.id, doorbell.vectors, doorbell.server_fd, doorbell.lost) == (OURS, 2, -1, "")
        assert doorbell.news() == []
        assert doorbell.drain() == 0
        for vector in 0, 1, 1:
            fake.interrupt(vector)
        assert doorbell.drain() == 3
        assert doorbell.drain() == 0
        assert doorbell.reach(OURS) is None
        assert doorbell.reach(-1) is doorbell.reach(0x10000) is None
        reach = doorbell.reach(0xFFFE)
        assert reach == Reach("register", reach.fd if reach else -1, DOORBELL, 0xFFFE0000)
        os.pwrite(reach.fd, struct.pack("<I", reach.value), reach.offset)
        assert fake.read(BAR0, 16) == struct.pack("<IIII", 0, 0, OURS, 0xFFFE0000)


def test_nobody_inherits_the_descriptors(fake: FakeVfio) -> None:
    with take(fake) as opened:
        for fd in (*opened._fds, opened.lock_fd, bell(opened).fd):
            assert not os.get_inheritable(fd)


def test_close_gives_it_back_in_order(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = take(fake)
    doorbell, close, closed = bell(opened), os.close, []

    def record(fd: int) -> None:
        closed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        close(fd)

    fake.calls.clear()
    view = memoryview(opened.mmap)
    with pytest.raises(BufferError, match="still in use"):
        opened.close()
    assert fake.calls == []  # nothing was changed
    view.release()
    monkeypatch.setattr(os, "close", record)
    opened.close()
    monkeypatch.undo()
    assert fake.calls == [("irqs", 0, 6)]  # off while bus mastering is on still
    assert fake.command == 0x103
    closed.remove("resource2")
    assert [name for name in closed if "eventfd" not in name] == ["vfio-device", "3", "vfio"]
    opened.close()
    doorbell.close()
    assert doorbell.fd == -1


def test_next_process_takes_it(fake: FakeVfio) -> None:
    for _ in range(2):
        with take(fake) as opened:
            fake.interrupt(0)
            assert bell(opened).drain() == 1


def test_device_that_went_away_can_be_closed(fake: FakeVfio) -> None:
    opened = take(fake)
    fake.fail[fake.asked + 1] = errno.ENODEV
    opened.close()
    for fd in fake.irqs:
        os.close(fd)


def test_forgotten_region(fake: FakeVfio) -> None:
    opened = take(fake)
    with pytest.warns(ResourceWarning, match=f"unclosed region vfio:{ADDRESS}"):
        del opened
    assert fake.irqs == []
    assert fake.command == 0x103


def test_raw_bytes_outlive_the_region(fake: FakeVfio) -> None:
    mapping = take(fake).detach()
    assert fake.irqs == []
    assert fake.command & 2  # else whoever touches the mapping is killed
    mapping[3] = 4
    mapping.close()


def test_forked_child_leaves_the_device_alone(fake: FakeVfio, forked: AsUser) -> None:
    opened = take(fake)

    def child() -> tuple[list[Any], list[str]]:
        fake.calls.clear()
        opened.close()
        links = [
            os.readlink(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd")) if exists(fd)
        ]
        ours = [link for link in links if str(fake.dev) in link or link.endswith("resource2")]
        return fake.calls, ours

    assert forked(child) == ([], [])
    assert fake.command == 0x107
    fake.interrupt(0)
    assert bell(opened).drain() == 1
    opened.close()


def exists(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_read_only_needs_no_interrupts(fake: FakeVfio) -> None:
    fake.vectors, fake.regions[0] = 0, (0, 0, 0)
    with take(fake, writable=False) as opened:
        assert opened.doorbell is None
        assert not opened.writable
        assert fake.command == 0x103
        with pytest.raises(TypeError):
            opened.mmap[0] = 1
    assert fake.calls == [("container",), ("iommu", 3)]


def test_fewer_interrupts_than_vectors(fake: FakeVfio) -> None:
    fake.vectors, fake.room = 64, 3
    with take(fake) as opened:
        assert bell(opened).vectors == 3
        fake.interrupt(0)
        assert bell(opened).drain() == 1


def test_older_iommu(fake: FakeVfio) -> None:
    fake.kinds = {1}
    take(fake).close()
    assert ("iommu", 1) in fake.calls


def test_without_an_iommu(sysfs: FakeSysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(FakeVfio(sysfs, tmp_path, noiommu=True), monkeypatch)
    with take(fake) as opened:
        assert opened.path == f"{fake.dev}/noiommu-3"
        assert ("iommu", 8) in fake.calls
    monkeypatch.setattr(os, "open", failing(errno.EPERM, os.open, "noiommu-3"))
    refused(fake, "noiommu-3 takes CAP_SYS_RAWIO", errno.EPERM)


# -- locks


def test_locks_are_those_of_sysfs(fake: FakeVfio) -> None:
    with take(fake) as opened, bar2.open_pci(ADDRESS, sysfs=fake.sysfs.root) as other:
        assert opened.can_lock
        assert opened.identity == other.identity
        assert opened.lock_section(4)
        assert other.section_locked(4)


def test_no_way_to_sysfs_no_locks(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EACCES, os.open, "resource2"))
    with take(fake) as opened:
        status = fake.group.stat()
        assert opened.identity == (status.st_dev, status.st_ino)
        assert not opened.can_lock
        assert opened.lock_fd == -1
        assert opened.lock_section(4)
        assert not opened.section_locked(4)


# -- by URL


@pytest.fixture
def by_url(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> FakeVfio:
    defaults = vfio.open_vfio.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "dev", str(fake.dev))
    return fake


@pytest.mark.parametrize("url", [f"vfio:{ADDRESS}", "vfio:00:04.0", "vfio:auto", "pci:auto"])
def test_urls(by_url: FakeVfio, url: str) -> None:
    with region.open(url, sysfs=by_url.sysfs.root) as opened:
        assert opened.url == f"vfio:{ADDRESS}"
        assert opened.writable
    with region.open(url, sysfs=by_url.sysfs.root, writable=False) as opened:
        assert not opened.writable


def test_auto_among_several(by_url: FakeVfio) -> None:
    by_url.sysfs.add("0000:00:05.0", size=2 * SIZE)
    with region.open("vfio:auto", sysfs=by_url.sysfs.root) as opened:
        assert opened.url == f"vfio:{ADDRESS}"
    with pytest.raises(RegionError, match=rf"vfio:{ADDRESS} \(1 MiB\), pci:0000:00:05.0 \(2 MiB\)"):
        region.open("pci:auto", sysfs=by_url.sysfs.root)
    with region.open(
        "pci:auto", sysfs=by_url.sysfs.root, probe=lambda device: device.address == ADDRESS
    ) as opened:
        assert opened.url == f"vfio:{ADDRESS}"


def test_auto_without_one(sysfs: FakeSysfs) -> None:
    with pytest.raises(RegionNotFoundError, match=r"no ivshmem device .* found"):
        region.open("vfio:auto", sysfs=sysfs.root)
    sysfs.add()
    with pytest.raises(RegionNotFoundError, match=rf"is {ADDRESS}: .*`shmsock bind ADDRESS`"):
        region.open("vfio:auto", sysfs=sysfs.root)


def test_pci_names_vfio(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver keeps the device from being enabled, and its memory from being mapped."""
    monkeypatch.setattr(os, "write", failing(errno.EBUSY))
    with pytest.raises(RegionError, match=rf"use it as vfio:{ADDRESS}.*`shmsock unbind {ADDRESS}`"):
        region.open(f"pci:{ADDRESS}", sysfs=fake.sysfs.root)


# -- bad input


def test_no_iommu_group(fake: FakeVfio) -> None:
    (fake.directory / "iommu_group").unlink()
    says = (
        r"-M q35,kernel-irqchip=split -device intel-iommu,intremap=on.*intel_iommu=on.*enable_unsafe_noiommu"
    )
    refused(fake, f"no IOMMU.*{says}.*pci:{ADDRESS}", errno.ENODEV)


@pytest.mark.parametrize("driver", [None, "uio_ivshmem"])
def test_not_bound(
    sysfs: FakeSysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str | None
) -> None:
    fake = install(FakeVfio(sysfs, tmp_path, bound=False), monkeypatch)
    if driver:
        (fake.directory / "driver").symlink_to(f"../../drivers/{driver}")
    says = rf"not bound to vfio-pci \(its driver: {driver or 'none'}\).*`shmsock bind {ADDRESS}`"
    refused(fake, says, errno.ENODEV)
    assert fake.asked == 0


def test_busy(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    with take(fake) as opened:
        monkeypatch.setattr(os, "open", failing(errno.EBUSY, os.open, "dev-vfio/3"))
        comm = Path("/proc/self/comm").read_text().strip()
        says = rf"in use by process {os.getpid()} \({re.escape(comm)}, this one\)"
        with pytest.raises(RegionError, match=says) as caught:
            take(fake)
        assert caught.value.errno == errno.EBUSY
        assert caught.value.filename == str(fake.group)
        assert opened.mmap[0] == 0
    refused(fake, r"in use by another process.*\(root sees who has .*/dev-vfio/3 open\)", errno.EBUSY)


def test_looking_at_what_is_in_use(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the descriptor of who has it, for whom nothing changes."""
    monkeypatch.setattr(iommu, "VFIO_DEVICE", str(fake.device))
    with take(fake) as owner:
        owner.mmap[3] = 7
        monkeypatch.setattr(os, "open", failing(errno.EBUSY, os.open, "dev-vfio/3"))
        before = list(fake.calls), fake.command

        def look() -> Any:
            with take(fake, writable=False) as looked:
                return bytes(looked.mmap[3:4]), looked.identity == owner.identity, looked.doorbell

        assert look() == (b"\7", True, None)
        monkeypatch.setattr(os, "open", failing(errno.EACCES, os.open, "resource2"))
        assert look() == (b"\7", False, None)
        assert (fake.calls, fake.command) == before


def test_who_has_several_devices_is_left_alone(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iommu, "VFIO_DEVICE", str(fake.device))
    (fake.dev / "4").touch()
    with take(fake), (fake.dev / "4").open():
        monkeypatch.setattr(os, "open", failing(errno.EBUSY, os.open, "dev-vfio/3"))
        with pytest.raises(RegionError, match="in use by process"):
            take(fake, writable=False)


def test_busy_by_a_mapping_alone(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of raw bytes, all that is left is a descriptor that has no name."""
    known = {"anon_inode:[vfio-device]": ["process 9 (raw)"]}
    monkeypatch.setattr(vfio, "users", lambda path: known.get(path, []))
    monkeypatch.setattr(os, "open", failing(errno.EBUSY, os.open, "dev-vfio/3"))
    refused(fake, r"in use by process 9 \(raw\), and vfio", errno.EBUSY)


def test_users_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "17/fd").mkdir(parents=True)
    (tmp_path / "17/fd/3").symlink_to("/dev/vfio/3")
    (tmp_path / "17/comm").write_text("python3\n")
    (tmp_path / "9").mkdir()
    (tmp_path / "9/maps").write_text(
        "7f00-7f01 rw-s 0000 00:15 99        /sys/devices/pci0/resource2_wc\n7f02-7f03 r--p 0 0:0 0\n"
    )
    (tmp_path / "self").mkdir()
    (tmp_path / "18").mkdir()
    wanted = "/dev/vfio/3", "/sys/devices/pci0/resource2_wc"
    assert iommu.users(*wanted, proc=str(tmp_path)) == ["process 9 (ending)", "process 17 (python3)"]
    assert iommu.users("/dev/vfio/33", proc=str(tmp_path)) == []
    assert iommu.users(*wanted, proc=str(tmp_path / "missing")) == []


def test_no_permission(
    shared_sysfs: FakeSysfs, shared: Path, as_nobody: AsUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(FakeVfio(shared_sysfs, shared), monkeypatch)
    fake.container.chmod(0o666)
    fake.group.chmod(0o600)
    fake.device.chmod(0o666)
    (fake.directory / "resource2").chmod(0o600)
    error, code = as_nobody(lambda: take(fake).close())
    assert type(error) is RegionPermissionError
    assert code == errno.EACCES
    says = rf"uid 65534.* may not open {fake.group}: .*chgrp shmsock {fake.group}.*\n  SUBSYSTEM==\"vfio\""
    assert re.search(says, str(error))
    fake.container.chmod(0o600)
    error, code = as_nobody(lambda: take(fake).close())
    assert (type(error), code) == (RegionPermissionError, errno.EACCES)
    assert f"may not open {fake.container}: " in str(error)
    assert f"`chmod 0666 {fake.container}`" in str(error)
    for path in fake.container, fake.group:
        path.chmod(0o666)

    def use() -> tuple[bool, int]:
        with take(fake) as opened:
            return opened.can_lock, bell(opened).id

    assert as_nobody(use) == (False, OURS)


def test_no_dev_vfio(fake: FakeVfio) -> None:
    fake.group.unlink()
    refused(fake, rf"{fake.group}, the IOMMU group of .*--device.*`shmsock unbind {ADDRESS}", errno.ENODEV)
    fake.container.unlink()
    refused(fake, rf"{fake.container} is not there: .*`modprobe vfio-pci`.*docker run", errno.ENODEV)


@pytest.mark.parametrize("name", ["dev-vfio/vfio", "dev-vfio/3"])
def test_descriptors_run_out(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EMFILE, os.open, name))
    refused(fake, rf"cannot open .*{name}: Too many open files", errno.EMFILE)


def test_group_is_not_viable(fake: FakeVfio) -> None:
    fake.flags = 0
    fake.sysfs.add("0000:00:04.1", ids=(0x1AF4, 0x1041), driver="virtio-pci")
    fake.sysfs.add("0000:00:04.2", ids=(0x8086, 0x2918))
    fake.sysfs.add("0000:00:04.3", driver="vfio-pci")
    refused(fake, "another device, which has a driver of its own", errno.EBUSY)
    (Path(fake.sysfs.root) / "kernel/iommu_groups/3").rename(Path(fake.sysfs.root) / "old")
    (fake.directory / "iommu_group").unlink()
    put_in_group(fake.sysfs, 3, ADDRESS, "0000:00:04.1", "0000:00:04.2", "0000:00:04.3")
    says = (
        r"in group 3 of ivshmem device 0000:00:04.0 is 0000:00:04.1 \(1af4:1041, virtio-pci\), which.*addr="
    )
    assert "04.2" not in str(refused(fake, says, errno.EBUSY))
    fake.flags = 1
    take(fake).close()


def test_no_device(sysfs: FakeSysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(FakeVfio(sysfs, tmp_path), monkeypatch)
    with pytest.raises(RegionNotFoundError, match=rf"no PCI device at 0000:00:09.0; .* here: vfio:{ADDRESS}"):
        vfio.open_vfio("0000:00:09.0", sysfs=sysfs.root, dev=str(fake.dev))
    sysfs.add("0000:00:02.0", ids=(0x1AF4, 0x1041), driver="vfio-pci")
    with pytest.raises(RegionNotFoundError, match="is 1af4:1041, expected 1af4:1110"):
        vfio.open_vfio("0000:00:02.0", sysfs=sysfs.root, dev=str(fake.dev))


def test_no_interrupts(fake: FakeVfio) -> None:
    fake.vectors = 0
    says = (
        rf"has no interrupts .*-device ivshmem-doorbell,vectors=1.*`shmsock unbind {ADDRESS}`.*pci:{ADDRESS}"
    )
    refused(fake, says, errno.ENXIO)


@pytest.mark.parametrize(
    ("index", "answer", "says"),
    [
        (0, (7, 0, 0), r"has 0 bytes of registers \(BAR0\), expected 256"),
        (0, (7, 8, BAR0), "has 8 bytes of registers"),
        (0, (0, 256, BAR0), "has 0 bytes of registers"),
        (2, (7, 0, 0), "vfio shows 0 bytes of BAR2.*expected Region 2: Memory"),
        (2, (7, SIZE // 2, BAR2), "vfio shows 512 KiB of BAR2"),
        (2, (3, SIZE, BAR2), "vfio shows 1 MiB of BAR2.*which cannot be mapped"),
    ],
)
def test_bars(fake: FakeVfio, index: int, answer: tuple[int, int, int], says: str) -> None:
    fake.regions[index] = answer
    refused(fake, says, errno.ENXIO)


@pytest.mark.parametrize(("size", "seen"), [(0, "no BAR2"), (1024, "1 KiB")])
def test_memory_too_small(sysfs: FakeSysfs, size: int, seen: str) -> None:
    sysfs.add("0000:00:05.0", size=size, doorbell=True, driver="vfio-pci")
    with pytest.raises(RegionError, match=f"has {seen}, expected at least 4 KiB"):
        vfio.open_vfio("0000:00:05.0", sysfs=sysfs.root)


def test_ids(fake: FakeVfio) -> None:
    fake.write(POSITION, b"\xff" * 4)
    refused(fake, rf"ivshmem device {ADDRESS}: it has no peer id yet .*is it running", errno.EAGAIN)
    fake.write(POSITION, struct.pack("<I", 0x10000))
    refused(fake, rf"ivshmem device {ADDRESS}: its peer id \(IVPosition\) reads 0x10000", errno.EIO)
    for number in 0, 0xFFFF:
        fake.write(POSITION, struct.pack("<I", number))
        with take(fake) as opened:
            assert bell(opened).id == number


def test_other_version(fake: FakeVfio) -> None:
    fake.version = 1
    refused(fake, "vfio speaks version 1, expected 0", errno.EPROTO)


def test_iommu_module_is_missing(fake: FakeVfio) -> None:
    fake.kinds = set()
    refused(fake, "`modprobe vfio_iommu_type1`", errno.ENODEV)


def test_iommu_without_interrupt_remapping(fake: FakeVfio) -> None:
    fake.fail[6] = errno.EPERM  # the one after "do you know type 1"
    refused(fake, "cannot remap interrupts.*kernel-irqchip=split", errno.EPERM)


def test_no_interrupt_left_in_the_guest(fake: FakeVfio) -> None:
    fake.room = 0
    refused(fake, "no interrupt left", errno.ENOSPC)


def test_arm(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    refused(fake, rf"on arm64.*`shmsock unbind {ADDRESS}`.*pci:{ADDRESS}", errno.EOPNOTSUPP)


def test_every_call_may_fail(fake: FakeVfio) -> None:
    """Whatever the kernel refuses: an error of ours, and nothing is left (the fixture counts descriptors)."""
    take(fake).close()
    whole = fake.asked - 1  # but for the one that switches interrupts off
    assert whole > 8
    for number in range(1, whole + 1):
        fake.asked, fake.fail = 0, {number: errno.EIO}
        refused(fake, f"ivshmem device {ADDRESS}", errno.EIO)
        assert fake.asked == number


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("os.eventfd", "cannot set up"),
        ("os.pread", "cannot set up"),
        ("os.pwrite", "cannot set up"),
        ("shmsock.region.base.Mapping", "cannot map"),
    ],
)
def test_what_else_may_fail(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch, target: str, says: str) -> None:
    monkeypatch.setattr(target, failing(errno.ENOMEM))
    refused(fake, f"{says} ivshmem device {ADDRESS} through vfio: Cannot allocate", errno.ENOMEM)


def test_last_steps_may_fail(fake: FakeVfio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EMFILE, os.open, "resource2"))
    refused(fake, f"cannot lock ivshmem device {ADDRESS} .*Too many open files", errno.EMFILE)
    monkeypatch.undo()
    install(fake, monkeypatch)
    looked = []

    def gone(address: str, sysfs: str) -> pci.PciDevice:
        looked.append(address)
        if len(looked) == 2:
            raise RegionError(errno.ENODEV, "removed just now")
        return pci.read_device(address, sysfs)

    monkeypatch.setattr(vfio, "the_device", gone)
    refused(fake, "removed just now")
    assert fake.calls[-1] == ("irqs", 0, 6)
    assert fake.command == 0x103
