"""Regions in a guest with interrupts: an ivshmem-doorbell device through vfio.

Shared memory is BAR2, mapped from the descriptor of the device; registers are BAR0, read and written through
that descriptor; interrupts arrive in an eventfd. One process at a time has the device.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from shmsock.errors import RegionError, region_error
from shmsock.region import vfio_ioctl
from shmsock.region.bar2 import place_of, the_device
from shmsock.region.base import Region
from shmsock.region.doorbell import Doorbell, Reach
from shmsock.region.file import owner_name
from shmsock.region.info_block import map_device
from shmsock.region.iommu import DEV, VFIO_DEVICE, Group, borrow, no_iommu, not_viable, read_group, users
from shmsock.region.pci import SYSFS, PciDevice
from shmsock.region.sizes import format_size
from shmsock.region.udev import VFIO_FILE, vfio_rule

__all__ = ["VfioDoorbell", "VfioRegion", "open_vfio"]

_T = TypeVar("_T")

_IVPOSITION, _DOORBELL, _REGISTERS = 8, 12, 16
"""Offsets in BAR0, and how much of it there must be."""
_COMMAND, _MEMORY, _BUS_MASTER = 4, 2, 4
"""Configuration space: the command register, and two of its bits."""
_NOBODY = 0xFFFFFFFF


class VfioDoorbell(Doorbell):
    """The doorbell of a device: all vectors fill one eventfd; others are kicked through BAR0. `device` is the
    region's to close."""

    def __init__(self, device: int, vectors: int) -> None:
        """Switch the interrupts on. Raises OSError; nothing is on then."""
        registers = vfio_ioctl.region_info(device, vfio_ioctl.BAR0)
        self._device, self._registers = device, registers.offset
        self._command = vfio_ioctl.region_info(device, vfio_ioctl.CONFIG).offset + _COMMAND
        self._pid = os.getpid()
        # Memory decoding is for BAR0; without bus mastering no interrupt arrives, and nothing says so.
        self._set_command(_MEMORY | _BUS_MASTER, 0)
        self.id = self._position()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            # Whichever a peer kicks through. Where the kernel has fewer to give, the first will do.
            self.vectors = vfio_ioctl.irqs_to(device, vfio_ioctl.MSIX, [self.fd] * vectors)
        except BaseException:
            os.close(self.fd)
            raise

    def _position(self) -> int:
        position = int.from_bytes(os.pread(self._device, 4, self._registers + _IVPOSITION), "little")
        if position == _NOBODY:
            raise region_error(
                errno.EAGAIN,
                "it has no peer id yet (IVPosition reads -1): its QEMU heard nothing from the ivshmem "
                "server; is it running?",
            )
        if position > 0xFFFF:
            raise region_error(
                errno.EIO,
                f"its peer id (IVPosition) reads {position:#x}, expected 0 to 65535: reset the guest",
            )
        return position

    def _set_command(self, on: int, off: int) -> None:
        """Set and clear bits of the command register. Memory decoding must stay on: without it a touch of the
        mapping kills the process."""
        seen = int.from_bytes(os.pread(self._device, 2, self._command), "little")
        os.pwrite(self._device, (seen & ~off | on).to_bytes(2, "little"), self._command)

    def reach(self, peer: int) -> Reach | None:
        if peer == self.id or not 0 <= peer <= 0xFFFF:
            return None
        return Reach("register", self._device, self._registers + _DOORBELL, peer << 16)

    def close(self) -> None:
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        try:
            if os.getpid() == self._pid:  # a forked child has copies of the descriptors, and one device
                vfio_ioctl.irqs_off(self._device, vfio_ioctl.MSIX)
                self._set_command(0, _BUS_MASTER)
        except OSError:
            pass  # the device was unplugged: it kicks nobody any more
        finally:
            os.close(fd)


class VfioRegion(Region):
    """A region in BAR2, and its doorbell unless it is read-only.

    Locks and identity are those of sysfs' `resource2`, as with pci:. (The inode of the device's descriptor is
    shared with half of the kernel's.) A user that may not open that has no locks.
    """

    doorbell: VfioDoorbell | None
    # vfio asks for uncached memory, where stores stay in order and fences are not needed. But x86 gives all
    # mappings of a page one memory type, and this one gives way to an MTRR that says write-combining, and to
    # a process that mapped resource2_wc first. Beside an uncached access a fence costs nothing; in a VM whose
    # host ignores the guest's types it costs what it costs pci:.
    write_combining = True

    def __init__(
        self,
        device: PciDevice,
        group: Group,
        fds: tuple[int, int, int],
        mapping: mmap.mmap,
        fd: int,
        can_lock: bool,
        writable: bool,
        doorbell: VfioDoorbell | None,
    ) -> None:
        """Take all of it over, unless it raises. `fds`: container, group, device."""
        super().__init__(f"vfio:{device.address}", group.path, mapping, fd, writable)
        self._can_lock = self._can_lock and can_lock
        self.device, self.doorbell = device, doorbell
        self.place = place_of(device)
        self._fds = fds

    def _close_fd(self) -> None:
        fds, self._fds = self._fds, (-1, -1, -1)
        try:
            super()._close_fd()  # the interrupts go first
        finally:
            for fd in reversed(fds):
                if fd >= 0:
                    os.close(fd)


