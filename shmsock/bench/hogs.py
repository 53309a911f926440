"""Processes that want a processor all the time: the neighbours on a noisy machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hogs"]

# It ends with its parent, whatever becomes of that.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(1000000): pass\n"


@contextmanager
def hogs(cpus: set[int]) -> Iterator[list[int]]:
    """One on each of these CPUs. Yields their process ids."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in cpus:
            running.append(subprocess.Popen([sys.executable, "-S", "-E", "-c", BUSY]))
            os.sched_setaffinity(running[-1].pid, {cpu})
        yield [hog.pid for hog in running]
    finally:
        for hog in running:
            hog.kill()
            hog.wait()
