"""`shmsock metrics`: the text that Prometheus reads says what the processes say."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shmsock.commands.metrics import MOST
from shmsock.testing import make_region
from tests.observe.conftest import Process, command, said
from tests.observe.holders import HELD

Start = Callable[..., Process]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "region"}
            key = sample.name, tuple(sorted(labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(found: Samples, name: str, /, **labels: str) -> float:
    return found["shmsock_" + name, tuple(sorted(labels.items()))]


@contextmanager
def exporter(region: Path) -> Iterator[Callable[[], Samples]]:
    argv = [sys.executable, "-m", "shmsock", "metrics", str(region), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = process.stderr.readline().split()[-1]

        def scrape() -> Samples:
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                return samples(answer.read().decode())

        scrape.url = url  # type: ignore[attr-defined]
        yield scrape
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_two_processes_hold(region: Path, start: Start) -> None:
    server = start("vm-b")
    client = start("vm-a", "vm-b")
    with exporter(region) as scrape:
        client.tell("churn")
        before = scrape()
        assert value(before, "up") == 1
        stood, there = client.tell("quiet"), server.tell("tell")
        assert stood["came"]
        a, b = {"section": "1", "name": "vm-a"}, {"section": "0", "name": "vm-b"}
        found = before
        while any(  # each shows it with its next beat
            value(found, "node_reads_total", **who) < told["reads"] for who, told in ((a, stood), (b, there))
        ):
            found = scrape()
        for name, counter in (
            ("sent_bytes", "bytes_out"),
            ("received_bytes", "bytes_in"),
            ("writes", "writes"),
        ):
            assert value(found, f"node_{name}_total", **a) == stood[counter]
            assert value(found, f"node_{name}_total", **b) == there[counter]
            assert value(before, f"node_{name}_total", **a) <= stood[counter]
        assert value(found, "connections", name="vm-a", peer="vm-b", state="open") == HELD
        assert value(found, "queued_bytes", name="vm-a", peer="vm-b") == sum(range(HELD))
        assert value(found, "node_unread_bytes", **b) == sum(range(HELD))
        assert value(found, "node_live", **a) == value(found, "node_live", **b) == 1
        assert value(found, "sections", state="live") == 2
        client.end()
        while value(found := scrape(), "sections", state="live") == 2:
            pass
        assert ("shmsock_node_live", tuple(sorted(a.items()))) not in found or not value(
            found, "node_live", **a
        )


def test_a_region_that_goes_and_comes_back(region: Path) -> None:
    with exporter(region) as scrape:
        assert value(scrape(), "up") == 1
        kept = region.with_suffix(".kept")
        os.rename(region, kept)
        try:
            while value(scrape(), "up"):
                pass
        finally:
            shutil.move(make_region(size=16 << 20), region)
            kept.unlink()
        while not value(found := scrape(), "up"):
            pass
        assert value(found, "region_bytes") == 16 << 20


def test_clients_that_say_nothing(region: Path) -> None:
    with exporter(region) as scrape:
        at = urlsplit(scrape.url)  # type: ignore[attr-defined]
        held = [
            socket.create_connection((at.hostname or "", at.port or 0), timeout=30) for _ in range(2 * MOST)
        ]
        for one in held:
            with suppress(ConnectionError):
                one.sendall(b"GET /metrics HTTP/1.0\r\n")
        answers = []
        for one in held:
            with suppress(ConnectionError):  # an end that comes while bytes are unread is a reset
                answers.append(one.recv(1))
            one.close()
        assert not any(answers)
        assert value(scrape(), "up") == 1


def test_clients_that_ask_byte_by_byte(region: Path) -> None:
    """They never come to an end, and would take all threads for ever."""
    over = threading.Event()
    with exporter(region) as scrape:
        at = urlsplit(scrape.url)  # type: ignore[attr-defined]
        held = [socket.create_connection((at.hostname or "", at.port or 0), timeout=30) for _ in range(MOST)]

        def drip() -> None:
            while not over.wait(0.2):
                for one in held:
                    with suppress(OSError):
                        one.send(b"G")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert value(scrape(), "up") == 1  # one of them goes
            for one in held:
                with suppress(ConnectionError):
                    assert one.recv(1) == b""  # and then all
        finally:
            over.set()
            dripping.join()
            for one in held:
                one.close()


def test_no_more_clients_than_there_are_threads_for(region: Path) -> None:
    with exporter(region) as scrape:
        at = urlsplit(scrape.url)  # type: ignore[attr-defined]
        held = [
            socket.create_connection((at.hostname or "", at.port or 0), timeout=30) for _ in range(2 * MOST)
        ]
        answered = 0
        for one in held[::-1]:
            with suppress(ConnectionError):
                one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                answered += one.recv(1) == b"H"
        for one in held:
            one.close()
        assert 0 < answered <= MOST
        assert value(scrape(), "up") == 1


def test_once(region: Path, start: Start) -> None:
    start("vm-b")
    found = samples(said("metrics", region))
    assert value(found, "node_live", section="0", name="vm-b") == 1
    assert value(found, "node_listeners", section="0", name="vm-b") == 2


@pytest.mark.parametrize("listen", ["x", "127.0.0.1:", "127.0.0.1:70000", ":-1"])
def test_where_nobody_can_listen(region: Path, listen: str) -> None:
    done = command("metrics", region, "--listen", listen)
    assert done.exit_code == 2
    assert "is not [HOST]:PORT" in done.stderr


def test_without_the_library(region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    done = command("metrics", region)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "shmsock: metrics need prometheus_client: pip install 'shmsock[metrics]'\n"
