"""`shmsock bench`: that it measures in turn, tells what it measured, and refuses what makes no sense."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shmsock.bench import floor, machine, measures, remote, runner, vm
from shmsock.bench.child import Child, ChildError, python
from shmsock.bench.ends.timing import encoded
from shmsock.bench.measures import ECHO, MEASURES, PLAIN, SWEEPS, Measure
from shmsock.bench.pairs import FLOOR, OURS, TCP, Variant, datagrams, variants
from shmsock.bench.runner import Bench, Host, Take
from shmsock.errors import RegionError
from tests.commands.test_cli import SECONDS, bad, good, usage


def regions() -> set[str]:
    """Those of processes that are no more."""
    kinds = ("shmsock-bench-", "shmsock-demo-")
    found = {name for name in os.listdir("/dev/shm") if name.startswith(kinds)}
    return {name for name in found if not Path("/proc", name.split("-")[2]).exists()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shmsock", *arguments]


class Made:
    """A place where nothing is measured: what takes the longest is known."""

    name = "host"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def variants(self, measure: Measure) -> list[Variant]:
        return [Variant("asyncio", "uvloop"), Variant("shmsock", "uvloop")]

    def where(self, measure: Measure) -> str | None:
        return None if measure.placement == "one" else "nowhere"

    def cache_line_ns(self) -> float | None:
        return 80.0 + len(self.asked)

    @contextmanager
    def open(self, measure: Measure) -> Iterator[Take]:
        def take(variant: Variant, seconds: float) -> dict[str, Any]:
            self.asked.append((measure.name, variant.label))
            p50 = 50.0 if variant.is_tcp else 1.0
            rates = {"mb_s": 1000 / p50, "per_s": 1e6 / p50, "hdr": encoded([int(p50 * 1000)])}
            return {"count": 1, "p50_us": p50, "p99_us": p50, "p999_us": p50, "max_us": p50, **rates}

        yield take


def test_a_run_takes_turns() -> None:
    place, out = Made(), io.StringIO()
    run = Bench(Console(width=200, file=out), place, 2, 0.1)
    sweep = replace(SWEEPS[0], values=(1, 64))
    one = replace(ECHO, name="one-core", placement="one")
    run.run([ECHO, one], [sweep])
    run.report["place"] = place.name
    turns = ("echo", TCP), ("echo", OURS)
    assert place.asked[:4] == [*turns, *turns]
    assert [name for name, _ in place.asked[4:]] == ["sizes-1"] * 4 + ["sizes-64"] * 4
    assert list(run.report["measures"]) == ["echo"]
    kept = run.report["measures"]["echo"]
    assert (kept["title"], kept["where"]) == (ECHO.title, "nowhere")
    assert kept["results"][TCP]["cache_line_ns"] == 81  # the median of 80 and 82
    assert len(kept["results"][OURS]["rounds"]) == 2
    assert run.report["sweeps"]["sizes"]["results"][OURS]["64"]["mb_s"] == 1000
    runner.judge(run.console, run.report)
    assert [mark["met"] for mark in run.report["marks"]] == [False, True]
    said = out.getvalue()
    assert "64 B round trip, nowhere; medians of 2 rounds of 0.1 s" in said
    assert "50x faster" in said
    assert "One way, by the size of a write" in said
    assert "Marks" in said
    json.dumps(run.report)


def test_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts, but as if measured elsewhere."""
    place = Made()
    monkeypatch.setattr(runner, "Host", lambda console: place)
    file, text, plot = tmp_path / "all.json", tmp_path / "all.txt", tmp_path / "all.svg"
    files = ("--json", file, "--text", text, "--plot", plot)
    said = good("bench", "--all", "--marks", "--rounds", "1", *files)
    report = json.loads(file.read_text())
    assert list(report["measures"]) == [m.name for m in measures.SUITE if m.placement != "one"]
    assert set(report["sweeps"]) == {"sizes", "connections"}
    assert list(report["sweeps"]["connections"]["results"][TCP]) == ["1", "4", "16", "64", "250", "1000"]
    assert {mark["measure"] for mark in report["marks"]} >= {"echo", "bulk", "connect", "many", "think-1ms"}
    assert report["machine"]["kernel"] == os.uname().release
    assert (report["rounds"], report["seconds"]) == (1, 0.5)
    assert text.read_text().splitlines()[-1] == said.splitlines()[-1]
    assert "<svg" in plot.read_text()


