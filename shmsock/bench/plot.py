"""`shmsock bench --plot`: the distribution of round trips, and throughput by the size of a write."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from shmsock.bench.measures import Measure, Sweep
from shmsock.bench.results import curve, have_histograms
from shmsock.bench.words import amount, microseconds
from shmsock.errors import region_error

__all__ = ["need_matplotlib", "need_plot", "plot"]

NOTHING = "there is nothing to plot: measure round trips, such as --only echo,sizes"
INCHES = (9.0, 5.0)
ABREAST = 2
NINES = {0: "0 %", 90: "90 %", 99: "99 %", 99.9: "99.9 %", 99.99: "99.99 %", 99.999: "99.999 %"}


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise region_error(2, "--plot draws with matplotlib: pip install 'shmsock[bench]'")


def need_plot(measures: Iterable[Measure], sweeps: Iterable[Sweep] = ()) -> None:
    """Raises RegionError when no picture could be drawn of these, whatever is measured."""
    need_matplotlib()
    if any(sweep.name == "sizes" for sweep in sweeps):
        return
    if not any(measure.timed for measure in measures):
        raise region_error(22, NOTHING)
    if not have_histograms():
        raise region_error(2, "--plot draws HDR histograms: pip install 'shmsock[bench]' (hdrhistogram)")


def plot(report: dict[str, Any], path: str) -> None:
    """An SVG, two pictures abreast. Raises RegionError: nothing to draw; OSError: not writable."""
    from matplotlib.figure import Figure

    drawn = [kept for kept in report.get("measures", {}).values() if _curves(kept)]
    sizes = report.get("sweeps", {}).get("sizes")
    if not drawn and not sizes:
        raise region_error(22, NOTHING)
    count = len(drawn) + bool(sizes)
    across = min(count, ABREAST)
    down = -(-count // across)
    figure = Figure(figsize=(INCHES[0] * across, INCHES[1] * down), layout="constrained")
    all_axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, kept in zip(all_axes, drawn, strict=False):
        _draw_curves(axes, kept)
    if sizes:
        _draw_sizes(all_axes[count - 1], sizes)
    for axes in all_axes[count:]:
        axes.set_axis_off()
    known = report["machine"]
    commit = f" at {known['commit']}" if "commit" in known else ""
    figure.suptitle(f"shmsock {known['shmsock']}{commit}, {known['python']}, {known['cpu']}", fontsize=9)
    figure.savefig(path, format="svg")


def _curves(kept: dict[str, Any]) -> dict[str, str]:
    return {label: r["hdr"] for label, r in kept["results"].items() if r.get("hdr")}


def _draw_curves(axes: Any, kept: dict[str, Any]) -> None:
    """Each further nine as far to the right as the one before."""
    for label, text in _curves(kept).items():
        percentiles, times = curve(text)
        part = [(100 / (100 - p), t) for p, t in zip(percentiles, times, strict=True) if p < 100]
        axes.plot([at for at, _ in part], [t for _, t in part], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([100 / (100 - p) for p in NINES], list(NINES.values()))
    axes.yaxis.set_major_formatter(lambda value, _: microseconds(value))
    axes.minorticks_off()
    axes.set(title=f"{kept['title']}, {kept['where']}", xlabel="of all round trips", ylabel="took at most")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)


def _draw_sizes(axes: Any, sizes: dict[str, Any]) -> None:
    at: list[int] = []
    for label, found in sizes["results"].items():
        at = [int(size) for size in found]
        axes.plot(at, [r[sizes["figure"]] for r in found.values()], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(at, [amount(size) for size in at])
    axes.minorticks_off()
    axes.set(title=sizes["title"], xlabel="size of a write", ylabel="MB/s")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
