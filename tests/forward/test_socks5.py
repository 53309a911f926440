"""`shmsock socks5`, by curl, proxychains, and by hand."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.forward.processes import PATIENCE_S, Forwarder, everything, exactly, program

PAGE = os.urandom(1 << 20)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(shm_region: Path, web: int) -> Iterator[Forwarder]:
    """A proxy, and a peer vm-b with a web server at port 8000."""
    with (
        Forwarder("shm:8000", f"tcp:127.0.0.1:{web}", "shm:8001", "tcp:127.0.0.1:1", name="vm-b", rules=2),
        Forwarder("--listen", "127.0.0.1:0", name="vm-a", command="socks5") as made,
    ):
        yield made


def fetch(port: int, url: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program("curl"), "-sS", "--max-time", "30", "--socks5-hostname", f"127.0.0.1:{port}", *options, url],
        capture_output=True,
        check=False,
    )


def test_curl(proxy: Forwarder, web: int) -> None:
    assert fetch(proxy.port, "http://vm-b.shm:8000/").stdout == PAGE
    assert fetch(proxy.port, f"http://127.0.0.1:{web}/").stdout == PAGE
    assert fetch(proxy.port, f"http://localhost:{web}/").stdout == PAGE
    unknown = fetch(proxy.port, "http://vm-c.shm:8000/")
    assert unknown.returncode == 97
    assert b"(4)" in unknown.stderr  # host unreachable
    refused = fetch(proxy.port, "http://vm-b.shm:8002/")
    assert refused.returncode == 97
    assert b"(5)" in refused.stderr
    proxy.said("to shm:vm-c:8000: not connected: no peer named 'vm-c'")


def test_proxychains(proxy: Forwarder, tmp_path: Path) -> None:
    chains, curl = program("proxychains4"), program("curl")
    config = tmp_path / "chains.conf"
    config.write_text(f"strict_chain\nproxy_dns\n[ProxyList]\nsocks5 127.0.0.1 {proxy.port}\n")
    url = "http://vm-b.shm:8000/"
    done = subprocess.run(
        [chains, "-q", "-f", config, curl, "-sS", "--max-time", "30", url], capture_output=True, check=False
    )
    assert done.stderr == b""
    assert done.stdout == PAGE


def asked(port: int, data: bytes) -> bytes:
    """Say that, and return all that is answered."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return everything(sock)
        except OSError:  # it had heard enough
            return b""


HELLO, OK = b"\5\1\0", b"\5\0"


def named(host: bytes, port: int, command: int = 1) -> bytes:
    return HELLO + struct.pack("!4B", 5, command, 0, 3) + bytes([len(host)]) + host + struct.pack("!H", port)


def test_by_hand(proxy: Forwarder, web: int) -> None:
    granted = OK + b"\5\0\0\1\0\0\0\0\0\0"
    request = b"GET / HTTP/1.0\r\n\r\n"  # sent before the answer came
    assert asked(proxy.port, named(b"vm-b.shm", 8000) + request).startswith(granted + b"HTTP/1.0 200")
    assert asked(proxy.port, named(b"VM-B.SHM.", 8000) + request).startswith(granted + b"HTTP/1.0 200")
    ipv4 = HELLO + b"\5\1\0\1\x7f\0\0\1" + struct.pack("!H", web)
    assert asked(proxy.port, ipv4 + request).startswith(granted + b"HTTP/1.0 200")
    mapped = HELLO + b"\5\1\0\4" + bytes(10) + b"\xff\xff\x7f\0\0\1" + struct.pack("!H", web)
    assert asked(proxy.port, mapped + request).startswith(granted + b"HTTP/1.0 200")
    for said, code in (
        (named(b"vm-c.shm", 8000), 4),
        (named(b"a b.shm", 8000), 4),
        (named(b"a..b", 8000), 4),
        (named(b"b\xfccher", 8000), 4),
        (named(b"x" * 64, 8000), 4),
        (named(b"vm-b.shm", 8002), 5),
        (HELLO + b"\5\1\0\1\x7f\0\0\1\0\1", 5),
        (named(b"vm-b.shm", 8000, command=2), 7),
        (HELLO + b"\5\1\0\x09", 8),
    ):
        assert asked(proxy.port, said)[:4] == OK + b"\5" + bytes([code]), said
    assert asked(proxy.port, b"\5\1\2") == b"\5\xff"  # a password alone


def test_in_pieces(proxy: Forwarder) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in named(b"vm-b.shm", 8000):
            sock.send(bytes([byte]))
        assert exactly(sock, 12)[3] == 0


def test_garbage_ends_that_client_alone(proxy: Forwarder) -> None:
    rng = random.Random(5)
    with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S) as good:
        good.sendall(named(b"vm-b.shm", 8000))
        assert exactly(good, 12)[3] == 0
        for n in range(300):
            begin = [b"", b"\5", HELLO, HELLO + b"\5\1\0", b"GET / HTTP/1.0\r\n\r\n", b"\4\1"][n % 6]
            asked(proxy.port, begin + rng.randbytes(rng.randrange(300)))
        good.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert exactly(good, 15) == b"HTTP/1.0 200 OK"
    assert fetch(proxy.port, "http://vm-b.shm:8000/").stdout == PAGE
    assert not [line for line in proxy.lines if "Traceback" in line or "unexpectedly" in line]


def test_only_shm(shm_region: Path, web: int) -> None:
    with Forwarder("--only-shm", "--listen", "127.0.0.1:0", name="vm-a", command="socks5") as proxy:
        assert asked(proxy.port, named(b"localhost", web))[:4] == OK + b"\5\2"
        assert asked(proxy.port, named(b"vm-b.shm", web))[:4] == OK + b"\5\4"
