"""`shmsock top`: what it draws in a terminal, what keys do, and that it lets go of the terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from shmsock.commands.top import BARS, spark
from tests.observe.conftest import Process, command, said
from tests.observe.holders import HELD

Start = Callable[..., Process]


class Terminal:
    """A program in a terminal, and what that shows."""

    def __init__(self, wide: int, high: int, *arguments: str) -> None:
        self.screen = pyte.Screen(wide, high)
        self.stream = pyte.ByteStream(self.screen)
        self.fd, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", high, wide, 0, 0))
        self.before = termios.tcgetattr(other)
        self.other = other
        argv = [sys.executable, "-m", "shmsock", *arguments]
        env = {**os.environ, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(argv, stdin=other, stdout=other, stderr=other, env=env)

    def until(self, fits: Callable[[list[str]], bool]) -> list[str]:
        """Draw what comes until that is so. Returns the lines."""
        while not fits(lines := [line.rstrip() for line in self.screen.display]):
            self.stream.feed(os.read(self.fd, 65536))
        return lines

    def key(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def ended(self) -> int:
        status = self.process.wait(20)
        assert termios.tcgetattr(self.other) == self.before  # it echoes again, and line by line
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self.other)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def begin(wide: int, high: int, *arguments: str) -> Terminal:
        opened.append(Terminal(wide, high, *arguments))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


def headings(lines: list[str]) -> tuple[int, int]:
    """Where the tables of peers and of connections begin."""
    return (
        next(n for n, line in enumerate(lines) if " Name " in line),
        next(n for n, line in enumerate(lines) if line.startswith("State ")),
    )


@pytest.mark.parametrize(("wide", "high"), [(80, 24), (200, 60), (40, 10)])
def test_the_screen(region: Path, start: Start, terminal: Any, wide: int, high: int) -> None:
    start("vm-b")
    client = start("vm-a", "vm-b")
    shown = terminal(wide, high, "top", str(region), "--sort", "queued")
    lines = shown.until(lambda lines: lines[-1].startswith("q quit") and any("vm-a" in x for x in lines))
    assert len(lines) == high
    assert "shmsock" in lines[0]
    assert lines[1].startswith("peers: 2 live of 16")
    if high == 10:
        shown.key("q")
        assert shown.ended() == 0
        return
    peers, connections = headings(lines)
    assert {line.split()[1] for line in lines[peers + 1 : connections]} == {"vm-a", "vm-b"}
    first = lines[connections + 1].split()
    port = client.began["ports"][HELD - 1]
    assert first[:5] == ["open", f"vm-a:{port}", "vm-b:7000", "0", str(HELD - 1)]  # the most is waiting there
    rows = lines[connections + 1 : -1]
    drawn = [row for row in rows if row.startswith("open ")]
    if high == 60:
        assert len(drawn) == HELD
        assert "Spin hits" in lines[peers]
        assert "512/512" in lines[connections + 1]
    else:
        assert rows[-1] == f"... and {HELD - len(drawn)} more"
    shown.key("q")
    assert shown.ended() == 0


def test_keys(region: Path, start: Start, terminal: Any) -> None:
    start("vm-b")
    start("vm-a", "vm-b")
    shown = terminal(120, 30, "top", str(region))
    shown.until(lambda lines: "every 1 s, by rate" in lines[0] and any("vm-a" in x for x in lines))
    shown.key("s")
    shown.until(lambda lines: "by queued" in lines[0])
    shown.key("r")
    lines = shown.until(lambda lines: "by queued (reverse)" in lines[0])
    assert lines[headings(lines)[1] + 1].split()[4] == "0"
    shown.key("p")
    shown.until(lambda lines: not any(" Name " in line for line in lines))
    shown.key("p")
    shown.until(lambda lines: any(" Name " in line for line in lines))
    shown.key("c")
    shown.until(lambda lines: not any(line.startswith("State ") for line in lines))
    shown.key("-")
    shown.until(lambda lines: "every 2 s" in lines[0])
    shown.key(" ")
    shown.until(lambda lines: "held, by queued" in lines[0])
    shown.key(" x")
    shown.until(lambda lines: "every 2 s" in lines[0])
    shown.key("q")
    assert shown.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_lets_go_of_the_terminal(region: Path, terminal: Any, number: int) -> None:
    shown = terminal(80, 24, "top", str(region))
    shown.until(lambda lines: lines[-1].startswith("q quit"))
    shown.process.send_signal(number)
    assert shown.ended() == (0 if number == signal.SIGINT else 128 + number)


def test_a_file_that_gets_smaller_ends_it_with_one_line(region: Path, terminal: Any) -> None:
    shown = terminal(120, 24, "top", str(region))
    shown.until(lambda lines: lines[-1].startswith("q quit"))
    os.truncate(region, 4096)
    assert shown.ended() == 1
    lines = shown.until(lambda lines: any("smaller" in line for line in lines))
    assert [line for line in lines if line.startswith("shmsock: region ")]
    assert not any("Traceback" in line for line in lines)


def test_without_a_terminal(region: Path, start: Start) -> None:
    start("vm-b")
    text = said("top", region, "-n", "1")
    assert "peers: 1 live of 16   connections: none" in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    documents = [
        json.loads(line) for line in said("top", region, "-n", "2", "-d", "0.5", "--json").splitlines()
    ]
    assert [[p["name"] for p in d["peers"]] for d in documents] == [["vm-b"], ["vm-b"]]
    assert documents[0]["taken"] < documents[1]["taken"]
    assert command("top", region, "-d", "0.1").exit_code == 2


def test_sparklines() -> None:
    assert spark([0, 1, 7, 3.5], 6) == "  " + BARS[0] + BARS[1] + BARS[7] + BARS[4]
    assert spark([1, 2, 3], 2) == BARS[5] + BARS[7]
    assert spark([], 3) == "   "
    assert spark([5], 0) == ""
