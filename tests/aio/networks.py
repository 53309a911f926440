"""A network of its own for a test: a namespace with a loopback, and the addresses that the test gives it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000
Change = Callable[[str, str], None]


@contextmanager
def network_of_its_own() -> Iterator[Change]:
    """Have this thread, and the processes that it starts, in a network of their own. Yields
    change("add", "10.0.0.5/32")."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network of its own: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield change
        finally:
            assert not libc.setns(before.fileno(), CLONE_NEWNET)


def change(what: str, address: str) -> None:
    """Add or delete an address of this network."""
    subprocess.run(["ip", "addr", what, address, "dev", "lo"], check=True)
