"""Figures in words."""

from __future__ import annotations

__all__ = [
    "amount",
    "between",
    "count",
    "duration",
    "microseconds",
    "nanoseconds",
    "nbytes",
    "percent",
    "rate",
    "ratio",
    "seconds",
    "share",
    "speed",
    "times",
    "verdict",
]


def microseconds(value: float) -> str:
    return (
        f"{value:.2f} us" if value < 10 else f"{value:.1f} us" if value < 1000 else f"{value / 1000:.1f} ms"
    )


def nanoseconds(value: float | None) -> str:
    """Tell the time of a cache line; "-": not known."""
    if value is None:
        return "-"
    return f"{value:.0f} ns" if value < 10_000 else microseconds(value / 1000)


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else microseconds(value * 1e6)


def speed(value: float) -> str:
    """Tell megabytes a second."""
    return f"{value / 1000:.2f} GB/s" if value >= 1000 else f"{value:.3g} MB/s"


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def rate(value: float) -> str:
    return f"{count(value)}/s"


def nbytes(value: float) -> str:
    return f"{value:,.0f} B"


def amount(value: float) -> str:
    """ "64 B", "4 KiB", "1 MiB"."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def duration(us: int) -> str:
    """ "none", "100 us", "10 ms"."""
    return "none" if not us else f"{us} us" if us < 1000 else f"{us / 1000:g} ms"


def percent(value: float) -> str:
    """Tell percents of one CPU: "0.25 %", "12 %"."""
    return f"{value:.2f} %" if value < 10 else f"{value:.0f} %"


def share(value: float) -> str:
    """ "97 %" of what is 1."""
    return f"{value * 100:.0f} %"


def between(low: float, high: float) -> str:
    """ "90 to 120", "1.9"."""
    words = [ratio(value, parts=False) for value in (low, high)]
    return words[0] if words[0] == words[1] else " to ".join(words)


def times(value: float, more: str, less: str) -> str:
    """ "12x faster", "1.3x slower", "the same"."""
    factor, word = (value, more) if value >= 1 else (1 / value, less)
    return "the same" if ratio(factor) == "1" else f"{ratio(factor)}x {word}"


def ratio(value: float, parts: bool = True) -> str:
    """ "1/60", "1.1", "15", "8,192"; what is small is told as a part."""
    if parts and 0 < value < 0.5:
        return f"1/{1 / value:.3g}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def verdict(met: bool) -> str:
    return "[green]met[/]" if met else "[red]missed[/]"
