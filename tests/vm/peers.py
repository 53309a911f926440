"""The tests' end of worker.py: processes that are attached to a region, in guests and on the host."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shmsock.aio.attach import prepare_region
from shmsock.guests.qemu import CommandFailed, CommandTimeout, Guest
from shmsock.region import open_file

WORKER = str(Path(__file__).with_name("worker.py"))
MODULES = (
    "shmsock.aio.attach",
    "shmsock.aio.endpoints",
    "faulthandler",
    "hashlib",
    "json",
    "logging",
    "random",
)
"""What a worker needs, all that takes long: its process in a guest begins with them."""
SECONDS = 60.0  # for what takes a moment; emulation and two busy cores make it several


class PeerError(Exception):
    """What a request raised in the worker; `name` is the exception's."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message = name, message


class _HostProcess:
    """The worker on this host, with the part of `qemu.Command` that `Peer` uses."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def readline(self, timeout: float) -> str:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise CommandTimeout(f"no line from the host's worker within {timeout:g} s") from None
        if line is None:
            self._lines.put(None)
            raise CommandFailed(f"the host's worker ended with exit status {self.process.wait()}")
        return line

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data.decode())
        self.process.stdin.flush()

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float) -> None:
        self.process.wait(timeout)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        for pipe in self.process.stdin, self.process.stdout:
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


class Peer:
    """One worker. `guest` None: on the host."""

    def __init__(
        self, guest: Guest | None, *, uvloop: bool = False, env: dict[str, str] | None = None
    ) -> None:
        argv = [sys.executable, WORKER, *(["uvloop"] if uvloop else [])]
        self.process = guest.start(argv, env=env, modules=MODULES) if guest else _HostProcess(argv, env or {})
        self.identity: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._done: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []

    def start(self, command: str, **arguments: Any) -> int:
        """Ask for something, and do not wait for it."""
        number = next(self._numbers)
        self.process.send(json.dumps([number, command, arguments]).encode() + b"\n")
        return number

    def result(self, number: int, timeout: float = SECONDS) -> Any:
        """What came of a request. Raises `PeerError`."""
        deadline = time.monotonic() + timeout
        while number not in self._done:
            self._take(deadline)
        line = self._done.pop(number)
        if "error" in line:
            raise PeerError(line["error"], line["message"])
        return line["result"]

    def ask(self, command: str, *, timeout: float = SECONDS, **arguments: Any) -> Any:
        return self.result(self.start(command, **arguments), timeout)

    def event(self, name: str, timeout: float = SECONDS) -> dict[str, Any]:
        """Wait for the first event of that name."""
        deadline = time.monotonic() + timeout
        while not (found := [e for e in self._events if e["event"] == name]):
            self._take(deadline)
        self._events.remove(found[0])
        return found[0]

    def _take(self, deadline: float) -> None:
        line = json.loads(self.process.readline(max(0.0, deadline - time.monotonic())))
        if "event" in line:
            self._events.append(line)
        else:
            self._done[line["number"]] = line

    def attach(self, region: str | None = None, timeout: float = SECONDS, **arguments: Any) -> Peer:
        self.identity = self.ask("attach", timeout=timeout, region=region, **arguments)
        return self

    @property
    def name(self) -> str:
        return str(self.identity["name"])

    @property
    def section(self) -> int:
        return int(self.identity["section"])

    def statistics(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("statistics")
        return found

    def kill(self) -> None:
        """SIGKILL: no last word."""
        self.process.kill()
        self.process.wait(SECONDS)

    def finish(self) -> None:
        """Let it leave as a program does that comes to its end."""
        self.process.close_stdin()
        self.process.wait(SECONDS)


class Peers:
    """Makes peers, and ends those on the host."""

    def __init__(self) -> None:
        self._all: list[Peer] = []

    def __call__(
        self, *guests: Guest | None, uvloop: bool = False, env: dict[str, str] | None = None
    ) -> list[Peer]:
        """A worker in each of `guests` (None: on the host), all started at once; ready, and not attached."""
        made = [Peer(guest, uvloop=uvloop, env=env) for guest in guests]
        self._all += made
        for peer in made:
            peer.event("ready", 120.0)
        return made

    def close(self) -> None:
        for peer in self._all:
            if isinstance(peer.process, _HostProcess):
                peer.process.close()


def format_region(path: Path, peers: int = 16) -> str:
    """Give an empty file its format, as `shmsock create` does; returns its URL."""
    with open_file(str(path)) as region:
        region.allocate()
        prepare_region(region, peers)
    return f"file:{path}"


def assert_calm(*peers: Peer) -> None:
    """Nobody was taken for dead, nobody missed a bell, nothing is held any more."""
    for peer in peers:
        seen = peer.statistics()
        assert (seen["peers_lost"], seen["healed"], seen["violations"]) == (0, 0, 0), (peer.name, seen)
        assert (seen["state"], seen["peers"]) == ("attached", len(peers)), (peer.name, seen)
