"""Regions in a guest: persistent memory (an NVDIMM, or virtio-pmem), mapped through /dev/daxN.M.

It is memory as the guest's own is: cached, write-back. Locks and identity are those of the device's file.
Flushes are for what has to outlive the host, which a region need not. /dev/pmemN, the block device of memory
that has no info block, is no way to it: its mappings are copies, in the guest's page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from contextlib import ExitStack
from dataclasses import dataclass

from shmsock.errors import RegionError, region_error
from shmsock.region.base import Description, Region, check_size, identity_of, map_bytes
from shmsock.region.file import owner_name
from shmsock.region.info_block import OURS
from shmsock.region.pci import SYSFS
from shmsock.region.place import Place
from shmsock.region.processes import read_line
from shmsock.region.sizes import format_size
from shmsock.region.udev import DAX_FILE, dax_rule

__all__ = ["DaxDevice", "DaxRegion", "choose_dax", "find_dax", "open_dax"]

DEV = "/dev"
DRIVER = "device_dax"
NAME = re.compile(r"dax\d+\.\d+", re.ASCII)
_MODULES = "modprobe -a nd_pmem dax_pmem device_dax"
_CREATE = "make the region with `shmsock create --dax`, on the host"


@dataclass(frozen=True)
class DaxDevice:
    """A device as sysfs shows it, at the moment of asking."""

    name: str
    directory: str
    backing: str
    """QEMU's name for what it is made of: "nvdimm", "virtio-pmem"; "other"."""
    size: int
    align: int
    """Bytes that it is mapped in multiples of."""
    uuid: str
    """In digits alone; empty: it has none."""
    driver: str | None
    """device_dax, or kmem: it is used as ordinary memory."""
    number: str
    """Of the device's file: "253:0"."""

    @property
    def ours(self) -> bool:
        """Was it made by `shmsock create --dax`?"""
        return self.uuid.startswith(OURS.hex())

    @property
    def url(self) -> str:
        return f"dax:{self.name}"

    def __str__(self) -> str:
        return f"{self.url} ({format_size(self.size)}, {self.backing})"


class DaxRegion(Region):
    """A region in persistent memory. It has its storage already."""

    def __init__(self, device: DaxDevice, path: str, mapping: mmap.mmap, fd: int, writable: bool) -> None:
        super().__init__(device.url, path, mapping, fd, writable)
        self.device = device
        self.place = Place(path, self.identity)

    def describe(self) -> Description:
        return super().describe()._replace(filesystem=self.device.backing, page_size=self.device.align)


def find_dax(sysfs: str = SYSFS) -> list[DaxDevice]:
    """List all devices of this kind, by name. Devices that vanish meanwhile are left out."""
    root = f"{sysfs}/bus/dax/devices"
    found = []
    for name in filter(NAME.fullmatch, _names(root)):
        directory = os.path.realpath(f"{root}/{name}")
        size, align = (read_line(f"{directory}/{what}") or "" for what in ("size", "align"))
        if not size.isdecimal():
            continue
        driver = f"{directory}/driver"
        found.append(
            DaxDevice(
                name=name,
                directory=directory,
                backing=_backing(directory),
                size=int(size),
                align=int(align) if align.isdecimal() else mmap.PAGESIZE,
                uuid=(read_line(f"{os.path.dirname(directory)}/uuid") or "").replace("-", ""),
                driver=os.path.basename(os.path.realpath(driver)) if os.path.islink(driver) else None,
                number=read_line(f"{directory}/dev") or "",
            )
        )
    return found


def _backing(directory: str) -> str:
    if "/ndbus" not in directory:
        return "other"
    return "virtio-pmem" if "/virtio" in directory else "nvdimm"


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def choose_dax(sysfs: str = SYSFS) -> DaxDevice:
    """Choose the one device that `shmsock create --dax` made.

    Raises RegionNotFoundError when there is none, RegionError (ENOTUNIQ) when there are several.
    """
    devices = find_dax(sysfs)
    ours = [device for device in devices if device.ours]
    if len(ours) == 1:
        return ours[0]
    if ours:
        raise region_error(
            errno.ENOTUNIQ,
            f"{len(ours)} regions in persistent memory found, expected one: "
            f"{', '.join(map(str, ours[:8]))}; name the one to use, as region= or SHMSOCK_REGION",
        )
    raise _none("no region in persistent memory", sysfs)


