"""Marks, tables, histograms and the picture, from made-up figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from shmsock.bench import plot, results
from shmsock.bench.compare import beside
from shmsock.bench.ends.timing import encoded
from shmsock.bench.marks import MARKS
from shmsock.bench.marks import judged as judge
from shmsock.bench.measures import IDLE, MEASURES, SPORADIC, SUITE, SWEEPS, chosen
from shmsock.bench.pairs import FLOOR, OURS, STOCK, TCP, UNIX, Variant
from shmsock.bench.results import combine, curve, of_peers
from shmsock.bench.tables import mark_table, measure_table, sweep_table
from shmsock.bench.words import (
    amount,
    count,
    duration,
    microseconds,
    nanoseconds,
    percent,
    ratio,
    speed,
    times,
)
from shmsock.errors import RegionError


def figures(**results: dict[str, float]) -> dict[str, Any]:
    return {"results": results}


def judged(measure: str, results: dict[str, Any], place: str = "host") -> list[tuple[str, bool]]:
    return [(mark["who"], mark["met"]) for mark in judge({measure: {"results": results}}, place)]


def told(table: Any, width: int = 300) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(table)
    return out.getvalue()


def test_marks_of_the_echo() -> None:
    """Each of them can be met, and be missed."""
    tcp = {"p50_us": 60.0, "p99_us": 90.0}
    good = {"p50_us": 1.0, "p99_us": 4.0}
    assert judged("echo", {TCP: tcp, OURS: good}) == [(OURS, True), (OURS, True)]
    assert judged("echo", {TCP: tcp, OURS: {"p50_us": 1.01, "p99_us": 4.1}}) == [(OURS, False), (OURS, False)]
    assert judged("echo", {TCP: tcp, STOCK: {"p50_us": 1.2}, OURS: good})[2:] == [(STOCK, True)]
    assert judged("echo", {TCP: tcp, STOCK: {"p50_us": 1.3}, OURS: good})[2:] == [(STOCK, False)]
    assert judged("echo", {"asyncio TCP": tcp, "shmsock, asyncio": good}) == []


def test_marks_of_bulk_take_the_best_of_the_others() -> None:
    def seen(ours: float) -> list[bool]:
        others = {TCP: 100.0, UNIX: 200.0, "asyncio UNIX": 400.0, FLOOR: 2000.0, OURS: ours}
        return [met for _, met in judged("bulk", {label: {"mb_s": rate} for label, rate in others.items()})]

    assert seen(1600) == [True, True, True]
    assert seen(1590) == [True, False, True]
    assert seen(1499) == [False, False, False]


def test_marks_without_others() -> None:
    assert judged("memory", {OURS: {"arena_bytes": 512, "beyond_bytes": 2501}}) == [
        (OURS, True),
        (OURS, False),
    ]
    assert judged("peers", {OURS: {"slowest_of_mean": 0.34}}) == [(OURS, True)]
    assert judged("peers", {OURS: {"slowest_of_mean": 0.33}}) == [(OURS, False)]
    assert judged("beside", {OURS: {"p50_us": 1.11, "alone_p50_us": 1.0}}) == [(OURS, False)]


def test_marks_between_guests() -> None:
    bells = f"{OURS}, doorbells"
    assert judged("echo", {TCP: {"p50_us": 20}, OURS: {"p50_us": 1}}, "vm") == [(OURS, True)]
    plain = {TCP: {"p50_us": 20}, OURS: {"p50_us": 10}}
    assert judged("think-1ms", plain, "vm") == []  # plain guests are held to nothing
    assert judged("think-1ms", {**plain, bells: {"p50_us": 21}}, "vm") == [(bells, False)]
    idle = {OURS: {"client_cpu": 1.9, "server_cpu": 2.1}, bells: {"client_cpu": 0.4, "server_cpu": 0.6}}
    assert [met for _, met in judged("idle", idle, "vm")] == [True, False, True, False]
    assert [met for _, met in judged("idle", idle)] == [False, False]


def test_every_mark_is_about_a_measure() -> None:
    """And every measure of the suite has one, but what is only shown."""
    assert {mark.measure for mark in MARKS} <= set(MEASURES)
    assert {m.name for m in SUITE} - {mark.measure for mark in MARKS} == {"one-core-bulk", "connect-protocol"}
    for mark in MARKS:
        assert (mark.most is None) != (mark.least is None)


def test_mark_table() -> None:
    results = {TCP: {"p50_us": 60.0, "p99_us": 90.0}, OURS: {"p50_us": 2.0, "p99_us": 4.0}}
    said = told(mark_table(judge({"echo": {"results": results}})))
    assert "at most 1/60" in said
    assert "1/30" in said
    assert "missed" in said
    assert "its p50_us" in said
    assert "at most 2,500" in told(mark_table(judge({"memory": figures(**{OURS: {"beyond_bytes": 1.0}})})))


TWO = [Variant("asyncio", "uvloop"), Variant("shmsock", "uvloop")]


def compared(name: str, variants: list[Variant], results: dict[str, Any], room: int = 300) -> Any:
    """The table of results that are those of one round."""
    found = {label: {**r, "rounds": [r]} for label, r in results.items()}
    beside(MEASURES[name], variants, found)
    return measure_table(MEASURES[name], variants, "title", found, room)


def test_measure_table() -> None:
    tcp = {"p50_us": 60.0, "p99_us": 1500.0, "p999_us": 2000.0, "max_us": 9000.0, "cache_line_ns": 104.4}
    results = {TCP: tcp, OURS: {**tcp, "p50_us": 2.0, "cache_line_ns": None}}
    said = told(compared("echo", TWO, results))
    for text in (
        "60.0 us",
        "1.5 ms",
        "2.00 us",
        "30x faster",
        "uvloop TCP",
        "title",
        "line took 104 ns there",
    ):
        assert text in said
    rates = {TCP: {"mb_s": 500.0, "per_s": 8000.0}, OURS: {"mb_s": 12500.0, "per_s": 2e5}}
    said = told(compared("bulk", TWO, rates))
    for text in ("500 MB/s", "12.50 GB/s", "200,000", "25x as much"):
        assert text in said
    assert "cache line" not in said  # none is known


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit(width: int) -> None:
    """No figure is folded or cut, and no name within a word."""
    names = (STOCK, "multiprocessing.Pipe", "shmsock, asyncio", TCP)
    slow = {"p50_us": 123.4, "p99_us": 123456.0, "p999_us": 123456.0, "max_us": 123456.0, "cpu_us": 999.9}
    results = {name: {**slow, "mb_s": 12345.6, "per_s": 1234567.0, "cache_line_ns": 104.0} for name in names}
    own = Variant("shmsock", "asyncio")
    variants = [Variant("asyncio", "uvloop", stock=True), Variant("pipe"), own, TWO[0]]
    for name in ("echo", "bulk", "connect"):
        said = told(compared(name, variants, results, width), width=width)
        assert max(len(line.rstrip()) for line in said.splitlines()) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in said
        cells = ("123.4 us", "the same") if name == "echo" else ("1,234,567/s", "the same")
        for word in (*cells, "beside", "multiprocessing.Pipe", "shmsock, asyncio", "stock asyncio on"):
            assert word in said
        assert "rounds" not in said  # of one there is no range
        assert ("Not shown, for the width: " in said) == (
            name == "connect" or (name == "echo" and width == 60)
        )
    row = {str(value): {"mb_s": 0.1234, "cache_line_ns": 90.0} for value in SWEEPS[0].values}
    said = told(sweep_table(SWEEPS[0], "title", dict.fromkeys("abcdefg", row), width), width=width)
    assert said.count("0.123 MB/s") == 7 * len(row)
    assert {*"abcdefg"} <= {*said.split()}


def test_rounds_that_disagree_are_explained_below() -> None:
    each = {TCP: (60.0, 60.0), OURS: (1.0, 30.0)}
    found = {label: {"p50_us": p[0], "rounds": [{"p50_us": v} for v in p]} for label, p in each.items()}
    beside(MEASURES["echo"], TWO, found)
    said = told(measure_table(MEASURES["echo"], TWO, "title", found))
    assert "2 to 60 !" in said
    assert "!: its rounds differ by more than 2 times." in said


def test_a_ratio_is_to_the_network_of_the_same_loop() -> None:
    loops = ("uvloop", "asyncio")
    what = [Variant(module, loop) for loop in loops for module in ("asyncio", "shmsock")]
    results = {v.label: {"p50_us": p50} for v, p50 in zip(what, (50.0, 5.0, 90.0, 6.0), strict=True)}
    said = told(compared("protocol", what, results))
    assert "10x faster" in said
    assert "15x faster" in said


def test_sweep_table() -> None:
    sizes = SWEEPS[0]
    row = {str(value): {"mb_s": 2000.0, "cache_line_ns": 90.0} for value in sizes.values}
    said = told(sweep_table(sizes, "title", {TCP: row}))
    for text in ("1 B", "4 KiB", "1 MiB", "2.00 GB/s", "90 ns"):
        assert text in said


def test_combine() -> None:
    def taken(p50: float, worst: float, text: str) -> dict[str, Any]:
        sides = {"client": {"cpu": p50, "counters": {"pumps": 1}}}
        return {"count": 2, "p50_us": p50, "p999_us": worst, "max_us": worst, "hdr": text, **sides}

    one, two = encoded([1000] * 1998), encoded([5_000_000] * 2)
    found = combine([taken(1, 8, one), taken(100, 9, two), taken(2, 7, one)])
    assert (found["count"], found["p50_us"], found["max_us"], found["client_cpu"]) == (6, 2, 9, 2)
    assert "client_counters_pumps" not in found
    assert found["p999_us"] == pytest.approx(1, rel=1e-3)  # of all rounds together, not 8
    assert "hdr" not in found["rounds"][0]
    percentiles, at_most = curve(found["hdr"])
    assert percentiles[-1] == 100
    assert at_most[-1] == pytest.approx(5000, rel=1e-3)
    assert combine([{"per_s": 3.0}, {"per_s": 5.0}])["per_s"] == 4


def test_of_peers() -> None:
    latency = {"p50_us": 1.0, "p99_us": 2.0, "p999_us": 3.0}
    found = of_peers([{"count": n, "per_s": n, "max_us": float(n), **latency} for n in (10, 20, 30)])
    assert (found["per_s"], found["slowest_s"], found["slowest_of_mean"]) == (60, 10, 0.5)
    assert (found["count"], found["max_us"]) == (60, 30)


def test_chosen() -> None:
    measures, sweeps = chosen("bulk, echo,sizes")
    assert [m.name for m in measures] == ["echo", "bulk"]
    assert [s.name for s in sweeps] == ["sizes"]
    for bad in ("echo,nothing", " "):
        with pytest.raises(ValueError, match="there are echo, readline"):
            chosen(bad)
    assert len({m.name for m in (*SUITE, *SPORADIC, *IDLE)}) == len(MEASURES)


MACHINE = {"shmsock": "1", "python": "CPython", "cpu": "some", "commit": "abc"}


def test_plot(tmp_path: Path) -> None:
    results = {TCP: {"hdr": encoded([50_000] * 9 + [900_000])}, OURS: {"hdr": encoded([1000] * 10)}}
    sizes = {TCP: {"1": {"mb_s": 0.2}, "1048576": {"mb_s": 900.0}}}
    report = {
        "machine": MACHINE,
        "measures": {
            "echo": {"title": "Round trips", "where": "here", "results": results},
            "bulk": {
                "title": "One way",
                "where": "here",
                "results": {TCP: {"mb_s": 1.0}, OURS: {"mb_s": 12.5}},
            },
        },
        "sweeps": {"sizes": {"title": "By size", "figure": "mb_s", "results": sizes}},
    }
    file = tmp_path / "out.svg"
    plot.plot(report, str(file))
    root = ElementTree.parse(file).getroot()
    assert root.tag.endswith("svg")
    said = file.read_text()
    for text in ("Round trips", "One way", "12.5 MB/s", "By size", OURS, "99.99 %", "1 MiB", "at abc"):
        assert text in said
    with pytest.raises(RegionError, match="nothing to plot"):
        plot.plot({"machine": MACHINE, "measures": {}}, str(file))


def test_where_libraries_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not results.have_histograms()
    for need in (results.need_histograms, plot.need_matplotlib):
        with pytest.raises(RegionError, match=r"pip install 'shmsock\[bench\]'"):
            need()


def test_words() -> None:
    assert [duration(us) for us in (0, 100, 1000, 100_000)] == ["none", "100 us", "1 ms", "100 ms"]
    assert [percent(value) for value in (0, 0.456, 9.99, 14.4)] == ["0.00 %", "0.46 %", "9.99 %", "14 %"]
    assert [microseconds(value) for value in (0.612, 61.2, 1234)] == ["0.61 us", "61.2 us", "1.2 ms"]
    assert [nanoseconds(value) for value in (None, 104.4, 819085)] == ["-", "104 ns", "819.1 us"]
    assert [speed(value) for value in (0.14, 500, 12500)] == ["0.14 MB/s", "500 MB/s", "12.50 GB/s"]
    assert [count(value) for value in (0, 4, 3.25, 1234567.8)] == ["0", "4", "3.2", "1,234,568"]
    assert [amount(value) for value in (1, 512, 4096, 1 << 20)] == ["1 B", "512 B", "4 KiB", "1 MiB"]
    assert [ratio(value) for value in (1 / 60, 0.75, 15, 8192)] == ["1/60", "0.75", "15", "8,192"]
    assert (times(25, "faster", "slower"), times(0.5, "faster", "slower")) == ("25x faster", "2x slower")
