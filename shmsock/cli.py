"""The command `shmsock`. Its subcommands are in shmsock.commands, a file each."""

from __future__ import annotations

import click

from shmsock.commands.group import Commands

__all__ = ["cli", "main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shmsock")
def cli() -> None:
    """Sockets for asyncio over QEMU ivshmem shared memory."""


def main() -> None:
    """The entry point."""
    cli(prog_name="shmsock")
