"""The floor program: compiled where it is used, honest, and gone when it is over."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from shmsock.bench import child, floor
from shmsock.native import build
from tests.native.test_build import ARM64, compile_object


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "shmsock" / "floor"


def test_flags_are_those_of_the_core() -> None:
    assert set(build.CFLAGS) <= set(floor.CFLAGS)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compiles_without_a_warning(compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    assert "-Werror" in floor.CFLAGS
    assert floor.program().parent == cache
    assert floor.run("count", "echo")["compiler"].startswith(compiler)


@pytest.mark.skipif(shutil.which(ARM64) is None, reason=f"no {ARM64}: apt-get install gcc-aarch64-linux-gnu")
def test_compiles_for_arm64(tmp_path: Path) -> None:
    done = compile_object(ARM64, floor.SOURCE, tmp_path)
    assert done.returncode == 0, done.stderr


def test_is_compiled_once_for_each_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = floor.program()
    before = first.stat().st_mtime_ns
    assert floor.program() == first
    assert first.stat().st_mtime_ns == before
    monkeypatch.setenv("CFLAGS", "-O1")
    second = floor.program()
    assert second != first
    assert sorted(cache.iterdir()) == sorted([first, second])


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert floor.cache_line_ns((0, 1)) is None
    with pytest.raises(floor.FloorUnavailable, match=r"no C compiler .* apt-get install gcc"):
        floor.run("echo", 0, 0, 0.01, 4096)


def test_a_compiler_that_is_not_there_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc -m64")
    with pytest.raises(floor.FloorUnavailable, match="CC=no-such-cc is no program"):
        floor.program()


def test_a_compiler_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-DSH_VERSION=")
    with pytest.raises(floor.FloorUnavailable, match="SH_VERSION"):
        floor.program()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shmsock").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(floor.FloorUnavailable, match="cannot keep"):
        floor.program()


def test_cache_line() -> None:
    server, client, _ = child.cpus()
    found = floor.cache_line_ns()
    if server == client:
        assert found is None
    else:
        assert found is not None
        assert found > 10  # how much more is for what else runs here
    assert floor.cache_line_ns((client, client)) is None


@pytest.mark.parametrize("ring_bytes", [4096, 1 << 20])
def test_floor(ring_bytes: int) -> None:
    """On one CPU too; the program itself compares what came with what was sent."""
    server, client, _ = child.cpus()
    for cpus in {(server, client), (client, client)}:
        found = floor.run("echo", *cpus, 0.02, ring_bytes)
        assert 0 < found["p50_us"] <= found["p99_us"] <= found["p999_us"] <= found["max_us"]
        assert floor.run("write", *cpus, 0.02, ring_bytes)["mb_s"] > 0


def test_impossible_arguments_are_told() -> None:
    with pytest.raises(floor.FloorUnavailable, match="a ring that cannot be"):
        floor.run("echo", 0, 0, 0.01, 5000)
    with pytest.raises(floor.FloorUnavailable, match="no such work"):
        floor.run("count", "nothing")
    with pytest.raises(floor.FloorUnavailable, match="cannot run on that CPU"):
        floor.run("echo", 1023, 1023, 0.01, 4096)


@pytest.mark.parametrize("what", ["line", "echo", "write"])
@pytest.mark.parametrize("victim", ["server", "client"])
def test_neither_process_outlives_the_other(what: str, victim: str) -> None:
    cpu = str(child.cpus()[1])
    more = [] if what == "line" else ["4096"]
    argv = [str(floor.program()), what, cpu, cpu, "60", *more]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as client:
        children = Path(f"/proc/{client.pid}/task/{client.pid}/children")
        while not (server := children.read_text().split()):
            assert client.poll() is None
        pidfd = os.pidfd_open(int(server[0]))
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL) if victim == "server" else client.kill()
            assert client.wait(30) == (1 if victim == "server" else -signal.SIGKILL)
            assert select.select([pidfd], [], [], 30)[0]
        finally:
            client.kill()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
