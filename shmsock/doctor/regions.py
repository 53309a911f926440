"""A region: can it be mapped, is it formatted, is it the one that others mean, is there room on its disk."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from shmsock import region as regions
from shmsock.address import default_region
from shmsock.doctor.devices import lockdown
from shmsock.doctor.finding import Finding, errors_of
from shmsock.engine import layout as lay
from shmsock.errors import RegionError, RegionFormatError, RegionNotFoundError, command, other_memory
from shmsock.observe.snapshot import Content, old_files
from shmsock.region.base import Region
from shmsock.region.file import FileRegion, owner_name
from shmsock.region.pci import SYSFS
from shmsock.region.place import restart
from shmsock.region.sizes import format_size, short_size
from shmsock.region.storage import disk_words, filesystem

__all__ = ["cannot_open", "defaults_of_others", "disk", "form", "mapped", "place"]

_SHM = "/dev/shm"
_LITTLE = 1 << 20
_ALONE = "who has another file than the others looks healthy, and is alone"


def cannot_open(url: str, error: OSError, sysfs: str = SYSFS) -> Finding:
    """Tell why a region cannot be opened, by the name of its cause."""
    try:
        kind, path = regions.parse_url(url)
    except RegionError:
        kind, path = "", ""
    text = str(error) if isinstance(error, RegionError) else os.strerror(error.errno or errno.EIO)
    old = old_files(path) if kind == "file" else []
    name, why, mend = _cause(kind, path, error, sysfs)
    if old and isinstance(error, RegionNotFoundError):
        holders = [holder for file in old for holder in file.held_by]
        name, why = "replaced", _ALONE
        text, mend = (
            restart(holders, path).rpartition(":")[0],
            f"restart them, once there is a file at {path}",
        )
    seen, said = errors_of(text, mend)
    return Finding(name, "error", seen, why, mend if name in ("lockdown", "replaced") else said, url)


def _cause(kind: str, path: str, error: OSError, sysfs: str) -> tuple[str, str, str]:
    """Return the name of the cause, why it matters, and what to do if the error does not say."""
    code = error.errno
    if kind in ("auto", "dax", "pci", "vfio"):
        if code == errno.EPERM and lockdown(sysfs):
            mend = "boot the guest without Secure Boot, or with lockdown=none on the kernel's command line"
            return "lockdown", f"a locked down kernel ({lockdown(sysfs)}) maps no device's memory", mend
        if code in (errno.EACCES, errno.EPERM):
            mend = "run as root, or let a group do it: shmsock install-units udev"
            return "permission", "a device's memory belongs to root", mend
        if code in (errno.ENODEV, errno.ENOTUNIQ):
            return "device", "in a guest the region is a device's memory", "shmsock info"
        if code == errno.ENXIO:
            return "bar", "BAR2 is the shared memory", "give it a memory-backend of another size"
        return "driver", "a device can be used by one driver at a time", "shmsock info"
    if kind == "ivshmem":
        why = "the server hands out memory and doorbells to who comes"
        return "server", why, f"start it: shmsock ivshmem-server --socket {path} --region FILE"
    if code in (errno.EACCES, errno.EPERM):
        return "permission", "who cannot open the file is no peer", f"chgrp, and chmod 0660 {path}"
    if isinstance(error, RegionNotFoundError):
        return "no-region", "there is nothing to talk through", f"shmsock create {path} --size 64M"
    if code == errno.ENOMEM:
        return "huge-pages", "huge pages are reserved before they can be used", "sysctl vm.nr_hugepages=N"
    if isinstance(error, RegionFormatError):
        return "size", "the bytes are no region", f"shmsock create {path} --size 64M --force"
    return "region", "there is nothing to talk through", f"shmsock create {_SHM}/NAME --size 64M"


def mapped(region: Region) -> Iterator[Finding]:
    """Tell what is mapped, of a region that is open."""
    known = region.describe()
    if isinstance(region, FileRegion):
        where = f"{known.filesystem}, pages of {format_size(known.page_size)}, mode {known.mode:04o}"
        if words := disk_words(known.filesystem):
            mend = f"shmsock create {_SHM}/NAME --size {short_size(region.size)}"
            yield Finding("disk", "warning", f"{region.path} {words}".partition(";")[0], "", mend, region.url)
    else:
        where = f"from {region.path}"
    locks = "" if region.can_lock else "; it knows no locks, so the dead are found by their beat alone"
    yield Finding(
        "mapped", "ok", f"{region.url}: {format_size(region.size)} ({where}){locks}", region=region.url
    )


def form(region: Region, content: Content) -> Finding:
    """Tell whether the region is formatted, and as this version does it."""
    if content.state == "formatted":
        made = f" by {content.release}" if content.release else ""
        seen = f"version {content.version}{made}, id {content.region_id}, for {content.peers} peers"
        return Finding("format", "ok", seen, region=region.url)
    why = "nobody can attach to it"
    mend = _format_mend(region)
    if content.state == "unformatted":
        why = "if others use it, this is other memory than theirs; else the first who attaches formats it"
        return Finding(
            "unformatted",
            "warning",
            content.problem,
            why,
            f"start a program there, or compare: {other_memory()}",
            region.url,
        )
    if content.upgrade:
        seen, mend = errors_of(content.upgrade, "")
        return Finding("version", "error", seen, why, mend, region.url)
    if content.version is not None and content.version not in lay.VERSIONS:
        seen = f"it has format version {content.version}, and this shmsock {lay.VERSION}"
        why, mend = "all peers of a region must have one layout", f"install one shmsock everywhere; {mend}"
        return Finding("version", "error", seen, why, mend, region.url)
    if content.bytes and content.bytes > region.size:
        seen = f"the region has {format_size(content.bytes)}, and {format_size(region.size)} of it are here"
        if region.kind == "file":
            return Finding("size", "error", seen, f"the file was truncated; {why}", mend, region.url)
        mend = f"start QEMU with size={short_size(content.bytes)}"
        return Finding("bar", "error", seen, f"BAR2 is smaller than the file; {why}", mend, region.url)
    return Finding("format", "error", content.problem, why, mend, region.url)


def _format_mend(region: Region) -> str:
    size = short_size(region.size)
    if region.kind == "file":
        return f"when nobody needs it any more: {command('create', region.path, f'--size {size} --force')}"
    return "on the host, when nobody needs it any more: shmsock create FILE --size SIZE --force"


def place(region: Region) -> Iterator[Finding]:
    """Tell whether others who name it get this very file, and who holds one that was removed."""
    if region.kind != "file":
        return
    if lost := region.displaced():
        yield Finding("replaced", "error", f"the file was {lost} just now", _ALONE, "try again", region.url)
    old = [holder for file in old_files(region.path) for holder in file.held_by]
    if old:
        seen = restart(old, region.path).rpartition(":")[0]
        mend = "restart them: they get the file that is there now; a QEMU, by stopping and starting its guest"
        yield Finding("replaced", "error", seen, _ALONE, mend, region.url)


def disk(path: str, size: int = 0, allocated: int = 0, url: str = "") -> Iterator[Finding]:
    """Tell whether the file system has room for what a file lacks of its `size`."""
    directory = path if os.path.isdir(path) else os.path.dirname(path) or "/"
    try:
        fs, free = filesystem(directory), os.statvfs(directory)
    except OSError:
        return
    room, lacks = free.f_bavail * free.f_frsize, size - allocated
    if fs.huge or room >= max(lacks, 0 if size else _LITTLE):
        return
    full = room < _LITTLE
    yield Finding(
        "disk-full",
        "error" if full else "warning",
        f"{directory} has {format_size(room)} left"
        + (f", and {format_size(lacks)} of the region have no storage yet" if size else ""),
        "connections are refused when the disk is full" if size else "no region can be made there",
        f"make room, or enlarge it: mount -o remount,size=2G {directory} (docker run --shm-size=2g)",
        url,
    )


def defaults_of_others(region: str, alone: bool, uid: int | None = None) -> Iterator[Finding]:
    """Tell of other users' default regions. `region`: the path of the one that is used here."""
    own = default_region()
    found = []
    for name in sorted(os.listdir(_SHM)) if os.path.isdir(_SHM) else []:
        path = f"{_SHM}/{name}"
        if name.startswith("shmsock-") and name[8:].isdigit() and path != own:
            try:
                status = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                found.append(f"{owner_name(status.st_uid)} ({path})")
    if found:
        yield Finding(
            "other-users",
            "warning" if alone and region == own else "note",
            f"other users have default regions of their own: {', '.join(found[:8])}",
            "the default region is its user's alone: processes of two users do not meet there",
            f"for all of them: shmsock create {_SHM}/NAME --mode 0660 --size 64M, chgrp it, and set "
            f"SHMSOCK_REGION={_SHM}/NAME",
        )
