"""IOMMU groups: what vfio hands out, and what keeps it from that."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

from shmsock.errors import RegionError, region_error
from shmsock.region.pci import SYSFS, PciDevice, read_device
from shmsock.region.processes import links, name_of, pids, read_line

__all__ = ["DEV", "NOIOMMU_SWITCH", "Group", "borrow", "no_iommu", "not_viable", "read_group", "users"]

DEV = "/dev/vfio"
NOIOMMU_SWITCH = "module/vfio/parameters/enable_unsafe_noiommu_mode"
"""Below sysfs, once the module is loaded, and only where the kernel has it."""

VFIO_DEVICE = "anon_inode:[vfio-device]"
"""The link of a device's descriptor in /proc."""

_PIDFD_GETFD = 438  # the number is the same on every machine

_HARMLESS = ("vfio", "pci-stub", "pcieport", "shpchp")
"""Drivers that vfio bears beside itself in a group."""


@dataclass(frozen=True)
class Group:
    """The devices that an IOMMU cannot tell apart."""

    number: int
    path: str
    """The path of the file that stands for it, once all of it is vfio's."""
    noiommu: bool
    """Is there no IOMMU, and vfio was told to do without?"""
    others: tuple[PciDevice, ...]
    """The other devices in it."""

    @property
    def hindering(self) -> list[str]:
        """The other devices whose drivers keep vfio from the group."""
        return [
            f"{other.address} ({other.ids[0]:04x}:{other.ids[1]:04x}, {other.driver})"
            for other in self.others
            if other.driver and not any(name in other.driver for name in _HARMLESS)
        ]


def read_group(device: PciDevice, sysfs: str = SYSFS, dev: str = DEV) -> Group | None:
    """Read the IOMMU group of `device`; None when there is no IOMMU."""
    try:
        directory = os.path.realpath(f"{device.directory}/iommu_group", strict=True)
        number = int(os.path.basename(directory))
        members = sorted(os.listdir(f"{directory}/devices"))
    except (OSError, ValueError):
        return None
    others = []
    for address in members:
        try:
            if address != device.address:
                others.append(read_device(address, sysfs))
        except (OSError, ValueError):
            continue
    noiommu = read_line(f"{directory}/name") == "vfio-noiommu"
    return Group(number, f"{dev}/{'noiommu-' if noiommu else ''}{number}", noiommu, tuple(others))


def no_iommu(device: PciDevice) -> RegionError:
    """Build the error for a machine without an IOMMU, which vfio needs as a rule."""
    return region_error(
        errno.ENODEV,
        f"no IOMMU, which vfio needs: ivshmem device {device.address} is in no IOMMU group. Start QEMU with "
        "`-M q35,kernel-irqchip=split -device intel-iommu,intremap=on` and the guest's kernel with "
        "`intel_iommu=on`; or, on a kernel that has enable_unsafe_noiommu_mode (CONFIG_VFIO_NOIOMMU), "
        f"`shmsock bind --noiommu {device.address}`, which taints it; pci:{device.address} works without, by "
        "polling",
    )


def not_viable(device: PciDevice, group: Group) -> RegionError:
    """Build the error for a group of which vfio does not have all devices."""
    seen = ", ".join(group.hindering[:8]) or "another device"
    return region_error(
        errno.EBUSY,
        f"vfio takes whole IOMMU groups, and in group {group.number} of ivshmem device {device.address} is "
        f"{seen}, which has a driver of its own: give the ivshmem device a slot of its own "
        "(QEMU: -device ivshmem-doorbell,...,addr=0x10), or unbind that driver",
        group.path,
    )


def users(*paths: str, proc: str = "/proc") -> list[str]:
    """Find processes that have one of these files open or mapped: 'process 17 (python3)'. Others than those
    that may be inspected are left out."""
    return [name_of(pid, proc) for pid in pids(proc) if not _files(pid, proc).isdisjoint(paths)]


def borrow(group: Group, proc: str = "/proc") -> int:
    """Take a descriptor of the device in `group` from the process that has it, as vfio makes no second one.
    Root may (ptrace(2), Linux 5.6). -1: nobody can be asked.

    A process with devices of several groups is left alone, as nothing tells which is which.
    """
    if any(other.vfio for other in group.others):
        return -1
    directory = os.path.dirname(group.path)
    for pid in pids(proc):
        files = links(pid, proc)
        groups = {file for file in files.values() if os.path.dirname(file) == directory}
        devices = [number for number, file in files.items() if file == VFIO_DEVICE]
        if devices and groups - {f"{directory}/vfio"} == {group.path}:
            with contextlib.suppress(OSError):
                return _copy_descriptor(int(pid), int(devices[0]))
    return -1


def _copy_descriptor(pid: int, fd: int) -> int:
    """Copy another process's descriptor by pidfd_getfd (Linux 5.6), which takes the right to trace it. Raises
    OSError."""
    import ctypes

    process = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        taken: int = libc.syscall(_PIDFD_GETFD, process, fd, 0)
        if taken < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        return taken
    finally:
        os.close(process)


def _files(pid: str, proc: str) -> set[str]:
    found = {*links(pid, proc).values()}
    with (
        contextlib.suppress(OSError),
        open(f"{proc}/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file,
    ):
        found |= {line[line.find("/") :].rstrip("\n") for line in file if "/" in line}
    return found
