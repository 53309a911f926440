"""A vfio-pci of our own: sysfs, /dev/vfio and the descriptor of the device are files, and ioctls are answered
as linux/vfio.h says, from numbers written down here once more."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

from tests.region.conftest import FakeSysfs

ADDRESS = "0000:00:04.0"
SIZE = 1 << 20
BAR0, CONFIG, BAR2 = 0x1000, 0x2000, 0x10000
"""Where the device's file has them."""
COMMAND, POSITION, DOORBELL = CONFIG + 4, BAR0 + 8, BAR0 + 12
OURS = 5
"""Our peer id."""

EVENTFD, NONE, TRIGGER = 4, 1, 32
MSIX = 2


def put_in_group(sysfs: FakeSysfs, number: int, *addresses: str, name: str | None = None) -> Path:
    """Makes an IOMMU group of these devices."""
    group = Path(sysfs.root) / f"kernel/iommu_groups/{number}"
    (group / "devices").mkdir(parents=True)
    for address in addresses:
        (group / "devices" / address).symlink_to(sysfs.devices / address)
        (sysfs.devices / address / "iommu_group").symlink_to(group)
    if name:
        (group / "name").write_text(name + "\n")
    return group


class FakeVfio:
    """One ivshmem-doorbell device, bound to vfio-pci, alone in group 3."""

    def __init__(self, sysfs: FakeSysfs, root: Path, *, noiommu: bool = False, bound: bool = True) -> None:
        self.sysfs = sysfs
        self.directory = sysfs.add(ADDRESS, size=SIZE, doorbell=True, driver="vfio-pci" if bound else None)
        put_in_group(sysfs, 3, ADDRESS, name="vfio-noiommu" if noiommu else None)
        self.dev = root / "dev-vfio"
        self.dev.mkdir()
        self.container = self.dev / "vfio"
        self.group = self.dev / ("noiommu-3" if noiommu else "3")
        self.device = root / "vfio-device"
        for path in self.container, self.group, self.device:
            path.touch()
        os.truncate(self.device, BAR2 + SIZE)
        self.write(POSITION, struct.pack("<I", OURS))
        self.write(
            COMMAND, struct.pack("<H", 0x103)
        )  # as a boot leaves it; bit 0x100 is nobody's business here
        # what it answers
        self.version, self.flags = 0, 1
        self.kinds = {8} if noiommu else {1, 3}
        self.regions = {0: (7, 256, BAR0), 2: (7, SIZE, BAR2), 7: (3, 256, CONFIG)}  # flags, size, offset
        self.vectors, self.room = 2, 64
        self.fail: dict[int, int] = {}  # the how-manyeth call -> errno
        # what it saw
        self.calls: list[tuple[Any, ...]] = []
        self.irqs: list[int] = []
        self.asked = 0

    def write(self, offset: int, data: bytes) -> None:
        with self.device.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def read(self, offset: int, length: int) -> bytes:
        with self.device.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    @property
    def command(self) -> int:
        value: int = struct.unpack("<H", self.read(COMMAND, 2))[0]
        return value

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> Any:
        self.asked += 1
        if code := self.fail.get(self.asked):
            raise OSError(code, os.strerror(code))
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        answer = {
            self.container: self._on_container,
            self.group: self._on_group,
            self.device: self._on_device,
        }
        return answer[path](request & 0xFF, argument, fd)

    def _on_container(self, number: int, argument: Any, fd: int) -> Any:
        if number == 100:
            return self.version
        if number == 101:
            return int(argument in self.kinds)
        assert number == 102
        self.calls.append(("iommu", argument))
        return 0

    def _on_group(self, number: int, argument: Any, fd: int) -> Any:
        if number == 103:
            assert struct.unpack("=II", argument)[0] == 8
            argument[4:8] = struct.pack("=I", self.flags)
            return 0
        if number == 104:
            (container,) = struct.unpack("=i", argument)
            assert os.readlink(f"/proc/self/fd/{container}") == str(self.container)
            self.calls.append(("container",))
            return argument if isinstance(argument, bytes) else 0
        assert number == 106
        assert bytes(argument) == ADDRESS.encode() + b"\0"
        return os.open(self.device, os.O_RDWR | os.O_CLOEXEC) if isinstance(argument, bytearray) else argument

    def _on_device(self, number: int, argument: Any, fd: int) -> Any:
        if number == 108:
            size, _, index, *_ = struct.unpack("=IIIIQQ", argument)
            assert size == 32
            flags, length, offset = self.regions[index]
            argument[:] = struct.pack("=IIIIQQ", 32, flags, index, 0, length, offset)
            return 0
        if number == 109:
            size, _, index, _ = struct.unpack("=IIII", argument)
            assert (size, index) == (16, MSIX)
            argument[:] = struct.pack("=IIII", 16, 9, index, self.vectors)
            return 0
        assert number == 110
        size, flags, index, start, count = struct.unpack_from("=IIIII", argument)
        fds = struct.unpack_from(f"={count}i", argument, 20)
        assert (size, index, start) == (len(argument), MSIX, 0)
        assert flags == (EVENTFD if count else NONE) | TRIGGER
        if count > self.vectors:
            raise OSError(errno.EINVAL, "more than there are")
        if count > self.room:
            return self.room or -errno.ENOSPC
        for old in self.irqs:
            os.close(old)
        self.irqs = [os.dup(number) for number in fds]
        self.calls.append(("irqs", count, self.command & 6))
        return 0

    def interrupt(self, vector: int) -> None:
        """What QEMU does when a peer rings; without bus mastering it gets nowhere."""
        if self.command & 4:
            os.eventfd_write(self.irqs[vector], 1)
