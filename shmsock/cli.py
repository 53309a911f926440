"""The command `shmsock`."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from shmsock import region as regions
from shmsock.aio.attach import prepare_region
from shmsock.errors import RegionError, region_error
from shmsock.fabric.layout import MAX_PEERS
from shmsock.region.base import Region
from shmsock.region.sizes import parse_size
from shmsock.tools import look, reap, show

__all__ = ["cli", "main"]


class Failed(click.ClickException):
    """A message on stderr, and exit status 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"shmsock: {self.message}", err=True)


class Commands(click.Group):
    """Every error that a user can meet becomes one line; a traceback is for what nobody foresaw."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failed(_message(error)) from error
        except KeyboardInterrupt:
            click.echo("\nshmsock: interrupted", err=True)
            sys.exit(130)


def _message(error: OSError) -> str:
    if isinstance(error, RegionError) or error.filename is None:
        return error.strerror or str(error)
    return f"{error.filename}: {error.strerror}"


class Size(click.ParamType[int]):
    """2G, 64M, 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, context)


class Mode(click.ParamType[int]):
    """Permissions, octal."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            mode = value if isinstance(value, int) else int(value, 8)
        except ValueError:
            mode = -1
        if mode & ~0o666 or mode & 0o600 != 0o600:
            self.fail(
                f"{value!r} is no mode for a region: expected octal digits such as 0600 or 0660",
                param,
                context,
            )
        return mode


def _console() -> Console:
    """Tables are not folded for the width of a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=160, soft_wrap=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shmsock")
def cli() -> None:
    """Sockets for asyncio over QEMU ivshmem shared memory."""


@cli.command()
@click.argument("path", type=click.Path(dir_okay=True))
@click.option("--size", type=Size(), required=True, help="Such as 256M or 2G; guests need a power of two.")
@click.option(
    "--peers",
    type=click.IntRange(1, MAX_PEERS),
    default=16,
    show_default=True,
    help="How many can be attached.",
)
@click.option("--mode", type=Mode(), default="0600", show_default=True, help="Permissions of the file.")
@click.option("--force", is_flag=True, help="Overwrite a file that is there; refused while anybody uses it.")
def create(path: str, size: int, peers: int, mode: int, force: bool) -> None:
    """Make and format a region file, with all of its storage."""
    kind, path = regions.parse_url(path if ":" in path.partition("/")[0] else os.path.abspath(path))
    if kind != "file":
        raise click.UsageError(
            f"{path}: a file is what can be created; BAR2 of a device has its bytes from the host"
        )
    regions.create_file(
        path, size, mode=mode, force=force, prepare=partial(prepare_region, peers=peers), check=_unused
    )
    with regions.open_file(path, writable=False) as region:
        for line in show.made_lines(path, look.look(region, 0), mode):
            click.echo(line)


def _unused(region: Region) -> None:
    if busy := look.busy_sections(region):
        raise region_error(
            errno.EBUSY,
            f"region {region.path} is in use by {', '.join(busy[:8])}: stop them, or make another region",
            region.path,
        )


