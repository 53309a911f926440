"""`shmsock bench`: its options, and what they choose."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shmsock.commands.console import console
from shmsock.commands.params import check_environ
from shmsock.errors import region_error

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["bench"]

PORT = 7000
Report = dict[str, Any]


class HostPort(click.ParamType[tuple[str | None, int]]):
    """HOST:PORT, or a port alone."""

    name = "[host:]port"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[str | None, int]:
        if isinstance(value, tuple):
            return value
        host, _, port = value.removeprefix("tcp://").rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} has no port: expected HOST:PORT, such as 192.168.7.2:7001", param, context)
        return host.strip("[]") or None, int(port)


def _measuring(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all that measures."""
    file = click.Path(dir_okay=False, writable=True)
    file_or_dash = click.Path(dir_okay=False, writable=True, allow_dash=True)
    for option in (
        click.option("--only", metavar="NAMES", help="These measures, with commas; --list tells them."),
        click.option("--rounds", type=click.IntRange(1, 1000), help="Measures are taken in turn so often."),
        click.option("--seconds", type=click.FloatRange(0.01, 600), help="For each measure in a round."),
        click.option("--json", "file", type=file_or_dash, help="Write all figures there too."),
        click.option("--text", type=file, help="Write the tables there too."),
        click.option("--plot", type=file, help="Draw an SVG of all that can be drawn."),
        click.option("--html", type=file, help="Write a page with verdict, plots, and the JSON beside it."),
        click.option("--marks", is_flag=True, help="Judge by what the project itself wants to reach."),
    ):
        command = option(command)
    return command


