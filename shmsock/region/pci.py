"""ivshmem devices, as sysfs shows them.

The device has up to three BARs: 0, registers (256 bytes); 1, the MSI-X table, on ivshmem-doorbell only; 2,
the shared memory. `ivshmem-plain` and `ivshmem-doorbell` carry the same PCI id.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from shmsock.errors import region_error
from shmsock.region.sizes import format_size

__all__ = [
    "IVSHMEM",
    "Bar",
    "PciDevice",
    "choose_device",
    "find_devices",
    "normalize_address",
    "read_device",
    "resource_address",
]

IVSHMEM = (0x1AF4, 0x1110)
"""Vendor and device id."""
SYSFS = "/sys"

_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.ASCII)

# Resource flags of the kernel (include/linux/ioport.h), third column of the `resource` file.
_IO, _PREFETCH, _MEM_64, _UNSET = 0x100, 0x2000, 0x100000, 0x20000000

# Configuration space: offset of the command register, and its bit "decode memory addresses".
_COMMAND, _COMMAND_MEMORY = 4, 2

_QEMU = (
    "-object memory-backend-file,id=shm,size=64M,mem-path=/dev/shm/NAME,share=on "
    "-device ivshmem-plain,memdev=shm"
)


@dataclass(frozen=True)
class Bar:
    """One base address register. Address and size in bytes; size 0: not there."""

    index: int
    address: int
    size: int
    flags: int

    @property
    def prefetchable(self) -> bool:
        return bool(self.flags & _PREFETCH)

    @property
    def wide(self) -> bool:
        """Whether it is a 64-bit register."""
        return bool(self.flags & _MEM_64)

    @property
    def assigned(self) -> bool:
        """Whether firmware or kernel has given it an address."""
        return bool(self.size) and not self.flags & _UNSET

    def __str__(self) -> str:
        """Describe it as lspci does."""
        if not self.size:
            return f"Region {self.index}: none"
        kind = "I/O ports" if self.flags & _IO else "Memory"
        where = f"{self.address:x}" if self.assigned else "<unassigned>"
        detail = ""
        if not self.flags & _IO:
            width, prefetchable = "64" if self.wide else "32", "" if self.prefetchable else "non-"
            detail = f" ({width}-bit, {prefetchable}prefetchable)"
        return f"Region {self.index}: {kind} at {where}{detail} [size={format_size(self.size)}]"


@dataclass(frozen=True)
class PciDevice:
    """A device as sysfs shows it, at the moment of asking."""

    address: str
    directory: str
    ids: tuple[int, int]
    """Vendor and device."""
    subsystem: tuple[int, int]
    """Vendor and device."""
    class_code: int
    revision: int
    bars: tuple[Bar, ...]
    """Regions 0 to 5."""
    driver: str | None
    """The kernel driver bound to it."""
    enabled: int
    """The count of requests to the kernel to enable it."""
    decoding: bool
    """Does the device answer at its memory addresses?"""
    numa_node: int
    """-1: none."""
    mappable: tuple[str, ...]
    """The files that sysfs offers of BAR2: "resource2_wc" (write-combining), "resource2"."""

    @property
    def is_ivshmem(self) -> bool:
        return self.ids == IVSHMEM

    @property
    def doorbell(self) -> bool:
        """Whether it is an ivshmem-doorbell (it has an MSI-X table), not an ivshmem-plain."""
        return self.bars[1].size > 0

    @property
    def model(self) -> str:
        """Name of the QEMU device."""
        return "ivshmem-doorbell" if self.doorbell else "ivshmem-plain"

    @property
    def memory(self) -> Bar:
        """The shared memory: BAR2."""
        return self.bars[2]

    @property
    def vfio(self) -> bool:
        """Whether it is bound to vfio-pci, or a driver made from that."""
        return "vfio" in (self.driver or "")

    @property
    def url(self) -> str:
        """The region URL that fits its driver."""
        return f"{'vfio' if self.vfio else 'pci'}:{self.address}"


def normalize_address(text: str) -> str:
    """Spell a PCI address in full: '0000:00:04.0' for '00:04.0'. Raises ValueError."""
    match = _ADDRESS.fullmatch(text.strip().lower())
    if not match:
        raise ValueError(
            f"{text!r} is no PCI address: expected DOMAIN:BUS:DEVICE.FUNCTION, such as 0000:00:04.0"
        )
    return f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}"


def resource_address(path: str) -> str | None:
    """Return the PCI address if `path` is a device's `resourceN` or `resourceN_wc` file in sysfs."""
    directory, name = os.path.split(os.path.realpath(path))
    address = os.path.basename(directory)
    return address if re.fullmatch("resource[0-5](_wc)?", name) and _ADDRESS.fullmatch(address) else None