def test_bench_command(tmp_path: Path) -> None:
    before = regions()
    file = tmp_path / "figures.json"
    said = good("bench", "--only", "datagram", "--rounds", "1", "--seconds", "0.03", "--json", file)
    assert "one round of 0.03 s" in said
    report = json.loads(file.read_text())
    assert set(report["measures"]) == {"datagram"}
    results = report["measures"]["datagram"]["results"]
    assert list(results) == [variant.label for variant in datagrams()]
    assert all(r["cache_line_ns"] is None or r["cache_line_ns"] > 0 for r in results.values())
    assert "marks" not in report
    assert "Marks" not in said
    assert regions() <= before


def test_what_the_old_options_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []

    def taken(console: Console, place: Any, *what: Any) -> dict[str, Any]:
        chosen[:] = what
        return {}

    monkeypatch.setattr(runner, "bench", taken)

    def names(*options: str) -> tuple[int, float, list[str], set[str], list[str]]:
        good("bench", *options)
        rounds, seconds, measures, sweeps = chosen
        return (
            rounds,
            seconds,
            [m.name for m in measures],
            {m.placement for m in measures},
            [s.name for s in sweeps],
        )

    one = ["one-core", "one-core-bulk"]
    assert names() == (5, 1.0, ["echo", "bulk", *one], {"two", "one"}, [])
    assert names("--one-core", "--rounds", "2") == (2, 1.0, one, {"one"}, [])
    thinks = [f"think-{think}" for think in ("none", "100us", "1ms", "10ms", "100ms")]
    free = [f"{think}-free" for think in thinks]
    assert names("--sporadic") == (3, 0.5, [*thinks, *free], {"two", "free"}, [])
    assert names("--sporadic", "--one-core")[2:4] == (thinks, {"one"})
    assert names("--idle", "--seconds", "2") == (1, 2.0, ["idle"], {"two"}, [])
    assert names("--sizes") == (3, 0.5, [], set(), ["sizes"])
    assert names("--only", "echo,connections", "--sizes")[4] == ["sizes", "connections"]


def test_bench_bad_usage() -> None:
    assert "not with --vm" in usage("bench", "--vm", "--one-core")
    assert "0 is not in the range" in usage("bench", "--rounds", "0")
    assert "directory" in usage("bench", "--json", "/")
    assert "one at a time" in usage("bench", "--sporadic", "--idle")
    assert "one at a time" in usage("bench", "--all", "--only", "echo")
    assert "only with --vm" in usage("bench", "--idle", "--doorbells")
    assert "no measure 'fast'; there are echo" in usage("bench", "--only", "fast")
    assert "no sweeps but --sizes" in usage("bench", "--vm", "--connections")
    assert "between guests there are only echo" in usage("bench", "--vm", "--only", "anyio")
    assert "come after its name" in usage("bench", "--all", "serve")


def test_bench_list() -> None:
    said = good("bench", "--list")
    for name in (*MEASURES, *(sweep.name for sweep in SWEEPS)):
        assert f"{name} " in said


