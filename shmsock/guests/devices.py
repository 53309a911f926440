"""What a test guest can be given: shared memory, and a network card on a bridge to compare with."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from shmsock.guests.image import GuestUnavailable, command_path
from shmsock.hypervisors import qemu

VHOST = "/dev/vhost-net"


class Device(Protocol):
    """Something that becomes arguments of QEMU; `index` tells several of a kind apart."""

    modules: ClassVar[tuple[str, ...]]
    """Kernel modules that the guest loads for it."""

    def arguments(self, index: int) -> list[str]: ...


@dataclass(frozen=True)
class Ivshmem:
    """An ivshmem-plain device: the file `path` (in /dev/shm, on hugetlbfs, anywhere) is the guest's BAR2.

    The file is made, or made longer, when need be. `size` is a power of two. `addr` is a PCI slot such as
    ``"0x10"``. `prealloc` takes all memory at once, which on hugetlbfs turns a later SIGBUS into an error.
    """

    path: Path | str
    size: int
    addr: str | None = None
    prealloc: bool = False

    modules: ClassVar[tuple[str, ...]] = ()

    def arguments(self, index: int) -> list[str]:
        more = "prealloc=on" if self.prealloc else ""
        return qemu.plain(self.path, self.size, name=f"ivshmem{index}", addr=self.addr, more=more)


@dataclass(frozen=True)
class IvshmemDoorbell:
    """An ivshmem-doorbell device: memory and interrupts come from the ivshmem server at `socket`.

    To use the interrupts in the guest, boot it with ``iommu=True`` (the stock kernel's vfio needs one).
    """

    socket: Path | str
    vectors: int = 1
    addr: str | None = None

    modules: ClassVar[tuple[str, ...]] = ()

    def arguments(self, index: int) -> list[str]:
        return qemu.doorbell(self.socket, vectors=self.vectors, name=f"ivshmem{index}", addr=self.addr)


@dataclass(frozen=True)
class Dax:
    """The file `path` as persistent memory, /dev/dax0.0 of the guest; `kind` is nvdimm or virtio-pmem."""

    path: Path | str
    size: int
    kind: str = "nvdimm"

    modules: ClassVar[tuple[str, ...]] = ("nfit", "virtio_pmem", "nd_pmem", "dax_pmem", "device_dax")

    def arguments(self, index: int) -> list[str]:
        return qemu.DAX[self.kind](self.path, self.size, name=f"dax{index}")


@dataclass(frozen=True)
class Tap:
    """A virtio-net card on the host's tap interface `ifname`; `address` (``10.1.2.3/24``) is the guest's."""

    ifname: str
    mac: str
    address: str
    vhost: bool = False
    """The host's kernel moves the packets, not QEMU."""

    modules: ClassVar[tuple[str, ...]] = ("virtio_net",)

    @property
    def ip(self) -> str:
        """The address alone: what others connect to."""
        return self.address.partition("/")[0]

    def arguments(self, index: int) -> list[str]:
        name, vhost = f"net{index}", ",vhost=on" if self.vhost else ""
        return [
            *("-netdev", f"tap,id={name},ifname={self.ifname},script=no,downscript=no{vhost}"),
            *("-device", f"virtio-net-pci,netdev={name},mac={self.mac}"),
        ]


class Bridge:
    """A bridge of the host with one tap interface per guest; all are removed at the end, or, where this
    process was killed, when another makes a bridge. Needs root.

    The host has the first address of `subnet` (by default one of 10.213.0.0/16, at random), guests the
    following ones, and nothing is routed::

        with Bridge() as bridge, Fleet() as fleet:
            fleet.boot("vm-a", net=bridge.tap())
    """

    def __init__(self, subnet: str | None = None) -> None:
        self._tag = secrets.token_hex(3)
        network = ipaddress.ip_network(subnet or f"10.213.{int(self._tag[:2], 16)}.0/24")
        self._hosts: Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address] = iter(network.hosts())
        self._prefix = network.prefixlen
        self._taps: list[Tap] = []
        self.name = f"shm-{self._tag}br"
        self._sign: socket.socket | None = None
        self.ip = str(next(self._hosts))

    def __enter__(self) -> Bridge:
        for path in Path("/sys/class/net").glob("shm-*br"):
            if (sign := _sign(path.name)) is not None:
                with sign:
                    _remove([*(tap.name for tap in path.parent.glob(f"{path.name[:-2]}t*")), path.name])
        self._sign = _sign(self.name)
        try:
            _ip("link", "add", self.name, "type", "bridge", "stp_state", "0")
            _ip("addr", "add", f"{self.ip}/{self._prefix}", "dev", self.name)
            _ip("link", "set", self.name, "up")
        except BaseException:
            self.close()
            raise
        return self

    def tap(self) -> Tap:
        """A new tap interface on the bridge, for `Fleet.boot`."""
        number = len(self._taps)
        tag = ":".join(self._tag[i : i + 2] for i in (0, 2, 4))
        address = f"{next(self._hosts)}/{self._prefix}"
        tap = Tap(
            f"shm-{self._tag}t{number}",
            f"52:54:{tag}:{number:02x}",
            address,
            os.access(VHOST, os.R_OK | os.W_OK),
        )
        self._taps.append(tap)
        _ip("tuntap", "add", tap.ifname, "mode", "tap")
        _ip("link", "set", tap.ifname, "master", self.name, "up")
        return tap

    def close(self) -> None:
        """Remove the bridge and its taps, those too that were made only half."""
        _remove([*(tap.ifname for tap in self._taps), self.name])
        self._taps.clear()
        if self._sign is not None:
            self._sign.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _sign(name: str) -> socket.socket | None:
    """Take the sign that the maker of that bridge lives: an abstract socket, which is of the same network
    namespace and ends with it. None: it lives."""
    sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sign.bind(f"\0shmsock-{name}")
    except OSError:
        sign.close()
        return None
    return sign


def _remove(names: list[str]) -> None:
    for name in names:
        if Path("/sys/class/net", name).exists():
            _ip("link", "del", name)


def _ip(*argv: str) -> None:
    program = command_path("ip")
    if program is None:
        raise GuestUnavailable("a bridge needs one more package: sudo apt-get install iproute2")
    done = subprocess.run([program, *argv], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(argv)}: {done.stderr.strip()}")
