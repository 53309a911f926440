"""The requests to the kernel's vfio (linux/vfio.h): one function per ioctl, numbers and structures as there.

Everything goes through `ioctl` below, where tests put a device of their own.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from fcntl import ioctl
from typing import NamedTuple

__all__ = [
    "API_VERSION",
    "BAR0",
    "BAR2",
    "CONFIG",
    "MSIX",
    "NOIOMMU",
    "TYPE1",
    "TYPE1_V2",
    "RegionInfo",
    "api_version",
    "attach_group",
    "get_device",
    "irq_count",
    "irqs_off",
    "irqs_to",
    "region_info",
    "set_iommu",
    "supports",
    "viable",
]

API_VERSION = 0
TYPE1, TYPE1_V2, NOIOMMU = 1, 3, 8
"""Kinds of IOMMU."""
BAR0, BAR2, CONFIG = 0, 2, 7
"""Regions of a PCI device."""
MSIX = 2
"""Its kind of interrupts."""

_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU = 0x3B64, 0x3B65, 0x3B66
_GROUP_GET_STATUS, _GROUP_SET_CONTAINER, _GROUP_GET_DEVICE_FD = 0x3B67, 0x3B68, 0x3B6A
_DEVICE_GET_REGION_INFO, _DEVICE_GET_IRQ_INFO, _DEVICE_SET_IRQS = 0x3B6C, 0x3B6D, 0x3B6E

_GROUP_VIABLE = 1
_REGION_READ, _REGION_WRITE, _REGION_MMAP = 1, 2, 4
_DATA_NONE, _DATA_EVENTFD, _ACTION_TRIGGER = 1, 4, 32

# Each begins with its own size, then flags.
_STATUS = struct.Struct("=II")
_REGION = struct.Struct("=IIIIQQ")  # index, offset of capabilities, size, offset
_IRQ = struct.Struct("=IIII")  # index, count
_SET = struct.Struct("=IIIII")  # index, start, count; then data


class RegionInfo(NamedTuple):
    """The place of a region of a device in its descriptor; size 0: there is none."""

    size: int
    offset: int
    mappable: bool


def api_version(container: int) -> int:
    version: int = ioctl(container, _GET_API_VERSION)
    return version


def supports(container: int, kind: int) -> bool:
    """Ask whether the container knows this kind of IOMMU."""
    return ioctl(container, _CHECK_EXTENSION, kind) > 0


def set_iommu(container: int, kind: int) -> None:
    ioctl(container, _SET_IOMMU, kind)


def viable(group: int) -> bool:
    """Ask whether no device of the group has a driver of the kernel's own."""
    status = bytearray(_STATUS.pack(_STATUS.size, 0))
    ioctl(group, _GROUP_GET_STATUS, status)
    return bool(_STATUS.unpack(status)[1] & _GROUP_VIABLE)


def attach_group(group: int, container: int) -> None:
    ioctl(group, _GROUP_SET_CONTAINER, struct.pack("=i", container))


def get_device(group: int, address: str) -> int:
    """Get a new descriptor of the device, with FD_CLOEXEC."""
    # A bytearray: for what is immutable, ioctl() returns that, not the descriptor.
    fd: int = ioctl(group, _GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    return fd


def region_info(device: int, index: int) -> RegionInfo:
    info = bytearray(_REGION.pack(_REGION.size, 0, index, 0, 0, 0))
    ioctl(device, _DEVICE_GET_REGION_INFO, info)
    _, flags, _, _, size, offset = _REGION.unpack(info)
    usable = flags & _REGION_READ and flags & _REGION_WRITE
    return RegionInfo(size if usable else 0, offset, bool(flags & _REGION_MMAP))


def irq_count(device: int, index: int) -> int:
    """Count the interrupts of that kind that the device has."""
    info = bytearray(_IRQ.pack(_IRQ.size, 0, index, 0))
    ioctl(device, _DEVICE_GET_IRQ_INFO, info)
    count: int = _IRQ.unpack(info)[3]
    return count


def irqs_to(device: int, index: int, eventfds: Sequence[int]) -> int:
    """Let the first interrupts signal these eventfds; returns how many do.

    Raises OSError (ENOSPC: the kernel has no interrupt left).
    """
    count = len(eventfds)
    while True:
        head = _SET.pack(_SET.size + 4 * count, _DATA_EVENTFD | _ACTION_TRIGGER, index, 0, count)
        fewer = ioctl(
            device, _DEVICE_SET_IRQS, bytearray(head + struct.pack(f"={count}i", *eventfds[:count]))
        )
        if fewer == 0:
            return count
        if not 0 < fewer < count:  # it tells how many there would be
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = fewer


def irqs_off(device: int, index: int) -> None:
    ioctl(
        device, _DEVICE_SET_IRQS, bytearray(_SET.pack(_SET.size, _DATA_NONE | _ACTION_TRIGGER, index, 0, 0))
    )
