"""Arguments of QEMU that give a region to a guest: as an ivshmem device, or as persistent memory ("dax")."""

from __future__ import annotations

import os

from shmsock.region.sizes import format_size, short_size

__all__ = ["DAX", "DAX_UNIT", "ID", "doorbell", "nvdimm", "plain", "virtio_pmem"]

ID = "HMB"
"""What the memory, or the connection to a server, is called."""
DAX_UNIT = 2 << 20
"""Bytes: what persistent memory is mapped in, and its size a multiple of."""
MAX_MEMORY = 64 << 30
"""Bytes that a guest may have at most, persistent memory included, unless more is asked for."""

Path = str | os.PathLike[str]


def plain(path: Path, size: int, *, name: str = ID, addr: str | None = None, more: str = "") -> list[str]:
    """The file `path` as BAR2 of an ivshmem-plain device. `addr`: a PCI slot; `more`: of the memory backend.

    Raises ValueError for a `size` that no BAR has.
    """
    if size < 4096 or size & (size - 1):
        raise ValueError(f"the size of a BAR is a power of two and at least 4096, not {size}")
    return [
        *_backend(path, size, name, more),
        *("-device", f"ivshmem-plain,memdev={name}{_at(addr)}"),
    ]


def doorbell(socket: Path, *, vectors: int = 1, name: str = ID, addr: str | None = None) -> list[str]:
    """An ivshmem-doorbell device: memory and interrupts come from the ivshmem server at `socket`."""
    return [
        *("-chardev", f"socket,path={_quoted(socket)},id={name}"),
        *("-device", f"ivshmem-doorbell,vectors={vectors},chardev={name}{_at(addr)}"),
    ]


def nvdimm(
    path: Path, size: int, *, name: str = ID, more: str = "", max_memory: int = MAX_MEMORY
) -> list[str]:
    """The file `path` as an NVDIMM, which takes a slot of the machine. Raises ValueError for a bad `size`."""
    _check_unit(size)
    return [
        *("-machine", "nvdimm=on", "-m", f"slots=8,maxmem={short_size(max_memory)}"),
        *_backend(path, size, name, more),
        *("-device", f"nvdimm,memdev={name}"),
    ]


def virtio_pmem(
    path: Path,
    size: int,
    *,
    name: str = ID,
    addr: str | None = None,
    more: str = "",
    max_memory: int = MAX_MEMORY,
) -> list[str]:
    """The file `path` as a virtio-pmem device. Raises ValueError for a bad `size`."""
    _check_unit(size)
    return [
        *("-m", f"maxmem={short_size(max_memory)}"),
        *_backend(path, size, name, more),
        *("-device", f"virtio-pmem-pci,memdev={name}{_at(addr)}"),
    ]


DAX = {"nvdimm": nvdimm, "virtio-pmem": virtio_pmem}
"""The ways to give a region as persistent memory, by QEMU's name for the device."""


def _backend(path: Path, size: int, name: str, more: str) -> tuple[str, str]:
    # Without share=on the guest would have a copy of its own: all looks well, and everyone is alone.
    backend = f"memory-backend-file,size={short_size(size)},mem-path={_quoted(path)},share=on,id={name}"
    return "-object", backend + (f",{more}" if more else "")


def _at(addr: str | None) -> str:
    return f",addr={addr}" if addr else ""


def _quoted(path: Path) -> str:
    return os.fspath(path).replace(",", ",,")


def _check_unit(size: int) -> None:
    if size <= 0 or size % DAX_UNIT:
        raise ValueError(
            f"the size of persistent memory is a multiple of {format_size(DAX_UNIT)}, not {size} bytes"
        )
