"""Programs under `shmsock run`, and as they are, in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60.0
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A TCP port that nobody has now, below those that the kernel chooses."""
    while True:
        port = 20000 + int.from_bytes(os.urandom(2), "big") % 10000
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Program:
    """`shmsock run OPTIONS -- COMMAND`; COMMAND alone without options. Lines that it prints, on stdout or
    stderr, are `lines`."""

    def __init__(
        self,
        options: list[str] | None,
        *command: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        run = [] if options is None else [sys.executable, "-m", "shmsock", "run", *options, "--"]
        self.process = subprocess.Popen(
            [*run, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self._over = True
            self._more.notify_all()

    def wait_for(self, text: str, times: int = 1) -> str:
        """Wait for the line that has `text`, for the so-manieth one, and return it."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        with self._more:
            seen = self._more.wait_for(lambda: len(found()) >= times or self._over, PATIENCE)
            assert seen, f"no line with {text!r} in {self.lines}"
            assert len(found()) >= times, f"it ended without a line with {text!r}: {self.lines}"
            return found()[times - 1]

    def tell(self, line: str = "") -> None:
        """Give it a line on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        """Wait for its end, and that of all that it has written; return its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.ends()

    def close(self) -> None:
        """Kill what there is still of it, children too: its session is its own."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def program(
    options: list[str] | None, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Program]:
    running = Program(options, *command, env=env, cwd=cwd)
    try:
        yield running
    finally:
        running.close()


def result(
    options: list[str], *command: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a program that ends well, and return what it printed."""
    with program(options, *command, env=env, cwd=cwd) as running:
        code = running.ends()
        assert code == 0, running.lines
        return "\n".join(running.lines)
