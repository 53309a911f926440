"""What `shmsock run` has to tell the user of a program: a line on stderr, once for all of its processes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys

__all__ = ["say", "warn"]

_said: set[str] = set()


def say(text: str) -> None:
    """Write a line to stderr, whatever the program does with its logging."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        print(f"shmsock run: {text}", file=sys.stderr, flush=True)


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
