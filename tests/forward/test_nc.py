"""`shmsock nc`: pipes, files and sockets over shared memory, both ways."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forward.processes import PATIENCE_S, SHMSOCK, Pair, exactly, pair

__all__ = ["pair"]

NC = [*SHMSOCK, "nc"]
DATA = os.urandom(1 << 20) * 40


def nc(*args: str, name: str = "vm-a", **more: Any) -> subprocess.Popen[bytes]:
    env = {**os.environ, "SHMSOCK_NAME": name}
    return subprocess.Popen([*NC, *args], env=env, stderr=subprocess.PIPE, **more)


def listening(port: str, **more: Any) -> subprocess.Popen[bytes]:
    child = nc("-l", port, name="vm-b", **more)
    for _ in range(600):
        info = subprocess.run(
            [*SHMSOCK, "info", os.environ["SHMSOCK_REGION"]], capture_output=True, text=True
        )
        if port in info.stdout:
            break
    return child


def test_both_ways_at_once_and_half_close(shm_region: Path, tmp_path: Path) -> None:
    """The one reads a pipe and writes a file, the other reads a file and writes a pipe."""
    (tmp_path / "in").write_bytes(DATA[::-1])
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as sink:
        far = listening("7000", stdin=source, stdout=sink)
        near = nc("vm-b", "7000", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        out, error = near.communicate(DATA, PATIENCE_S)
        assert (near.returncode, error) == (0, b"")
        assert hashlib.sha256(out).digest() == hashlib.sha256(DATA[::-1]).digest()
        assert far.communicate(timeout=PATIENCE_S)[1] == b""
        assert far.returncode == 0
    assert (tmp_path / "out").read_bytes() == DATA


def test_region_and_name_are_options(shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = listening("7000", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    monkeypatch.delenv("SHMSOCK_REGION")
    options = "--region", str(shm_region), "--name", "vm-c"
    near = nc(*options, "vm-b", "7000", name="not it", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert near.communicate(b"hello", PATIENCE_S) == (b"", b"")
    assert far.communicate(timeout=PATIENCE_S) == (b"hello", b"")


def test_the_end_of_the_input_leaves_the_output_open(pair: Pair) -> None:
    child = nc("vm-b", "7000", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    server = pair.accept()
    assert server.recv(1) == b""
    server.sendall(b"late")
    server.close()
    assert child.communicate(timeout=PATIENCE_S) == (b"late", b"")
    assert child.returncode == 0


def test_the_end_of_the_output_leaves_the_input_open(pair: Pair) -> None:
    child = nc("vm-b", "7000", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    server = pair.accept()
    server.shutdown(socket.SHUT_WR)
    assert child.stdout.read() == b""  # its reader knows
    child.stdin.write(b"late")
    child.stdin.close()
    assert exactly(server, 4) == b"late"
    assert server.recv(1) == b""
    server.close()
    assert child.wait(PATIENCE_S) == 0
    child.stdout.close()
    assert child.stderr is not None
    child.stderr.close()


def test_a_socket_as_input_and_output(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    child = nc("vm-b", "7000", stdin=theirs, stdout=theirs)
    theirs.close()
    server = pair.accept()
    ours.sendall(b"ping")
    assert exactly(server, 4) == b"ping"
    server.sendall(b"x" * 1_000_000)
    server.close()
    assert exactly(ours, 1_000_000) == b"x" * 1_000_000
    assert ours.recv(1) == b""
    ours.close()
    assert child.communicate(timeout=PATIENCE_S)[1] == b""
    assert child.returncode == 0


def test_a_reader_that_leaves_ends_it_by_sigpipe(pair: Pair) -> None:
    child = nc("vm-b", "7000", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    server = pair.accept()
    child.stdout.close()
    with pytest.raises(ConnectionError):
        server.sendall(b"x" * (64 << 20))
    server.close()
    assert child.wait(PATIENCE_S) == -signal.SIGPIPE
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.stdin is not None
    child.stdin.close()


def test_a_slow_reader_holds_up_the_writer(pair: Pair) -> None:
    child = nc("vm-b", "7000", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server = pair.accept()
    sent = 0
    while select.select([], [server], [], 1)[1]:  # until nothing has moved for a while
        sent += server.send(b"x" * 65536, socket.MSG_DONTWAIT)
    assert sent < 64 << 20
    server.shutdown(socket.SHUT_WR)
    out, _ = child.communicate(b"", PATIENCE_S)
    assert len(out) == sent
    server.close()


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("vm-c", "7000"), 1, b"shmsock: no peer named 'vm-c' is attached"),
        (("vm-b", "7001"), 1, b"shmsock: connection to ('vm-b', 7001) refused"),
        (("a b", "7001"), 1, b"shmsock: 'a b' is no peer name"),
        (("vm-b", "0"), 2, b"Usage:"),
        (("vm-b",), 2, b"Usage:"),
        (("-l", "vm-b", "7000"), 2, b"Usage:"),
    ],
)
def test_mistakes(pair: Pair, args: tuple[str, ...], status: int, said: bytes) -> None:
    child = nc(*args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    out, error = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, out) == (status, b"")
    assert error.startswith(said)
    assert status == 2 or error.count(b"\n") == 1


@pytest.mark.parametrize(("closed", "status"), [("<&-", 0), (">&-", 1), ("<&- >&- 2>&-", 1)])
def test_what_is_closed_is_nothing_else(pair: Pair, closed: str, status: int) -> None:
    """A closed input is at its end, output to a closed one fails; no other descriptor takes their place."""
    child = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *NC, "vm-b", "7000"], stderr=subprocess.PIPE
    )
    server = pair.accept()
    if status == 0:
        assert server.recv(1) == b""
        server.close()
    else:
        server.sendall(b"x")
    _, error = child.communicate(timeout=PATIENCE_S)
    server.close()
    assert child.returncode == status
    assert error == (b"shmsock: Bad file descriptor\n" if closed == ">&-" else b"")


def test_a_reset_is_told(pair: Pair) -> None:
    child = nc("vm-b", "7000", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pair.accept().close()
    pair.far.stop(signal.SIGKILL)
    out, error = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, out) == (1, b"")
    assert b"vm-b" in error
    assert error.count(b"\n") == 1
