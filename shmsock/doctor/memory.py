"""The type of a region's memory, by what reading and writing it costs beside ordinary memory.

A device's memory can be mapped so that caches do not keep it. Nothing says so to a program, and everything
works: at a hundredth of the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from shmsock.doctor.finding import Finding
from shmsock.native._core import ffi, lib

__all__ = ["SPAN", "Speed", "judge", "measure", "memory_type", "ordinary"]

SPAN = 64 << 10
"""Bytes that are read and written: more than fits into what combines writes, and soon done."""
_LOADS, _ROUNDS = 2048, 5
_SLOW_READ, _SLOW_NS = 8, 20  # a cached load takes a nanosecond, one of a device's memory a hundred
_SLOW_WRITE = 24  # writes that are combined are a few times slower than cached ones, single ones a hundred

_DAX = (
    "give the region to the guest as persistent memory, which is cached: `shmsock create --dax`, and what "
    "`shmsock qemu-args --dax nvdimm` prints"
)

# The clock: tests put a slow one here.
time_reads: Callable[[Any, int, int, int], int] = lib.sh_time_reads
time_writes: Callable[[Any, int, int, int], int] = lib.sh_time_writes


@dataclass(frozen=True)
class Speed:
    """The best of a few rounds. `write_mb_s` None: nothing may be written there."""

    load_ns: float
    read_mb_s: float
    write_mb_s: float | None

    def __str__(self) -> str:
        written = "" if self.write_mb_s is None else f", {_rate(self.write_mb_s)} written"
        return f"{self.load_ns:.3g} ns a load, {_rate(self.read_mb_s)} read{written}"


def _rate(mb_s: float) -> str:
    return f"{mb_s / 1000:.3g} GB/s" if mb_s >= 1000 else f"{mb_s:.3g} MB/s"


def measure(mapping: Any, offset: int, length: int, *, write: bool) -> Speed:
    """Measure those bytes. With `write` they are overwritten: they must be the caller's own."""
    with ffi.from_buffer("uint8_t[]", mapping) as buffer:
        load = min(time_reads(buffer, offset, 8, _LOADS) for _ in range(_ROUNDS)) / _LOADS
        read = min(time_reads(buffer, offset, length, 1) for _ in range(_ROUNDS))
        wrote = min(time_writes(buffer, offset, length, 1) for _ in range(_ROUNDS)) if write else None
    return Speed(load, _mb_s(length, read), None if wrote is None else _mb_s(length, wrote))


def _mb_s(length: int, ns: int) -> float:
    return length * 1000 / max(ns, 1)


def ordinary(length: int) -> Speed:
    """Measure as much of this process's own memory."""
    return measure(bytearray(length), 0, length, write=True)


def memory_type(speed: Speed, usual: Speed) -> str:
    """Tell the type of memory of that speed, where ordinary memory has the `usual` one."""
    if speed.load_ns < max(_SLOW_READ * usual.load_ns, _SLOW_NS):
        return "write-back"
    if speed.write_mb_s is None or usual.write_mb_s is None:
        return "uncached or write-combining"
    return "uncached" if speed.write_mb_s * _SLOW_WRITE < usual.write_mb_s else "write-combining"


def judge(url: str, mapping: Any, offset: int, length: int, *, write: bool) -> Finding:
    """Measure, and tell what comes of it. `write`: see measure()."""
    measure(mapping, offset, length, write=write)  # pages are faulted in
    usual = ordinary(length)
    speed = measure(mapping, offset, length, write=write)
    kind = memory_type(speed, usual)
    data = {"type": kind, "here": asdict(speed), "ordinary": asdict(usual)}
    if kind == "write-back":
        return Finding(
            "memory-type", "ok", f"cached (write-back): {speed}; ordinary: {usual}", region=url, data=data
        )
    return Finding(
        "memory-type",
        "warning",
        f"the memory is {kind}: {speed}; ordinary memory: {usual}",
        "every look at it goes to the bus: latency is many times what it could be, and little is read in a "
        "second",
        _mend(url, kind),
        url,
        data,
    )


def _mend(url: str, kind: str) -> str:
    if url.startswith("vfio:"):
        return (
            f"vfio maps a device's memory uncached; {_DAX}, or do without vfio: `shmsock unbind`, then pci:"
        )
    if url.startswith("pci:"):
        wc = (
            "" if kind == "write-combining"
            else "let shmsock open resource2_wc (the udev rule gives it to a group, too), so that writes are "
            "combined; "
        )  # fmt: skip
        return wc + _DAX
    return "put the region's file into /dev/shm or on hugetlbfs: `shmsock create /dev/shm/NAME --size SIZE`"
