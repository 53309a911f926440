"""`shmsock bind` and `shmsock unbind`: hand an ivshmem device to vfio-pci, and take it back.

What is to be done is planned first, each step with the shell command that it equals; nothing is changed by
planning, and all that can be known to be in the way is an error of the plan.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click

from shmsock.commands.group import Failed
from shmsock.commands.params import Address
from shmsock.errors import region_error
from shmsock.region.bar2 import the_device
from shmsock.region.iommu import DEV, NOIOMMU_SWITCH, Group, no_iommu, not_viable, read_group, users
from shmsock.region.pci import SYSFS, PciDevice
from shmsock.region.processes import read_line

__all__ = ["VFIO", "Plan", "Step", "bind", "plan_bind", "plan_unbind", "unbind"]

VFIO = "vfio-pci"


@click.command()
@click.argument("address", type=Address())
@click.option("--driver", default="vfio-pci", show_default=True, help="One made from vfio-pci will do too.")
@click.option("--noiommu", is_flag=True, help="Where there is no IOMMU. Taints the kernel.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def bind(address: str, driver: str, noiommu: bool, yes: bool, dry_run: bool) -> None:
    """Give the ivshmem-doorbell device at ADDRESS to vfio-pci.

    So programs get its interrupts. In a guest, as root. ADDRESS is as in `shmsock info`, such as
    0000:00:04.0. Says what it will do, as shell commands, and asks.
    """
    _carry_out(plan_bind(address, driver=driver, noiommu=noiommu), yes, dry_run)


@click.command()
@click.argument("address", type=Address())
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def unbind(address: str, yes: bool, dry_run: bool) -> None:
    """Take the device at ADDRESS back from vfio-pci. Undoes `shmsock bind`."""
    _carry_out(plan_unbind(address), yes, dry_run)


def _carry_out(plan: Plan, yes: bool, dry_run: bool) -> None:
    for line in plan.lines():
        click.echo(line)
    if plan.steps:
        if dry_run:
            return
        if os.geteuid() != 0:
            raise Failed("only root can do this; nothing was changed")
        if not yes and not click.confirm("Do it?", err=True):
            raise Failed("nothing was changed")
        plan.apply()
        click.echo("done")
    for line in plan.then():
        click.echo(line)


@dataclass(frozen=True)
class Step:
    """One thing to do: a file of sysfs and what to write there, or a program."""

    why: str
    path: str = ""
    text: str = ""
    argv: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The shell command that does the same."""
        if self.argv:
            return " ".join(self.argv)
        return f"echo {self.text} > {self.path}" if self.text else f"echo > {self.path}"


@dataclass(frozen=True)
class Plan:
    """The steps, what to know before them, and what to do then."""

    title: str
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    check: Callable[[], None] = lambda: None
    """Raises RegionError unless the steps did what they were to do."""
    then: Callable[[], list[str]] = list

    def apply(self) -> None:
        """Do it. Raises RegionError at the first step that fails."""
        for step in self.steps:
            if step.argv:
                _run(step)
            else:
                _write(step)
        self.check()

    def lines(self) -> Iterator[str]:
        yield self.title
        for note in self.notes:
            yield f"    {note}"
        for step in self.steps:
            yield f"    # {step.why}"
            yield f"    {step.command}"


