"""The pictures of a report: ratios with their rounds, distributions, throughput, pauses, and what it costs.

`shmsock bench --plot` has all of them in one file, `--html` each where it belongs.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shmsock.bench.measures import IDLE, THINKS, Measure, Sweep
from shmsock.bench.results import curve, flat
from shmsock.bench.style import bar, colour, line
from shmsock.bench.words import amount, count, duration, microseconds, percent, rate, ratio, speed
from shmsock.errors import region_error

__all__ = ["Panel", "need_matplotlib", "need_plot", "panels", "plot"]

NOTHING = "there is nothing to plot: measure round trips or throughput, such as --only echo,sizes"
INCHES = 7.5
ABREAST = 2
NINES = {0: "0 %", 90: "90 %", 99: "99 %", 99.9: "99.9 %", 99.99: "99.99 %", 99.999: "99.999 %"}
GREY = "#5f6368"
RATIOS: dict[str, Sequence[str]] = {
    "Times as fast as TCP": ("p50_us", "mb_s", "per_s"),
    "Times the CPU time of TCP": ("cpu_us", "cpu_s_gb"),
    "Times the CPU time of TCP, as the host counts it": ("host_us", "host_s_gb"),
}
"""Titles, and the figures of which the ratios are."""
BARS = {"mb_s": speed, "per_s": rate, "p50_us": microseconds}
"""The figure of a measure that is shown as bars, by which of them it has, and how it is told."""


@dataclass(frozen=True)
class Panel:
    name: str
    title: str
    draw: Callable[[Any], None]
    rows: int = 12
    """How high, in lines of text."""
    wide: bool = False

    @property
    def inches(self) -> tuple[float, float]:
        return (INCHES * (1.6 if self.wide else 1), 1.2 + 0.25 * self.rows)


def need_matplotlib(option: str = "--plot") -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise region_error(
            2,
            f"{option} draws with matplotlib: pip install 'shmsock[bench]'; or keep --json FILE, and where "
            "matplotlib is: shmsock bench report FILE",
        )


def need_plot(measures: Iterable[Measure], sweeps: Iterable[Sweep] = (), option: str = "--plot") -> list[str]:
    """Tell which of these cannot be drawn. Raises RegionError when none can."""
    need_matplotlib(option)
    measures = list(measures)
    drawn = [m for m in measures if m.kind in ("sporadic", "idle") or {c.key for c in m.columns} & {*BARS}]
    if not drawn and not list(sweeps):
        raise region_error(22, NOTHING)
    return [measure.name for measure in measures if measure not in drawn]


def plot(report: dict[str, Any], path: str) -> None:
    """An SVG, two pictures abreast. Raises RegionError: nothing to draw; OSError: not writable."""
    from matplotlib.figure import Figure

    drawn = panels(report)
    if not drawn:
        raise region_error(22, NOTHING)
    across = min(len(drawn), ABREAST)
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(INCHES * across, 4.6 * down), layout="constrained")
    all_axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, panel in zip(all_axes, drawn, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title)
    for axes in all_axes[len(drawn) :]:
        axes.set_axis_off()
    known = report["machine"]
    commit = f" at {known['commit']}" if "commit" in known else ""
    figure.suptitle(f"shmsock {known['shmsock']}{commit}, {known['python']}, {known['cpu']}", fontsize=9)
    figure.savefig(path, format="svg")


def panels(report: dict[str, Any]) -> list[Panel]:
    """Whatever can be drawn of it, what matters most first."""
    measures, idle = report.get("measures", {}), [measure.name for measure in IDLE]
    found = []
    for part, (title, keys) in enumerate(RATIOS.items()):
        if rows := _ratios(measures, keys):
            lines = 2 * len({what for what, *_ in rows}) + len(rows)
            found.append(Panel(f"ratios-{part}", title, partial(_draw_ratios, rows=rows), lines, True))
    for name, kept in measures.items():
        if drawn := _curves(kept):
            found.append(Panel(f"curve-{name}", kept["title"], partial(_draw_curves, curves=drawn), 13))
        elif not _pause(name) and name not in idle and (key := _bar_key(kept)):
            draw = partial(_draw_bars, kept=kept, key=key, show=BARS[key])
            found.append(Panel(f"bars-{name}", kept["title"], draw, max(4, 2 * len(kept["results"]))))
    pauses = [(name, kept) for name, kept in measures.items() if _pause(name)]
    if len(pauses) > 1:
        draw = partial(_draw_pauses, pauses=sorted(pauses, key=lambda each: THINKS.index(_pause(each[0])[0])))
        found.append(Panel("pauses", "64 B round trip after a pause, p50", draw, 13))
    elif pauses:
        ((name, kept),) = pauses
        draw = partial(_draw_bars, kept=kept, key="p50_us", show=microseconds)
        found.append(Panel(f"bars-{name}", f"{kept['title']}, p50", draw, max(4, 2 * len(kept["results"]))))
    for name, sweep in report.get("sweeps", {}).items():
        found.append(Panel(f"sweep-{name}", sweep["title"], partial(_draw_sweep, name=name, sweep=sweep), 13))
    for name in idle:
        if kept := measures.get(name):
            draw = partial(_draw_bars, kept=_both_sides(kept), key="cpu", show=percent)
            title = f"{kept['title']}: CPU of both processes"
            found.append(Panel(f"bars-{name}", title, draw, max(4, 2 * len(kept["results"]))))
    if probes := report.get("probe"):
        found.append(Panel("probe", "Time that a spinning process lost", partial(_draw_probe, probes=probes)))
    return found


def _pause(name: str) -> list[int]:
    """The microseconds in the name of a measure with pauses, if it is one."""
    return [us for us in THINKS if name == f"think-{duration(us).replace(' ', '')}"]


def _bar_key(kept: dict[str, Any]) -> str | None:
    return next((key for key in BARS if all(key in r for r in kept["results"].values())), None)


def _both_sides(kept: dict[str, Any]) -> dict[str, Any]:
    return {**kept, "results": {label: r for label, r in kept["results"].items() if "cpu" in r}}


def _curves(kept: dict[str, Any]) -> dict[str, str]:
    if "mb_s" in next(iter(kept["results"].values()), {}):
        return {}
    return {label: r["hdr"] for label, r in kept["results"].items() if r.get("hdr")}


def _ratios(measures: dict[str, Any], keys: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """What is compared, label, and what was seen: those of one thing together."""
    return [
        (kept["title"], label, seen)
        for kept in measures.values()
        for key in keys
        for label, r in kept["results"].items()
        if (seen := r.get("beside", {}).get(key)) is not None
    ]


def _draw_ratios(axes: Any, rows: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """A line for each, from the lowest to the highest of its range; a dot for each round."""
    at, last = 0.0, ""
    ticks: list[tuple[float, str]] = []
    named: dict[str, Any] = {}
    for what, label, seen in rows:
        at += 1.0 if what == last else 1.8
        if what != last:
            ticks.append((at, what))
        last = what
        paint = line(label)
        axes.plot(seen["each"], [at] * len(seen["each"]), ".", color=paint["color"], alpha=0.35, markersize=9)
        axes.plot([seen["low"], seen["high"]], [at, at], color=paint["color"], linewidth=3, alpha=0.8)
        (made,) = axes.plot([seen["ratio"]], [at], paint["marker"], color=paint["color"], markersize=9)
        named.setdefault(label, made)
        told = f"{ratio(seen['ratio'], False)}x"
        axes.annotate(told, (max(seen["each"]), at), xytext=(6, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low = min(min(seen["each"]) for *_, seen in rows)
    high = max(max(seen["each"]) for *_, seen in rows)
    low, high = min(0.7, low), max(2.0, high)
    axes.set_xlim(low / 1.2, high * (high / low) ** 0.12)
    axes.set_ylim(at + 1, 0.6)
    axes.legend(named.values(), list(named), fontsize=9, loc="best")
    axes.set_yticks([where for where, _ in ticks], ["\n".join(textwrap.wrap(what, 30)) for _, what in ticks])
    axes.tick_params(axis="y", length=0)
    _label_log(axes.xaxis, lambda value: f"{value:g}x")
    axes.set_xlabel("1x: the same as TCP")
    axes.grid(True, axis="x", alpha=0.3)


def _label_log(axis: Any, show: Callable[[float], str]) -> None:
    """Label 1, 2 and 5 of each decade; no more than the decades where they are many."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= low * 1e4 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: show(value))


