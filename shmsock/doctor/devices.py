"""Devices that can have a region: ivshmem, with BARs, drivers and what interrupts take; persistent memory."""

from __future__ import annotations

from collections.abc import Iterator

from shmsock.doctor.finding import Finding, errors_of
from shmsock.errors import RegionError
from shmsock.region.bar2 import the_device
from shmsock.region.dax import DRIVER, DaxDevice, find_dax
from shmsock.region.iommu import DEV, no_iommu, not_viable, read_group
from shmsock.region.pci import SYSFS, PciDevice, find_devices
from shmsock.region.processes import read_line
from shmsock.region.sizes import format_size

__all__ = ["devices", "lockdown"]

_NO_DOORBELLS = (
    "a sleeping program is not woken by an interrupt but polls: its first answer takes milliseconds"
)


def devices(sysfs: str = SYSFS, dev: str = DEV) -> Iterator[Finding]:
    """Look at each ivshmem device of this machine, and at persistent memory."""
    for device in find_devices(sysfs):
        yield from _device(device, sysfs, dev)
    for pmem in find_dax(sysfs):
        yield _persistent(pmem)


def _persistent(device: DaxDevice) -> Finding:
    if device.driver != DRIVER and device.ours:
        return Finding(
            "driver",
            "error",
            f"{device} has the driver {device.driver or 'none'}, expected {DRIVER}",
            "only that one lets programs map the memory as it is",
            f"as root: daxctl reconfigure-device --mode=devdax {device.name}, or modprobe {DRIVER}",
            device.url,
        )
    what = "" if device.ours else ", which shmsock did not make: it is used only when it is named"
    return Finding("device", "ok", f"persistent memory {device}{what}", region=device.url)


def _device(device: PciDevice, sysfs: str, dev: str) -> Iterator[Finding]:
    try:
        the_device(device.address, sysfs)
    except RegionError as error:
        seen, mend = errors_of(str(error), "give it a memory-backend of another size")
        yield Finding("bar", "error", seen, "BAR2 is the shared memory", mend, device.url)
        return
    yield Finding(
        "device",
        "ok",
        f"{device.address} {device.model}: BAR2 of {format_size(device.memory.size)}, driver "
        f"{device.driver or 'none'}",
        region=device.url,
    )
    if device.doorbell:
        yield from _interrupts(device, sysfs, dev)
    elif device.vfio:
        yield Finding(
            "driver",
            "error",
            f"{device.address} is ivshmem-plain, which has no interrupts, and is bound to {device.driver}",
            "vfio: regions take a device with interrupts, and pci: one without a driver",
            f"shmsock unbind {device.address}",
            device.url,
        )
    if device.driver and not device.vfio:
        yield Finding(
            "driver",
            "warning",
            f"{device.address} is bound to {device.driver}",
            "a driver may keep others from the device's memory, or switch it off when it lets go of it",
            f"as root: echo {device.address} > {device.directory}/driver/unbind",
            device.url,
        )


def _interrupts(device: PciDevice, sysfs: str, dev: str) -> Iterator[Finding]:
    """Tell whether a doorbell device can be used as one, and the next step."""
    group = read_group(device, sysfs, dev)
    if group is None:
        seen, mend = errors_of(str(no_iommu(device)), "")
        yield Finding("iommu", "warning", seen, _NO_DOORBELLS, mend, device.url)
    elif group.hindering:
        seen, mend = errors_of(str(not_viable(device, group)), "")
        yield Finding("iommu", "warning", seen, _NO_DOORBELLS, mend, device.url)
    elif not device.vfio:
        yield Finding(
            "unbound",
            "warning",
            f"{device.address} has interrupts, and is not bound to vfio-pci",
            _NO_DOORBELLS,
            f"shmsock bind {device.address}",
            device.url,
        )
    else:
        what = "without an IOMMU" if group.noiommu else f"IOMMU group {group.number}"
        yield Finding("iommu", "ok", f"{device.address} is vfio's ({what})", region=device.url)


def lockdown(sysfs: str = SYSFS) -> str:
    """Tell how the kernel is locked down: "integrity", "confidentiality"; "": it is not."""
    chosen = read_line(f"{sysfs}/kernel/security/lockdown").partition("[")[2].partition("]")[0]
    return "" if chosen == "none" else chosen
