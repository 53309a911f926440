"""`shmsock libvirt-xml`: the elements that give a region to a domain of libvirt."""

from __future__ import annotations

from collections.abc import Iterator

import click

from shmsock.commands.given import Given, given_options
from shmsock.commands.params import Size
from shmsock.hypervisors import libvirt
from shmsock.hypervisors.qemu import DAX

__all__ = ["libvirt_xml"]


@click.command("libvirt-xml")
@given_options
@click.option("--vectors", type=click.IntRange(1, 64), default=1, show_default=True, help="With --doorbell.")
@click.option(
    "--max-memory",
    type=Size(),
    default="64G",
    show_default=True,
    help="With --dax: the most that the domain may have, its own memory and the region together.",
)
@click.option("--memory", type=Size(), default="2G", show_default=True, help="With --dax: the domain's own.")
@click.option(
    "--cpus", type=click.IntRange(1), default=1, show_default=True, help="With --dax: as many as its <vcpu>."
)
def libvirt_xml(
    region: str | None, doorbell: str | None, dax: str | None, vectors: int, **sizes: int
) -> None:
    """Print the XML that gives REGION to a domain of libvirt.

    Each element comes with the one that it belongs into (`virsh edit DOMAIN`). Without --doorbell and --dax:
    as ivshmem-plain. What must be so besides goes to stderr.
    """
    given = Given.of(region, doorbell, dax)
    try:
        if given.how == "doorbell":
            parts = libvirt.doorbell(given.path, vectors)
        elif given.how == "plain":
            parts = libvirt.plain(given.path, given.size)
        else:
            parts = libvirt.dax(given.path, given.size, given.how, **sizes)
        for part in parts:
            click.echo(part)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    for note in (*given.notes(), *_notes(given)):
        click.echo(f"note: {note}", err=True)


def _notes(given: Given) -> Iterator[str]:
    """Say what libvirt's own users and confinement want."""
    yield (
        "libvirt's QEMU runs as a user of its own, libvirt-qemu in group kvm (Debian, Ubuntu) or qemu "
        f"(Fedora): `chgrp kvm {given.path}; chmod 0660 {given.path}`"
    )
    if given.how in DAX:
        yield (
            "libvirt gives the file to that user and group while a domain runs; processes of the host that "
            "use it have to be in the group"
        )
        yield "memory and cpus of <cell> must be the domain's: --memory, --cpus"
    if given.how == "plain" and not given.path.startswith(f"{libvirt.SHM}/"):
        yield (
            "AppArmor does not know of a file named in <qemu:commandline>: allow it in "
            f'/etc/apparmor.d/abstractions/libvirt-qemu (or local/): `"{given.path}" rw,`'
        )
    else:
        yield "AppArmor: libvirt allows it by itself"
    yield (
        "SELinux: the file must be one that all domains may use: `semanage fcontext -a -t svirt_image_t "
        f"{given.path}; restorecon {given.path}`"
        + (
            "; libvirt labels persistent memory for one domain alone, so with several of them let it not: "
            '<seclabel type="dynamic" model="selinux" relabel="no"/>'
            if given.how in DAX
            else ""
        )
    )
