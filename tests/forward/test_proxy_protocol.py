"""Who connects, told to the target: PROXY headers, and a source address per peer."""

from __future__ import annotations

import ipaddress
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from shmsock.forward.proxy_protocol import peer_address, proxy_header
from tests.forward.processes import PATIENCE_S, SHMSOCK, Pair, everything, exactly


def parsed_v1(sock: socket.socket) -> tuple[str, ...]:
    line = b""
    while not line.endswith(b"\r\n"):
        line += exactly(sock, 1)
        assert len(line) <= 107
    assert line.startswith(b"PROXY ")
    return tuple(line.decode().split()[1:])


def parsed_v2(sock: socket.socket) -> tuple[str, str, int, int, dict[int, bytes]]:
    assert exactly(sock, 12) == b"\r\n\r\n\0\r\nQUIT\n"
    what, family, length = struct.unpack("!BBH", exactly(sock, 4))
    assert what == 0x21
    body = exactly(sock, length)
    size = {0x11: 4, 0x21: 16, 0: 0}[family]
    source, destination = (ipaddress.ip_address(body[n * size : (n + 1) * size]) for n in range(2))
    ports = struct.unpack("!2H", body[2 * size : 2 * size + 4])
    rest, fields = body[2 * size + 4 :], {}
    while rest:
        kind, long = struct.unpack("!BH", rest[:3])
        fields[kind], rest = rest[3 : 3 + long], rest[3 + long :]
    return str(source), str(destination), *ports, fields


@pytest.fixture
def sections(shm_region: Path) -> dict[str, str]:
    """The forwarders of a pair attach in this order."""
    return {"vm-b": peer_address(0), "vm-a": peer_address(1)}


@pytest.mark.parametrize("side", ["near", "far"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_target_is_told(sections: dict[str, str], version: str, side: str) -> None:
    options = ("--proxy-protocol", version)
    pair = Pair(*(options if side == "near" else ()), far=options if side == "far" else ())
    client, server = pair.both()
    client.sendall(b"after")
    if version == "v1":
        kind, source, destination, *digits = parsed_v1(server)
        ports = [int(port) for port in digits]
        assert kind == "TCP4"
    else:
        source, destination, *ports, fields = parsed_v2(server)
        assert fields == ({0xE0: b"vm-a"} if side == "far" else {})
    if side == "near":
        assert (source, ports[0]) == client.getsockname()
        assert (destination, ports[1]) == client.getpeername()
    else:
        assert (source, destination, ports[1]) == (sections["vm-a"], sections["vm-b"], 7000)
    assert exactly(server, 5) == b"after"
    client.close()
    server.close()
    pair.close()


def test_the_target_speaks_first(shm_region: Path) -> None:
    pair = Pair(far=("--proxy-protocol", "v2"))
    client, server = pair.both()
    parsed_v2(server)  # comes without a word of the client
    server.sendall(b"hello")
    assert exactly(client, 5) == b"hello"
    client.close()
    assert everything(server) == b""
    server.close()
    pair.close()


def test_a_source_address_per_peer(sections: dict[str, str]) -> None:
    pair = Pair(far=("--source-per-peer",))
    client, server = pair.both()
    assert server.getpeername()[0] == sections["vm-a"]
    client.close()
    server.close()
    pair.close()
    refused = subprocess.run(
        [*SHMSOCK, "forward", "--source-per-peer", "tcp:127.0.0.1:0", "shm:b:1"],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "source_per_peer needs" in refused.stderr


def test_headers() -> None:
    four, six = ("10.0.0.1", 1), ("fe80::1%eth0", 2, 0, 3)
    assert proxy_header("v1", four, four) == b"PROXY TCP4 10.0.0.1 10.0.0.1 1 1\r\n"
    assert proxy_header("v1", six, ("::1", 3, 0, 0)) == b"PROXY TCP6 fe80::1 ::1 2 3\r\n"
    assert proxy_header("v1", four, ("::1", 3, 0, 0)) == b"PROXY TCP6 ::ffff:a00:1 ::1 1 3\r\n"
    assert proxy_header("v1", "", "/run/socket") == b"PROXY UNKNOWN\r\n"
    assert proxy_header("v2", "", "/run/socket")[12:] == b"\x21\0\0\0"
