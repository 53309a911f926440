"""UDP on one side, datagrams in shared memory on the other."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmsock.forward import datagrams, forwarder
from shmsock.forward.endpoints import parse
from shmsock.forward.rules import Rule
from tests.aio.conftest import until
from tests.forward.processes import PATIENCE_S, Forwarder


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(PATIENCE_S)
    return sock


class Udp:
    """udp -> shm -> udp."""

    def __init__(self, *options: str) -> None:
        self.server = udp()
        self.far_args = ("shm:53", f"udp:127.0.0.1:{self.server.getsockname()[1]}", *options)
        self.far = Forwarder(*self.far_args, name="vm-b")
        self.near = Forwarder("udp:127.0.0.1:0", "shm:vm-b:53", *options, name="vm-a")

    def client(self) -> socket.socket:
        sock = udp()
        sock.connect(("127.0.0.1", self.near.port))
        return sock

    def asked(self, client: socket.socket, data: bytes) -> tuple[str, int]:
        """Send, have it arrive, answer, have that arrive. Returns who the server saw."""
        client.send(data)
        seen, who = self.server.recvfrom(1 << 16)
        assert seen == data
        self.server.sendto(data[::-1], who)
        assert client.recv(1 << 16) == data[::-1]
        address: tuple[str, int] = who
        return address

    def close(self) -> None:
        self.server.close()
        self.near.stop()
        self.far.stop()


@pytest.fixture
def over(shm_region: Path) -> Iterator[Udp]:
    made = Udp()
    yield made
    made.close()


def test_each_client_has_an_endpoint_of_its_own(over: Udp) -> None:
    clients = [over.client() for _ in range(20)]
    for _ in range(3):
        seen = {over.asked(client, b"%d" % n + b"x" * n * 100) for n, client in enumerate(clients)}
        assert len(seen) == 20
    for size in (0, 1, 1400, 60000, 65507):
        over.asked(clients[0], b"y" * size)
    mark = len(over.near.lines)
    over.near.send_signal(signal.SIGUSR1)
    over.near.said(r"20 clients, 20 open, 0 errors, 0 dropped; 65 datagrams there, 65 back", mark)
    for client in clients:
        client.close()


def test_a_silent_client_is_forgotten(shm_region: Path) -> None:
    over = Udp("--idle-timeout", "0.1")
    with over.client() as client:
        first = over.asked(client, b"one")
        for _ in range(100):  # the forwarder's clock: each asks for a summary, until it has swept
            mark = len(over.near.lines)
            over.near.send_signal(signal.SIGUSR1)
            if over.near.said(r"clients, (\d) open", mark)[1] == "0":
                break
        assert over.asked(client, b"two")[1] != 0
        assert first[1] != 0
    over.close()


def test_more_clients_than_there_is_room_for(over: Udp) -> None:
    clients = [over.client() for _ in range(300)]
    for n, client in enumerate(clients):
        over.asked(client, b"%d" % n)
    over.asked(clients[0], b"again")
    mark = len(over.near.lines)
    over.near.send_signal(signal.SIGUSR1)
    over.near.said(r"301 clients, 256 open, 0 errors", mark)
    for client in clients:
        client.close()


def test_a_peer_that_comes_back_is_found(over: Udp) -> None:
    with over.client() as client:
        over.asked(client, b"one")
        over.far.stop()
        over.far = Forwarder(*over.far_args, name="vm-b")
        over.server.settimeout(0.2)
        for _ in range(100):
            client.send(b"two")  # datagrams are lost while nobody is there
            try:
                seen, who = over.server.recvfrom(10)
                break
            except TimeoutError:
                pass
        assert seen == b"two"
        over.server.sendto(b"back", who)
        assert client.recv(10) == b"back"


def test_nobody_there_is_counted(over: Udp) -> None:
    over.far.stop()
    with over.client() as client:
        client.send(b"x")
        over.near.said("udp:127.0.0.1:0 -> shm:vm-b:53: 127.0.0.1:.*no peer named 'vm-b'")


@pytest.mark.asyncio
async def test_a_flood_for_nobody_is_one_attempt(shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "PAUSE_S", 60)
    one = forwarder.Forwarder(name="vm-a")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    rule = Rule(parse(f"udp:127.0.0.1:{port}", listens=True), parse("shm:vm-b:53", listens=False))
    await one.carry_out([rule])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(50):
            client.sendto(b"x", ("127.0.0.1", port))
        await until(lambda: "50 dropped" in "".join(one.summary()))
    assert "1 clients, 1 open, 1 errors" in "".join(one.summary())
    await one.stop()
