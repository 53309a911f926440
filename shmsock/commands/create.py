"""`shmsock create`: make and format a region file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial

import click

from shmsock import region as regions
from shmsock.aio.attach import prepare_region
from shmsock.commands.params import Mode, Size, peers_option
from shmsock.errors import command, region_error
from shmsock.hypervisors import qemu
from shmsock.observe.snapshot import Content, busy_sections, inspect
from shmsock.region.base import Region
from shmsock.region.locks import SERVER_LOCK
from shmsock.region.sizes import format_size, human

__all__ = ["create"]


@click.command()
@click.argument("path", type=click.Path(readable=False))
@click.option("--size", type=Size(), required=True, help="Such as 256M or 2G; guests need a power of two.")
@peers_option("How many can be attached.")
@click.option("--mode", type=Mode(), default="0600", show_default=True, help="Permissions of the file.")
@click.option(
    "--dax",
    is_flag=True,
    help="For guests that get it as persistent memory too (`shmsock qemu-args --dax`); takes 2 MiB of it.",
)
@click.option(
    "--force", is_flag=True, help="Replace a file of yours that is there; refused while anybody uses it."
)
def create(path: str, size: int, peers: int, mode: int, dax: bool, force: bool) -> None:
    """Make and format a region file, with all of its storage."""
    kind, path = regions.parse_url(path if ":" in path.partition("/")[0] else os.path.abspath(path))
    if kind != "file":
        raise click.UsageError(
            f"{path}: a file is what can be created; BAR2 of a device has its bytes from the host"
        )
    prepare = partial(prepare_region, peers=peers)
    regions.create_file(path, size, mode=mode, force=force, dax=dax, prepare=prepare, check=_unused)
    with regions.open_file(path, writable=False) as region:
        size = region.origin + region.size
        for line in made_lines(path, size, inspect(region, 0), region.describe().mode, dax):
            click.echo(line)
    if size & (size - 1):
        above = 1 << size.bit_length()
        click.echo(
            f"shmsock: warning: {format_size(size)} is no power of two: fit for processes of this host, and "
            f"no guest can be given it; for guests make it {format_size(above // 2)} or {format_size(above)}",
            err=True,
        )


def _unused(region: Region) -> None:
    if region.section_locked(SERVER_LOCK):
        raise region_error(
            errno.EBUSY,
            f"region {region.path} is served by an ivshmem server: stop that one, or make another region",
            region.path,
        )
    if busy := busy_sections(region):
        raise region_error(
            errno.EBUSY,
            f"region {region.path} is in use by {', '.join(busy[:8])}: stop them, or make another region",
            region.path,
        )


def made_lines(path: str, size: int, content: Content, mode: int, dax: bool = False) -> Iterator[str]:
    """Tell what `shmsock create` made."""
    yield f"made {path}: {format_size(size)}, mode {mode:04o}, all of it allocated"
    yield (
        f"    for {content.peers} peers; each has {human(content.section_bytes)}, of it "
        f"{human(content.ring_bytes_per_peer)} for rings, up to {content.connections_per_peer} connections"
    )
    if not size & (size - 1):
        yield "    to give it to a guest of QEMU:"
        yield f"        {' '.join(qemu.plain(path, size))}"
    if dax:
        yield "    or, as persistent memory, what this prints:"
        yield f"        {command('qemu-args', path, '--dax nvdimm')}"
    yield "    to use it on this host:"
    yield f"        SHMSOCK_REGION={path}"
