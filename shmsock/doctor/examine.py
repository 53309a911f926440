"""All checks, in the order in which one needs the other."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator

from shmsock import region as regions
from shmsock.doctor import memory
from shmsock.doctor.devices import devices
from shmsock.doctor.finding import Finding
from shmsock.doctor.peers import alone, peers, room
from shmsock.doctor.processes import qemus
from shmsock.doctor.regions import cannot_open, defaults_of_others, disk, form, mapped, place
from shmsock.doctor.round_trips import try_all
from shmsock.engine.layout import read_layout
from shmsock.errors import listing
from shmsock.observe.memory import memory_of
from shmsock.observe.snapshot import Content, inspect, old_files
from shmsock.region.base import Region
from shmsock.region.dax import choose_dax
from shmsock.region.file import FileRegion
from shmsock.region.iommu import DEV
from shmsock.region.pci import SYSFS
from shmsock.region.processes import read_line

__all__ = ["examine"]

# Of the kernel's own processes (PROC_PID_INIT_INO and its likes).
_FIRST_NAMESPACES = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF, "uts": 0xEFFFFFFE, "cgroup": 0xEFFFFFFB}


def examine(
    url: str | None,
    *,
    attach: bool = True,
    sysfs: str = SYSFS,
    dev: str = DEV,
    proc: str = "/proc",
    root: str = "",
) -> Iterator[Finding]:
    """Examine this machine, and the region `url`; None: those that programs here would use. `attach`: be a
    peer for some seconds, which measures the memory and asks every other peer. `sysfs`, `dev`, `proc`,
    `root`: for tests."""
    yield _machine(proc, sysfs, root)
    told: set[tuple[str, str]] = set()
    for finding in devices(sysfs, dev):
        if finding.level == "error":
            told.add((finding.region, finding.name))
        yield finding
    chosen = os.environ.get("SHMSOCK_REGION")
    urls = [url] if url else [chosen] if chosen else regions.device_urls(sysfs)
    if not urls:
        urls = [regions.default_url(sysfs=sysfs)]
        yield (without := _no_device(urls[0], sysfs))
        if without.level == "error":
            yield from disk(regions.parse_url(urls[0])[1])
            return
    if len(urls) > 1:
        yield Finding(
            "several",
            "note",
            f"{len(urls)} devices: {listing(urls)}",
            "programs that name none take the only one that is formatted, if there is one",
            f"SHMSOCK_REGION={urls[0]}, or region= in the program",
        )
    for each in urls:
        for finding in _region(each, attach, sysfs, proc):
            if (finding.region, finding.name) not in told:  # else it could not be opened for that reason
                yield finding


def _machine(proc: str, sysfs: str, root: str) -> Finding:
    contained = (
        "a container (of the host's /dev/shm it has only what it was given: docker run --ipc=host, or -v)"
    )
    kind = "a guest" if _guest(proc, sysfs) else "a machine of its own"
    if _container(proc, root):
        kind = contained
    seen = f"{kind}, Linux {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    return Finding("machine", "ok", seen)


def _container(proc: str, root: str) -> bool:
    """Is this a container: does it have namespaces of its own for processes, or for System V's objects? Or
    some other, and a runtime's mark? The mark alone says nothing: an image that was made with docker is a
    guest's root, too."""
    if _apart(proc, "pid") or _apart(proc, "ipc"):
        return True
    marked = any(os.path.exists(root + mark) for mark in ("/.dockerenv", "/run/.containerenv"))
    try:
        same = os.readlink(f"{proc}/1/ns/mnt") == os.readlink(f"{proc}/self/ns/mnt")
    except OSError:  # not for everybody to see
        same = not _apart(proc, "cgroup") and not _apart(proc, "uts")
    return marked and not same


def _apart(proc: str, kind: str) -> bool:
    """Is the namespace another one than the kernel's own processes have?"""
    try:
        return os.readlink(f"{proc}/self/ns/{kind}") != f"{kind}:[{_FIRST_NAMESPACES[kind]}]"
    except OSError:
        return False


