"""`shmsock bench --sporadic` and `--idle`: what pauses between messages cost, in time and in CPU time."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from shmsock.tools.bench import REFERENCE, Kind, Variant, reference, times, variants

__all__ = ["DOORBELLS", "IDLE", "PLAIN", "SPORADIC"]

THINKS = (0, 100, 1_000, 10_000, 100_000)
"""Microseconds between two echoes."""
DOORBELLS, PLAIN = "doorbells", "plain"
"""How regions of guests are told apart."""
SIDES = ("client", "server")
IDLE_MARKS = {DOORBELLS: 0.5, PLAIN: 2.0}
"""Percent of one CPU, for ten idle connections."""


def _variants() -> list[Variant]:
    """TCP and shmsock; asyncio's own streams on shmsock's loop are shmsock."""
    return [variant for variant in variants() if not variant.stock]


def _sides(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of what client and server used."""
    return {
        f"{side}_{what}": statistics.median(r[side][what] for r in rounds)
        for side in SIDES
        for what in ("cpu", "system", "sleeps_s")
    }


def sporadic_medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for think in rounds[0]["sporadic"]:
        taken = [r["sporadic"][think] for r in rounds]
        times = {what: statistics.median(t[what] for t in taken) for what in ("p50_us", "p99_us")}
        found[think] = {**times, **_sides(taken)}
    return {"think_us": found}


def sporadic_table(title: str, results: dict[str, Any]) -> Table:
    base = reference(results)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("pause")
    table.add_column("")
    for column in ("p50", "p99", f"p50 beside {base}", "CPU of client", "of server"):
        table.add_column(column, justify="right")
    for think in next(iter(results.values()))["think_us"]:
        for number, (label, result) in enumerate(results.items()):
            r, ratio = result["think_us"][think], ""
            if base and label != base:
                ratio = times(results[base]["think_us"][think]["p50_us"] / r["p50_us"], "faster", "slower")
            table.add_row(
                "" if number else duration(int(think)),
                label,
                f"{r['p50_us']:.1f} us",
                f"{r['p99_us']:.1f} us",
                ratio,
                *(percent(r[f"{side}_cpu"]) for side in SIDES),
                end_section=number == len(results) - 1,
            )
    return table


def sporadic_marks(results: dict[str, Any], placement: str) -> list[dict[str, Any]]:
    """No pause makes shmsock slower than TCP: but between guests it takes doorbells for that."""
    label = "shmsock, uvloop" + (f", {DOORBELLS}" if placement == "vm" else "")
    ours, tcp = results.get(label), results.get(REFERENCE)
    if not ours or not tcp:
        return []
    found = []
    for think, r in ours["think_us"].items():
        seen = tcp["think_us"][think]["p50_us"] / r["p50_us"]
        row = {"where": placement, "what": "sporadic", "think_us": int(think), "who": label}
        found.append({**row, "than": REFERENCE, "at_least": 1.0, "seen": seen, "met": seen >= 1})
    return found


def print_sporadic_marks(console: Console, marks: list[dict[str, Any]]) -> None:
    if marks:
        seen = [
            f"{duration(m['think_us'])} {times(m['seen'], 'faster', 'slower')} {_met(m['met'])}"
            for m in marks
        ]
        console.print(f"  mark: p50 of {marks[0]['who']} at most that of {REFERENCE}: " + "; ".join(seen))


def idle_medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {"connections": rounds[0]["idle"]["connections"], **_sides([r["idle"] for r in rounds])}


def idle_table(title: str, results: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for side in SIDES:
        for column in (f"CPU of {side}", "in the kernel", "sleeps"):
            table.add_column(column, justify="right")
    for label, r in results.items():
        cells = []
        for side in SIDES:
            cells += [percent(r[f"{side}_{what}"]) for what in ("cpu", "system")]
            cells.append(f"{r[f'{side}_sleeps_s']:.0f}/s")
        table.add_row(label, *cells)
    return table


def idle_marks(results: dict[str, Any], placement: str) -> list[dict[str, Any]]:
    """Futexes and doorbells cost next to nothing; looking, as plain guests have to, a little."""
    found = []
    for label, r in results.items():
        if not label.startswith("shmsock"):
            continue
        plain = placement == "vm" and not label.endswith(DOORBELLS)
        most = IDLE_MARKS[PLAIN if plain else DOORBELLS]
        seen = max(r[f"{side}_cpu"] for side in SIDES)
        row = {"where": placement, "what": "idle", "who": label, "under": most, "seen": seen}
        found.append({**row, "met": seen < most})
    return found


def print_idle_marks(console: Console, marks: list[dict[str, Any]]) -> None:
    for m in marks:
        seen = f"{percent(m['seen'])}, {_met(m['met'])}"
        console.print(f"  mark: each process of {m['who']} under {m['under']:g} %: {seen}")


def _met(met: bool) -> str:
    return "[green]met[/]" if met else "[red]missed[/]"


def duration(us: int) -> str:
    """ "none", "100 us", "10 ms"."""
    return "none" if not us else f"{us} us" if us < 1000 else f"{us / 1000:g} ms"


def percent(value: float) -> str:
    """Of one CPU."""
    return f"{value:.2f} %" if value < 10 else f"{value:.0f} %"


SPORADIC = Kind(
    title="64 B round trips with pauses",
    arguments=("--measure", "sporadic", "--think", ",".join(map(str, THINKS))),
    rounds=3,
    seconds=0.5,
    placements=("two", "free"),
    variants=_variants,
    medians=sporadic_medians,
    table=sporadic_table,
    marks_of=sporadic_marks,
    print_marks=print_sporadic_marks,
)
IDLE = Kind(
    title="Ten idle connections",
    arguments=("--measure", "idle", "--connections", 10),
    rounds=1,
    seconds=10.0,
    placements=("two",),
    variants=_variants,
    medians=idle_medians,
    table=idle_table,
    marks_of=idle_marks,
    print_marks=print_idle_marks,
)