def find_devices(sysfs: str = SYSFS) -> list[PciDevice]:
    """List all ivshmem devices of this machine, by address. Devices that vanish meanwhile are left out."""
    root = f"{sysfs}/bus/pci/devices"
    try:
        addresses = sorted(os.listdir(root))
    except OSError:
        return []
    found = []
    for address in addresses:
        try:
            ids = _number(f"{root}/{address}/vendor"), _number(f"{root}/{address}/device")
            if ids == IVSHMEM:
                found.append(read_device(address, sysfs))
        except (OSError, ValueError):
            continue
    return found


def read_device(address: str, sysfs: str = SYSFS) -> PciDevice:
    """Read the device at `address` (normalized), of whatever kind. Raises OSError when there is none."""
    directory = f"{sysfs}/bus/pci/devices/{address}"
    ids = _number(f"{directory}/vendor"), _number(f"{directory}/device")
    try:
        driver = os.path.basename(os.readlink(f"{directory}/driver"))
    except OSError:
        driver = None
    try:
        with open(f"{directory}/config", "rb") as file:
            decoding = bool(file.read(64)[_COMMAND] & _COMMAND_MEMORY)
    except (OSError, IndexError):
        decoding = False
    names = ("resource2_wc", "resource2")
    return PciDevice(
        address=address,
        directory=directory,
        ids=ids,
        subsystem=(_number(f"{directory}/subsystem_vendor", 0), _number(f"{directory}/subsystem_device", 0)),
        class_code=_number(f"{directory}/class", 0),
        revision=_number(f"{directory}/revision", 0),
        bars=_bars(f"{directory}/resource"),
        driver=driver,
        enabled=_number(f"{directory}/enable", 0),
        decoding=decoding,
        numa_node=_number(f"{directory}/numa_node", -1),
        mappable=tuple(name for name in names if os.path.exists(f"{directory}/{name}")),
    )


def _number(path: str, default: int | None = None) -> int:
    """Read the number in a sysfs file, written as '0x1af4' or '-1'."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read(64), 0)
    except (OSError, ValueError):
        if default is None:
            raise
        return default


def _bars(path: str) -> tuple[Bar, ...]:
    """Parse lines of 'start end flags', all hexadecimal; the first six are the BARs. Raises OSError,
    ValueError."""
    bars = []
    with open(path, encoding="ascii") as file:
        for index, line in zip(range(6), file, strict=False):
            start, end, flags = (int(word, 16) for word in line.split())
            bars.append(Bar(index, start, end - start + 1 if end > start else 0, flags))
    return tuple(bars) + tuple(Bar(index, 0, 0, 0) for index in range(len(bars), 6))


def choose_device(
    sysfs: str = SYSFS, probe: Callable[[PciDevice], bool] | None = None, *, vfio: bool = False
) -> PciDevice:
    """Choose the one ivshmem device; of several the only one that `probe` accepts (raising OSError it does
    not).
    `vfio`: only those that vfio-pci has.

    Raises RegionNotFoundError when there is none, RegionError (ENOTUNIQ) when it cannot be told which.
    """
    devices = find_devices(sysfs)
    if vfio and devices:
        known = ", ".join(device.address for device in devices[:8])
        devices = [device for device in devices if device.vfio]
        if not devices:
            raise region_error(
                errno.ENODEV,
                f"no ivshmem device is bound to vfio-pci; there is {known}: bind it, as root, with "
                "`shmsock bind ADDRESS`",
            )
    if not devices:
        root = f"{sysfs}/bus/pci/devices"
        seen = "" if os.path.isdir(root) else f" ({root} is not there: a container without sysfs?)"
        raise region_error(
            errno.ENODEV,
            f"no ivshmem device (PCI 1af4:1110) found{seen}: in a guest, start QEMU with `{_QEMU}`; "
            "on the host, name the file instead (file:/dev/shm/NAME)",
        )
    if len(devices) > 1 and probe:
        accepted = [device for device in devices if _accepts(probe, device)]
        if len(accepted) == 1:
            return accepted[0]
    if len(devices) > 1:
        seen = ", ".join(f"{device.url} ({format_size(device.memory.size)})" for device in devices[:8])
        raise region_error(
            errno.ENOTUNIQ,
            f"{len(devices)} ivshmem devices found, expected one: {seen}; name the one to use, as region= or "
            "SHMSOCK_REGION",
        )
    return devices[0]


def _accepts(probe: Callable[[PciDevice], bool], device: PciDevice) -> bool:
    try:
        return probe(device)
    except OSError:
        return False
