"""Benchmarks: that they run, are fair, and say what they measured. Not how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shmsock.tools import bench, bench_handlers
from shmsock.tools.bench import marks_of, measure, medians, private_region, times, variants
from shmsock.tools.child import Child, ChildError, cpus, python
from tests.test_cli import SECONDS, bad, good, usage


def regions() -> set[str]:
    """Those of processes that are no more."""
    kinds = ("shmsock-bench-", "shmsock-demo-")
    found = {name for name in os.listdir("/dev/shm") if name.startswith(kinds)}
    return {name for name in found if not Path("/proc", name.split("-")[2]).exists()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shmsock", *arguments]


def test_tcp_imports_nothing_of_shmsock() -> None:
    with private_region("bench") as region:
        server, client, _ = cpus()
        for variant in variants():
            found = measure(variant, region, 0.05, server, client)
            assert (found["shmsock_modules"] == 0) == variant.is_tcp
            assert found["echo"]["count"] > 0
            assert 0 < found["echo"]["p50_us"] <= found["echo"]["p99_us"]
            assert found["write"]["bytes"] % bench_handlers.BLOCK == 0


def test_bench_command(tmp_path: Path) -> None:
    before = regions()
    file = tmp_path / "figures.json"
    said = good("bench", "--one-core", "--rounds", "1", "--seconds", "0.05", "--json", file)
    assert "both on CPU" in said
    assert "uvloop TCP" in said
    assert "mark: 64 B p50 at least 1x" in said
    report = json.loads(file.read_text())
    assert set(report["results"]) == {"one"}
    assert set(report["results"]["one"]) == {variant.label for variant in variants()}
    assert report["machine"]["kernel"] == os.uname().release
    assert {mark["what"] for mark in report["marks"]} == {"echo", "write"}
    assert regions() <= before


def test_marks() -> None:
    """They can be missed."""
    figures = {"echo_p50_us": 60.0, "write_mb_s": 500.0}
    fast = {"echo_p50_us": 2.0, "write_mb_s": 3000.0}
    results = {"uvloop TCP": figures, "shmsock, uvloop": fast, bench.STOCK: fast}
    assert [mark["met"] for mark in bench.marks_of(results, "two")] == [True] * 4
    results[bench.STOCK] = {"echo_p50_us": 2.6, "write_mb_s": 2300.0}
    assert [mark["met"] for mark in bench.marks_of(results, "two")] == [True, True, False, False]
    assert [mark["met"] for mark in bench.marks_of(results, "one")] == [True, True]
    results["shmsock, uvloop"] = figures
    assert [mark["met"] for mark in bench.marks_of(results, "two")][:2] == [False, False]


def test_bench_bad_usage() -> None:
    assert "not with --vm" in usage("bench", "--vm", "--one-core")
    assert "0 is not in the range" in usage("bench", "--rounds", "0")
    assert "directory" in usage("bench", "--json", "/")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_bench_vm_takes_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "as root" in bad("bench", "--vm")


def test_medians_and_marks() -> None:
    def result(p50: float, p99: float, rate: float) -> dict[str, dict[str, float]]:
        return {"echo": {"p50_us": p50, "p99_us": p99}, "write": {"mb_s": rate}}

    fast = medians([result(2, 9, 8000), result(3, 7, 9000), result(100, 8, 1)])
    assert fast == {"echo_p50_us": 3, "echo_p99_us": 8, "write_mb_s": 8000}
    slow = medians([result(74, 90, 1000)])
    echo, write = marks_of({"uvloop TCP": slow, "shmsock, uvloop": fast}, "two")
    assert (echo["met"], write["met"]) == (False, True)
    assert [mark["what"] for mark in marks_of({"uvloop TCP": slow, "shmsock, uvloop": fast}, "vm")] == [
        "echo"
    ]
    assert marks_of({"asyncio TCP": slow, "shmsock, asyncio": fast}, "two") == []
    assert (times(25, "faster", "slower"), times(0.5, "faster", "slower")) == ("25x faster", "2x slower")
    table = bench.bench_table("title", {"asyncio TCP": slow, "shmsock, asyncio": fast})
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    assert "24.7x faster" in console.export_text()
    console.file.close()


def test_a_child_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        Child(python("-c", "import sys; sys.exit('why')")) as child,
        pytest.raises(ChildError, match="status 1"),
    ):
        child.line()
    assert capfd.readouterr().err == "why\n"


def test_a_child_does_not_outlive_its_parents_patience() -> None:
    with pytest.raises(KeyboardInterrupt), Child(python("-c", "import time; time.sleep(1000)")) as child:
        raise KeyboardInterrupt
    assert child.process.returncode == -signal.SIGTERM


def test_where_uvloop_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "have_uvloop", lambda: False)
    assert {variant.loop for variant in variants()} == {"asyncio"}
    assert len(variants()) == 3
    assert "uvloop" not in bench.machine()
    assert "no uvloop" in bench.describe(bench.machine())


def test_demo() -> None:
    before = regions()
    done = subprocess.run(command("demo", "--scale", "0.05"), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1000 round trips of 64 B" in done.stdout
    assert "SHA-256 " in done.stdout
    for variant in variants():
        assert variant.label in done.stdout
    assert regions() <= before


def test_demo_and_ctrl_c() -> None:
    before = regions()
    with subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        while "listens on port" not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        run.send_signal(signal.SIGINT)
        said = run.stderr.read()
        assert run.wait(SECONDS) == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert regions() <= before
