"""Python programs as forks of one process that has imported what they need: a start takes milliseconds, not
the tenth of a second that imports take. They are children of the test's process all the same."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shmsock.guests import forker

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "anyio._backends._asyncio",
    "shmsock.aio.attach",
    "shmsock.aio.datagram",
    "shmsock.aio.endpoints",
    "shmsock.anyio",
    "tests.aio.processes",
    "trio",
    "trustme",
    "uvloop",
)
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def _forker(own: int, network: int) -> socket.socket:
    """A connection with the process that forks, in this network namespace, which ends with it."""
    connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-W", "error", forker.__file__, str(other.fileno()), *MODULES],
            env={**os.environ, "PYTHONPATH": path},
            cwd=ROOT,
            pass_fds=[other.fileno()],
        )

    def end() -> None:
        if os.getpid() == own:
            connection.close()
            process.wait()

    atexit.register(end)
    return connection


def _is_ours(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class Forked:
    """`python -W error -m ARGV...` in this repository's root, with pipes at its standard input and output.

    It has what `subprocess.Popen` has, by the same names.
    """

    def __init__(self, argv: Sequence[str], env: dict[str, str] | None = None) -> None:
        request = {"argv": ["-m", *argv], "env": {**os.environ, **(env or {})}, "cwd": str(ROOT)}
        connection = _forker(os.getpid(), os.stat("/proc/thread-self/ns/net").st_ino)
        (stdin, to), (out, stdout) = os.pipe(), os.pipe()
        # Whose parent has ended goes to the nearest reaper above: that is us, for as long as it takes.
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(connection, [json.dumps(request).encode()], [stdin, stdout, 2])
            self.pid = int(connection.recv(100))
            while not _is_ours(self.pid):
                time.sleep(0.0005)
        finally:
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            os.close(stdin)
            os.close(stdout)
        self.stdin = os.fdopen(to, "wb")
        self.stdout = os.fdopen(out, "rb")
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            fd = os.pidfd_open(self.pid)
            try:
                ready, _, _ = select.select([fd], [], [], timeout)
            finally:
                os.close(fd)
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