def _guest(proc: str, sysfs: str) -> bool:
    """Does the processor say so, or the firmware (other processors than x86 do not)?"""
    with contextlib.suppress(OSError), open(f"{proc}/cpuinfo", encoding="ascii", errors="replace") as file:
        if any(line.startswith("flags") and " hypervisor" in line for line in file):
            return True
    return _made_by_qemu(sysfs)


def _made_by_qemu(sysfs: str) -> bool:
    return read_line(f"{sysfs}/class/dmi/id/sys_vendor") in ("QEMU", "Red Hat", "KubeVirt")


def _no_device(url: str, sysfs: str) -> Finding:
    """Tell that there is no device: an error where there is nothing else to talk through, either."""
    guest = _made_by_qemu(sysfs)
    missing = regions.is_missing(url) and not old_files(regions.parse_url(url)[1])
    seen = "no ivshmem device (PCI 1af4:1110) is here"
    if not os.path.isdir(f"{sysfs}/bus/pci/devices"):
        seen += f", nor {sysfs}/bus/pci/devices"
    try:
        choose_dax(sysfs)
    except OSError as error:
        if ": there is" in str(error):  # some, of which nothing can be made as it is
            seen += f"; {error}"
    return Finding(
        "device",
        "error" if missing else "warning" if guest else "note",
        seen,
        f"programs use {url.removeprefix('file:')}, which only processes of this machine share",
        "in a guest, start QEMU with what `shmsock create` printed (`-device ivshmem-plain,...`); on the "
        "host, name the file that the guests have: SHMSOCK_REGION=/dev/shm/NAME, or make it with "
        "`shmsock create`",
    )


def _region(url: str, attach: bool, sysfs: str, proc: str) -> Iterator[Finding]:
    try:
        kind, path = regions.parse_url(url)
    except OSError as error:
        yield cannot_open(url, error, sysfs)
        return
    try:
        opened, writable = _open(url, sysfs)
    except OSError as error:
        yield cannot_open(url, error, sysfs)
        if kind == "file":
            yield from qemus(path, url, proc)
            yield from disk(path, url=url)
            yield from defaults_of_others(path, True)
        return
    with opened:
        if writable is not None:
            yield writable
        yield from mapped(opened)
        content = inspect(opened)
        yield form(opened, content)
        yield from _around(opened, content, proc)
        if content.state == "formatted":
            yield from peers(opened, content)
            seen = memory_of(opened)
            try:
                yield from room(opened, content, read_layout(seen, looks=True))
            finally:
                seen.release()
        attach = attach and writable is None and content.state == "formatted"
        attach = attach and any(section.state in ("free", "left", "dead") for section in content.sections)
        if not attach and not opened.sparse:
            yield memory.judge(opened.url, opened.mmap, 0, 4096, write=False)
        name = opened.url
        live = {section.number for section in content.sections if section.state == "live"}
    if attach:
        yield from try_all(name, live)


def _open(url: str, sysfs: str) -> tuple[Region, Finding | None]:
    """Open it as programs do, or to look only, and say why."""
    try:
        return regions.open(url, sysfs=sysfs), None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY):
            raise
        first = error
    try:
        opened = regions.open(url, writable=False, sysfs=sysfs)
    except OSError:
        raise first from None
    found = cannot_open(url, first, sysfs)
    if first.errno == errno.EBUSY:  # the program that it is for has it
        found = Finding(
            "in-use", "note", found.seen, "so it is looked at only, and no peer is asked", region=url
        )
    return opened, found


def _around(region: Region, content: Content, proc: str) -> Iterator[Finding]:
    """Look at what is around a region's file: its name, disk and users."""
    if not isinstance(region, FileRegion):
        return
    if region.kind == "file":
        yield from place(region)
        yield from qemus(region.path, region.url, proc)
        yield from defaults_of_others(region.path, alone(content))
    if region.sparse:
        yield from disk(region.path, region.size, region.describe().allocated, region.url)