def _none(what: str, sysfs: str) -> RegionError:
    hint = _instead(sysfs) or (
        "give the guest one with what `shmsock qemu-args --dax nvdimm` prints on the host (and here, as "
        f"root, `modprobe -a nfit virtio_pmem`, then `{_MODULES}`)"
    )
    return region_error(errno.ENODEV, f"{what} found: {hint}")


def _instead(sysfs: str = SYSFS) -> str:
    """Tell what there is that is no region, and what to do; "": no persistent memory at all."""
    devices = find_dax(sysfs)
    nd = f"{sysfs}/bus/nd/devices"
    names = _names(nd)
    block = [name for name in _names(f"{sysfs}/block") if name.startswith("pmem")]
    if devices:
        seen = ", ".join(map(str, devices[:8]))
        return f"there is {seen}, which shmsock did not make; name it if it is to be used, or {_CREATE}"
    if any(NAME.fullmatch(name) and read_line(f"{nd}/{name}/namespace") for name in names):
        return f"there is such memory, and its driver is missing: as root, `{_MODULES}`"
    if block:
        return (
            f"there is /dev/{block[0]}, a block device, whose mappings are copies in the page cache of this "
            f"guest: {_CREATE}"
        )
    if any(name.startswith("namespace") for name in names):
        return f"there is persistent memory without a driver: as root, `{_MODULES}`"
    return ""


def open_dax(name: str, *, writable: bool = True, sysfs: str = SYSFS, dev: str = DEV) -> DaxRegion:
    """Map the device of that name ("dax0.0").

    Raises RegionError with the errno that fits: RegionNotFoundError, RegionPermissionError (the message has a
    udev rule), EBUSY (the guest uses it as ordinary memory), ...
    """
    device = next((device for device in find_dax(sysfs) if device.name == name), None)
    if device is None:
        raise _none(f"no device {name}", sysfs)
    path = f"{dev}/{name}"
    if device.driver != DRIVER:
        raise region_error(
            errno.EBUSY,
            f"{path} has the driver {device.driver or 'none'}, expected {DRIVER}: as root, `daxctl "
            f"reconfigure-device --mode=devdax {name}`, or `modprobe {DRIVER}`",
            path,
        )
    check_size(path, device.size)
    with ExitStack() as undo:
        fd = _open(device, path, writable)
        try:
            lock_fd = _open(device, path, writable)  # not dup(), see Region.__init__
            undo.callback(os.close, lock_fd)
            if identity_of(fd) != identity_of(lock_fd):
                raise region_error(errno.ESTALE, f"{path} was replaced while it was opened: try again", path)
            mapping = undo.enter_context(map_bytes(fd, device.size, writable))
        except RegionError:
            raise
        except OSError as error:
            raise region_error(
                error.errno or errno.EIO,
                f"cannot map the {format_size(device.size)} of {path}: {error.strerror}; see `dmesg`",
                path,
            ) from None
        finally:
            os.close(fd)
        region = DaxRegion(device, path, mapping, lock_fd, writable)
        undo.pop_all()
        return region


def _open(device: DaxDevice, path: str, writable: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | (os.O_RDWR if writable else os.O_RDONLY))
    except OSError as error:
        code = error.errno or errno.EIO
        if code in (errno.EACCES, errno.EPERM):
            raise region_error(
                code,
                f"{owner_name(os.geteuid())} may not open {path}: run as root, or let a group do it with "
                f"this udev rule in {DAX_FILE} (`shmsock install-units udev-dax`):\n"
                f"  {dax_rule()}\n"
                "then `groupadd --system shmsock; usermod -aG shmsock USER; udevadm control --reload; "
                "udevadm trigger --subsystem-match=dax`, and log in again",
                path,
            ) from None
        if code == errno.ENOENT:
            raise region_error(
                errno.ENODEV,
                f"{path} is not there, though the device is: in a container, give it that file (docker run "
                "--device)",
                path,
            ) from None
        raise region_error(code, f"cannot open {path}: {os.strerror(code)}", path) from None
    status = os.fstat(fd)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if stat.S_ISCHR(status.st_mode) and device.number == number:
        return fd
    os.close(fd)
    raise region_error(
        errno.ENODEV, f"{path} is another file than that of the device, {device.number}: remove it", path
    )
