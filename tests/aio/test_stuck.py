"""A ring that cannot end by itself: who shares the eventfd makes it blocking and fills it, between the look
at it and the write."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aio.stuck import held, let_go
from tests.forked import ROOT
from tests.region.fake_ivshmem import FakeServer

SECONDS = 20.0


@pytest.mark.parametrize("how", ["write", "read"])
def test_the_heartbeat_ends_a_kick_that_is_stuck(tmp_path: Path, how: str) -> None:
    """With two beats. All goes on, other threads meanwhile, and that peer is not kicked any more."""
    fake = FakeServer(str(tmp_path / "s"), 32 << 20)
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    thread, other = socket.socketpair()
    thread.settimeout(SECONDS)
    words = [f"ivshmem:{fake.path}", str(theirs.fileno()), str(other.fileno()), how]
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.aio.stuck", *words],
        cwd=ROOT,
        pass_fds=[theirs.fileno(), other.fileno()],
    )
    theirs.close()
    other.close()
    try:
        fake.accept()
        b = fake.accept()
        _, (listener,), _, _ = socket.recv_fds(ours, 4, 1)
        try:
            ring = held(listener, SECONDS)
            assert ring is not None
            thread.send(b"?")
            assert thread.recv(1) == b"?"
            fake.rung(b)
            (eventfd,) = fake.peers[b]
            os.eventfd_write(eventfd, 2**64 - 2)
            os.set_blocking(eventfd, True)
            let_go(listener, ring)
            assert ours.recv(5) == b"kicks"  # and the echo was there
            assert ours.recv(5) == b"kicks"  # as far as it is concerned
            assert held(listener, 0) is None
            assert child.wait(SECONDS) == 0
        finally:
            os.close(listener)
    finally:
        child.kill()
        child.wait()
        ours.close()
        thread.close()
        fake.close()
