"""`shmsock qemu-args`: the arguments that give a region to a guest."""

from __future__ import annotations

import shlex

import click

from shmsock.commands.given import Given, given_options
from shmsock.commands.params import Size
from shmsock.hypervisors import qemu
from shmsock.region.sizes import format_size, short_size

__all__ = ["qemu_args"]


@click.command("qemu-args")
@given_options
@click.option("--id", "name", default=qemu.ID, show_default=True, help="What QEMU calls the memory.")
@click.option("--vectors", type=click.IntRange(1, 64), default=1, show_default=True, help="With --doorbell.")
@click.option(
    "--max-memory",
    type=Size(),
    default="64G",
    show_default=True,
    help="With --dax: the most that the guest may have, its own memory (-m) and the region together.",
)
def qemu_args(
    region: str | None, doorbell: str | None, dax: str | None, name: str, vectors: int, max_memory: int
) -> None:
    """Print the arguments of QEMU that give REGION to a guest.

    Without --doorbell and --dax: as ivshmem-plain. What must be so besides goes to stderr, so this works:

    \b
        qemu-system-x86_64 -m 2G ... $(shmsock qemu-args /dev/shm/vms)
    """
    given = Given.of(region, doorbell, dax)
    if given.how in qemu.DAX and max_memory <= given.size:
        raise click.UsageError(
            f"--max-memory {short_size(max_memory)} has no room for the {format_size(given.size)} of the "
            "region and the guest's own memory"
        )
    try:
        if given.how == "doorbell":
            # vfio in the guest wants an IOMMU, and that QEMU has it before the devices.
            arguments = ["-machine", "q35,kernel-irqchip=split", "-device", "intel-iommu,intremap=on"]
            arguments += qemu.doorbell(given.path, vectors=vectors, name=name)
        elif given.how == "plain":
            arguments = qemu.plain(given.path, given.size, name=name)
        else:
            arguments = qemu.DAX[given.how](given.path, given.size, name=name, max_memory=max_memory)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        click.echo(f"{option} {shlex.quote(value)}")
    for note in given.notes():
        click.echo(f"note: {note}", err=True)
