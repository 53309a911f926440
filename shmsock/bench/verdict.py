"""What a comparison comes to: a line that says what is faster, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from shmsock.bench.compare import DISAGREE
from shmsock.bench.measures import COST
from shmsock.bench.style import on_asyncio
from shmsock.bench.words import between, microseconds, percent, ratio, share

__all__ = ["how_sure", "say_verdict", "warnings"]

COSTS = {column.key for column in COST}
LOST = 5.0
"""Percent of the time that a process stood still: more is worth a warning."""
NAMED = 4
"""Figures whose rounds differ that a warning names."""
SAID = (
    ("echo", "p50_us", "64 B echo", "faster", "slower"),
    ("bulk", "mb_s", "64 KiB writes", "faster", "slower"),
    ("connect", "per_s", "connects", "faster", "slower"),
    ("think-1ms", "p50_us", "echo after 1 ms of silence", "faster", "slower"),
    ("think-1ms", "cpu_us", "an echo each ms takes", "the CPU time", ""),
)
"""A measure, its figure, and how the ratio is told."""


def say_verdict(console: Console, report: dict[str, Any]) -> None:
    """Print it, after whatever keeps it from being sure; and keep both in the report."""
    report["warnings"] = warnings(report)
    report["verdict"] = [
        {"who": who, "than": than, "text": ", ".join(parts)} for who, (than, parts) in _parts(report).items()
    ]
    for text in report["warnings"]:
        console.print(f"[yellow]Not sure:[/] {text}", highlight=False)
    for found in report["verdict"]:
        told = f"[bold]{found['who']}[/] beside {found['than']}: {found['text']}."
        console.print(told, highlight=False)
    if report["verdict"]:
        console.print(how_sure(report), highlight=False)


def how_sure(report: dict[str, Any]) -> str:
    """Tell what the two ends of each range are."""
    seen = [seen["sure"] for *_, seen in _ratios(report)]
    if report["rounds"] < 2 or not seen:
        return "Of one round: how much rounds differ is not known."
    return (
        f"Ranges: the ratios of {report['rounds']} rounds; with {share(min(seen))} the median is in them, "
        "while the load is the same."
    )


def _ratios(report: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Measure, label and key of each, and what was seen."""
    for name, kept in report.get("measures", {}).items():
        for label, r in kept["results"].items():
            for key, seen in r.get("beside", {}).items():
                yield name, label, key, seen


def _parts(report: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """By label: beside what, and the parts of a sentence. On asyncio's own loop only if there is no other."""
    all_seen = {(name, label, key): seen for name, label, key, seen in _ratios(report)}
    if faster := {way: seen for way, seen in all_seen.items() if not on_asyncio(way[1])}:
        all_seen = faster
    found: dict[str, tuple[str, list[str]]] = {}
    for name, key, what, more, less in SAID:
        for (of, label, figure), seen in all_seen.items():
            if (of, figure) == (name, key):
                found.setdefault(label, (seen["than"], []))[1].append(f"{what} {told(seen, more, less)}")
    return found


def told(seen: dict[str, Any], more: str, less: str) -> str:
    """ "90 to 120 times faster"."""
    low, high = seen["low"], seen["high"]
    if less and high < 1:
        return f"{between(1 / high, 1 / low)} times {less}"
    if less and low < 1:
        return f"{ratio(1 / low, False)} times {less} to {ratio(high, False)} times {more}"
    return f"{between(low, high)} times {more}"


def warnings(report: dict[str, Any]) -> list[str]:
    """Whatever makes this run's figures those of the moment."""
    found, probes = [], report.get("probe", [])
    lost = {end: max((taken[end]["lost"] for taken in probes), default=0.0) for end in ("client", "server")}
    if any(share > LOST for share in lost.values()):
        longest = max(taken[end]["longest_us"] for taken in probes for end in lost)
        found.append(
            f"a process that only spins stood still for up to {percent(lost['client'])} of the time here and "
            f"{percent(lost['server'])} at the other end, {microseconds(longest)} at once: others use these "
            "processors. Waiting by spinning works while both ends run at once, so another load gives "
            "another result."
        )
    apart = [
        f"{name} of {label} ({between(min(seen['each']), max(seen['each']))} times {seen['than']})"
        for name, label, key, seen in _ratios(report)
        if not seen["agree"] and key not in COSTS
    ]
    if apart:
        rest = f", and {len(apart) - NAMED} more" if len(apart) > NAMED else ""
        found.append(f"rounds differ by more than {DISAGREE:g} times: {', '.join(apart[:NAMED])}{rest}.")
    return found
