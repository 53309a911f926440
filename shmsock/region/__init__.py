"""Regions: the shared bytes, by URL.

/path, file:/path       a file: under /dev/shm, on hugetlbfs, or wherever files can be mapped
auto                    in a guest: the one of the following that there is
pci:auto                the one ivshmem device of this guest; with interrupts if vfio-pci has it
pci:0000:00:04.0        that ivshmem device, memory only (short: pci:00:04.0)
vfio:0000:00:04.0       that ivshmem-doorbell device, with its interrupts; vfio:auto: the one vfio-pci has
dax:dax0.0              persistent memory of this guest, /dev/dax0.0; dax:auto: the one that shmsock made
ivshmem:/path           on the host: memory and doorbells of the ivshmem server that listens there
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any

from shmsock.address import default_region
from shmsock.errors import RegionUrlError, format_error, region_error
from shmsock.region import dax, pci
from shmsock.region.base import Region
from shmsock.region.create import Prepare, create_file, open_default
from shmsock.region.file import open_file
from shmsock.region.pci import PciDevice, find_devices
from shmsock.region.sizes import format_size

__all__ = [
    "PciDevice",
    "create_file",
    "default_url",
    "device_urls",
    "find_devices",
    "is_missing",
    "open",
    "open_default",
    "open_file",
    "open_region",
    "opening",
    "parse_url",
]

Url = str | os.PathLike[str]
POLL_S = 0.002  # until a server is asked again whether it has answered; it does at once

_ACCEPTED = (
    "expected /path, file:/path, auto, pci:auto, pci:0000:00:04.0, vfio:0000:00:04.0, dax:auto, dax:dax0.0 "
    "or ivshmem:/path"
)


def parse_url(url: Url) -> tuple[str, str]:
    """Split a region URL into (kind, argument): ("file" or "ivshmem", absolute path), ("pci" or "vfio",
    "auto" or a full address), ("dax", "auto" or a name as "dax0.0") or ("auto", "").

    Raises RegionUrlError (a ValueError too), EINVAL, for what is no region URL.
    """
    text = os.fspath(url)
    if not isinstance(text, str):
        raise TypeError(f"a region URL is a str or a path of str, not {type(text).__name__}")
    if not text or "\0" in text:
        raise _bad(f"{text!r} is no region URL: {_ACCEPTED}")
    if text.startswith("/"):
        return "file", "/" + text.lstrip("/")
    if text == "auto":
        return "auto", ""
    kind, colon, argument = text.partition(":")
    if not colon:
        raise _bad(f"{text!r} is no region URL: {_ACCEPTED}; a relative path is not, make it absolute")
    if kind in ("file", "ivshmem"):
        if not argument.startswith("/"):
            raise _bad(f"{text!r} names a relative path: {_ACCEPTED}")
        if argument.startswith("//") and not argument.startswith("///"):
            raise _bad(f"{text!r} names a host: {_ACCEPTED}")
        return kind, "/" + argument.lstrip("/")
    if kind == "dax":
        name = argument.removeprefix("/dev/")
        if name != "auto" and not dax.NAME.fullmatch(name):
            raise _bad(f"{text!r} is no region URL: {argument!r} is no name such as dax0.0; {_ACCEPTED}")
        return kind, name
    if kind in ("pci", "vfio"):
        if argument == "auto":
            return kind, "auto"
        try:
            return kind, pci.normalize_address(argument)
        except ValueError as error:
            raise _bad(f"{text!r} is no region URL: {error}; {_ACCEPTED}") from None
    raise _bad(f"{text!r} is no region URL: unknown kind {kind!r}; {_ACCEPTED}")


def default_url(environ: Mapping[str, str] | None = None, *, sysfs: str = pci.SYSFS) -> str:
    """Return the URL of the region to use when none is named: SHMSOCK_REGION, else a device of this guest,
    else this user's own.

    Never raises: whether the region can be used is for open() to say.
    """
    chosen = (os.environ if environ is None else environ).get("SHMSOCK_REGION", "")
    if chosen:
        return chosen
    found = device_urls(sysfs)
    if found and found[0].startswith("dax:"):
        return "auto"
    return "pci:auto" if found else f"file:{default_region()}"


def device_urls(sysfs: str = pci.SYSFS) -> list[str]:
    """List the devices of this guest that can have a region. Persistent memory, which is always cached, comes
    first, if `shmsock create --dax` made it."""
    ours = [device.url for device in dax.find_dax(sysfs) if device.ours]
    return ours + [device.url for device in find_devices(sysfs)]


def is_missing(url: Url | None = None) -> bool:
    """Is it a file, and not there? Then nobody can be in it. Raises RegionUrlError."""
    kind, argument = parse_url(url) if url is not None else _parse_default(pci.SYSFS)
    return kind == "file" and not os.path.exists(argument)


def open(
    url: Url | None = None,
    *,
    writable: bool = True,
    create_default: bool = False,
    prepare: Prepare | None = None,
    probe: Callable[[PciDevice], bool] | None = None,
    prefer_wc: bool = True,
    sysfs: str = pci.SYSFS,
) -> Region:
    """Map a region; None: the default one.

    `create_default`: make this user's own region (`default_region()`) if that is meant and not there;
    `prepare` formats it. `probe`: tells several devices apart for pci:auto and vfio:auto. `prefer_wc`: see
    open_pci().
    `sysfs`: for tests.

    Raises RegionError (RegionUrlError, RegionNotFoundError, RegionPermissionError, RegionFormatError, ...).
    """
    kind, argument = parse_url(url) if url is not None else _parse_default(sysfs)
    if kind == "auto":
        kind, argument = parse_url(_choose(sysfs))
    if kind == "dax":
        argument = dax.choose_dax(sysfs).name if argument == "auto" else argument
        return dax.open_dax(argument, writable=writable, sysfs=sysfs)
    if kind in ("pci", "vfio") and argument == "auto":
        kind, argument = pci.choose_device(sysfs, probe, vfio=kind == "vfio").url.split(":", 1)
    # A kind of region is imported only where it is used.
    if kind == "vfio":
        from shmsock.region.vfio import open_vfio

        return open_vfio(argument, writable=writable, sysfs=sysfs)
    if kind == "pci":
        from shmsock.region.bar2 import open_pci

        return open_pci(argument, writable=writable, prefer_wc=prefer_wc, sysfs=sysfs)
    if kind == "ivshmem":
        from shmsock.region.ivshmem import open_ivshmem

        return open_ivshmem(argument, writable=writable)
    if bar := pci.resource_address(argument):
        # As a plain file it would be mapped without enabling the device, and with the wrong fences.
        raise _bad(f"{argument} is a BAR of a PCI device: name it pci:{bar}")
    if argument == default_region():
        return open_default(argument, prepare=prepare, create=create_default and writable, writable=writable)
    return open_file(argument, writable=writable)


def _choose(sysfs: str) -> str:
    """Choose among the devices of this guest: the first, if all have one region, as the same bytes may be
    there in several ways."""
    urls = device_urls(sysfs)
    if not urls or not urls[0].startswith("dax:"):
        return "pci:auto"
    if len(urls) == 1:
        return urls[0]
    ids = {url: _id(url, sysfs) for url in urls}
    formatted = [url for url in urls if ids[url]]
    if len({ids[url] for url in formatted or urls}) > 1 or not formatted:
        raise region_error(
            errno.ENOTUNIQ,
            f"several regions found, expected one: {', '.join(urls)}; name the one to use, as region= or "
            "SHMSOCK_REGION",
        )
    return formatted[0]


def _id(url: str, sysfs: str) -> int:
    """Read the id of the region there; 0: there is none, or none that can be read."""
    from shmsock.region.occupants import region_id

    try:
        with open(url, writable=False, sysfs=sysfs) as region:
            return region_id(region)
    except OSError:
        return 0


def opening(url: Url | None = None, **how: Any) -> Generator[float, None, Region]:
    """Do as open() does, for event loops: a generator that yields seconds to wait, and returns the Region.
    Closed in between, it leaves nothing behind. Raises what open() does."""
    kind, argument = parse_url(url) if url is not None else _parse_default(how.get("sysfs", pci.SYSFS))
    if kind != "ivshmem":
        return open(url, **how)
    from shmsock.region.ivshmem import opening_ivshmem

    steps = opening_ivshmem(argument, writable=how.get("writable", True))
    try:
        while True:
            yield min(next(steps).seconds, POLL_S)
    except StopIteration as end:
        region: Region = end.value
        return region
    finally:
        steps.close()


def open_region(
    url: Url | None = None, *, size: int | None = None, writable: bool = True, force: bool = False
) -> memoryview:
    """Map the raw bytes of a region, for programs that want nothing else. Returns a memoryview.

        with open_region("pci:auto") as memory:
            memory[0] = 1

    `url`: as for attach(); None: the default region, which is not made here. `size`: only the first so many
    bytes. `writable`: False to read only. `force`: writable even if shmsock formatted it; any byte written
    may then take the region from all who use it for sockets. The mapping goes when the view and all slices of
    it are released or collected. Nothing is kept from others, no lock is taken. On a file with holes a full
    disk is a SIGBUS (`shmsock create` makes files without).

    Raises what open() raises, RegionFormatError when the region has fewer than `size` bytes, and
    RegionExistsError for a formatted one, unless with `force` or without `writable`.
    """
    from shmsock.region.occupants import claimed_by, is_formatted  # the C core: devices are listed without

    with open(url, writable=writable) as region:
        if size is not None and not 0 < size <= region.size:
            raise format_error(
                f"region {region.url} has {format_size(region.size)}, expected the {size} bytes asked for",
                region.path,
            )
        if writable and not force and is_formatted(region):
            owners = claimed_by(region)
            raise region_error(
                errno.EEXIST,
                f"region {region.url} is formatted for sockets, and "
                + (f"attached are {', '.join(owners[:8])}" if owners else "nobody is attached")
                + (f" and {len(owners) - 8} more" if len(owners) > 8 else "")
                + ": raw bytes written there break it; open it with writable=False to read, with force=True "
                "to write all the same, or name another region",
                region.path,
            )
        view = memoryview(region.detach())
    return view if size is None else view[:size]


def _parse_default(sysfs: str) -> tuple[str, str]:
    try:
        return parse_url(default_url(sysfs=sysfs))
    except RegionUrlError as error:  # say that the environment is to blame, and not an argument
        raise RegionUrlError(error.errno, f"SHMSOCK_REGION: {error}") from None


def _bad(message: str) -> RegionUrlError:
    return RegionUrlError(errno.EINVAL, message)
