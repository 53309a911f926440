"""Round trips and how long they took; one-way writes until the time is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

__all__ = ["HIGHEST_NS", "LEAST", "WARM_UP", "batches", "encoded", "percentiles", "same", "shared", "trips"]

WARM_UP = 0.2  # of the seconds of a measure
LEAST = 30  # echoes for a median, however long the pauses between them
HIGHEST_NS = 60 * 10**9
DIGITS = 3
BATCH = 8


def trips(times: list[int], seconds: float, begin: int = 0) -> Iterator[bool]:
    """Steps once per round trip, which is what happens between two steps; at least one is counted, however
    busy the machine is. The first ones are for the caches, and for windows that adapt. `begin`: of the
    clock, where several begin at once."""
    clock = time.perf_counter_ns
    warm = (begin or clock()) + int(seconds * WARM_UP * 1e9)
    end = warm + int(seconds * 1e9)
    now = clock()
    while now < end or not times:
        start = now
        yield True
        now = clock()
        if start >= warm:
            times.append(now - start)


def shared(each: list[list[int]], times: list[int], seconds: float, begin: int) -> dict[str, Any]:
    """Sum up what `each` of several took who began at once: how many trips in all, and how many the slowest
    of them made. One clock for all: rates of each, added up, would count who came late as if it were served
    all the time."""
    took = (time.perf_counter_ns() - begin) / 1e9 - seconds * WARM_UP
    counts = [len(taken) for taken in each]
    for taken in each:
        times += taken
    total = sum(counts)
    return {
        **percentiles(times),
        "per_s": total / took,
        "slowest_of_mean": min(counts) * len(counts) / total,
        "connections": len(each),
    }


def batches(seconds: float) -> Iterator[int]:
    """Count the messages up to and with this one, until the time is over; one clock call for
    eight."""
    clock = time.perf_counter
    end, count = clock() + seconds, 0
    while clock() < end:
        for _ in range(BATCH):
            count += 1
            yield count


def percentiles(times: list[int]) -> dict[str, Any]:
    """Sum up nanoseconds, in microseconds; and how many fit in a second, one after another."""
    times.sort()
    count = len(times)
    found: dict[str, Any] = {"count": count, "per_s": count / (sum(times) / 1e9)}
    for name, of_1000 in (("p50_us", 500), ("p99_us", 990), ("p999_us", 999)):
        found[name] = times[min(count * of_1000 // 1000, count - 1)] / 1000
    return {**found, "max_us": times[-1] / 1000}


def encoded(times: list[int]) -> str:
    """An HDR histogram of nanoseconds, as its library writes it: base64 of a compressed one."""
    from hdrh.histogram import HdrHistogram

    histogram = HdrHistogram(1, HIGHEST_NS, DIGITS)
    for value, count in Counter(times).items():
        histogram.record_value(min(max(value, 1), HIGHEST_NS), count)
    text: bytes = histogram.encode()
    return text.decode()


def same(sent: bytes, back: bytes) -> None:
    if sent != back:
        raise ValueError("the echo differs from what was sent")
