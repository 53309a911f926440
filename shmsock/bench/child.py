"""Child processes that print a JSON object per line, for demos and benchmarks; they end with their parent."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Child", "ChildError", "cpus", "have_uvloop", "python"]


class ChildError(OSError):
    """A child ended before it said what it was asked for: why, or its own words went to stderr."""

    def __init__(self, argv: list[str], status: int, why: str = "", number: int | None = None) -> None:
        role = next((a for a in argv if a in ("server", "client", "serve", "echo", "send")), argv[-1])
        said = f"the {role} process ended with exit status {status}; it says why above"
        super().__init__(number, why or said)
        self.strerror = str(self.args[1])


class Child:
    """A running child process, in a session of its own: Ctrl-C is for the parent, which ends its children.

    Leaving its `with` block ends it: kindly by the end of its stdin, then by force.
    """

    process: subprocess.Popen[str]

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        self.argv, self._env = argv, {**os.environ, **(env or {})}

    def __enter__(self) -> Child:
        with _interrupt_later() as interrupted:  # else it could be running with nobody who knows of it
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._env,
                start_new_session=True,
                text=True,
            )
        if interrupted:
            self._end(kindly=False)
            signal.raise_signal(interrupted[0])
        return self

    def line(self) -> dict[str, Any]:
        """The next thing it says. Raises ChildError when it ended instead."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise ChildError(self.argv, self.process.wait())
        said: dict[str, Any] = json.loads(text)
        if next(iter(said), "") == "error":
            raise ChildError(self.argv, self.process.wait(), said["error"], said.get("errno"))
        return said

    def tell(self, line: str) -> None:
        """Raises ChildError when it ended meanwhile."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self.argv, self.process.wait()) from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what it says, up to the line with "done"."""
        while True:
            said = self.line()
            yield said
            if said.get("event") == "done":
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kindly=kind is None)

    def _end(self, kindly: bool) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not kindly:
            self.process.terminate()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def _interrupt_later() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, which raise at once otherwise. (Only the main thread gets them anyway.)"""
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda number, _: interrupted.append(number)) for number in numbers]
    try:
        yield interrupted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def python(script: str | Path, *arguments: object) -> list[str]:
    """The command that runs a script with this interpreter."""
    return [sys.executable, str(script), *(str(a) for a in arguments)]


def have_uvloop() -> bool:
    return importlib.util.find_spec("uvloop") is not None


def cpus() -> tuple[int, int, str]:
    """A CPU for a server, one for a client, and what to say about them. Twice the same when there is one."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) == 1:
        return allowed[0], allowed[0], f"both on CPU {allowed[0]}, the only one there is"
    client = allowed[-1]
    others = [cpu for cpu in allowed[:-1] if client not in _siblings(cpu)]
    server = (others or allowed)[-1] if others else allowed[0]
    shared = "" if others else " (two threads of one core)"
    return server, client, f"server on CPU {server}, client on CPU {client}{shared}"


def _siblings(cpu: int) -> set[int]:
    """The hardware threads of that CPU's core."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        found: set[int] = set()
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
        return found
    except (OSError, ValueError):
        return {cpu}
