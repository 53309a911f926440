"""What `shmsock run` has to tell the user of a program: a line on stderr, once for all of its processes."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import sys
from collections.abc import Iterable

__all__ = ["offered", "say", "tell_of_unoffered", "unoffered", "warn"]

offered: set[int] = set()
"""Ports that this process listens on, or did, by loops that offer them on shared memory."""
_said: set[str] = set()


def say(text: str) -> None:
    """Write a line to stderr, whatever the program does with its logging."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        print(f"shmsock run: {text}", file=sys.stderr, flush=True)


def unoffered(port: int) -> None:
    """Tell that a port which was to be offered is listened on by no loop, if at all."""
    if port not in offered:
        warn(
            f"unoffered-{port}",
            f"nothing listened on {port} through asyncio's loops, so it is not offered on shared memory; "
            f"`shmsock forward shm:{port} tcp:127.0.0.1:{port}` does that for other programs",
        )


def tell_of_unoffered(ports: Iterable[int], pid: int) -> None:
    """Do so at the end of the process `pid`. One that had children may have left listening to them."""
    if os.getpid() == pid and not resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss:
        for port in sorted(ports):
            unoffered(port)


def warn(kind: str, text: str) -> None:
    """Say it, unless this process or another one of the program did for this `kind` of reason. The name that
    tells them is taken until the process ends."""
    if kind in _said:
        return
    _said.add(kind)
    program = os.environ.get("SHMSOCK_RUN") or os.getpid()
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind(f"\0shmsock-run-{program}-{kind}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return
        name.detach()
    say(text)
