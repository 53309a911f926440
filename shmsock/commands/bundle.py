"""`shmsock bundle`: one file for guests without a network and a compiler."""

from __future__ import annotations

import re
from pathlib import Path

import click

from shmsock.commands.group import Failed
from shmsock.region.sizes import human

__all__ = ["bundle"]


@click.command()
@click.argument("output", required=False, type=click.Path(dir_okay=False, writable=True, path_type=Path))
@click.option(
    "--python",
    metavar="PROGRAM",
    help="The guest's Python as it is on this machine, such as python3.12: its pip fetches and builds. "
    "Otherwise for this one, of what is installed, without a network.",
)
@click.option("--add", multiple=True, metavar="PACKAGE", help="Packages to go along, such as uvloop.")
@click.option(
    "--pyz", is_flag=True, help="Only shmsock.pyz: all commands in a file, to be installed nowhere."
)
def bundle(output: Path | None, python: str | None, add: tuple[str, ...], pyz: bool) -> None:
    """Pack what a guest without a network and a compiler needs.

    One file, OUTPUT: wheels for the guest's Python, examples, udev rules. Prints the three commands that
    install it there.
    """
    from shmsock.install import BundleError
    from shmsock.install.bundle import make_bundle, make_pyz

    if pyz and add:
        raise click.UsageError("--add is for what is installed, --pyz for a look with nothing installed")
    if bad := [name for name in add if not re.fullmatch(r"[\w.-]+", name)]:
        raise click.BadParameter(f"{bad[0]!r} is no name of a package", param_hint="--add")
    try:
        if pyz:
            output = output or Path("shmsock.pyz")
            make_pyz(output, python)
        else:
            output, commands = make_bundle(output, python, add)
    except BundleError as error:
        raise Failed(str(error)) from None
    click.echo(f"made {output}, {human(output.stat().st_size)}; copy it into the guest, and there")
    for command in [f"python3 {output.name} info"] if pyz else commands:
        click.echo(f"    {command}")