def _short(us: float) -> str:
    """ "0.5 us", "20 us", "5 ms": of a tick."""
    return f"{us:g} us" if us < 1000 else f"{us / 1000:g} ms"


def _draw_curves(axes: Any, curves: dict[str, str]) -> None:
    """Each further nine as far to the right as the one before."""
    for label, text in curves.items():
        percentiles, times = curve(text)
        part = [(100 / (100 - p), t) for p, t in zip(percentiles, times, strict=True) if p < 100]
        paint = {**line(label), "marker": None}
        axes.plot([at for at, _ in part], [t for _, t in part], label=label, **paint)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([100 / (100 - p) for p in NINES], list(NINES.values()))
    axes.minorticks_off()
    _label_log(axes.yaxis, _short)
    axes.set(xlabel="of all round trips", ylabel="took at most")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9)


def _draw_bars(axes: Any, kept: dict[str, Any], key: str, show: Callable[[float], str]) -> None:
    """The median of the rounds, and from where to where they lie."""
    results = kept["results"]
    most = 0.0
    for at, (label, r) in enumerate(results.items()):
        each = [dict(flat(taken)).get(key, r[key]) for taken in r.get("rounds", [])] or [r[key]]
        axes.barh(at, r[key], height=0.7, **bar(label))
        axes.plot([min(each), max(each)], [at, at], color="black", linewidth=1.5, marker="|")
        most = max(most, *each)
        axes.annotate(f" {show(r[key])}", (max(r[key], *each), at), va="center")
    axes.set_xlim(0, most * 1.25 or 1)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: show(value) if value else "0")
    axes.tick_params(axis="x", labelsize=9)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(True, axis="x", alpha=0.3)


