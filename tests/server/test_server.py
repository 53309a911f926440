"""`shmsock ivshmem-server`, as a process, with clients that behave and clients that do not."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import json
import mmap
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner

from shmsock import region as regions
from shmsock.cli import cli
from shmsock.engine import layout as lay
from shmsock.engine.memory import Memory, native_core
from shmsock.errors import RegionError
from shmsock.region import open_file
from shmsock.region.file import FileRegion
from shmsock.region.ivshmem_protocol import Receiver, send_message
from shmsock.server import server as ivshmem_server
from shmsock.server import setup as ivshmem_setup
from shmsock.server.clients import Client
from shmsock.server.server import IvshmemServer
from shmsock.testing import make_region
from tests.commands.test_cli import good
from tests.region.conftest import NOBODY, in_child, open_files

SECONDS = 30
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Becomes the program, after a line of Python.
BECOME = "import os, resource, sys\n{}\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Server:
    """The program, which says when it is ready. Its log can be waited for."""

    def __init__(
        self,
        place: Path,
        *options: object,
        path: str | None = "s",
        region: object = "memfd",
        size: str | None = "2M",
        before: str = "",
        fds: tuple[int, ...] = (),
        abstract: bool = False,
    ) -> None:
        self.path = str(place / (path or "s"))
        self.lines: list[str] = []
        name = f"\0shmsock-test-{os.getpid()}-{id(self)}" if abstract else str(place / "notify")
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.settimeout(SECONDS)
        self.notices.bind(name)
        arguments = ["-m", "shmsock", "ivshmem-server", "--region", region, *options]
        arguments += ["--socket", self.path] if path else []
        arguments += ["--size", size] if size else []
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", BECOME.format(before)] if before else []), *map(str, arguments)],
            stderr=subprocess.PIPE,
            pass_fds=fds,
            env={**os.environ, "NOTIFY_SOCKET": name.replace("\0", "@"), "PYTHONWARNINGS": "error"},
            text=True,
        )
        try:
            assert self.notices.recv(100) == b"READY=1"
        except BaseException:
            self.kill()
            raise

    def log_until(self, text: str) -> str:
        """Its log up to the line that has `text` in it."""
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"no line with {text!r} in {self.lines}")

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def fds_fall_to(self, count: int) -> None:
        """The kernel may say that a client is gone before what it did not read is gone."""
        end = time.monotonic() + SECONDS
        while self.fds() != count:
            assert time.monotonic() < end, f"{self.fds()} descriptors, expected {count}"

    def stop(self, number: int = signal.SIGTERM) -> str:
        """The rest of its log."""
        self.process.send_signal(number)
        assert self.process.stderr is not None
        rest = self.process.stderr.read()
        assert self.process.wait(SECONDS) == 0, rest
        assert "Error" not in rest
        assert self.notices.recv(100) == b"STOPPING=1"
        return rest

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        self.notices.close()
        name = self.notices_path
        if name:
            Path(name).unlink(missing_ok=True)

    @property
    def notices_path(self) -> str:
        return os.path.join(os.path.dirname(self.path), "notify")


class Peer:
    """A client that behaves. It fails where the vectors of a peer do not come whole."""

    def __init__(self, path: str, vectors: int = 1) -> None:
        self.vectors = vectors
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(path)
        self.inbox = Receiver(self.sock)
        self.fds: dict[int, list[int]] = {}
        self.found: list[int] = []
        self.memory = -1

    def message(self) -> tuple[int, int]:
        while True:
            try:
                return self.inbox.receive()
            except BlockingIOError:
                assert select.select([self.sock], [], [], SECONDS)[0], "nothing came"

    def join(self) -> Peer:
        assert self.message() == (0, -1)
        self.id, none = self.message()
        assert none == -1
        number, self.memory = self.message()
        assert number == -1
        assert self.memory >= 0
        while self.id not in self.fds:
            number, came = self.news()
            assert came
            self.found.append(number)
        self.found.pop()
        return self

    def news(self) -> tuple[int, bool]:
        """Who came (True), with all vectors, or left."""
        number, fd = self.message()
        if fd < 0:
            for old in self.fds.pop(number):
                os.close(old)
            return number, False
        assert number not in self.fds
        self.fds[number] = [fd]
        while len(self.fds[number]) < self.vectors:
            again, fd = self.message()
            assert fd >= 0
            self.fds[number].append(fd)
            assert again == number
        return number, True

    def ended(self) -> bool:
        """Is the connection closed, and nothing more to be read?"""
        assert select.select([self.sock], [], [], SECONDS)[0]
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()
        self.inbox.close()
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)
        self.fds.clear()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Start = Callable[..., Server]


@pytest.fixture
def place() -> Iterator[Path]:
    before = open_files()
    with tempfile.TemporaryDirectory(prefix="shmsock-test-", dir="/dev/shm") as directory:
        yield Path(directory)
    assert open_files() == before


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    made: list[Server] = []

    def begin(*options: object, **more: Any) -> Server:
        made.append(Server(place, *options, **more))
        return made[-1]

    yield begin
    for server in made:
        server.kill()


@pytest.fixture
def joined() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def join(server: Server, vectors: int = 1) -> Peer:
        made.append(Peer(server.path, vectors))
        return made[-1].join()

    yield join
    for peer in made:
        peer.close()


Join = Callable[..., Peer]


# -- what it is for


def test_clients_meet_ring_and_part(start: Start, joined: Join) -> None:
    server = start("--vectors", 3, abstract=True)
    a = joined(server, 3)
    line = server.log_until("client 0")
    assert f"pid {os.getpid()} (" in line
    assert f"uid {os.getuid()} came; 1 connected" in line
    b = joined(server, 3)
    assert (a.id, a.found, b.id, b.found) == (0, [], 1, [0])
    assert a.news() == (1, True)
    for rings, rung in ((a, b), (b, a)):
        os.eventfd_write(rings.fds[rung.id][2], 1)
        assert [bool(select.select([fd], [], [], 0)[0]) for fd in rung.fds[rung.id]] == [False, False, True]
        assert not os.get_blocking(rung.fds[rung.id][0])
    with mmap.mmap(a.memory, 2 << 20) as one, mmap.mmap(b.memory, 2 << 20) as other:
        one[-5:] = b"hello"
        assert other[-5:] == b"hello"
        assert other[:8] == lay.MAGIC.to_bytes(8, "little")
    b.close()
    assert a.news() == (1, False)
    assert "left; 1 connected" in server.log_until("client 1, pid") + server.log_until("client 1, pid")
    c = joined(server, 3)
    assert (c.id, c.found) == (2, [0])  # a knows 1
    assert a.news() == (2, True)
    a.close()
    c.close()
    server.log_until("0 connected")
    assert joined(server, 3).id == 0  # for master=on


def test_a_client_that_never_reads_is_dropped_and_nobody_else_feels_it(start: Start, joined: Join) -> None:
    server = start("--vectors", 64, "--timeout", 0.7)
    peers: list[Peer] = []

    def one_more() -> None:
        before = [peer.id for peer in peers]
        came = joined(server, 64)
        assert [other for other in came.found if other != 5] == before
        assert [peer.news() for peer in peers] == [(came.id, True)] * len(peers)
        peers.append(came)

    for _ in range(5):
        one_more()
    with Peer(server.path, 64) as deaf:  # which is told more than fits into a connection
        assert [peer.news() for peer in peers] == [(5, True)] * 5
        one_more()
        peers.pop(2).close()
        assert [peer.news() for peer in peers] == [(2, False)] * 5
        assert [peer.news() for peer in peers] == [(5, False)] * 5
        assert "took no message for 0.7 s; 5 connected" in server.log_until("dropped")
        one_more()
        # What it finds, should it read after all: everything in order, cut off after a message.
        with pytest.raises(ConnectionResetError, match="closed the connection"):
            read_on(deaf)


def read_on(peer: Peer) -> None:
    """All that it was sent."""
    peer.join()
    while True:
        peer.news()


def test_bytes_from_a_client_are_its_end(start: Start, joined: Join) -> None:
    server = start()
    watcher = joined(server)
    for number, data, flags in ((1, b"x", 0), (2, bytes(100_000), 0), (3, b"x", socket.MSG_OOB)):
        rude = joined(server)
        assert watcher.news() == (number, True)
        rude.sock.setblocking(False)
        rude.sock.send(data, flags)
        assert watcher.news() == (number, False)
        assert rude.ended()
        assert "clients send none; 1 connected" in server.log_until("dropped")
    quiet = joined(server)
    quiet.sock.shutdown(socket.SHUT_WR)
    assert [watcher.news(), watcher.news()] == [(4, True), (4, False)]


def test_who_is_gone_again_at_once_costs_no_id_and_is_not_mentioned(start: Start, joined: Join) -> None:
    server = start()
    watcher = joined(server)
    server.process.send_signal(signal.SIGSTOP)
    for data in (b"GET / HTTP/1.0\r\n\r\n", b"") * 25:
        with socket.socket(socket.AF_UNIX) as passing:
            passing.connect(server.path)
            passing.send(data)
    server.process.send_signal(signal.SIGCONT)
    assert joined(server).id == 1
    assert watcher.news() == (1, True)
    assert "came and was dropped" in server.log_until("came and")
    assert "came and left" in server.log_until("came and")


def test_descriptors_from_a_client_are_closed(start: Start, joined: Join) -> None:
    server = start()
    joined(server)
    before = server.fds()
    rude = joined(server)
    read, write = os.pipe()
    fds = array.array("i", [write] * 100)
    rude.sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    os.close(write)
    assert os.read(read, 1) == b""  # the end: nobody has the other one any more
    os.close(read)
    server.log_until("dropped")
    server.fds_fall_to(before)


def test_one_process_takes_only_its_share(start: Start, joined: Join) -> None:
    server = start("--per-process", 3)
    mine = [joined(server) for _ in range(3)]
    for _ in range(20):
        with Peer(server.path) as refused:
            assert refused.ended()
    assert f"pid {os.getpid()} (" in server.log_until("refused: that process has 3 connections")
    assert in_child(lambda: Peer(server.path).join().found) == [0, 1, 2]
    assert mine[2].news() == (3, True)
    mine[0].close()
    assert mine[1].news()[0] == 2
    assert {mine[1].news() for _ in range(3)} == {(3, True), (3, False), (0, False)}
    assert joined(server).id == 4
    assert server.stop().count("was refused") < 10  # one line each is too many


def until_joined(server: Server) -> Peer:
    while True:
        peer = Peer(server.path)
        try:
            return peer.join()
        except ConnectionResetError:
            peer.close()


@pytest.mark.parametrize("options", [("--per-process", 3), ("--clients", 3)])
def test_who_was_dropped_keeps_its_place_while_it_keeps_what_it_was_sent(
    start: Start, options: tuple[object, ...]
) -> None:
    """For that, the kernel holds our user to account."""
    server = start(*options)
    rude = [Peer(server.path) for _ in range(3)]
    server.log_until("3 connected")
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [peer.sock.fileno()])) for peer in rude]
    server.process.send_signal(signal.SIGSTOP)
    for peer, own in zip(rude, fds, strict=True):  # its own end comes along, which must not keep that open
        for _ in range(3):
            peer.sock.sendmsg([b"x"], [own])
    server.process.send_signal(signal.SIGCONT)
    server.log_until("0 connected")
    with Peer(server.path) as refused:
        assert refused.ended()
    rude[0].close()
    with pytest.raises(ConnectionResetError):
        read_on(rude[1])
    with until_joined(server), until_joined(server), Peer(server.path) as refused:
        assert refused.ended()
    for peer in rude:
        peer.close()


def test_sixty_come_and_go(start: Start, joined: Join) -> None:
    server = start("--vectors", 2)
    watcher = joined(server, 2)
    server.log_until("client 0")
    before = server.fds()
    for turn in range(3):
        crowd = [joined(server, 2) for _ in range(60)]
        assert [peer.found for peer in crowd[::20]] == [sorted(watcher_ids(peer)) for peer in crowd[::20]]
        assert server.fds() == before + 60 * 3
        ids = range(1 + 60 * turn, 61 + 60 * turn)
        assert [watcher.news() for _ in ids] == [(number, True) for number in ids]
        for peer in crowd:
            peer.close()
        assert sorted(watcher.news() for _ in ids) == [(number, False) for number in ids]
        server.fds_fall_to(before)
    assert set(watcher.fds) == {0}


def watcher_ids(peer: Peer) -> set[int]:
    """All that came before it: the watcher, and those of its own turn."""
    first = 1 + (peer.id - 1) // 60 * 60
    return {0, *range(first, peer.id)}


# -- memory


def test_a_restart_keeps_the_memory_and_replaces_the_socket_file(
    start: Start, joined: Join, place: Path
) -> None:
    server = start(region=place / "region")
    file = place / "region"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_blocks * 512 >= 2 << 20
    with mmap.mmap(joined(server).memory, 0) as memory:
        memory[1 << 20 : (1 << 20) + 4] = b"kept"
        before = memory[:]
    server.kill()
    assert os.path.exists(server.path)
    again = start(region=file, size=None)
    assert "2 MiB, as it was" in again.log_until("listening on")
    with mmap.mmap(joined(again).memory, 0) as memory:
        assert memory[:] == before
    again.stop()
    assert not os.path.exists(server.path)


def test_a_file_of_zeros_is_formatted(start: Start, joined: Join, place: Path) -> None:
    file = place / "region"
    file.touch()
    os.truncate(file, 4 << 20)
    file.chmod(0o640)
    server = start("--peers", 5, region=file, size=None)
    line = server.log_until("listening on")
    assert line.endswith("4 MiB, formatted\n")
    assert file.stat().st_blocks * 512 == 4 << 20
    with mmap.mmap(joined(server).memory, 0) as memory:
        assert memory[:8] == lay.MAGIC.to_bytes(8, "little")
        assert memory[lay.H_ID] == 5  # the low byte of the id: for so many peers


@pytest.mark.parametrize("formatted", [False, True])
@pytest.mark.parametrize("size", ["4M", None])
def test_a_file_that_somebody_else_made(place: Path, formatted: bool, size: str | None) -> None:
    """It could be truncated under all that have it, or opened to everybody."""
    if os.geteuid():
        pytest.skip("takes root to give a file away")
    file = Path(make_region(place, size=4 << 20))
    if not formatted:
        file.write_bytes(bytes(4 << 20))
    before = file.read_bytes()
    os.chown(file, NOBODY, -1)
    status, said = run(place, region=file, size=size)
    assert (status, f"region {file} is owned by uid {NOBODY}" in said, "expected uid 0" in said) == (
        1,
        True,
        True,
    )
    assert file.read_bytes() == before


def test_a_file_of_root_is_trusted(place: Path) -> None:
    if os.geteuid():
        pytest.skip("takes root to become another user")
    file = Path(make_region(place, size=4 << 20))
    place.chmod(0o755)
    file.chmod(0o666)

    def title() -> str:
        store = ivshmem_setup.make_store(str(file), None)
        store.close()
        return store.title

    assert in_child(title, NOBODY).endswith("as it was, mode 0666: everybody can open it")


def test_a_name_that_moves_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is served, formatted and locked, though another file has its name by then."""
    file, other = place / "region", place / "other"
    for name in (file, other):
        name.write_bytes(bytes(4 << 20))
    identity = (file.stat().st_dev, file.stat().st_ino)
    opening = regions.open_file

    def moving(path: str) -> FileRegion:
        opened = opening(path)
        os.rename(other, path)
        return opened

    monkeypatch.setattr(regions, "open_file", moving)
    store = ivshmem_setup.make_store(str(file), None)
    try:
        for fd in (store.fd, store.lock_fd):
            assert (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == identity
        assert os.pread(store.fd, 8, 0) == lay.MAGIC.to_bytes(8, "little")
    finally:
        store.close()
    assert file.read_bytes() == bytes(4 << 20)


def test_a_stale_socket_of_somebody_else(place: Path) -> None:
    if os.geteuid():
        pytest.skip("takes root to give a file away")
    listening(place / "s").close()
    os.chown(place / "s", NOBODY, -1)
    status, said = run(place)
    assert (status, f"s is owned by uid {NOBODY}" in said) == (1, True)
    assert (place / "s").exists()


def test_a_memfd_is_all_there_and_sealed(start: Start, joined: Join) -> None:
    memory = joined(start(size="16M")).memory
    assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) == SEALS
    status = os.fstat(memory)
    assert (status.st_size, status.st_blocks * 512) == (16 << 20, 16 << 20)
    for size in (0, 32 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)


