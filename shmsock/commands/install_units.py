"""`shmsock install-units`: write or print units of systemd, udev rules, a sysctl."""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from shmsock.commands.group import Failed
from shmsock.commands.params import Size
from shmsock.install.system import NAMES, SystemFile, system_files
from shmsock.region.file import owner_name

__all__ = ["install_units"]


class _Command(click.Command):
    """Tells in its help what can be installed."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Files"):
            formatter.write_dl(list(NAMES.items()))


@click.command("install-units", cls=_Command)
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(list(NAMES)))
@click.option("--print", "only_print", is_flag=True, help="Only print them: all, or those that are named.")
@click.option("--region", metavar="PATH", default="/dev/shm/vms", help="The region that is made at boot.")
@click.option("--size", type=Size(), default="256M", help="Of that region, or of the server's.")
@click.option("--group", help="Who may use it; else kvm on the host, and shmsock in a guest.")
@click.option("--root", type=click.Path(file_okay=False), default="/", help="Write below this directory.")
@click.option("--force", is_flag=True, help="Replace files that differ.")
def install_units(names: tuple[str, ...], only_print: bool, root: str, force: bool, **options: Any) -> None:
    """Install units of systemd and the like. Names what root does then."""
    if not names and not only_print:
        raise click.UsageError(f"name what to install, or --print: {', '.join(NAMES)}")
    if not re.fullmatch(r"/[\w./:,=+-]+", options["region"]):
        raise click.BadParameter("expected an absolute path of plain characters", param_hint="--region")
    files = [file for name in dict.fromkeys(names or NAMES) for file in system_files(name, **options)]
    if root == "/":
        _warn_of_groups(files)
    if only_print:
        for number, file in enumerate(files):
            click.echo(f"{chr(10) if number else ''}# {file.path}\n{file.text}", nl=False)
        return
    targets = [(file, Path(root, file.path.lstrip("/"))) for file in files]
    if not force:
        for file, path in targets:
            if path.exists() and path.read_text(encoding="utf-8") != file.text:
                raise Failed(f"{path} is there and differs: look at it, then --force. Nothing was written")
    for file, path in targets:
        try:
            _write(file, path)
        except PermissionError:
            raise Failed(
                f"{path} cannot be written by {owner_name(os.geteuid())}: as root, or --print"
            ) from None
    click.echo("then, as root:")
    units = any(file.path.startswith("/etc/systemd/") for file in files)
    for command in [*(["systemctl daemon-reload"] if units else []), *(c for f in files for c in f.then)]:
        click.echo(f"    {command}")


def _warn_of_groups(files: Iterable[SystemFile]) -> None:
    """Tell of groups that units name and this machine has not: such a unit does not start."""
    known = {group.gr_name for group in grp.getgrall()}
    named = {name for f in files for name in re.findall(r"^(?:Socket)?Group=(.+)$", f.text, re.MULTILINE)}
    for name in sorted(named - known):
        click.echo(
            f"shmsock: warning: there is no group {name!r} here, and a unit that names it does not start: "
            f"`groupadd --system {name}`, or --group",
            err=True,
        )


def _write(file: SystemFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file.text, encoding="utf-8")
    path.chmod(0o644)
    click.echo(f"wrote {path}")