def _draw_pauses(axes: Any, pauses: Sequence[tuple[str, dict[str, Any]]]) -> None:
    labels = list(dict.fromkeys(label for _, kept in pauses for label in kept["results"]))
    for label in labels:
        each_pause = [(at, kept["results"].get(label)) for at, (_, kept) in enumerate(pauses)]
        found = [(at, r) for at, r in each_pause if r]
        axes.plot([at for at, _ in found], [r["p50_us"] for _, r in found], label=label, **line(label))
        for at, r in found:
            each = [taken["p50_us"] for taken in r.get("rounds", [])]
            if each:
                axes.plot([at, at], [min(each), max(each)], color=colour(label), linewidth=3, alpha=0.35)
    axes.set_yscale("log")
    axes.set_xticks(range(len(pauses)), [duration(_pause(name)[0]) for name, _ in pauses])
    _label_log(axes.yaxis, _short)
    axes.set(xlabel="pause before each")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9)


def _draw_sweep(axes: Any, name: str, sweep: dict[str, Any]) -> None:
    key, at = sweep["figure"], [0]
    for label, found in sweep["results"].items():
        at = [int(value) for value in found]
        axes.plot(at, [r[key] for r in found.values()], label=label, **line(label))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    say = amount if name == "sizes" else count
    axes.set_xticks(at, [say(value) for value in at])
    axes.minorticks_off()
    _label_log(axes.yaxis, BARS[key])
    axes.set(xlabel="size of a write" if name == "sizes" else "connections")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9)


def _draw_probe(axes: Any, probes: Sequence[dict[str, Any]]) -> None:
    most = 5.0
    for shift, end in ((-0.2, "client"), (0.2, "server")):
        lost = [taken[end]["lost"] for taken in probes]
        most = max(most, *lost)
        paint = {
            "facecolor": GREY if end == "client" else "white",
            "hatch": "" if end == "client" else "////",
        }
        axes.bar([at + shift for at in range(len(lost))], lost, 0.38, label=end, edgecolor=GREY, **paint)
    axes.set_xticks(range(len(probes)), [str(number + 1) for number in range(len(probes))])
    axes.set_ylim(0, most * 1.1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set(xlabel="round", ylabel="of 0.1 s")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=9)
