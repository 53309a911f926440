"""The command `shmsock`."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import click

from shmsock import region as regions
from shmsock.aio.attach import prepare_region
from shmsock.commands import content as look
from shmsock.commands import reap, show
from shmsock.commands.bench import bench_command
from shmsock.commands.bind import Plan, plan_bind, plan_unbind
from shmsock.engine.layout import MAX_PEERS
from shmsock.errors import RegionError, region_error
from shmsock.region.base import Region
from shmsock.region.locks import SERVER_LOCK
from shmsock.region.pci import normalize_address
from shmsock.region.sizes import parse_size

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


class Address(click.ParamType[str]):
    """A PCI address, or the region URL that has it."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            return normalize_address(value.removeprefix("vfio:").removeprefix("pci:"))
        except ValueError as error:
            self.fail(f"{error}; `shmsock info` lists the devices", param, context)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shmsock")
def cli() -> None:
    """Sockets for asyncio over QEMU ivshmem shared memory."""


@cli.command()
@click.argument("path", type=click.Path(readable=False))
@click.option("--size", type=Size(), required=True, help="Such as 256M or 2G; guests need a power of two.")
@click.option(
    "--peers",
    type=click.IntRange(1, MAX_PEERS),
    default=16,
    show_default=True,
    help="How many can be attached.",
)
@click.option("--mode", type=Mode(), default="0600", show_default=True, help="Permissions of the file.")
@click.option(
    "--force", is_flag=True, help="Replace a file of yours that is there; refused while anybody uses it."
)
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
        for line in show.made_lines(path, look.look(region, 0), region.describe().mode):
            click.echo(line)


def _unused(region: Region) -> None:
    if region.section_locked(SERVER_LOCK):
        raise region_error(
            errno.EBUSY,
            f"region {region.path} is served by an ivshmem server: stop that one, or make another region",
            region.path,
        )
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
    urls = [region] if region else [device.url for device in devices]
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
            found.append({"url": url, "error": problem, **_old_files(url)})
    shown = regions.find_devices() or devices  # once more: opening one enables it
    if region and not region.startswith(("pci:", "vfio:")):
        shown = []
    elif region and "content" in found[0]:
        shown = [device for device in shown if device.url == found[0]["url"]]
    if as_json:
        click.echo(
            json.dumps(
                {"devices": [look.describe_device(d) for d in shown], "regions": found},
                default=asdict,
                indent=2,
            )
        )
    else:
        _print_info([look.describe_device(d) for d in shown], found)
    if problem and len(urls) == 1:
        raise Failed(problem)
    for bad in found:
        if "error" in bad:
            click.echo(f"shmsock: {bad['error']}", err=True)
    if problem:
        sys.exit(1)


def _old_files(url: str) -> dict[str, Any]:
    """Of a region that cannot be opened: its file may have been removed under those who use it."""
    try:
        kind, path = regions.parse_url(url)
    except RegionError:
        kind, path = "", ""
    return {"path": path, "old_files": look.old_files(path) if kind == "file" else []}