def plan_bind(
    address: str,
    *,
    driver: str = VFIO,
    noiommu: bool = False,
    sysfs: str = SYSFS,
    dev: str = DEV,
    proc: str = "/proc",
) -> Plan:
    """Plan how the ivshmem device at `address` (normalized) comes to `driver`. Raises RegionError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*vfio[A-Za-z0-9_-]*", driver, re.ASCII):
        raise region_error(
            errno.EINVAL,
            f"{driver!r} is no driver of the vfio family, which is what vfio: regions take: use {VFIO}",
        )
    device = the_device(address, sysfs)
    group = read_group(device, sysfs, dev)
    if not device.doorbell:
        raise region_error(
            errno.ENXIO,
            f"{_name(device)} has no interrupts, so it gains nothing from {driver}: use pci:{address} as it "
            "is, or start QEMU with `-chardev socket,path=SOCKET,id=s -device "
            "ivshmem-doorbell,vectors=1,chardev=s` on the socket of `shmsock ivshmem-server`",
        )
    if group is not None and group.hindering:
        raise not_viable(device, group)
    if device.driver == driver:
        return Plan(
            f"{_name(device)} is bound to {driver} already: nothing to do", then=lambda: _next(device, group)
        )
    if group is None and not noiommu:
        raise no_iommu(device)
    if group is not None and noiommu:
        raise region_error(
            errno.EINVAL,
            f"there is an IOMMU (ivshmem device {address} is in group {group.number}): leave --noiommu out",
        )
    files = [f"{os.path.realpath(device.directory)}/{name}" for name in ("resource2", "resource2_wc")]
    if who := users(*files, proc=proc):
        raise region_error(
            errno.EBUSY,
            f"ivshmem device {address} is in use through sysfs (pci:{address}) by {', '.join(who[:8])}: stop "
            "them first, as the next access to its memory would kill them",
            files[0],
        )
    bus = f"{sysfs}/bus/pci"
    steps = []
    if not os.path.isdir(f"{bus}/drivers/{driver}"):
        steps.append(Step("load the driver", argv=("modprobe", driver)))
    if noiommu:
        steps.append(Step("do without an IOMMU: TAINTS THE KERNEL", f"{sysfs}/{NOIOMMU_SWITCH}", "1"))
    steps.append(Step("no other driver shall take it", f"{device.directory}/driver_override", driver))
    if device.driver:
        steps.append(Step(f"take it from {device.driver}", f"{device.directory}/driver/unbind", address))
    steps.append(Step("let the driver take it", f"{bus}/drivers_probe", address))
    notes = []
    if noiommu:
        notes.append(
            "Without an IOMMU nothing keeps a device, and so whoever has it, from this machine's memory; the "
            "kernel marks itself tainted until the next boot."
        )
    if group is not None and group.others:
        others = ", ".join(
            f"{other.address} ({other.ids[0]:04x}:{other.ids[1]:04x}, driver {other.driver or 'none'})"
            for other in group.others[:8]
        )
        notes.append(f"Also in its IOMMU group {group.number}, and out of use for other drivers: {others}")

    def check() -> None:
        now = the_device(address, sysfs)
        if now.driver != driver:
            raise region_error(
                errno.EIO,
                f"ivshmem device {address} was not taken by {driver} (its driver: {now.driver or 'none'}): "
                f"`dmesg | tail` says why; `shmsock unbind {address}` undoes what was done",
            )

    return Plan(
        f"{_name(device)} goes to {driver}, as root:",
        steps,
        notes,
        check,
        lambda: _next(device, read_group(device, sysfs, dev)),
    )


def plan_unbind(address: str, *, sysfs: str = SYSFS, dev: str = DEV, proc: str = "/proc") -> Plan:
    """Plan how it comes back. Raises RegionError."""
    device = the_device(address, sysfs)
    group = read_group(device, sysfs, dev)
    override = read_line(f"{device.directory}/driver_override")
    steps = []
    if override not in ("", "(null)"):
        steps.append(Step("any driver may take it again", f"{device.directory}/driver_override"))
    if device.vfio:
        if group is not None and (who := users(group.path, proc=proc)):
            raise region_error(
                errno.EBUSY,
                f"ivshmem device {address} is in use by {', '.join(who[:8])}: stop that first, as the kernel "
                "would wait for it",
                group.path,
            )
        steps.append(Step(f"take it from {device.driver}", f"{device.directory}/driver/unbind", address))
        steps.append(
            Step("give it to the driver it would have had", f"{sysfs}/bus/pci/drivers_probe", address)
        )
    if not steps:
        return Plan(
            f"{_name(device)} is not bound to vfio (its driver: {device.driver or 'none'}): nothing to do",
            then=lambda: [f"to use it without interrupts: SHMSOCK_REGION=pci:{address}"],
        )

    def check() -> None:
        now = the_device(address, sysfs)
        if now.vfio:
            raise region_error(
                errno.EIO, f"ivshmem device {address} is bound to {now.driver} still: see dmesg"
            )

    return Plan(
        f"{_name(device)} is given back, as root:",
        steps,
        check=check,
        then=lambda: [
            f"to use it without interrupts: SHMSOCK_REGION=pci:{address}",
            f"to bind it again: shmsock bind {address}",
        ],
    )


def _run(step: Step) -> None:
    try:
        done = subprocess.run(step.argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise region_error(
            errno.ENOENT, f"cannot run `{step.command}`: there is no {step.argv[0]}; install kmod"
        ) from None
    if done.returncode:
        seen = done.stderr.strip() or f"exit status {done.returncode}"
        raise region_error(
            errno.ENODEV, f"`{step.command}` failed: {seen}; run as root, on a kernel that has that module"
        )


def _write(step: Step) -> None:
    try:
        fd = os.open(step.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, step.text.encode() + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        code = error.errno or errno.EIO
        seen = os.strerror(code)
        if code in (errno.EACCES, errno.EPERM):
            text = f"`{step.command}` takes root: run it with sudo"
        elif code == errno.EROFS:
            text = f"`{step.command}` failed: sysfs is mounted read-only (in a container?); do it outside"
        elif code == errno.ENOENT and step.path.endswith(NOIOMMU_SWITCH):
            text = (
                f"`{step.command}` failed: this kernel cannot do without an IOMMU (CONFIG_VFIO_NOIOMMU is "
                "off, as in Debian 12's kernels); give the guest one, or use pci:"
            )
        else:
            text = f"`{step.command}` failed: {seen}; `dmesg | tail` may say more"
        raise region_error(code, text, step.path) from None


def _next(device: PciDevice, group: Group | None) -> list[str]:
    """Tell what to do once it is bound."""
    lines = [f"to use it: SHMSOCK_REGION=vfio:{device.address} (pci:auto finds it too)"]
    if group is not None and not group.noiommu:
        lines.append(f"to let others than root: chgrp shmsock {group.path}; chmod 0660 {group.path}")
    lines.append(f"to undo: shmsock unbind {device.address}; a reboot does too")
    return lines


def _name(device: PciDevice) -> str:
    return f"{device.address} {device.model}"
