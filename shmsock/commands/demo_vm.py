"""`shmsock demo-vm`: shmsock between two guests and this host."""

from __future__ import annotations

import sys

import click

__all__ = ["demo_vm"]


@click.command("demo-vm")
@click.option("--megabytes", type=click.IntRange(1, 1000), default=200, help="Of the file, each way.")
@click.option("--echoes", type=click.IntRange(1, 10_000_000), default=10_000, help="Round trips of 64 bytes.")
def demo_vm(megabytes: int, echoes: int) -> None:
    """Run two QEMU guests without a network. A file both ways at once, echoes, this host as a third peer."""
    from shmsock.bench.demo_vm import run_demo_vm
    from shmsock.commands.console import console

    if not run_demo_vm(console(), megabytes * 1_000_000, echoes):
        sys.exit(1)