# -- the process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end(start: Start, joined: Join, number: int) -> None:
    server = start("--mode", "0660", before="os.umask(0o77)", region="memfd")
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o660
    peers = [joined(server), joined(server)]
    peers[0].news()
    assert "2 connected" in server.stop(number)
    assert [peer.ended() for peer in peers] == [True, True]
    assert not os.path.exists(server.path)


def test_a_socket_file_that_is_somebody_elses_by_now_stays(start: Start) -> None:
    server = start()
    os.unlink(server.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(server.path)
        server.stop()
        assert os.path.exists(server.path)


def test_few_descriptors(start: Start, joined: Join) -> None:
    """The soft limit becomes the hard one, and what that allows is what fits."""
    server = start(before="resource.setrlimit(resource.RLIMIT_NOFILE, (16, 44))")
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (44, 44)
    room = int(server.log_until("room for").split("room for ")[1].split()[0])
    assert 3 <= room <= 15
    peers = [joined(server) for _ in range(room)]
    with Peer(server.path) as refused:
        assert refused.ended()
    assert f"there are {room} clients" in server.log_until("refused")
    peers.pop(0).close()
    assert [peers[-1].news()[1]] == [False]
    assert joined(server).found == [peer.id for peer in peers]


def became(before: str, *options: str, fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A server that does not start."""
    return subprocess.run(
        [sys.executable, "-c", BECOME.format(before), "-m", "shmsock", "ivshmem-server", *options],
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_too_few_descriptors(place: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))"
    done = became(limit, "--region=memfd", "--size=2M", f"--socket={place}/s")
    assert done.returncode == 1
    assert done.stderr.startswith("shmsock: the limit of 24 open files leaves no room")
    assert done.stderr.count("\n") == 1
    assert not os.path.exists(f"{place}/s")


# -- systemd


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def connected(path: Path) -> socket.socket:
    with listening(path):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
    return sock


def datagrams(path: Path) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def a_file(path: Path) -> IO[bytes]:
    return path.open("wb")


def passed(fd: int, count: str = "1") -> str:
    return (
        f"os.dup2({fd}, 3); "
        f"os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='{count}', LISTEN_FDNAMES='x')"
    )


def test_socket_activation(start: Start, joined: Join, place: Path) -> None:
    with listening(place / "s") as sock:
        for _ in range(2):  # a second server takes over what is in the backlog
            with Peer(str(place / "s")) as early:
                server = start(path=None, before=passed(sock.fileno()), fds=(sock.fileno(),))
                early.join()
                assert early.id == 0
                assert joined(server).found == [0]
                assert early.news() == (1, True)
                server.stop()
                assert early.ended()
            server.kill()
        assert (place / "s").exists()


@pytest.mark.parametrize(
    ("made", "count", "options", "status", "text"),
    [
        (listening, "2", [], 1, "LISTEN_FDS=2: expected 1"),
        (datagrams, "1", [], 1, "not a listening UNIX stream socket"),
        (connected, "1", [], 1, "not a listening UNIX stream socket"),
        (a_file, "1", [], 1, "descriptor 3 is no socket"),
        (listening, "1", ["--socket", "/elsewhere"], 2, "leave --socket out"),
    ],
)
def test_bad_socket_activation(
    place: Path,
    made: Callable[[Path], socket.socket | IO[bytes]],
    count: str,
    options: list[str],
    status: int,
    text: str,
) -> None:
    with made(place / "s") as sock:
        fd = sock.fileno()
        done = became(passed(fd, count), "--region=memfd", "--size=2M", *options, fds=(fd,))
    assert done.returncode == status
    assert text in done.stderr


def test_what_was_meant_for_another_process_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert ivshmem_setup.activated() is None
    assert "LISTEN_FDS" not in os.environ


# -- bad input


def run(place: Path, **options: object) -> tuple[int, str]:
    """Status and message of a server that does not start. Without its parameters: good ones."""
    given = {"socket": place / "s", "region": "memfd", "size": "2M", **options}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    done = CliRunner().invoke(cli, ["ivshmem-server", *words], prog_name="shmsock")
    assert done.exit_code == 2 or done.stderr.count("\n") == 1, done.output
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vectors": 0}, "0 is not in the range 1<=x<=64"),
        ({"vectors": 65}, "65 is not in the range 1<=x<=64"),
        ({"size": "60M"}, "no power of two"),
        ({"size": "much"}, "no size"),
        ({"size": None}, "takes a --size"),
        ({"mode": "0777"}, "no mode"),
        ({"peers": 65}, "65 is not in the range"),
        ({"clients": 1}, "1 is not in the range"),
        ({"timeout": 0}, "0.0 is not in the range"),
        ({"socket": None}, "--socket is missing"),
        ({"region": None}, "--region"),
    ],
)
def test_bad_options(place: Path, options: dict[str, object], text: str) -> None:
    status, said = run(place, **options)
    assert status == 2
    assert text in said


def test_bad_regions(place: Path) -> None:
    file = place / "region"

    def said(**options: object) -> str:
        status, text = run(place, **{"region": file, **options})
        assert status == 1
        assert not os.path.exists(place / "s")
        return text

    assert "does not exist: give a size" in said(size=None)
    assert f"nor does the directory {place}/none" in said(region=place / "none" / "x")
    assert "is a directory" in said(region=place)
    assert "too few for a region of 64 peers" in said(size="1M", peers=64)
    assert "too few for a region" in said(region="memfd", size="64K")
    assert "that is served" in said(region="pci:00:04.0")
    file.write_bytes(b"something else" + bytes((2 << 20) - 14))
    assert "expected 0x314b434f534d4853: it holds something else" in said()
    file.write_bytes(bytes(5000))
    os.truncate(file, 2 << 20)
    with open(file, "r+b") as late:
        late.seek(-1, os.SEEK_END)
        late.write(b"x")
    assert "something else further on" in said()
    assert file.read_bytes()[:8] == bytes(8)
    file.write_bytes(bytes(3 << 20))
    assert "3 MiB, expected the 2 MiB asked for" in said()
    assert "expected a power of two" in said(size=None)
    os.unlink(file)
    formatted = make_region(place, size=4 << 20)
    os.truncate(formatted, 2 << 20)
    assert "truncated" in said(region=formatted, size=None)
    os.truncate(formatted, 8 << 20)
    assert "was formatted with 4 MiB and has 8 MiB" in said(region=formatted, size=None)
    with open(formatted, "r+b") as old:
        old.seek(lay.H_VERSION)
        old.write(b"\1")
    assert "format version 1" in said(region=formatted, size=None)


def test_bad_sockets(place: Path) -> None:
    assert run(place, socket=place / "none" / "s") == (
        1,
        f"shmsock: cannot make socket {place}/none/s: there is no directory {place}/none; make it first\n",
    )
    status, said = run(place, socket=place / ("x" * 108))
    assert (status, "too long for a socket's path, expected at most 107" in said) == (1, True)
    (place / "s").write_text("a file")
    status, said = run(place)
    assert (status, "is no socket" in said, (place / "s").read_text()) == (1, True, "a file")
    (place / "s").unlink()
    with listening(place / "s") as sock:
        for _ in range(3):  # also when it has no room for one more to connect
            status, said = run(place)
            assert (status, "another server listens there" in said) == (1, True)
            sock.listen(0)
    assert (place / "s").exists()


def test_one_server_for_a_file(start: Start, place: Path) -> None:
    server, file = start(region=place / "region"), place / "region"
    status, said = run(place, socket=place / "other", region=file, size=None)
    assert (status, "is served by another ivshmem server already" in said) == (1, True)
    created = CliRunner().invoke(cli, ["create", str(file), "--size", "2M", "--force"], prog_name="shmsock")
    assert (created.exit_code, "is served by an ivshmem server" in created.stderr) == (1, True)
    server.kill()  # the lock falls with it, though clients may have the file still
    start(region=file, size=None).stop()


PEER = """
import asyncio, sys, shmsock
async def main():
    async with shmsock.attach(sys.argv[1], name=sys.argv[2]):
        print("attached", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""


def test_info_tells_doorbells_of_a_former_server(start: Start, place: Path) -> None:
    """A guest cannot tell that the server went: its section goes on to name an id that is nobody's, or
    another's."""

    def told(region: object) -> tuple[bool, dict[str, bool]]:
        content = json.loads(good("info", region, "--json"))["regions"][0]["content"]
        found = {s["name"]: s["doorbell_gone"] for s in content["sections"] if s["doorbell"]}
        return "of a former ivshmem server" in good("info", region), found

    file = place / "region"
    server = start(region=file, size="4M")
    bells = f"ivshmem:{server.path}"
    with attached(bells, "host"):
        assert told(file) == (False, {"host": False})
        assert told(bells) == (False, {"host": False})
        with attached(file, "guest") as guest:  # as one that has a doorbell, by the device
            content = json.loads(good("info", file, "--json"))["regions"][0]["content"]
            (section,) = [s["number"] for s in content["sections"] if s["pid"] == guest.pid]
            with open_file(str(file)) as opened:
                memory = Memory(native_core(), opened.mmap)
                memory.store(lay.read_layout(memory).section(section) + lay.DOORBELL, 7 << 32 | 1)
                memory.release()
            assert told(bells) == (True, {"host": False, "guest": True})
            assert told(file) == (False, {"host": False, "guest": False})  # that cannot be known here
            server.kill()
            assert told(file)[0]
            start(region=file, size=None)
            assert told(bells)[1]["guest"]


@contextlib.contextmanager
def attached(region: object, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a node there."""
    argv = [sys.executable, "-c", PEER, str(region), name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        yield process
        process.communicate()


def test_more_memory_than_there_is(place: Path) -> None:
    status, said = run(place, size="1024T")
    assert (status, "of memory are free: use a smaller size" in said) == (1, True)


def test_no_permission_for_the_socket(place: Path) -> None:
    if os.geteuid() == 0:
        place.chmod(0o755)
        error, code = in_child(lambda: ivshmem_setup.listen(f"{place}/s"), NOBODY)
    else:
        place.chmod(0o500)
        error, code = in_child(lambda: ivshmem_setup.listen(f"{place}/s"))
        place.chmod(0o700)
    assert code == errno.EACCES
    assert "no permission to make or replace socket" in str(error)


# -- what is left unread


@pytest.mark.parametrize(("total", "clients"), [(15000, 1024), (768, 199), (48, 7), (400_000, 30)])
def test_all_together_leave_no_more_unread_than_there_may_be(total: int, clients: int) -> None:
    share = ivshmem_setup.Unread(total, clients)
    assert 2 <= share.clients <= clients
    extras, fits = [], []
    for _ in range(share.clients):
        near, far = socket.socketpair()
        with near, far:
            extras.append(share.take(near))
            near.setblocking(False)
            count = 0
            with contextlib.suppress(BlockingIOError):
                while count < 1000:
                    near.send(bytes(8))
                    count += 1
            fits.append(count)
    assert sum(fits) <= total
    assert sum(fits) >= min(total // 2, 100 * clients)
    assert fits[0] == max(fits)
    for extra in extras:
        share.give_back(extra)
    with socket.socket(socket.AF_UNIX) as again:
        assert share.take(again) == extras[0]


# -- in a program of one's own


@pytest.mark.asyncio
async def test_as_a_class(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with IvshmemServer(place / "s", "memfd", size=2 << 20, vectors=2, clients=2) as server:
        released, release, spare = asyncio.Event(), server._release, server._unread._spare

        def releasing(client: Client) -> None:
            release(client)
            released.set()

        monkeypatch.setattr(server, "_release", releasing)
        with Peer(f"{place}/s", 2) as peer:
            await asyncio.to_thread(peer.join)
            assert server.connected == 1
            assert server._unread._spare < spare
        await asyncio.wait_for(released.wait(), SECONDS)
        assert server._unread._spare == spare
    assert server.connected == 0
    await server.aclose()
    assert not (place / "s").exists()


@pytest.mark.asyncio
async def test_joining_and_leaving_without_end(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes a share of the new ids, then used ones, of which those who were here are not told again."""
    monkeypatch.setattr(ivshmem_server, "_SHARE", 3)
    async with IvshmemServer(place / "s", "memfd", size=2 << 20) as server:

        def churn(turns: int) -> Iterator[int]:
            """The ids that come up. Each is known to be gone when the next comes."""
            for _ in range(turns):
                with Peer(path) as peer:
                    yield peer.join().id
                assert left.acquire(timeout=SECONDS)

        path, lose, left = f"{place}/s", server._lose, threading.Semaphore(0)

        def losing(client: Client, why: str) -> None:
            lose(client, why)
            left.release()

        monkeypatch.setattr(server, "_lose", losing)
        with Peer(path) as watcher:
            await asyncio.to_thread(watcher.join)
            assert await asyncio.to_thread(list, churn(6)) == [1, 2, 1, 2, 1, 2]
            assert "has an id that was in use before" in caplog.text
            with Peer(path) as late:
                assert (await asyncio.to_thread(late.join)).id == 1
                monkeypatch.setattr(ivshmem_server, "_SHARE", 100)
                assert await asyncio.to_thread(list, churn(1)) == [3]
                news = [(1, True), (1, False), (2, True), (2, False), (3, True), (3, False)]
                assert [watcher.news() for _ in news] == news
                assert late.found == [0]
                assert [late.news(), late.news()] == [(3, True), (3, False)]


@pytest.mark.parametrize("bad", [{"vectors": 0}, {"vectors": 65}, {"clients": 1}, {"patience": 0}])
def test_bad_parameters(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad.values()))}.* asked for, expected"):
        IvshmemServer("s", "memfd", **bad)


@pytest.mark.asyncio
async def test_a_failed_start_leaves_nothing(place: Path) -> None:
    with pytest.raises(RegionError, match="give one"):
        await IvshmemServer(place / "s", "memfd").start()
    assert not (place / "s").exists()


@pytest.mark.asyncio
async def test_a_kernel_without_room_is_no_fault_of_the_clients(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ETOOMANYREFS: descriptors under way are counted per user, be they ours or not."""
    real, full = send_message, False

    def send(sock: socket.socket, number: int, fd: int | None = None) -> None:
        if full and fd is not None:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        real(sock, number, fd)

    monkeypatch.setattr("shmsock.server.clients.send_message", send)
    async with IvshmemServer(place / "s", "memfd", size=2 << 20, patience=0.01) as server:
        with Peer(path := f"{place}/s") as reader:
            await asyncio.to_thread(reader.join)
            full = True
            tried, try_held, tries = asyncio.Event(), server._try_held, []

            def trying() -> None:
                tries.append(1)
                try_held()
                if len(tries) == 3:  # longer than the patience
                    tried.set()

            monkeypatch.setattr(server, "_try_held", trying)
            with Peer(path) as newcomer:
                await asyncio.wait_for(tried.wait(), SECONDS)
                assert server.connected == 2
                full = False
                await asyncio.to_thread(newcomer.join)
                assert newcomer.found == [0]
                assert await asyncio.to_thread(reader.news) == (1, True)


@pytest.mark.asyncio
async def test_without_descriptors_newcomers_wait(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with IvshmemServer(place / "s", "memfd", size=2 << 20) as server:
        paused, pause, pauses = asyncio.Event(), server._pause, []

        def pausing(error: OSError) -> None:
            pauses.append(error)
            pause(error)
            paused.set()

        monkeypatch.setattr(server, "_pause", pausing)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with Peer(f"{place}/s") as first:
            await asyncio.to_thread(first.join)
            with Peer(f"{place}/s") as second:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                try:
                    await asyncio.wait_for(paused.wait(), SECONDS)
                    for _ in range(100):
                        await asyncio.sleep(0)
                    assert len(pauses) == 1  # it does not ask all the time
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await asyncio.to_thread(second.join)
                assert second.found == [0]
    assert "cannot accept clients: Too many open files" in caplog.text
