"""What `shmsock qemu-args` and `shmsock libvirt-xml` are asked to give to a guest, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import click

from shmsock import region as regions
from shmsock.commands.group import Failed
from shmsock.errors import command
from shmsock.hypervisors.qemu import DAX
from shmsock.region.base import Description
from shmsock.region.file import owner_name
from shmsock.region.sizes import format_size, short_size

__all__ = ["Given", "given_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


class Given(NamedTuple):
    """A region, and how the guest is to have it."""

    how: str
    """plain, doorbell, nvdimm or virtio-pmem."""
    path: str
    """The file; with doorbell the server's socket."""
    size: int
    about: Description | None
    """Of a file: who may open it, and where it lies."""

    @classmethod
    def of(cls, region: str | None, doorbell: str | None, dax: str | None) -> Given:
        """Look at the region. Raises RegionError, click.UsageError."""
        if region and doorbell:
            raise click.UsageError("--doorbell gives the memory of that server: name no REGION beside it")
        region = region or os.environ.get("SHMSOCK_REGION")
        kind, path = regions.parse_url(_absolute(region)) if region and not doorbell else ("", "")
        if doorbell and dax:
            raise click.UsageError("--doorbell is an ivshmem device, --dax is not: one of them")
        if doorbell or kind == "ivshmem":
            if dax:
                raise click.UsageError("memory of an ivshmem server is not for --dax: name the file")
            return cls("doorbell", os.path.abspath(doorbell) if doorbell else path, 0, None)
        if not kind:
            raise click.UsageError("name the REGION, set SHMSOCK_REGION, or use --doorbell")
        if kind != "file":
            raise click.UsageError(f"{region} is a device of this guest; what is given to guests is a file")
        with regions.open_file(path, writable=False) as opened:
            size, about = os.stat(path).st_size, opened.describe()
            if dax and not opened.origin:
                anew = command("create", path, f"--dax --size {short_size(size)} --force")
                raise Failed(
                    f"region {path} is not made for --dax: a guest would find no /dev/dax0.0; make one by "
                    f"another name, or anew: `{anew}`"
                )
        if not dax and size & (size - 1):
            raise Failed(
                f"region {path} has {format_size(size)}, expected a power of two, as a BAR has: make one "
                f"with `shmsock create --size {format_size(1 << size.bit_length()).replace(' ', '')}`"
            )
        return cls(dax or "plain", path, size, about)

    def notes(self) -> Iterator[str]:
        """Say what must be so besides, as far as all hypervisors are concerned."""
        if self.about is not None:
            yield (
                f"{self.path} belongs to {owner_name(self.about.uid)}, mode "
                f"{self.about.mode:04o}: QEMU must be able to read and write it"
            )
            if self.about.filesystem == "hugetlbfs":
                yield f"it lies on huge pages of {format_size(self.about.page_size)}, all of them allocated"
        if self.how in DAX:
            yield (
                "in the guest it is /dev/dax0.0, found by itself (modules nd_pmem, dax_pmem, device_dax and "
                f"{'nfit' if self.how == 'nvdimm' else 'virtio_pmem'}; Debian's cloud kernel has them)"
            )
        if self.how == "doorbell":
            yield "the ivshmem server must run first: `shmsock ivshmem-server`"
            yield "in the guest: `shmsock bind ADDRESS`, as root, for vfio-pci to take the device"


def given_options(command: _F) -> _F:
    """Add the argument and options that `Given.of` takes."""
    ways = click.option(
        "--dax",
        type=click.Choice(list(DAX)),
        help="As persistent memory: needs no ivshmem in QEMU, and is cached as ordinary memory is.",
    )(command)
    bell = click.option(
        "--doorbell", metavar="SOCKET", help="As ivshmem-doorbell: the socket of `shmsock ivshmem-server`."
    )(ways)
    return click.argument("region", required=False)(bell)


def _absolute(region: str) -> str:
    return region if ":" in region.partition("/")[0] else os.path.abspath(region)