def _attaching(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an end that runs on a machine of its own."""
    for option in (
        click.option("--cpu", type=click.IntRange(0), help="Where the process that is measured stays."),
        click.option("--name", help="Of this side; else SHMSOCK_NAME, or the host's name."),
        click.option(
            "--region", metavar="URL", help="What to attach to; else SHMSOCK_REGION, or the default."
        ),
    ):
        command = option(command)
    return command


def _write(
    measure: Callable[[Console], Report],
    options: dict[str, Any],
    measures: Sequence[Any],
    sweeps: Sequence[Any] = (),
) -> None:
    """Measure, and write what was measured wherever it is wanted. What would fail then fails now."""
    from shmsock.bench import plot
    from shmsock.bench.runner import judge

    file, text, picture, html = (options[name] for name in ("file", "text", "plot", "html"))
    if html and not file:
        file = str(Path(html).with_suffix(".json"))
    for path in (file, text, picture, html):
        if path not in (None, "-"):
            _check_writable(Path(str(path)))
    out = console(record=text is not None)
    if picture or html:
        option = "--plot" if picture else "--html"
        if rest := plot.need_plot(measures, sweeps, option):
            out.print(f"In no plot, but in the figures: {', '.join(rest)}.", highlight=False)
    report = measure(out)
    if options["marks"]:
        judge(out, report)
    if file == "-":
        click.echo(json.dumps(report, indent=2))
    elif file:
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if text:
        Path(text).write_text(out.export_text(), encoding="utf-8")
    if picture:
        plot.plot(report, picture)
    if html:
        _write_page(report, html, str(file))


def _write_page(report: Report, path: str, figures: str) -> None:
    from shmsock.bench.page import page

    Path(path).write_text(page(report), encoding="utf-8")
    where = "above" if figures == "-" else figures
    click.echo(f"The report is {path}, its figures are {where}", err=True)


def _check_writable(path: Path) -> None:
    place = path if path.exists() else path.parent
    if not place.exists():
        raise region_error(errno.ENOENT, f"cannot write {path}: there is no directory {place}; make it first")
    if not os.access(place, os.W_OK):
        raise region_error(errno.EACCES, f"cannot write {path}: no permission to write to {place}")


def _chosen(only: str) -> tuple[list[Any], list[Any]]:
    from shmsock.bench.measures import chosen

    try:
        return chosen(only)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from None


@click.group("bench", invoke_without_command=True)
@_measuring
@click.option("--all", "everything", is_flag=True, help="The whole suite, --sizes and --connections too.")
@click.option("--sizes", is_flag=True, help="Throughput by the size of a write, 1 B to 1 MiB.")
@click.option("--connections", is_flag=True, help="Echoes by the number of connections, 1 to 1000.")
@click.option("--list", "show_list", is_flag=True, help="Only tell what can be measured.")
@click.option("--sporadic", is_flag=True, help="Round trips with pauses of 0 to 100 ms, and the CPU time.")
@click.option("--idle", is_flag=True, help="Ten connections on which nothing is said: the CPU time.")
@click.option("--one-core", is_flag=True, help="With both processes on one core.")
@click.option("--vm", is_flag=True, help="Between two guests, beside virtio-net. Needs root.")
@click.option("--doorbells", is_flag=True, help="With --vm: an ivshmem-doorbell device too, through vfio.")
@click.option("--dax", is_flag=True, help="With --vm: persistent memory too, as dax:.")
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Measure round trips and throughput beside TCP. And beside what else there is: in the same run, medians
    over its rounds.

    Without options the two figures that matter most; --all is the suite, which takes minutes and needs
    `pip install 'shmsock[bench]'`. Everything is measured in turn for --rounds (5; 3 of the suite and of
    --sporadic, 1 of --idle) of --seconds (1; 0.5 of the suite and of --sporadic, 10 of --idle).
    """
    asked = {name for name, value in options.items() if value}
    if context.invoked_subcommand is not None:
        if asked:
            raise click.UsageError(f"options of {context.invoked_subcommand!r} come after its name")
        return
    if options["show_list"]:
        _list()
        return
    _refuse(asked)
    measures, sweeps, rounds, seconds = _plan(options)
    rounds, seconds = options["rounds"] or rounds, options["seconds"] or seconds

    def measure(console: Console) -> Report:
        from shmsock.bench import runner

        if options["vm"]:
            from shmsock.bench.vm import bench_guests

            devices = {name: options[name] for name in ("doorbells", "dax")}
            loops = ("uvloop", "asyncio") if options["everything"] else ()
            return bench_guests(console, rounds, seconds, measures, sweeps, **devices, loops=loops)
        return runner.bench(console, runner.Host(console), rounds, seconds, measures, sweeps)

    _write(measure, options, measures, sweeps)


def _list() -> None:
    from shmsock.bench.measures import MEASURES, SUITE, SWEEPS

    for measure in MEASURES.values():
        click.echo(f"{measure.name:<24}{measure.title}" + ("" if measure in SUITE else " (not in --all)"))
    for sweep in SWEEPS:
        click.echo(f"{sweep.name:<24}{sweep.title}")


def _refuse(asked: set[str]) -> None:
    """Refuse what does not go together."""
    if {"vm", "one_core"} <= asked:
        raise click.UsageError("--one-core is about processes of this host: not with --vm")
    if asked & {"doorbells", "dax"} and "vm" not in asked:
        raise click.UsageError("--doorbells and --dax are about guests: only with --vm")
    sets = [name for name in ("sporadic", "idle", "only", "everything", "one_core") if name in asked]
    names = {"everything": "--all", "one_core": "--one-core"}
    if (len(sets) > 1 and set(sets) - {"one_core", "idle", "sporadic"}) or {"sporadic", "idle"} <= asked:
        told = " and ".join(names.get(name, f"--{name}") for name in sets)
        raise click.UsageError(f"{told} choose measures: one at a time")
    if "vm" in asked and "connections" in asked:
        raise click.UsageError("between guests there are no sweeps but --sizes")


def _plan(options: dict[str, Any]) -> tuple[list[Any], list[Any], int, float]:
    """Choose measures, sweeps, rounds and seconds."""
    from dataclasses import replace

    from shmsock.bench import measures as known
    from shmsock.bench.remote import REMOTE
    from shmsock.bench.results import need_histograms

    if options["sporadic"] or options["idle"]:
        measures = [*(known.SPORADIC if options["sporadic"] else known.IDLE[:1])]
        if options["one_core"]:
            measures = [replace(m, placement="one") for m in measures if m.placement == "two"]
        elif options["vm"]:
            measures = [m for m in measures if m.placement == "two"]
        return measures, [], *((3, 0.5) if options["sporadic"] else (1, 10.0))
    if options["vm"] and options["everything"]:
        need_histograms()
        return list(known.VM), list(known.VM_SWEEPS), 3, 0.5
    sweeps = [s for s in known.SWEEPS if options["everything"] or options[s.name]]
    if options["vm"] and sweeps:
        sweeps = list(known.VM_SWEEPS)
    if options["only"]:
        measures, named = _chosen(options["only"])
        sweeps = [s for s in known.SWEEPS if s in sweeps or s in named]
        if options["vm"] and any(m.name not in (*REMOTE, "datagram") for m in measures):
            raise click.UsageError(f"between guests there are only {', '.join((*REMOTE, 'datagram'))}")
    elif options["everything"]:
        measures = list(known.SUITE)
    elif sweeps:
        measures = []
    elif options["one_core"]:
        return list(known.ONE), [], 5, 1.0
    else:
        return [*known.PLAIN, *(() if options["vm"] else known.ONE)], [], 5, 1.0
    need_histograms()
    return measures, sweeps, 3, 0.5


@bench.command()
@click.option(
    "--listen", type=click.IntRange(0, 65535), default=PORT, metavar="PORT", help="In the region; 0: any."
)
@click.option("--tcp", type=HostPort(), metavar="[HOST:]PORT", help="Listen there too, for TCP beside it.")
@_attaching
def serve(
    listen: int, tcp: tuple[str | None, int] | None, region: str | None, name: str | None, cpu: int | None
) -> None:
    """Be the other end of `shmsock bench connect`. Until standard input ends, or Ctrl-C."""
    from shmsock.bench import remote

    check_environ(name)
    remote.serve(console(), listen, tcp, region, name, cpu)


@bench.command()
@click.argument("host")
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, help="What the other end listens on.")
@click.option(
    "--against",
    "--tcp",
    "tcp",
    type=HostPort(),
    metavar="tcp://HOST:PORT",
    help="Compare with TCP, to where the other end has --tcp: pauses, CPU time and a verdict too.",
)
@_attaching
@_measuring
def connect(
    host: str,
    port: int,
    tcp: tuple[str | None, int] | None,
    region: str | None,
    name: str | None,
    cpu: int | None,
    **options: Any,
) -> None:
    """Measure against `shmsock bench serve` on HOST. A peer's name: in another VM, or on this host.

    Each measure takes turns in --rounds (3; 6 with --against) of --seconds (0.5; 0.3 with --against).
    """
    from shmsock.bench.remote import REMOTE, Remote, bench_remote

    check_environ(name)
    if tcp and tcp[0] is None:
        raise click.BadParameter("the host is missing: expected HOST:PORT", param_hint="--against")
    measures = _chosen(options["only"] or ("echo,bulk,connect" if tcp else "echo,bulk,drain,connect"))[0]
    if other := [m.name for m in measures if m.name not in REMOTE]:
        raise click.BadParameter(
            f"{', '.join(other)}: between two machines there are {', '.join(REMOTE)}", param_hint="--only"
        )
    place = Remote((host, port), tcp, region, name, cpu)
    rounds, seconds = options["rounds"] or (6 if tcp else 3), options["seconds"] or (0.3 if tcp else 0.5)
    _write(lambda console: bench_remote(console, place, rounds, seconds, measures), options, measures)


@bench.command()
@click.argument("figures", type=click.Path(exists=True, dir_okay=False), metavar="FIGURES.json")
@click.argument("page", required=False, type=click.Path(dir_okay=False, writable=True), metavar="[PAGE.html]")
def report(figures: str, page: str | None) -> None:
    """Draw what --json has kept, as --html does. Where matplotlib is: a guest may have none."""
    from shmsock.bench import plot

    path = page or str(Path(figures).with_suffix(".html"))
    _check_writable(Path(path))
    plot.need_matplotlib("the page")
    try:
        found = json.loads(Path(figures).read_text(encoding="utf-8"))
        found["measures"], found["machine"]["shmsock"]
    except (ValueError, KeyError, TypeError):
        raise click.BadParameter(f"{figures} is not what `shmsock bench --json` writes") from None
    _write_page(found, path, figures)