def open_vfio(address: str, *, writable: bool = True, sysfs: str = SYSFS, dev: str = DEV) -> VfioRegion:
    """Take the ivshmem-doorbell device at `address` (normalized), map its BAR2, switch its interrupts on.

    Read-only, no interrupts are set up, a device without any will do, and so does one that another process
    has, if that lets us have its descriptor (it does for root). It is in use then until both have closed it.
    Raises RegionError with the errno that fits: RegionNotFoundError, RegionPermissionError, EBUSY (another
    process has it), ...
    """
    device = the_device(address, sysfs)
    group = _ready(device, read_group(device, sysfs, dev))
    if platform.machine() == "aarch64":
        # vfio maps BARs as device memory, where memcpy() of what is not aligned is a SIGBUS.
        raise region_error(
            errno.EOPNOTSUPP,
            f"ivshmem device {address} cannot be used through vfio on arm64, where the kernel maps it as "
            f"registers, not as memory: give it back (`shmsock unbind {address}`) and use pci:{address}, by "
            "polling",
        )
    with ExitStack() as undo:

        def kept(fd: int) -> int:
            undo.callback(os.close, fd)
            return fd

        container = kept(_open_container(device, dev))
        group_fd, fd = -1, -1
        try:
            group_fd = kept(_open_group(device, group))
        except RegionError as error:
            if not writable and error.errno == errno.EBUSY:
                fd = borrow(group)
            if fd < 0:
                raise
            kept(fd)
        else:
            _join(device, group, group_fd, container)
            fd = kept(_call(device, "take", lambda: vfio_ioctl.get_device(group_fd, address), group.path))
        memory = _call(device, "ask", lambda: vfio_ioctl.region_info(fd, vfio_ioctl.BAR2), group.path)
        if memory.size != device.memory.size or not memory.mappable:
            raise region_error(
                errno.ENXIO,
                f"vfio shows {format_size(memory.size)} of BAR2 of ivshmem device {address}"
                f"{'' if memory.mappable else ', which cannot be mapped'}, expected {device.memory}: a BAR "
                "must be at least a page and fill its pages; try another size=",
            )
        doorbell = None
        if writable:
            vectors = _vectors(device, group, fd)
            doorbell = _call(device, "set up", lambda: VfioDoorbell(fd, vectors), group.path)
            undo.callback(doorbell.close)
        mapping = _call(device, "map", lambda: _map(fd, memory, writable, f"vfio:{address}"), group.path)
        undo.callback(mapping.close)
        lock_fd = _open_lock(device, writable)
        # Of the group, if there is nothing else: an inode to know it by.
        own = kept(os.dup(fd if group_fd < 0 else group_fd) if lock_fd is None else lock_fd)
        now = the_device(address, sysfs)  # once more, as it is enabled now
        region = VfioRegion(
            now, group, (container, group_fd, fd), mapping, own, lock_fd is not None, writable, doorbell
        )
        undo.pop_all()
        return region


def _ready(device: PciDevice, group: Group | None) -> Group:
    """Check what must be so before vfio is asked at all. Raises RegionError."""
    if group is None:
        raise no_iommu(device)
    if not device.vfio:
        raise region_error(
            errno.ENODEV,
            f"ivshmem device {device.address} is not bound to vfio-pci (its driver: "
            f"{device.driver or 'none'}): bind it, as root, with `shmsock bind {device.address}`; "
            f"pci:{device.address} works without, by polling",
        )
    return group


def _open_container(device: PciDevice, dev: str) -> int:
    path = f"{dev}/vfio"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        code = error.errno or errno.EIO
        if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise region_error(
                errno.ENODEV,
                f"{path} is not there: as root, `modprobe vfio-pci`, then `shmsock bind {device.address}`; "
                f"in a container, give it {path} and the group's file (docker run --device)",
                path,
            ) from None
        if code in (errno.EACCES, errno.EPERM):
            raise region_error(
                code,
                f"{owner_name(os.geteuid())} may not open {path}: it is for everybody as a rule, so as root, "
                f"`chmod 0666 {path}`, or run as root",
                path,
            ) from None
        raise region_error(code, f"cannot open {path}: {os.strerror(code)}", path) from None