@cli.command()
@click.argument("region", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(region: str | None, as_json: bool) -> None:
    """Show ivshmem devices, and what lies in REGION. Changes nothing.

    Without REGION: of all devices, and of SHMSOCK_REGION or, where there is no device, the default region.
    """
    devices = regions.find_devices()
    urls = [region] if region else [f"pci:{device.address}" for device in devices]
    chosen = os.environ.get("SHMSOCK_REGION")
    if not region and (chosen or not devices):
        urls = [url for url in [chosen or regions.default_url(), *urls] if url != "pci:auto" or not devices]
    found, problem = [], None
    for url in urls:
        try:
            with regions.open(url, writable=False) as opened:
                found.append({**look.describe_region(opened), "content": look.look(opened)})
        except OSError as error:
            problem = _message(error)
            found.append({"url": url, "error": problem})
    shown = regions.find_devices() or devices  # once more: opening one enables it
    if region and not region.startswith("pci:"):
        shown = []
    elif region and "content" in found[0]:
        shown = [device for device in shown if f"pci:{device.address}" == found[0]["url"]]
    if as_json:
        click.echo(
            json.dumps(
                {"devices": [look.describe_device(d) for d in shown], "regions": found},
                default=asdict,
                indent=2,
            )
        )
    else:
        _print_info([look.describe_device(d) for d in shown], [f for f in found if "content" in f])
    if problem and len(urls) == 1:
        raise Failed(problem)
    for bad in found:
        if "error" in bad:
            click.echo(f"shmsock: {bad['error']}", err=True)
    if problem:
        sys.exit(1)


def _print_info(devices: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    console = _console()
    for device in devices:
        for line in show.device_lines(device):
            click.echo(line)
    for region in found:
        for line in (*show.region_lines(region), *show.content_lines(region["content"])):
            click.echo(line)
        if table := show.section_table(region["content"]):
            console.print(table)


@cli.command("reap")
@click.argument("region", required=False)
@click.option(
    "--section",
    "wanted",
    multiple=True,
    metavar="N",
    help="A silent section to free, by number or name; repeatable.",
)
@click.option("--yes", is_flag=True, help="Do not ask before freeing a silent section.")
@click.option(
    "--watch",
    type=click.FloatRange(1, 600),
    default=3.0,
    show_default=True,
    help="Seconds for which a beat must stand still.",
)
def reap_command(region: str | None, wanted: tuple[str, ...], yes: bool, watch: float) -> None:
    """Free the sections of REGION whose owners are gone: those proven dead, and silent ones that you name."""
    with regions.open(region) as opened:
        done = reap.reap_region(opened, wanted, None if yes else _confirm, watch)
    for line in done.lines():
        click.echo(line)
    if done.refused:
        sys.exit(1)


def _confirm(section: look.Section) -> bool:
    return click.confirm(
        f"Section {section.number} ({section.title}) is silent. If its owner comes back, it finds its "
        "connections lost. Free it?",
        err=True,
    )


@cli.command()
@click.option(
    "--scale",
    type=click.FloatRange(0.01, 10),
    default=1.0,
    hidden=True,
    help="Of the time and bytes; for tests.",
)
def demo(scale: float) -> None:
    """A server and a client process of this host: echo, a file, and a table beside TCP. About 20 s."""
    from shmsock.tools.demo import run_demo

    run_demo(_console(), scale)


@cli.command("demo-vm")
@click.option(
    "--megabytes", type=click.IntRange(1, 1000), default=200, show_default=True, help="Of the file, each way."
)
@click.option("--echoes", type=click.IntRange(1, 10_000_000), default=10_000, show_default=True)
def demo_vm(megabytes: int, echoes: int) -> None:
    """Two QEMU guests without a network: a file both ways at once, echoes, and this host as a third peer."""
    from shmsock.tools.demo_vm import run_demo_vm

    if not run_demo_vm(_console(), megabytes * 1_000_000, echoes):
        sys.exit(1)


@cli.command()
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    help="Write all figures there too.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Measures are taken in turn so often.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 600),
    default=1.0,
    show_default=True,
    help="For each measure in a round.",
)
@click.option("--one-core", is_flag=True, help="Only with both processes on one core.")
@click.option("--vm", is_flag=True, help="Between two guests, beside virtio-net. Needs root.")
def bench(file: str | None, rounds: int, seconds: float, one_core: bool, vm: bool) -> None:
    """Round trips and throughput beside TCP, medians over several rounds."""
    from shmsock.tools import bench as run

    if vm and one_core:
        raise click.UsageError("--one-core is about processes of this host: not with --vm")
    if vm:
        from shmsock.tools.bench_vm import bench_guests

        report = bench_guests(_console(), rounds, seconds)
    else:
        report = run.bench_host(_console(), rounds, seconds, ["one"] if one_core else ["two", "one"])
    if file == "-":
        click.echo(json.dumps(report, indent=2))
    elif file:
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The entry point."""
    cli(prog_name="shmsock")
