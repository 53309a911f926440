"""The command `shmsock`. Its subcommands are in shmsock.commands, a file each."""

from __future__ import annotations

import os

import click

from shmsock.commands.group import Commands

__all__ = ["cli", "main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="shmsock")
def cli() -> None:
    """Sockets for asyncio over QEMU ivshmem shared memory."""


def main() -> None:
    """The entry point. Standard descriptors that are closed are filled first, as the C library does for
    set-user-ID programs: else the region would become one of them, and whoever prints would write to it.
    Input and output fail there as before."""
    for fd, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest that is free
    cli(prog_name="shmsock")
