"""Regions in a guest: BAR2 of an ivshmem device, mapped through sysfs."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import ExitStack

from shmsock.errors import RegionError, RegionFormatError, RegionPermissionError, region_error
from shmsock.region.base import MINIMUM, Region, identity_of
from shmsock.region.file import owner_name
from shmsock.region.info_block import map_device
from shmsock.region.pci import SYSFS, PciDevice, find_devices, read_device
from shmsock.region.place import Place
from shmsock.region.processes import read_line
from shmsock.region.sizes import format_size
from shmsock.region.udev import PCI_FILE, pci_rule

__all__ = ["PciRegion", "open_pci", "place_of", "the_device"]


class PciRegion(Region):
    """A region in BAR2. It has its storage already; locks and identity are those of `resource2`."""

    # Whatever file was mapped: x86 gives all mappings of a page one memory type, so ours is write-combining
    # as soon as another process mapped resource2_wc first, or where an MTRR says so.
    write_combining = True

    def __init__(self, device: PciDevice, path: str, mapping: mmap.mmap, fd: int, writable: bool) -> None:
        super().__init__(f"pci:{device.address}", path, mapping, fd, writable)
        self.device = device
        self.place = place_of(device)


def place_of(device: PciDevice) -> Place:
    """Find the device in sysfs, where it is as long as it is plugged in."""
    return Place(device.directory, identity_of(device.directory))


def open_pci(address: str, *, writable: bool = True, prefer_wc: bool = True, sysfs: str = SYSFS) -> PciRegion:
    """Enable the ivshmem device at `address` (normalized), and map its BAR2.

    `prefer_wc`: through resource2_wc where there is one. Where the guest's memory type counts,
    write-combining is a little faster to read than uncached (both slow) and many times faster to write;
    elsewhere it makes no difference. Raises RegionError with the errno that fits: RegionNotFoundError,
    RegionPermissionError (the message has a udev rule), EBUSY (another driver has it), ...
    """
    device = the_device(address, sysfs)
    _enable(device)
    with ExitStack() as undo:
        # Locks are on resource2 in any case: processes that map different files must see each other's.
        lock_fd = _open_resource(device, "resource2", writable)
        undo.callback(os.close, lock_fd)
        name, mapping = "resource2", None
        if prefer_wc and "resource2_wc" in device.mappable:
            try:
                mapping = _map_resource(device, "resource2_wc", writable, sysfs)
                name = "resource2_wc"
            except RegionPermissionError:
                pass  # people open the plain file to a group and forget the other
        mapping = mapping or _map_resource(device, name, writable, sysfs)
        undo.callback(mapping.close)
        now = the_device(address, sysfs)  # once more, as it is enabled now
        region = PciRegion(now, f"{device.directory}/{name}", mapping, lock_fd, writable)
        undo.pop_all()
        return region


def _map_resource(device: PciDevice, name: str, writable: bool, sysfs: str) -> mmap.mmap:
    path, size = f"{device.directory}/{name}", device.memory.size
    fd = _open_resource(device, name, writable)
    try:
        seen = os.fstat(fd).st_size
        if seen != size:
            raise region_error(
                errno.EIO,
                f"{path} has {format_size(seen)}, expected {format_size(size)} as BAR2 has: "
                "the device is being removed or resized; try again",
                path,
            )
        try:
            return map_device(fd, size, writable, f"pci:{device.address}")
        except RegionFormatError:
            raise
        except OSError as error:
            raise _explain_map(error, device, path, sysfs) from None
    finally:
        os.close(fd)


def the_device(address: str, sysfs: str) -> PciDevice:
    """The ivshmem device at `address`, with a BAR2 that can be mapped."""
    others = ", ".join(device.url for device in find_devices(sysfs)[:8])
    known = f"ivshmem devices here: {others or 'none'}"
    try:
        device = read_device(address, sysfs)
    except FileNotFoundError:
        raise region_error(errno.ENODEV, f"no PCI device at {address}; {known}") from None
    except (OSError, ValueError) as error:
        raise region_error(
            errno.EIO, f"cannot read about PCI device {address} in {sysfs}: {error}; {known}"
        ) from None
    if not device.is_ivshmem:
        vendor, number = device.ids
        raise region_error(
            errno.ENODEV,
            f"PCI device {address} is {vendor:04x}:{number:04x}, expected 1af4:1110 (ivshmem); {known}",
        )
    bar = device.memory
    if bar.size < MINIMUM:
        seen = format_size(bar.size) if bar.size else "no BAR2"
        raise region_error(
            errno.ENXIO,
            f"ivshmem device {address} has {seen}, expected at least {format_size(MINIMUM)} of shared "
            "memory: give its memory-backend a larger size=, a power of 2",
        )
    if not bar.assigned or "resource2" not in device.mappable:
        raise region_error(
            errno.ENXIO,
            f"BAR2 of ivshmem device {address} ({format_size(bar.size)}) cannot be mapped: no room was found "
            "for it in the guest's address space, or sysfs does not offer it; use a smaller size=, or make "
            "room for 64-bit BARs (guest kernel: pci=realloc; QEMU: -global q35-pcihost.pci-hole64-size=, "
            "a CPU with more phys-bits)",
        )
    return device


def _enable(device: PciDevice) -> None:
    """Switch memory decoding on, unless it was: a disabled device reads as all ones. Raises RegionError."""
    if device.enabled > 0:
        return
    path = f"{device.directory}/enable"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except OSError as error:
        code = error.errno or errno.EIO
        if code == errno.EBUSY:
            raise _claimed(device, path) from None
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            if device.decoding and device.driver is None:
                return  # the firmware switched it on: that will do
            me = owner_name(os.geteuid())
            what = f"ivshmem device {device.address} is not enabled, and {me} may not do it"
            raise _denied(what, path, code) from None
        raise region_error(
            code, f"cannot enable ivshmem device {device.address} through {path}: {os.strerror(code)}", path
        ) from None


def _open_resource(device: PciDevice, name: str, writable: bool) -> int:
    path = f"{device.directory}/{name}"
    try:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        code = error.errno or errno.EIO
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _denied(f"{owner_name(os.geteuid())} may not open {path}", path, code) from None
        if code == errno.ENOENT:
            raise region_error(
                errno.ENODEV, f"ivshmem device {device.address} has no {name}: it was removed just now", path
            ) from None
        raise region_error(code, f"cannot open {path}: {os.strerror(code)}", path) from None


def _denied(what: str, path: str, code: int) -> RegionError:
    """RegionPermissionError with what an administrator can do about it."""
    if code == errno.EROFS:
        text = f"{what}: sysfs is mounted read-only (in a container?); mount it read-write there"
        return region_error(errno.EACCES, text, path)
    return region_error(
        code,
        f"{what}: run as root, or let a group do it with this udev rule in {PCI_FILE} "
        "(`shmsock install-units udev` writes it):\n"
        f"  {pci_rule()}\n"
        "then `groupadd --system shmsock; usermod -aG shmsock USER; udevadm control --reload; "
        "udevadm trigger --subsystem-match=pci`, and log in again",
        path,
    )


def _claimed(device: PciDevice, path: str) -> RegionError:
    if device.vfio:
        return region_error(
            errno.EBUSY,
            f"ivshmem device {device.address} is claimed by {device.driver}: use it as {device.url}, with "
            f"interrupts, or give it back, as root: `shmsock unbind {device.address}`",
            path,
        )
    driver = device.driver or "another driver"
    unbind = f"echo {device.address} > {device.directory}/driver/unbind"
    return region_error(
        errno.EBUSY,
        f"ivshmem device {device.address} is claimed by {driver}, which keeps others from its memory "
        f"(CONFIG_IO_STRICT_DEVMEM); give it back first, as root: {unbind}",
        path,
    )


def _explain_map(error: OSError, device: PciDevice, path: str, sysfs: str) -> RegionError:
    """Explain why BAR2 could not be mapped."""
    code = error.errno or errno.EIO
    if code == errno.EPERM:
        lockdown = read_line(f"{sysfs}/kernel/security/lockdown")
        seen = f" (lockdown: {lockdown})" if lockdown else ""
        return region_error(
            code,
            f"the kernel forbids to map {path}{seen}: it is locked down, as with Secure Boot; boot the guest "
            "without Secure Boot or with lockdown=none",
            path,
        )
    if code in (errno.EINVAL, errno.EBUSY):
        return _claimed(device, path)
    return region_error(
        code, f"cannot map the {format_size(device.memory.size)} of {path}: {os.strerror(code)}", path
    )
