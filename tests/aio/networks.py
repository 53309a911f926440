"""A network for a test: a namespace with a loopback, and the addresses that the test gives it. There is one
for each process of tests, so that its children are forks too (tests/forked.py)."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000
Change = Callable[[str, str], None]


def _set(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.setns(namespace, CLONE_NEWNET), os.strerror(ctypes.get_errno())


@functools.cache
def _made(own: int) -> int | str:
    """A new network of the process with that id, as a descriptor; or why there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET):
            return os.strerror(ctypes.get_errno())
        made = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _set(before)
        return made
    finally:
        os.close(before)


@contextmanager
def network_of_its_own() -> Iterator[Change]:
    """Have this thread, and the processes that it starts, in a network of their own, without any address yet.
    Yields change("add", "10.0.0.5/32")."""
    network = _made(os.getpid())
    if isinstance(network, str):
        pytest.skip(f"no network of its own: {network}")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _set(network)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "addr", "flush", "dev", "lo", "scope", "global"], check=True)
        yield change
    finally:
        _set(before)
        os.close(before)


def change(what: str, address: str) -> None:
    """Add or delete an address of this network."""
    subprocess.run(["ip", "addr", what, address, "dev", "lo"], check=True)
