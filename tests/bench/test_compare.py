"""Ratios round by round, how sure they are, and the verdict, from made-up figures."""

from __future__ import annotations

import io
from itertools import product
from statistics import median
from typing import Any

import pytest
from rich.console import Console

from shmsock.bench.compare import beside, spread
from shmsock.bench.measures import MEASURES, costing, with_cost
from shmsock.bench.pairs import OURS, TCP, Variant
from shmsock.bench.verdict import say_verdict

TWO = [Variant("asyncio", "uvloop"), Variant("shmsock", "uvloop")]


def taken(*rounds: tuple[float, float], name: str = "echo", key: str = "p50_us") -> dict[str, Any]:
    """A report of one measure: TCP's figure and ours, round by round."""
    each = zip((TCP, OURS), zip(*rounds, strict=True), strict=True)
    results: dict[str, Any] = {
        label: {"rounds": [{key: value} for value in values]} for label, values in each
    }
    beside(with_cost(MEASURES[name]), TWO, results)
    kept = {"title": MEASURES[name].title, "where": "here", "results": results}
    return {"rounds": len(rounds), "measures": {name: kept}}


def verdict(report: dict[str, Any]) -> str:
    out = io.StringIO()
    say_verdict(Console(width=1000, file=out), report)
    return out.getvalue()


def lost(client: float, server: float) -> dict[str, Any]:
    ends = {"client": client, "server": server}
    return {end: {"lost": share, "longest_us": share * 100} for end, share in ends.items()}


def test_a_range_is_as_sure_as_it_says() -> None:
    """The median of what is drawn from lies in it that often: here of all ways to draw from two halves."""
    for count in (1, 2, 5, 6, 9):
        found = spread(range(count))
        inside = 0
        for above in product((False, True), repeat=count):
            seen = spread([1.0 + n / 100 if up else -1.0 - n / 100 for n, up in enumerate(above)])
            inside += seen["low"] < 0 < seen["high"]
        assert inside / 2**count == pytest.approx(found["sure"])
    assert spread(range(5))["sure"] == pytest.approx(0.9375)
    assert (spread(range(6))["low"], spread(range(6))["high"]) == (0, 5)
    assert (spread(range(9))["low"], spread(range(9))["high"]) == (1, 7)  # the outermost are not needed


def test_ratios_are_of_rounds() -> None:
    """Not of medians: what slows a round down slows down both."""
    report = taken((10, 1), (100, 5), (40, 1))
    seen = report["measures"]["echo"]["results"][OURS]["beside"]["p50_us"]
    assert (seen["than"], seen["each"]) == (TCP, [10, 20, 40])
    assert (seen["ratio"], seen["low"], seen["high"]) == (median([10, 20, 40]), 10, 40)
    assert "beside" not in report["measures"]["echo"]["results"][TCP]
    rates = taken((100, 300), name="bulk", key="mb_s")
    assert rates["measures"]["bulk"]["results"][OURS]["beside"]["mb_s"]["ratio"] == 3
    cost = taken((2, 3), name="think-1ms", key="cpu_us")
    assert cost["measures"]["think-1ms"]["results"][OURS]["beside"]["cpu_us"]["ratio"] == 1.5


def test_nothing_is_no_ratio() -> None:
    report = taken((0.0, 1.0), name="think-1ms", key="cpu_us")
    assert report["measures"]["think-1ms"]["results"][OURS]["beside"] == {}


def test_what_it_costs() -> None:
    assert costing({"cpu": 150.0, "mb_s": 500.0, "per_s": 9.0})["cpu_s_gb"] == pytest.approx(3)
    assert costing({"cpu": 200.0, "per_s": 1e5})["cpu_us"] == pytest.approx(20)
    paused = costing({"cpu": 10.0, "per_s": 1e4, "thought_us": 900.0})  # 100 us after 900 each time
    assert paused["cpu_us"] == pytest.approx(100)
    assert costing({"host_cpu": 50.0, "per_s": 1e6})["host_us"] == pytest.approx(0.5)
    assert costing({"cpu": 1.0, "connections": 10}) == {"cpu": 1.0, "connections": 10}


def test_a_verdict_of_rounds_that_agree() -> None:
    report = taken((90, 1), (100, 1), (120, 1))
    report["measures"] |= taken((2, 4), (2, 3), (2, 4), name="think-1ms", key="cpu_us")["measures"]
    report["probe"] = [lost(1, 4), lost(0, 0)]
    said = verdict(report)
    text = "64 B echo 90 to 120 times faster, an echo each ms takes 1.5 to 2 times the CPU time"
    assert report["verdict"] == [{"who": OURS, "than": TCP, "text": text}]
    assert f"{OURS} beside {TCP}: {text}." in said
    assert "the ratios of 3 rounds; with 75 % the median is in them" in said
    assert report["warnings"] == []
    assert "Not sure" not in said


@pytest.mark.parametrize(
    ("rounds", "text"),
    [
        (((1, 2), (1, 4)), "2 to 4 times slower"),
        (((1, 2), (4, 2)), "2 times slower to 2 times faster"),
        (((2, 2), (2, 2)), "1 times faster"),
    ],
)
def test_what_is_not_faster(rounds: Any, text: str) -> None:
    report = taken(*rounds)
    verdict(report)
    assert report["verdict"][0]["text"] == f"64 B echo {text}"


def test_rounds_that_disagree_are_said() -> None:
    report = taken((2.2, 1), (679, 1))
    assert "Not sure: rounds differ by more than 2 times: echo of shmsock, uvloop (2.2 to 679" in verdict(
        report
    )
    (warning,) = report["warnings"]
    assert TCP in warning
    for name in ("bulk", "connect", "many", "drain", "think-1ms"):
        report["measures"] |= taken((1, 3), (9, 3), name=name, key=MEASURES[name].columns[0].key)["measures"]
    verdict(report)
    (warning,) = report["warnings"]
    assert "drain" not in warning
    assert warning.endswith(", and 2 more.")  # a list of all would bury what is above


def test_processors_that_others_use_are_said() -> None:
    report = taken((90, 1), (91, 1))
    report["probe"] = [lost(1, 1), lost(2, 30)]
    said = verdict(report)
    assert "stood still for up to 2.00 % of the time here and 30 % at the other end, 3.0 ms at once" in said


def test_one_round_says_nothing_of_others() -> None:
    assert "Of one round: how much rounds differ is not known" in verdict(taken((90, 1)))