def _open_group(device: PciDevice, group: Group) -> int:
    path = group.path
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        code = error.errno or errno.EIO
    if code == errno.EBUSY:
        who = users(path) or users(VFIO_DEVICE)  # a mapping alone keeps it too
        raise region_error(
            code,
            f"ivshmem device {device.address} is in use by {', '.join(who[:8]) or 'another process'}, and "
            "vfio gives it to one at a time: stop that one, or give each process a device of its own (root "
            "may look all the same, with `shmsock info`)"
            f"{'' if who else ' (root sees who has ' + path + ' open)'}",
            path,
        )
    if code == errno.EPERM and group.noiommu:
        raise region_error(
            code,
            f"{path} takes CAP_SYS_RAWIO, as there is no IOMMU: run as root, or give the guest one",
            path,
        )
    if code in (errno.EACCES, errno.EPERM):
        raise region_error(
            code,
            f"{owner_name(os.geteuid())} may not open {path}: run as root, or let a group do it: "
            f"`groupadd --system shmsock; usermod -aG shmsock USER; chgrp shmsock {path}; chmod 0660 "
            f"{path}`, and for the next boot this udev rule in {VFIO_FILE} (`shmsock install-units "
            "udev-vfio` writes it):\n"
            f"  {vfio_rule()}\n"
            "then log in again",
            path,
        )
    if code == errno.ENOENT:
        raise region_error(
            errno.ENODEV,
            f"{path}, the IOMMU group of ivshmem device {device.address}, is not there: in a container, give "
            f"it that file (docker run --device); else bind it anew, `shmsock unbind {device.address}; "
            f"shmsock bind {device.address}`",
            path,
        )
    raise region_error(code, f"cannot open {path}: {os.strerror(code)}", path)


def _join(device: PciDevice, group: Group, group_fd: int, container: int) -> None:
    """Put the group into the container, with the IOMMU that there is. Raises RegionError."""
    version = _call(device, "ask", lambda: vfio_ioctl.api_version(container), group.path)
    if version != vfio_ioctl.API_VERSION:
        raise region_error(
            errno.EPROTO, f"this kernel's vfio speaks version {version}, expected {vfio_ioctl.API_VERSION}"
        )
    if not _call(device, "ask", lambda: vfio_ioctl.viable(group_fd), group.path):
        raise not_viable(device, group)
    _call(device, "take", lambda: vfio_ioctl.attach_group(group_fd, container), group.path)
    kinds = (vfio_ioctl.NOIOMMU,) if group.noiommu else (vfio_ioctl.TYPE1_V2, vfio_ioctl.TYPE1)
    known = _call(device, "ask", lambda: [k for k in kinds if vfio_ioctl.supports(container, k)], group.path)
    if not known:
        raise region_error(
            errno.ENODEV,
            f"vfio knows no IOMMU for ivshmem device {device.address}: as root, `modprobe vfio_iommu_type1`",
        )
    try:
        vfio_ioctl.set_iommu(container, known[0])
    except OSError as error:
        code = error.errno or errno.EIO
        if code == errno.EPERM:
            raise region_error(
                code,
                f"vfio refuses the IOMMU that ivshmem device {device.address} is behind: it cannot remap "
                "interrupts; start QEMU with `-M q35,kernel-irqchip=split -device intel-iommu,intremap=on`",
            ) from None
        raise _failed(device, "use the IOMMU of", code, group.path) from None


def _vectors(device: PciDevice, group: Group, fd: int) -> int:
    """Count the interrupts, once it is known that there are registers too. Raises RegionError."""
    registers = _call(device, "ask", lambda: vfio_ioctl.region_info(fd, vfio_ioctl.BAR0), group.path)
    if registers.size < _REGISTERS:
        raise region_error(
            errno.ENXIO,
            f"ivshmem device {device.address} has {format_size(registers.size)} of registers (BAR0), "
            "expected 256: it can ring nobody",
        )
    vectors = _call(device, "ask", lambda: vfio_ioctl.irq_count(fd, vfio_ioctl.MSIX), group.path)
    if not vectors:
        raise region_error(
            errno.ENXIO,
            f"ivshmem device {device.address} has no interrupts (MSI-X vectors), expected 1 or more: it is "
            "ivshmem-plain, or ivshmem-doorbell with vectors=0; start QEMU with `-chardev "
            "socket,path=SOCKET,id=s -device ivshmem-doorbell,vectors=1,chardev=s` on the socket of `shmsock "
            f"ivshmem-server`, or do without: `shmsock unbind {device.address}`, then pci:{device.address}, "
            "by polling",
        )
    return min(vectors, 64)


def _map(fd: int, memory: vfio_ioctl.RegionInfo, writable: bool, url: str) -> mmap.mmap:
    return map_device(fd, memory.size, writable, url, memory.offset)


def _open_lock(device: PciDevice, writable: bool) -> int | None:
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(f"{device.directory}/resource2", flags)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            return None  # a user of vfio need not have access to sysfs
        raise _failed(device, "lock", error.errno, f"{device.directory}/resource2") from None


def _call(device: PciDevice, what: str, call: Callable[[], _T], path: str) -> _T:
    """Return what `call` does; an OSError becomes a RegionError that says what it was about."""
    try:
        return call()
    except RegionError as error:
        raise region_error(
            error.errno or errno.EIO, f"ivshmem device {device.address}: {error}", path
        ) from None
    except OSError as error:
        raise _failed(device, what, error.errno or errno.EIO, path) from None


def _failed(device: PciDevice, what: str, code: int, path: str) -> RegionError:
    text = f"cannot {what} ivshmem device {device.address} through vfio: {os.strerror(code)}"
    if code == errno.ENOSPC:
        text += ", as this guest has no interrupt left"
    return region_error(code, f"{text}; `dmesg` may say more", path)
