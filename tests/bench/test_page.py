"""The page of `shmsock bench --html`, of a run in which nothing is measured."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shmsock.bench.ends import probe
from shmsock.bench.measures import IDLE, MEASURES, SPORADIC, SWEEPS, Measure, with_cost
from shmsock.bench.page import page
from shmsock.bench.pairs import OURS, TCP, Variant
from shmsock.bench.runner import Take, bench
from tests.commands.test_cli import good, usage

BELLS = f"{OURS}, doorbells"


class Made:
    """Each round takes a little longer than the one before; doorbells have rounds that do not agree."""

    name = "vm"

    def __init__(self) -> None:
        self.taken: Counter[tuple[str, str]] = Counter()

    def variants(self, measure: Measure) -> list[Variant]:
        ours = [Variant("shmsock", "uvloop"), Variant("shmsock", "uvloop", note="doorbells")]
        return [Variant("asyncio", "uvloop"), *ours]

    def where(self, measure: Measure) -> str:
        return "<nowhere> & never"

    def cache_line_ns(self) -> None:
        """Nothing."""

    @contextmanager
    def open(self, measure: Measure) -> Iterator[Take]:
        def take(variant: Variant, seconds: float) -> dict[str, Any]:
            self.taken[measure.name, variant.label] += 1
            number = self.taken[measure.name, variant.label]
            p50 = (40.0 if variant.is_tcp else number**3 if variant.note else 2.0) * (1 + number / 10)
            found = {"count": 9, "p50_us": p50, "p99_us": 2 * p50, "p999_us": 3 * p50, "max_us": 4 * p50}
            sides = {"client": {"cpu": 1.5}, "server": {"cpu": 2.5}, "cpu": 4.0}
            rate = {"mb_s": 1e4 / p50} if measure.kind == "write" else {}
            per_s = {} if measure.kind == "idle" else {"per_s": 1e6 / p50}
            return measure.figures({measure.kind: {**found, **sides, **rate, **per_s}})

        yield take


@pytest.fixture(scope="module")
def report() -> Any:
    chosen = [*(MEASURES[name] for name in ("echo", "bulk", "connect", "memory")), *SPORADIC[:5], IDLE[0]]
    end = {**probe.spin(0.0), "lost": 12.0, "machine": probe.machine(), "region": "pci:0000:00:04.0"}
    measures = [with_cost(measure) for measure in chosen]
    sweeps = [replace(SWEEPS[0], values=(64, 4096))]
    out = Console(file=io.StringIO())
    more = {"qemu": "QEMU 7.2"}
    made: Any = bench(out, Made(), 3, 0.1, measures, sweeps, more, lambda: {"client": end, "server": end})
    return json.loads(json.dumps(made))


@pytest.fixture(scope="module")
def text(report: Any) -> str:
    return page(report)


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def found_at(report: Any, way: str) -> Any:
    for part in way.split("/")[1:]:
        report = report[part]
    return report


def test_its_figures_are_those_of_the_json(report: Any, text: str) -> None:
    ways = {}
    for tag, attributes in Seen(text).tags:
        if tag == "data":
            way, value = attributes["data-at"], attributes["value"]
            assert way is not None
            assert value is not None
            ways[way] = float(value)
    assert ways == {way: found_at(report, way) for way in ways}
    for name, kept in report["measures"].items():
        for label, r in kept["results"].items():
            figure = (
                next(key for key in ("cpu", "mb_s", "p50_us") if key in r) if name == "idle" else "p50_us"
            )
            if name == "bulk":
                figure = "mb_s"
            if name not in ("idle", "memory"):
                assert f"/measures/{name}/results/{label}/{figure}" in ways
            for key in r.get("beside", {}):
                for part in ("ratio", "low", "high"):
                    assert f"/measures/{name}/results/{label}/beside/{key}/{part}" in ways
    assert f"/sweeps/sizes/results/{BELLS}/4096/mb_s" in ways


def test_it_asks_nobody_for_anything(text: str) -> None:
    assert re.findall(r"url\((?!#)", text) == []
    for tag, attributes in Seen(text).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "image")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in text


def test_names_in_it_are_its_own(text: str) -> None:
    """Several SVGs in one page: a name that two have would draw one's parts in the other."""
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    names = [{*re.findall(r'\bid="([^"]+)"', figure)} for figure in figures]
    assert sum(map(len, names)) == len(set().union(*names)) > 20
    for figure, own in zip(figures, names, strict=True):
        assert {*re.findall(r'(?:href="#|url\(#)([^")]+)', figure)} <= own
    assert Seen(text).open == []


def test_it_says_what_is_faster_and_how_sure_that_is(text: str) -> None:
    words = re.sub(r"<[^>]*>", "", text)
    for line in (
        f"{OURS} beside {TCP}: 64 B echo 20 times faster",
        f"{BELLS} beside {TCP}: 64 B echo",
        "rounds disagree:",
        "12 %",
        "QEMU 7.2",
        "pci:0000:00:04.0",
        "probability of 75 %",
        "ten idle connections",
    ):
        assert line in words
    assert "<nowhere>" not in text


def test_a_system_keeps_its_colour(text: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    told = {re.sub(r"<[^>]*>", "", figure.partition("</figcaption>")[0]): figure for figure in figures}
    assert len(told) == len(figures) >= 7
    for title, figure in told.items():
        if "spinning" not in title:
            assert "#0072b2" in figure
            assert "#d55e00" in figure
            assert ("#5f6368" in figure) == ("Times" not in title)  # a ratio is beside it


def test_a_report_of_figures_that_were_kept(report: Any, tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    kept.write_text(json.dumps({**report, "measures": {"bulk": report["measures"]["bulk"]}, "sweeps": {}}))
    good("bench", "report", kept)
    assert "64 KiB writes" in (tmp_path / "figures.html").read_text()
    kept.write_text("[1]")
    assert "not what `shmsock bench --json` writes" in usage("bench", "report", kept)


def test_the_json_lies_beside_it(tmp_path: Path) -> None:
    good(
        "bench", "--only", "datagram", "--rounds", "1", "--seconds", "0.02", "--html", tmp_path / "page.html"
    )
    found = json.loads((tmp_path / "page.json").read_text())
    assert list(found["measures"]) == ["datagram"]
    assert "datagrams" in (tmp_path / "page.html").read_text()
