"""`shmsock bench --sporadic` and `--idle`: that they measure what they say. Not how much."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shmsock.tools import bench_sporadic
from shmsock.tools.bench import Variant, measure, note_load, private_region, variants
from shmsock.tools.bench_handlers import LEAST, used
from shmsock.tools.bench_sporadic import IDLE, SPORADIC, duration, percent
from shmsock.tools.child import cpus
from tests.test_cli import good, usage

OURS = "shmsock, uvloop"
CPUS = len(os.sched_getaffinity(0))


def taken(variant: Variant, *more: object) -> dict[str, Any]:
    server, client, _ = cpus()
    with private_region("bench") as region:
        found = measure(variant, region, 0.05, server, client, *more)
    assert (found.pop("shmsock_modules") == 0) == variant.is_tcp
    return found


def check_sides(found: dict[str, Any], variant: Variant) -> None:
    for side in ("client", "server"):
        assert 0 <= found[side]["system"] <= found[side]["cpu"] <= 100 * CPUS + 10  # a tick at either end
        assert found[side]["sleeps_s"] >= 0
        assert variant.is_tcp == (not found[side]["counters"])


@pytest.mark.parametrize("variant", SPORADIC.variants(), ids=lambda variant: variant.label)
def test_sporadic(variant: Variant) -> None:
    """Every echo is counted, and comes after the pause that was asked for, also where loops cannot sleep so
    shortly."""
    found = taken(variant, "--measure", "sporadic", "--think", "0,100,3000")
    assert set(found) == {"sporadic"}
    assert list(found["sporadic"]) == ["0", "100", "3000"]
    for think, r in found["sporadic"].items():
        assert r["count"] >= LEAST
        assert r["thought_us"] >= int(think)
        assert 0 < r["p50_us"] <= r["p99_us"]
        check_sides(r, variant)
        if not variant.is_tcp:
            assert r["client"]["counters"]["bytes_out"] == 64 * r["count"]


@pytest.mark.parametrize("variant", SPORADIC.variants(), ids=lambda variant: variant.label)
def test_idle(variant: Variant) -> None:
    found = taken(variant, "--measure", "idle", "--connections", 3)
    assert set(found) == {"idle"}
    assert found["idle"]["connections"] == 3
    check_sides(found["idle"], variant)
    assert "bytes_out" not in found["idle"]["client"]["counters"]


def test_used() -> None:
    before = {"at": 1.0, "user": 1.0, "system": 2.0, "sleeps": 10, "counters": {"pumps": 3, "reads": 4}}
    after = {"at": 3.0, "user": 1.5, "system": 2.25, "sleeps": 30, "counters": {"pumps": 8, "reads": 4}}
    assert used(before, after) == {"cpu": 37.5, "system": 12.5, "sleeps_s": 10, "counters": {"pumps": 5}}


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    said = good("bench", "--idle", "--one-core", "--seconds", "0.05", "--json", file)
    assert "Ten idle connections, both on CPU" in said
    assert "one round of 0.05 s" in said
    assert f"mark: each process of {OURS} under 0.5 %" in said
    report = json.loads(file.read_text())
    labels = {variant.label for variant in variants() if not variant.stock}
    assert set(report["results"]["one"]) == labels
    assert report["machine"]["kernel"] == os.uname().release
    assert [mark["who"] for mark in report["marks"]] == [v for v in report["results"]["one"] if "shm" in v]

    short = ("--measure", "sporadic", "--think", "0,1000")
    monkeypatch.setattr(bench_sporadic, "SPORADIC", replace(SPORADIC, arguments=short, placements=("free",)))
    said = good("bench", "--sporadic", "--rounds", "2", "--seconds", "0.05", "--json", file)
    assert "wherever the kernel put them; medians of 2 rounds" in said
    assert "p50 beside uvloop TCP" in said
    assert f"mark: p50 of {OURS} at most that of uvloop TCP: none " in said
    report = json.loads(file.read_text())
    for label in labels:
        result = report["results"]["free"][label]
        assert list(result["think_us"]) == ["0", "1000"]
        assert len(result["rounds"]) == 2
    assert [mark["think_us"] for mark in report["marks"]] == [0, 1000]


def test_bad_usage() -> None:
    assert "one at a time" in usage("bench", "--sporadic", "--idle")
    assert "only with --vm" in usage("bench", "--idle", "--doorbells")


def side(cpu: float) -> dict[str, float]:
    return {"cpu": cpu, "system": cpu / 2, "sleeps_s": 7.0}


def test_sporadic_medians_and_marks() -> None:
    def result(*p50s: float) -> dict[str, Any]:
        shown = {"p99_us": 900.0, "client": side(3), "server": side(40)}
        return SPORADIC.medians([{"sporadic": {"100": {"p50_us": p50, **shown}}} for p50 in p50s])

    tcp, fast, slow = result(60), result(10, 20, 1000), result(61)
    assert fast["think_us"]["100"]["p50_us"] == 20
    assert fast["think_us"]["100"]["server_cpu"] == 40
    for place in ("two", "one", "free"):
        (mark,) = SPORADIC.marks_of({"uvloop TCP": tcp, OURS: fast}, place)
        assert (mark["met"], mark["seen"], mark["think_us"]) == (True, 3, 100)
        (mark,) = SPORADIC.marks_of({"uvloop TCP": tcp, OURS: slow}, place)
        assert not mark["met"]
    plain = {"uvloop TCP": tcp, OURS: fast}
    assert SPORADIC.marks_of(plain, "vm") == []  # plain guests are held to nothing
    (mark,) = SPORADIC.marks_of({**plain, f"{OURS}, doorbells": slow}, "vm")
    assert not mark["met"]
    assert SPORADIC.marks_of({"asyncio TCP": tcp, "shmsock, asyncio": fast}, "two") == []
    said = told(SPORADIC, plain, "two")
    assert "100 us 3x faster met" in said
    assert "3.00 %" in said
    assert "40 %" in said


def test_idle_medians_and_marks() -> None:
    def result(client: float, server: float) -> dict[str, Any]:
        return IDLE.medians([{"idle": {"connections": 10, "client": side(client), "server": side(server)}}])

    found = {"uvloop TCP": result(0, 0), OURS: result(0.49, 1.5), f"{OURS}, doorbells": result(0.4, 0.1)}
    assert found[OURS]["server_sleeps_s"] == 7
    assert [mark["met"] for mark in IDLE.marks_of(found, "vm")] == [True, True]
    assert [mark["met"] for mark in IDLE.marks_of(found, "two")] == [False, True]
    found = {OURS: result(2, 0), f"{OURS}, doorbells": result(0, 0.5)}
    assert [mark["met"] for mark in IDLE.marks_of(found, "vm")] == [False, False]
    assert "0.50 %, missed" in told(IDLE, found, "vm")


def told(kind: Any, results: dict[str, Any], place: str) -> str:
    out = io.StringIO()
    console = Console(width=160, file=out)
    console.print(kind.table("title", results))
    kind.judge(console, results, place)
    return out.getvalue()


def test_words() -> None:
    assert [duration(us) for us in (0, 100, 1000, 100_000)] == ["none", "100 us", "1 ms", "100 ms"]
    assert [percent(value) for value in (0, 0.456, 9.99, 14.4)] == ["0.00 %", "0.46 %", "9.99 %", "14 %"]


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known, out = {"cpus": 2}, io.StringIO()
    for load in (4.0, 4.1):
        assert out.getvalue() == ""
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        note_load(Console(width=300, file=out), known)
    assert "load 4.1 on 2 CPUs" in out.getvalue()
    assert known == {"cpus": 2, "load_after": 4.1}


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to make a bridge")
def test_bench_vm_with_doorbells(tmp_path: Path) -> None:
    """TCP, ivshmem-plain and ivshmem-doorbell in the same two guests."""
    file = tmp_path / "figures.json"
    said = good("bench", "--vm", "--doorbells", "--idle", "--seconds", "0.5", "--json", file)
    assert f"mark: each process of {OURS} under 2 %" in said
    assert f"mark: each process of {OURS}, doorbells under 0.5 %" in said
    report = json.loads(file.read_text())
    assert list(report["results"]["vm"]) == ["uvloop TCP", OURS, f"{OURS}, doorbells"]