@pytest.mark.parametrize(
    ("package", "options"),
    [("hdrh", ("--only", "echo")), ("matplotlib", ("--plot", "x")), ("matplotlib", ("--html", "x"))],
)
def test_missing_packages_are_named(
    package: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    monkeypatch.setattr(runner, "bench", lambda *_: pytest.fail("it was measured"))
    assert "pip install 'shmsock[bench]'" in bad("bench", *options)


@pytest.mark.parametrize("way", [(), ("--vm",), ("connect", "nowhere")])
@pytest.mark.parametrize("option", ["--json", "--text", "--plot", "--html"])
def test_files_that_cannot_be_written(
    way: tuple[str, ...], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is said before anything is measured."""
    for module, name in ((runner, "bench"), (vm, "bench_guests"), (remote, "bench_remote")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it was measured"))
    there = tmp_path / "none" / "file"
    assert f"there is no directory {there.parent}" in bad("bench", *way, option, there)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"no permission to write to {tmp_path}" in bad("bench", *way, option, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--plot", "--html"])
def test_what_cannot_be_plotted_is_said_before(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "bench", lambda *_: pytest.fail("it was measured"))
    assert "nothing to plot" in bad("bench", "--only", "memory", option, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []

    def stop(console: Console, *_: Any) -> Any:
        assert "In no plot, but in the figures: memory." in console.export_text()
        raise RegionError(5, "stopped here")

    monkeypatch.setattr(runner, "bench", stop)
    said = bad("bench", "--only", "echo,memory", option, tmp_path / "x", "--text", tmp_path / "text")
    assert "stopped here" in said


@pytest.mark.parametrize("name", ["echo", "connect", "drain", "think-none"])
def test_what_has_a_histogram_is_known_before(name: str) -> None:
    measure = MEASURES[name]
    with Host(Console(file=io.StringIO())).open(measure) as take:
        found = take(next(v for v in measure.variants() if v.module == "shmsock"), 0.03)
    assert ("hdr" in found) == measure.timed == (name in ("echo", "connect"))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_bench_vm_takes_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "as root" in bad("bench", "--vm")


def test_the_c_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in the tables of echo and bulk, where it can be built."""
    ran: list[Any] = []

    def run(*arguments: Any) -> dict[str, Any]:
        ran.append(arguments[0])
        return {"p50_us": 0.3}

    monkeypatch.setattr(floor, "run", run)
    monkeypatch.setattr(floor, "program", lambda: Path("built"))
    host = Host(Console(file=io.StringIO()))
    host.server, host.client = 0, 1
    assert [v.label for v in host.variants(ECHO)][-1] == FLOOR
    assert FLOOR not in [v.label for m in (*PLAIN, MEASURES["anyio"]) for v in host.variants(m)]
    with host.open(ECHO) as take:
        assert take(Variant("floor"), 0.1) == {"p50_us": 0.3}
    assert ran == ["echo"]

    def unavailable(*_: Any) -> Any:
        raise floor.FloorUnavailable("no compiler")

    monkeypatch.setattr(floor, "program", unavailable)
    monkeypatch.setattr(floor, "run", unavailable)
    host = Host(Console(file=io.StringIO()))
    assert FLOOR not in [v.label for v in host.variants(ECHO)]
    with host.open(ECHO) as take, pytest.raises(RegionError, match="no compiler"):
        take(Variant("floor"), 0.1)


def test_one_cpu_measures_no_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "cpus", lambda: (3, 3, "both on CPU 3, the only one there is"))
    out = io.StringIO()
    host = Host(Console(width=200, file=out))
    assert host.where(ECHO) is None
    assert "no figures of 'echo' for two" in out.getvalue()
    assert host.where(MEASURES["one-core"]) == "both on CPU 3"
    assert not host.has_floor


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known, out = {"cpus": 2}, io.StringIO()
    for load in (4.0, 4.1):
        assert out.getvalue() == ""
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        machine.note_load(Console(width=300, file=out), known)
    assert "load 4.1 on 2 CPUs" in out.getvalue()
    assert known == {"cpus": 2, "load_after": 4.1}


def test_machine_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "have_uvloop", lambda: False)
    assert "uvloop" not in machine.machine()
    assert "no uvloop" in machine.describe(machine.machine())


def test_a_child_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        Child(python("-c", "import sys; sys.exit('why')")) as child,
        pytest.raises(ChildError, match="status 1"),
    ):
        child.line()
    assert capfd.readouterr().err == "why\n"


def test_a_child_that_ended_cannot_be_told() -> None:
    with Child(python("-c", "pass")) as child:
        child.process.wait()
        with pytest.raises(ChildError, match="status 0"):
            child.tell("go")


def test_a_child_does_not_outlive_its_parents_patience() -> None:
    with pytest.raises(KeyboardInterrupt), Child(python("-c", "import time; time.sleep(1000)")) as child:
        raise KeyboardInterrupt
    assert child.process.returncode == -signal.SIGTERM


def test_demo() -> None:
    before = regions()
    done = subprocess.run(command("demo", "--scale", "0.05"), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1000 round trips of 64 B" in done.stdout
    assert "as much" in done.stdout
    assert "SHA-256 " in done.stdout
    for variant in variants():
        assert variant.label in done.stdout
    assert regions() <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_ended(number: signal.Signals) -> None:
    before = regions()
    with subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        while "listens on port" not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        run.send_signal(number)
        said = run.stderr.read()
        assert run.wait(SECONDS) == 128 + number
    assert ("interrupted" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said
    assert regions() <= before
