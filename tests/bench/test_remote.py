"""`shmsock bench serve` and `shmsock bench connect`, and what is measured between guests."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmsock.bench.pairs import OURS, TCP, private_region
from shmsock.bench.remote import REMOTE
from tests.commands.test_cli import SECONDS, bad, shmsock, usage


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The command, and the addresses it tells: one a line."""
    argv = [sys.executable, "-m", "shmsock", "bench", "serve", "--listen", "0", *options]
    count = 1 + ("--tcp" in options)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(count)]
        try:
            yield process, [port for line in lines for port in re.findall(r"port (\d+)$", line)]
        finally:
            process.stdin.close()
            process.wait(SECONDS)


def test_serve_and_connect(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    with private_region("bench", 32 << 20, 4) as region:
        options = ("--region", region, "--name", "there", "--tcp", "127.0.0.1:0")
        with serving(*options) as (process, (tcp, port)):
            where = ("--region", region, "--port", port, "--against", f"tcp://127.0.0.1:{tcp}")
            short = ("--rounds", "2", "--seconds", "0.03", "--json", file)
            done = shmsock("bench", "connect", "there", *where, "--only", "echo,bulk", *short)
        assert process.returncode == 0  # its input ended
    said = done.stdout
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[1:] == ["round 1 of 2 is done", "round 2 of 2 is done"]  # no terminal
    assert "to there, TCP to 127.0.0.1" in said
    report = json.loads(file.read_text())
    assert (report["host"], report["port"]) == ("there", int(port))
    assert set(report["measures"]) == {"echo", "bulk", "think-1ms", "think-10ms", "idle"}
    assert "marks" not in report
    for name, kept in report["measures"].items():
        (tcp, ours) = kept["results"].values()
        costs = (
            ("client_cpu", "server_cpu") if name == "idle" else ("cpu_s_gb" if name == "bulk" else "cpu_us",)
        )
        assert all(r[cost] >= 0 for r in (tcp, ours) for cost in costs)
        assert len(ours["rounds"]) == 2
    echo = report["measures"]["echo"]["results"]
    seen = echo[OURS]["beside"]["p50_us"]
    ratios = [
        a["p50_us"] / b["p50_us"] for a, b in zip(echo[TCP]["rounds"], echo[OURS]["rounds"], strict=True)
    ]
    assert (seen["than"], seen["each"]) == (TCP, ratios)
    assert [set(taken) for taken in report["probe"]] == [{"client", "server"}] * 2
    for end in ("client", "server"):
        assert 0 <= report["probe"][0][end]["lost"] <= 100
        assert report["probe"][0][end]["machine"]["kernel"] == os.uname().release
        assert report["probe"][0][end]["region"] == f"file:{region}"
        assert "load" in report["probe"][0][end]["memory"]
    assert report["verdict"][0]["text"].startswith("64 B echo ")
    assert f"{OURS} beside {TCP}: 64 B echo " in " ".join(said.split())


def test_serve_ends_on_ctrl_c() -> None:
    with private_region("bench", 32 << 20, 4) as region:
        with serving("--region", region) as (process, _):
            process.send_signal(signal.SIGINT)
            process.wait(SECONDS)
        assert process.returncode == 0


def test_nobody_serves(capfd: pytest.CaptureFixture[str]) -> None:
    with private_region("bench", 32 << 20, 4) as region:
        said = bad("bench", "connect", "nobody", "--region", region, "--rounds", "1", "--seconds", "0.03")
    assert "nobody" in said
    assert "does `shmsock bench serve --listen 7000` run there?" in said
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("how", ["serve", "connect there"])
def test_a_bad_name_is_one_line(how: str) -> None:
    argv = [sys.executable, "-m", "shmsock", "bench", *how.split(), "--name", "a/b"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'a/b' is no peer name" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_end_that_cannot_start_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    said = bad("bench", "serve", "--region", "nonsense:x")
    assert "'nonsense:x' is no region URL" in said
    assert said.count("\n") == 1
    assert capfd.readouterr().err == ""


def test_bad_usage() -> None:
    assert "has no port" in usage("bench", "serve", "--tcp", "there")
    assert "the host is missing" in usage("bench", "connect", "there", "--against", "tcp://7001")
    assert "between two machines there are echo" in usage("bench", "connect", "there", "--only", "anyio")
    assert "echo" in REMOTE


def test_the_hint_is_about_who_is_not_there(tmp_path: Path) -> None:
    region = tmp_path / "none"
    said = bad("bench", "connect", "there", "--region", f"file:{region}", "--seconds", "0.03")
    assert f"{region} does not exist" in said
    assert "bench serve" not in said


def test_a_tcp_port_in_use_is_said() -> None:
    with private_region("bench", 32 << 20, 4) as region, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = bad("bench", "serve", "--listen", "0", "--region", region, "--tcp", f"127.0.0.1:{port}")
    assert said == f"shmsock: --tcp: TCP port {port} is in use here; choose another, or 0 for a free one\n"
