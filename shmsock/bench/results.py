"""The results of several rounds, as one set of figures."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from shmsock.errors import region_error

__all__ = ["combine", "curve", "flat", "have_histograms", "need_histograms", "of_peers"]

PERCENTILES = (0, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99, 99.995, 99.999, 100)


def have_histograms() -> bool:
    return importlib.util.find_spec("hdrh") is not None


def need_histograms() -> None:
    if not have_histograms():
        raise region_error(
            2,
            "the suite keeps its figures in HDR histograms: pip install 'shmsock[bench]' (hdrhistogram)",
        )


def flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every figure under one name: those of the client's CPU are client_cpu and so on."""
    for key, value in found.items():
        if isinstance(value, dict) and key != "counters":
            yield from flat(value, f"{prefix}{key}_")
        elif isinstance(value, (int, float)):
            yield prefix + key, value


def combine(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the far end of the distribution, and the largest time, of all of them."""
    figures = [dict(flat(found)) for found in rounds]
    of_all: dict[str, Callable[[list[float]], float]] = {"count": sum, "max_us": max}
    found: dict[str, Any] = {
        key: of_all.get(key, statistics.median)([f[key] for f in figures if key in f]) for key in figures[0]
    }
    texts = [text for found in rounds if (text := found.get("hdr"))]
    if texts:
        histogram = merged(texts)
        found["p999_us"] = histogram.get_value_at_percentile(99.9) / 1000
        found["hdr"] = histogram.encode().decode()
    found["rounds"] = [{key: value for key, value in taken.items() if key != "hdr"} for taken in rounds]
    return found


def merged(texts: list[str]) -> Any:
    from hdrh.histogram import HdrHistogram

    histogram = HdrHistogram.decode(texts[0])
    for text in texts[1:]:
        histogram.decode_and_add(text)
    return histogram


def curve(text: str) -> tuple[list[float], list[float]]:
    """Read a histogram: percentiles, and the microseconds that so many took at most."""
    histogram = merged([text])
    return list(PERCENTILES), [histogram.get_value_at_percentile(p) / 1000 for p in PERCENTILES]


def of_peers(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine several clients at once: how evenly one server serves them."""
    rates = [client["per_s"] for client in found]
    mean = statistics.mean(rates)
    worst = max(found, key=lambda client: client["p50_us"])
    return {
        **{key: worst[key] for key in ("p50_us", "p99_us", "p999_us")},
        "max_us": max(client["max_us"] for client in found),
        "count": sum(client["count"] for client in found),
        "per_s": sum(rates),
        "slowest_s": min(rates),
        "slowest_of_mean": min(rates) / mean,
    }
