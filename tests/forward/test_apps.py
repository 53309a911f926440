"""Real servers and their own tools: nginx and wrk, redis, sshd and scp. (SHMSOCK_LONG=1: more of it.)"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forward.processes import LONG, Forwarder, Pair, Process, program

REQUESTS = 100_000 if LONG else 10_000
COPY = (1 << 30) if LONG else (64 << 20)

NGINX = """
daemon off; master_process on; worker_processes 1; pid {path}/pid; error_log {path}/error.log;
{user}
events {{ worker_connections 1024; }}
http {{
    access_log off; default_type application/octet-stream; keepalive_requests 1000000;
    client_body_temp_path {path}/t1; proxy_temp_path {path}/t2; fastcgi_temp_path {path}/t3;
    uwsgi_temp_path {path}/t4; scgi_temp_path {path}/t5;
    server {{ listen unix:{path}/http; root {path}/root; }}
    server {{
        listen unix:{path}/proxy proxy_protocol;
        location / {{ return 200 "$proxy_protocol_addr $proxy_protocol_port\\n"; }}
    }}
}}
"""


def until(connects: Path, process: Process) -> None:
    """Wait until somebody listens there; a server that is not up refuses at once."""
    for _ in range(100_000):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(connects))
                return
            except OSError:
                assert process.child.poll() is None, process.lines
    raise AssertionError(process.lines)


@pytest.fixture
def nginx(shm_region: Path, tmp_path: Path) -> Iterator[Path]:
    """Serves small.txt and large.bin at the UNIX socket http, and at proxy what a PROXY header says."""
    server = program("nginx")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "small.txt").write_bytes(b"x" * 100)
    (tmp_path / "root" / "large.bin").write_bytes(os.urandom(10 << 20))
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    (tmp_path / "conf").write_text(NGINX.format(path=tmp_path, user=user))
    args = ("-c", str(tmp_path / "conf"), "-e", str(tmp_path / "error.log"), "-p", str(tmp_path))
    with Process(server, *args) as process:
        until(tmp_path / "http", process)
        yield tmp_path


def wrk(port: int, file: str, *, seconds: str, connections: int = 20) -> str:
    tool = program("wrk")
    url = f"http://127.0.0.1:{port}/{file}"
    done = subprocess.run(
        [tool, "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "20s", url],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_nginx_behind_a_forward_fails_no_request(nginx: Path) -> None:
    pair = Pair(target=f"unix:{nginx / 'http'}")
    done = 0
    while done < REQUESTS:
        said = wrk(pair.port, "small.txt", seconds="2s")
        assert "Socket errors" not in said, said
        assert "Non-2xx" not in said, said
        found = re.search(r"(\d+) requests in", said)
        assert found is not None, said
        done += int(found[1])
    content = subprocess.run(
        [program("curl"), "-sS", "--max-time", "60", f"http://127.0.0.1:{pair.port}/large.bin"],
        capture_output=True,
        check=True,
    ).stdout
    assert content == (nginx / "root" / "large.bin").read_bytes()
    pair.close()


def test_a_peer_that_is_killed_under_load_resets_its_clients(nginx: Path) -> None:
    pair = Pair(target=f"unix:{nginx / 'http'}")
    for _ in range(3):
        clients = [pair.connect() for _ in range(10)]
        for client in clients:  # in the middle of the answer: it is larger than all buffers
            client.sendall(b"GET /large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(1)
        pair.far.stop(signal.SIGKILL)
        for client in clients:
            with pytest.raises(ConnectionResetError):
                drain(client)
            client.close()
        pair.far = Forwarder(*pair.far_args, name="vm-b")
        with pair.connect() as client:
            client.sendall(b"GET /small.txt HTTP/1.0\r\n\r\n")
            assert drain(client) > 100
    assert pair.near.child.poll() is None
    pair.close()


def drain(sock: socket.socket) -> int:
    count = 0
    while data := sock.recv(1 << 18):
        count += len(data)
    return count


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nginx_understands_the_proxy_header(nginx: Path, version: str) -> None:
    pair = Pair("--proxy-protocol", version, target=f"unix:{nginx / 'proxy'}")
    with pair.connect() as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        said = b""
        while data := client.recv(1 << 16):
            said += data
        host, port = client.getsockname()
        assert said.endswith(f"{host} {port}\n".encode())
    pair.close()


def test_redis_behind_a_forward(shm_region: Path, tmp_path: Path) -> None:
    server, cli, benchmark = program("redis-server"), program("redis-cli"), program("redis-benchmark")
    path = tmp_path / "redis"
    with Process(
        server, "--port", "0", "--unixsocket", str(path), "--save", "", stdout=subprocess.DEVNULL
    ) as redis:
        until(path, redis)
        pair = Pair(target=f"unix:{path}")
        port = ["-p", str(pair.port)]

        def run(*args: str) -> str:
            done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
            assert (done.returncode, done.stderr) == (0, ""), done
            return done.stdout

        assert run(cli, *port, "set", "key", "value" * 10_000) == "OK\n"
        assert run(cli, *port, "get", "key") == "value" * 10_000 + "\n"
        tests = ["-t", "set,get", "-n", str(REQUESTS), "-q"]
        for more in ([], ["-P", "100"], ["-d", "100000", "-n", "500"]):
            said = run(benchmark, *port, *tests, *more)
            assert said.count("requests per second") == 2, said
        pair.close()


@pytest.fixture
def sshd(shm_region: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """sshd at a port of its own, with keys of its own."""
    server, keygen = program("sshd"), program("ssh-keygen")
    for key in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    sftp = next((p for p in Path("/usr/lib").glob("**/sftp-server")), "internal-sftp")
    (tmp_path / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nPidFile {tmp_path}/pid\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        f"PermitRootLogin yes\nSubsystem sftp {sftp}\nMaxStartups 100\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where it locks itself in
    with Process(server, "-D", "-e", "-f", str(tmp_path / "config")) as process:
        process.said("Server listening on")
        with Forwarder("shm:22", f"tcp:127.0.0.1:{port}", name="vm-b"):
            proxy = f"{sys.executable} -m shmsock nc %h %p"
            yield {
                "options": [
                    "-q", "-i", str(tmp_path / "user"), "-o", f"ProxyCommand={proxy}",
                    "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known",
                    "-o", "BatchMode=yes", "-F", "none",
                ],
                "host": f"{getpass.getuser()}@vm-b",
            }  # fmt: skip


def test_scp_through_nc(sshd: dict[str, Any], tmp_path: Path) -> None:
    scp = program("scp")
    piece, digest = os.urandom(1 << 20), hashlib.sha256()
    with open(tmp_path / "file", "wb") as file:
        for _ in range(COPY >> 20):
            file.write(piece)
            digest.update(piece)
    for source, to in (
        (tmp_path / "file", f"{sshd['host']}:{tmp_path}/there"),
        (f"{sshd['host']}:{tmp_path}/there", tmp_path / "back"),
    ):
        done = subprocess.run(
            [scp, *sshd["options"], source, to], capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    for name in ("there", "back"):
        with open(tmp_path / name, "rb") as file:
            seen = hashlib.sha256()
            while data := file.read(1 << 20):
                seen.update(data)
        assert seen.digest() == digest.digest()
        (tmp_path / name).unlink()
    (tmp_path / "file").unlink()


def test_ssh_through_nc(sshd: dict[str, Any]) -> None:
    ssh = program("ssh")
    done = subprocess.run(
        [ssh, *sshd["options"], sshd["host"], "cat; exit 7"],
        input=b"\0\xff" * 100_000, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (7, b"")
    assert done.stdout == b"\0\xff" * 100_000