def _print_info(devices: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    console = show.console()
    for device in devices:
        for line in show.device_lines(device):
            click.echo(line)
    for region in found:
        parts = [(show.region_lines(region), region["content"])] if "content" in region else []
        parts += [(show.old_file_lines(region["path"], old), old.content) for old in region["old_files"]]
        for title, content in parts:
            lines = [*title]
            if content:
                lines += [
                    *show.content_lines(content),
                    *show.former_lines(content),
                    *show.alone_lines(content),
                ]
            for line in lines:
                click.echo(line)
            if content and (table := show.section_table(content)):
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


@cli.command()
@click.argument("address", type=Address())
@click.option("--driver", default="vfio-pci", show_default=True, help="One made from vfio-pci will do too.")
@click.option("--noiommu", is_flag=True, help="Where there is no IOMMU. Taints the kernel.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def bind(address: str, driver: str, noiommu: bool, yes: bool, dry_run: bool) -> None:
    """Give the ivshmem-doorbell device at ADDRESS to vfio-pci, so that programs get its interrupts.

    In a guest, as root. ADDRESS is as in `shmsock info`, such as 0000:00:04.0. Says what it will do, as shell
    commands, and asks.
    """
    _carry_out(plan_bind(address, driver=driver, noiommu=noiommu), yes, dry_run)


@cli.command()
@click.argument("address", type=Address())
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def unbind(address: str, yes: bool, dry_run: bool) -> None:
    """Take the device at ADDRESS back from vfio-pci: undoes `shmsock bind`."""
    _carry_out(plan_unbind(address), yes, dry_run)


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
    from shmsock.commands.demo import run_demo

    run_demo(show.console(), scale)


@cli.command("demo-vm")
@click.option(
    "--megabytes", type=click.IntRange(1, 1000), default=200, show_default=True, help="Of the file, each way."
)
@click.option("--echoes", type=click.IntRange(1, 10_000_000), default=10_000, show_default=True)
def demo_vm(megabytes: int, echoes: int) -> None:
    """Two QEMU guests without a network: a file both ways at once, echoes, and this host as a third peer."""
    from shmsock.commands.demo_vm import run_demo_vm

    if not run_demo_vm(show.console(), megabytes * 1_000_000, echoes):
        sys.exit(1)


cli.add_command(bench_command)


@cli.command("ivshmem-server")
@click.option("--socket", "path", metavar="PATH", help="Where to listen; not needed when systemd does.")
@click.option("--region", required=True, metavar="FILE|memfd", help="The memory; a file is made if need be.")
@click.option("--size", type=Size(), help="A power of two such as 64M; of a file that is there: its own.")
@click.option("--vectors", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each client.")
@click.option(
    "--mode", type=Mode(), default="0600", show_default=True, help="Permissions of socket and new file."
)
@click.option(
    "--peers",
    type=click.IntRange(1, MAX_PEERS),
    default=16,
    show_default=True,
    help="How many of shmsock can be attached; of memory that is formatted here.",
)
@click.option("--clients", type=click.IntRange(2, 65536), default=1024, show_default=True, help="At most.")
@click.option(
    "--per-process",
    type=click.IntRange(0, 65536),
    default=64,
    show_default=True,
    help="Connections that one process may have; 0: as many as there are.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Seconds after which a client that takes no message is dropped.",
)
def ivshmem_server(
    path: str | None,
    region: str,
    size: int | None,
    vectors: int,
    mode: int,
    peers: int,
    clients: int,
    per_process: int,
    timeout: float,
) -> None:
    """Serve ivshmem-doorbell devices of QEMU, and processes of this host, until SIGTERM or Ctrl-C.

    Hands out the memory and the eventfds by which clients ring each other. Takes its socket from systemd
    (LISTEN_FDS) when started so. Logs to stderr who comes and goes.
    """
    from shmsock.server.server import IvshmemServer, run_server
    from shmsock.server.setup import MEMFD, activated

    if size is not None and size & (size - 1):
        raise click.BadParameter(
            f"{size} bytes are no power of two, as a PCI BAR must be", param_hint="--size"
        )
    if region == MEMFD and size is None:
        raise click.UsageError("--region memfd takes a --size, such as 64M")
    listener = activated()
    if listener is None and not path:
        raise click.UsageError("--socket is missing, and systemd passed none (LISTEN_FDS)")
    if listener is not None and path and os.path.abspath(path) != os.path.abspath(listener.path):
        raise click.UsageError(f"--socket is {path}, and systemd passed {listener.path}: leave --socket out")
    run_server(
        IvshmemServer(
            listener or path or "",
            region,
            size=size,
            peers=peers,
            vectors=vectors,
            mode=mode,
            clients=clients,
            per_process=per_process,
            patience=timeout,
        )
    )


def main() -> None:
    """The entry point."""
    cli(prog_name="shmsock")
