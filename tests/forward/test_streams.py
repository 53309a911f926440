"""`shmsock forward` between TCP, UNIX sockets and shared memory: what passes through, both ways."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from shmsock.testing import make_region
from tests.forward.processes import (
    PATIENCE_S,
    SHMSOCK,
    Forwarder,
    Pair,
    Process,
    everything,
    exactly,
    memory,
    pair,
    reset,
)

__all__ = ["pair"]


def test_bytes_and_half_close_pass_both_ways(pair: Pair) -> None:
    for first in ("client", "server"):
        client, server = pair.both()
        ends = (client, server) if first == "client" else (server, client)
        ends[0].sendall(b"a" * 300_000)
        ends[0].shutdown(socket.SHUT_WR)
        assert everything(ends[1]) == b"a" * 300_000
        ends[1].sendall(b"b" * 300_000)  # the other direction is open still
        ends[1].close()
        assert everything(ends[0]) == b"b" * 300_000
        ends[0].close()
    said = pair.near.said(r"closed; 300000 bytes there, 300000 back")
    assert said.string.split(": ")[0].endswith("-> shm:vm-b:7000")


def test_what_the_server_says_first_arrives(pair: Pair) -> None:
    client = pair.connect()
    server = pair.accept()
    server.sendall(b"220 hello\r\n")
    assert exactly(client, 11) == b"220 hello\r\n"
    client.close()
    assert everything(server) == b""
    server.close()


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_of_one_side_becomes_a_reset_of_the_other(pair: Pair, who: str) -> None:
    for _ in range(20):
        client, server = pair.both()
        ends = (client, server) if who == "client" else (server, client)
        reset(ends[0])
        with pytest.raises(ConnectionResetError):
            ends[1].recv(1)
        ends[1].close()
    for _ in range(5):
        client, server = pair.both()
        client.sendall(b"x")
        assert exactly(server, 1) == b"x"
        ends = (client, server) if who == "client" else (server, client)
        reset(ends[0])
        with pytest.raises(ConnectionResetError):
            ends[1].recv(1)
        ends[1].close()
    pair.near.said("reset by " + ("client" if who == "client" else "target"))


def test_a_reader_that_stops_holds_up_the_writer_and_memory_stays(pair: Pair) -> None:
    pairs = [pair.both() for _ in range(4)]
    before = [memory(p.child.pid) for p in (pair.near, pair.far)]
    sent = []
    for client, _ in pairs:
        client.setblocking(False)
        count = 0
        try:
            while True:  # until nothing has moved for a while
                try:
                    count += client.send(b"x" * (1 << 16))
                except BlockingIOError:
                    if not select.select([], [client], [], 0.5)[1]:
                        break
        finally:
            sent.append(count)
    after = [memory(p.child.pid) for p in (pair.near, pair.far)]
    assert all(count < 40 << 20 for count in sent)
    assert all(b - a < 16 << 20 for a, b in zip(before, after, strict=True))
    for (client, server), count in zip(pairs, sent, strict=True):
        client.setblocking(True)
        client.shutdown(socket.SHUT_WR)
        assert len(everything(server)) == count
        client.close()
        server.close()


def test_200_connections_at_once(pair: Pair) -> None:
    pairs = []
    for n in range(200):
        client, server = pair.both()
        client.sendall(b"%03d" % n)
        assert exactly(server, 3) == b"%03d" % n
        pairs.append((client, server))
    for n, (_, server) in enumerate(pairs):
        server.sendall(b"%03d back" % n)
    for n, (client, server) in enumerate(pairs):
        assert exactly(client, 8) == b"%03d back" % n
        client.close()
        assert server.recv(1) == b""
        server.close()
    mark = len(pair.near.lines)
    pair.near.send_signal(signal.SIGUSR1)
    pair.near.said(r"200 connections, \d+ open, 0 failed, 0 reset, .* 600 bytes there, 1600 back", mark)


def test_nobody_there_is_a_reset_and_one_that_comes_is_found(pair: Pair) -> None:
    pair.far.stop(signal.SIGKILL)
    client = pair.connect()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    pair.near.said("not connected: ")
    pair.far = Forwarder(*pair.far_args, name="vm-b")
    client, server = pair.both()
    client.sendall(b"again")
    assert exactly(server, 5) == b"again"
    client.close()
    server.close()


def test_a_peer_that_is_killed_resets_its_clients(pair: Pair) -> None:
    client, server = pair.both()
    client.sendall(b"x")
    assert exactly(server, 1) == b"x"
    pair.far.stop(signal.SIGKILL)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    server.close()
    pair.near.said("reset by target")


def test_a_target_that_refuses_is_a_reset(pair: Pair) -> None:
    pair.server.close()
    client = pair.connect()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    pair.far.said("not connected: ")


def test_without_memory_clients_wait_and_are_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    region = make_region(size=1 << 20, peers=2)
    monkeypatch.setenv("SHMSOCK_REGION", region)
    small = Pair()
    try:
        clients = [small.connect() for _ in range(230)]  # there is room for 224
        small.near.said("waits: no ")
        threading.Thread(target=_echo_all, args=(small.server, len(clients)), daemon=True).start()
        for client in clients:
            client.sendall(b"x")
            assert exactly(client, 1) == b"x"
            client.close()
    finally:
        small.close()
        os.unlink(region)


def _echo_all(server: socket.socket, count: int) -> None:
    for _ in range(count):
        sock, _ = server.accept()
        threading.Thread(target=_echo, args=(sock,), daemon=True).start()


def _echo(sock: socket.socket) -> None:
    with sock, contextlib.suppress(ConnectionResetError):  # by the end of the test
        while data := sock.recv(1 << 16):
            sock.sendall(data)


@pytest.mark.parametrize("side", ["near", "far"])
def test_unix_sockets(shm_region: Path, tmp_path: Path, side: str) -> None:
    path = tmp_path / "socket"
    server = socket.socket(socket.AF_UNIX)
    if side == "far":
        server.bind(str(path))
        server.listen()
        rules = ("shm:7000", f"unix:{path}"), ("tcp:127.0.0.1:0", "shm:vm-b:7000")
    else:
        server.close()
        server = socket.create_server(("127.0.0.1", 0))
        to = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        rules = ("shm:7000", to), (f"unix:{path}", "shm:vm-b:7000")
    server.settimeout(PATIENCE_S)
    with Forwarder(*rules[0], name="vm-b"), Forwarder(*rules[1], name="vm-a") as near:
        if side == "far":
            client = socket.create_connection(("127.0.0.1", near.port), PATIENCE_S)
        else:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(PATIENCE_S)
            client.connect(str(path))
        there, _ = server.accept()
        client.sendall(b"x" * 100_000)
        client.shutdown(socket.SHUT_WR)
        assert everything(there) == b"x" * 100_000
        there.sendall(b"y" * 100_000)
        there.close()
        assert everything(client) == b"y" * 100_000
        client.close()
    server.close()
    assert path.exists() == (side == "far")  # what the forwarder made, it removes


def test_a_socket_file_that_was_left_is_taken_over_and_a_live_one_is_not(
    shm_region: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Forwarder(f"unix:{path}", "shm:vm-b:1", name="vm-a"):
        done = subprocess.run(
            [*SHMSOCK, "forward", f"unix:{path}", "shm:vm-b:1"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"shmsock: cannot listen on unix:{path}: another process (or rule) listens there: stop it, or "
            "choose another port"
        ]


def test_a_taken_port_is_one_line(shm_region: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [*SHMSOCK, "forward", f"tcp:127.0.0.1:{port}", "shm:vm-b:1"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"shmsock: cannot listen on tcp:127.0.0.1:{port}: another process")
    assert len(done.stderr.splitlines()) == 1
    with Forwarder("shm:7000", "tcp:127.0.0.1:9", name="vm-b"):
        again = Process(*SHMSOCK, "forward", "shm:7000", "tcp:127.0.0.1:9", name="vm-b")
        assert again.wait() == 1
        assert [line.split(":")[1] for line in again.lines] == [" cannot listen on shm"]
        again.stop()


def test_a_region_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SHMSOCK, "forward", "--region", str(tmp_path / "no"), "shm:1", "tcp:127.0.0.1:9"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "no") in done.stderr


def test_open_connections_are_reset_when_it_stops(pair: Pair) -> None:
    client, server = pair.both()
    client.sendall(b"x")
    assert exactly(server, 1) == b"x"
    pair.near.stop()
    for end in (client, server):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        end.close()
    assert "1 connections" in pair.near.lines[-1] or "1 connections" in "".join(pair.near.lines[-3:])
    assert pair.near.child.returncode == 0


@pytest.mark.parametrize("uvloop", [True, False])
def test_a_mix_of_everything(
    shm_region: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uvloop: bool
) -> None:
    """Echoes, half-closes and resets, twelve at a time, of a byte to some megabytes: nothing is lost."""
    if not uvloop:
        (tmp_path / "uvloop.py").write_text("raise ImportError")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mixed = Pair()
    seen: list[str] = []
    threads = [threading.Thread(target=_mixed_server, args=(mixed.server, seen), daemon=True)]
    threads += [threading.Thread(target=_mixed_client, args=(mixed, n, seen), daemon=True) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(PATIENCE_S)
    for forwarder in (mixed.near, mixed.far):
        said = None
        for _ in range(200):  # until what was closed just now is counted
            mark = len(forwarder.lines)
            forwarder.send_signal(signal.SIGUSR1)
            said = forwarder.said(r"72 connections, (\d+) open, 0 failed, (\d+) reset", mark)
            if said[1] == "0":
                break
        assert said is not None
        assert (said[1], said[2]) == ("0", "48")
    # The server need not have seen those that were reset before they had come to it.
    assert (seen.count("echo"), seen.count("reset") >= 48, len(set(seen))) == (24, True, 2)
    mixed.close()


def _mixed_client(mixed: Pair, number: int, seen: list[str]) -> None:
    rng = random.Random(number)
    for turn in range(6):
        client = mixed.connect()
        data = rng.randbytes(rng.choice([1, 1000, 1 << 14, 70_000, 3 << 20]))
        client.sendall(b"%d" % (turn % 3) + len(data).to_bytes(4, "big"))
        if turn % 3 == 0:
            sender = threading.Thread(target=client.sendall, args=(data,))
            sender.start()
            if everything(client) == data:
                seen.append("echo")
            sender.join()
            client.close()
        elif turn % 3 == 1:  # the server resets it
            try:
                everything(client)
            except ConnectionResetError:
                seen.append("reset")
            client.close()
        else:
            client.sendall(data[: len(data) // 2 & 0x7FFF])  # bytes, and the reset right behind them
            reset(client)


def _mixed_server(server: socket.socket, seen: list[str]) -> None:
    with contextlib.suppress(OSError):  # closed
        while True:
            sock, _ = server.accept()
            threading.Thread(target=_mixed_answer, args=(sock, seen), daemon=True).start()


def _mixed_answer(sock: socket.socket, seen: list[str]) -> None:
    try:
        head = exactly(sock, 5)
        count = int.from_bytes(head[1:], "big")
        if head[:1] == b"1":
            reset(sock)
            seen.append("reset")
            return
        sock.sendall(exactly(sock, count))
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        sock.close()
    except ConnectionResetError:
        seen.append("reset")
        sock.close()
