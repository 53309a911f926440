"""Forwarders as real processes, and TCP ends in the test itself."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

SHMSOCK = [sys.executable, "-m", "shmsock"]
LONG = os.environ.get("SHMSOCK_LONG") == "1"
PATIENCE_S = 30.0


def program(name: str) -> str:
    """The path of a program from a system package, without which the test is skipped."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class Process:
    """A child whose stderr is read by a thread, line by line; what it says can be waited for."""

    def __init__(self, *args: str, name: str | None = None, **more: Any) -> None:
        env = {**os.environ, **more.pop("env", {})}
        if name is not None:
            env["SHMSOCK_NAME"] = name
        env.pop("JOURNAL_STREAM", None)
        self.child = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=env, **more)
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def said(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line that matches, among those from number `after` on."""

        def found() -> re.Match[str] | None:
            return next((m for line in self.lines[after:] if (m := re.search(pattern, line))), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._over, PATIENCE_S)
            match = found()
        assert match is not None, f"{pattern!r} is not in {self.lines[after:]}"
        return match

    def send_signal(self, number: int) -> None:
        self.child.send_signal(number)

    def wait(self) -> int:
        status = self.child.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        return status

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.child.poll() is None:
            self.child.send_signal(number)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise
        finally:
            assert self.child.stderr is not None
            self.child.stderr.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Forwarder(Process):
    """`shmsock forward`, or another command that listens; it listens when this returns."""

    def __init__(self, *args: str, name: str, rules: int = 1, command: str = "forward") -> None:
        super().__init__(*SHMSOCK, command, *args, name=name)
        with self._news:
            self._news.wait_for(lambda: self._listens() >= rules or self._over, PATIENCE_S)
        if self._listens() < rules:
            self.stop()
            raise AssertionError(self.lines)

    def _listens(self) -> int:
        return sum("listening on" in line for line in self.lines)

    @property
    def port(self) -> int:
        """The port of the first rule."""
        return int(self.said(r"listening on \S+:(\d+) ->")[1])

    def __enter__(self) -> Forwarder:
        return self


class Pair:
    """tcp -> shm -> tcp: `port` leads to `server`, a listening socket of the test."""

    def __init__(self, *near: str, far: tuple[str, ...] = (), target: str | None = None) -> None:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.server.settimeout(PATIENCE_S)
        to = target or f"tcp:127.0.0.1:{self.server.getsockname()[1]}"
        self.far_args = ("shm:7000", to, *far)
        self.far = Forwarder(*self.far_args, name="vm-b")
        self.near = Forwarder("tcp:127.0.0.1:0", "shm:vm-b:7000", *near, name="vm-a")
        self.port = self.near.port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)

    def accept(self) -> socket.socket:
        sock, _ = self.server.accept()
        sock.settimeout(PATIENCE_S)
        return sock

    def both(self) -> tuple[socket.socket, socket.socket]:
        client = self.connect()
        return client, self.accept()

    def close(self) -> None:
        self.server.close()
        with contextlib.ExitStack() as stack:
            stack.callback(self.far.stop)
            stack.callback(self.near.stop)


@pytest.fixture
def pair(shm_region: Path) -> Iterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        made.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def everything(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 18):
        parts.append(data)
    return b"".join(parts)


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"the end after {len(data)} of {count} bytes"
        data += more
    return data


def memory(pid: int) -> int:
    """Bytes of a process's own memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
