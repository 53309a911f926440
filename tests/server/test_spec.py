"""`shmsock ivshmem-server` beside the protocol's specification, and clients that mean it harm."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server import spec_client
from tests.server.spec_client import (
    MESSAGE,
    PATIENCE,
    Books,
    Client,
    Follower,
    Message,
    News,
    ProtocolError,
    ServerGone,
)

MEGABYTE = 1 << 20
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
STAYS = 8 * MEGABYTE  # how much of the server's own memory may have grown after an attack


class Server:
    """The server as a process, ready when this returns."""

    def __init__(
        self,
        place: Path,
        *options: object,
        region: str | Path = "memfd",
        size: str = "4M",
        vectors: int = 2,
        fds: int = 0,
        user: int = 0,
    ) -> None:
        self.path, self.vectors = place / "socket", vectors
        self.log = place / "log"
        argv = [*COMMAND, "--socket", str(self.path), "--region", str(region)]
        argv += ["--size", size, "--vectors", str(vectors), *map(str, options)]
        if fds:
            argv = ["prlimit", f"--nofile={fds}:{fds}", *argv]
        if user:
            os.chown(place, user, user)
            # It still has to get at Python, wherever that is.
            caps = [f"--{kind}={'-all,' * (kind == 'bounding-set')}+dac_read_search" for kind in CAPS]
            argv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *caps, *argv]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, self.log.open("ab") as log:
            notify = place / "notify"
            notify.unlink(missing_ok=True)
            told.bind(str(notify))
            notify.chmod(0o666)
            env = {**os.environ, "NOTIFY_SOCKET": str(notify)}
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, env=env)
            self.pid = self.process.pid
            try:
                self.wait_ready(told)
            except BaseException:
                self.process.kill()
                self.process.wait()
                raise

    def wait_ready(self, told: socket.socket) -> None:
        ended = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(told, select.POLLIN)
            poll.register(ended, select.POLLIN)
            while True:
                ready = dict(poll.poll(PATIENCE * 1000))
                if told.fileno() not in ready:
                    how = "ended" if ready else "does not say READY=1"
                    raise AssertionError(f"the server {how}: {self.log.read_text()}")
                if b"READY=1" in told.recv(4096).splitlines():
                    return
        finally:
            os.close(ended)

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Bytes of its own that are in use: the shared memory is not counted."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon in /proc/PID/status")

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def check_idle(self) -> None:
        """It does not spin: over a while in which nothing happens, nearly no CPU time."""
        before, began = self.cpu(), time.monotonic()
        select.poll().poll(300)
        assert self.cpu() - before < 0.4 * (time.monotonic() - began)

    def settle(self, fds: int, memory: int) -> None:
        eventually(lambda: self.fds() == fds, lambda: f"{self.fds()} fds, expected {fds}")
        eventually(lambda: self.memory() < memory + STAYS, lambda: f"{self.memory()} B, before {memory} B")

    def join(self, *, keep: bool = True) -> Client:
        client = Client(self.path, self.vectors, keep=keep)
        try:
            return client.handshake()
        except BaseException:
            client.close()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """SIGTERM ends it, with status 0 and nothing left behind."""
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(PATIENCE) == 0, self.log.read_text()
            assert not self.path.exists()
        assert "Traceback" not in self.log.read_text()


CAPS = ["inh-caps", "ambient-caps", "bounding-set"]
COMMAND = [sys.executable, "-m", "shmsock", "ivshmem-server"]


def eventually(true: Callable[[], bool], what: Callable[[], str]) -> None:
    """For what /proc shows, where nothing tells that it changed."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what()
        select.poll().poll(10)


@pytest.fixture
def place() -> Iterator[Path]:
    """In /dev/shm: region files belong there, and paths of sockets must be short."""
    made = Path(tempfile.mkdtemp(prefix="shmsock-spec-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def many_fds() -> Iterator[int]:
    """As many fds as this process may have, for tests in which each of many clients holds those of all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 100_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def start(place: Path, many_fds: int) -> Iterator[Callable[..., Server]]:
    """Starts servers; they are ended, and must end well."""
    servers: list[Server] = []

    def start(*options: object, **named: Any) -> Server:
        servers.append(Server(place, *options, **named))
        return servers[-1]

    yield start
    try:
        for server in servers:
            server.end()
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def later() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


class Pair:
    """Two honest clients that are connected all the time."""

    def __init__(self, server: Server, one: Follower, two: Follower) -> None:
        self.server, self.one, self.two = server, one, two

    def bells(self) -> None:
        """Every vector of each, rung by the other: heard there, and nowhere else."""
        for me, peer in (self.one, self.two), (self.two, self.one):
            for vector in range(self.server.vectors):
                me.client.ring(peer.id, vector)
                assert peer.client.rung(vector, PATIENCE) == 1
                assert heard(me.client) == heard(peer.client) == [0] * self.server.vectors
        self.one.check()
        self.two.check()

    def wait(self, true: Callable[[Books], bool], what: str) -> None:
        self.one.wait(true, what)
        self.two.wait(true, what)

    def wait_here(self, *ids: int) -> None:
        self.one.wait_here(*ids)
        self.two.wait_here(*ids)

    def wait_gone(self, *ids: int) -> None:
        self.one.wait_gone(*ids)
        self.two.wait_gone(*ids)

    def welcome(self) -> int:
        """A newcomer is served, rings both and is rung by both, and leaves."""
        with self.server.join() as new:
            self.wait_here(new.id)
            for vector in range(self.server.vectors):
                for old in self.one, self.two:
                    new.ring(old.id, vector)
                    assert old.client.rung(vector, PATIENCE) == 1
                    old.client.ring(new.id, vector)
                    assert new.rung(vector, PATIENCE) == 1
            assert os.fstat(new.books.memory).st_ino == os.fstat(self.one.books.memory).st_ino
        self.wait_gone(new.id)
        return new.id


@contextlib.contextmanager
def program(server: Server, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The client as a process; killed at the end of the block, if it is still there."""
    argv = [sys.executable, spec_client.__file__, server.path, server.vectors, *arguments]
    with subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(client: Client) -> list[int]:
    return [client.rung(vector) for vector in range(client.books.vectors)]


@contextlib.contextmanager
def unharmed(server: Server) -> Iterator[Pair]:
    """Whatever happens within: a pair that was there goes on, newcomers are served, and nothing stays."""
    with Follower(server.path, server.vectors) as one, Follower(server.path, server.vectors) as two:
        pair = Pair(server, one, two)
        one.wait_here(two.id)
        fds = server.fds()
        pair.bells()
        pair.welcome()
        pair.welcome()
        memory = server.memory()
        yield pair
        pair.bells()
        pair.welcome()
        pair.wait(lambda books: len(books.peers) == 1, "all others leave")
        pair.bells()
        server.settle(fds, memory)
        # Whoever came has left, and both saw the same in the same order.
        assert one.books.news[1:] == two.books.news
        came = [news.id for news in two.books.news if news.came]
        assert sorted(came) == sorted(two.books.gone)
        assert server.process.poll() is None


# To the byte.


def numbers(client: Client) -> list[tuple[int, int]]:
    return [(message.value, message.fds) for message in client.log]


@pytest.mark.parametrize("vectors", [1, 3, 64])
def test_every_message(start: Callable[..., Server], later: contextlib.ExitStack, vectors: int) -> None:
    server = start(vectors=vectors)
    clients: list[Client] = []
    expected: list[list[Message]] = []

    def message(value: int, fds: int) -> Message:
        return Message(value.to_bytes(8, "little", signed=True), fds)

    for there in range(6):
        new = later.enter_context(server.join())
        assert new.log[0] == (bytes(8), 0)
        assert new.log[2] == (b"\xff" * 8, 1)
        assert 0 <= new.id <= 0xFFFF
        assert new.id not in [client.id for client in clients]
        if not there:
            assert new.id == 0  # QEMU's master=on wants it
        assert len(new.books.found) == there
        said = [message(0, 0), message(new.id, 0), message(-1, 1)]
        for found in new.books.found:
            said += [message(found, 1)] * vectors
        said += [message(new.id, 1)] * vectors
        assert sorted(new.books.found) == sorted(client.id for client in clients)
        for words in expected:
            words += [message(new.id, 1)] * vectors
        clients.append(new)
        expected.append(said)
    order = random.Random(vectors).sample(range(6), 4)
    left = [index for index in range(6) if index not in order]
    for count, index in enumerate(order, 1):
        gone = clients[index]
        gone.until(lambda books, want=6 + count - 2: len(books.peers) + 2 * len(books.gone) == want)  # type: ignore[misc]
        assert gone.log == expected[index]
        gone.close()
        for other in set(range(6)) - set(order[:count]):
            expected[other].append(message(gone.id, 0))
        clients[left[0]].until(lambda books, id=gone.id: id in books.gone)  # type: ignore[misc]
    late = later.enter_context(server.join())
    assert late.id not in [client.id for client in clients]
    assert sorted(late.books.found) == [clients[index].id for index in left]
    for index in left:
        expected[index] += [message(late.id, 1)] * vectors
    server.end()
    for index in left:
        clients[index].until_eof()
        assert clients[index].log == expected[index]
    late.until_eof()
    assert len(late.log) == 3 + 3 * vectors


@pytest.mark.parametrize("vectors", [1, 3, 64])
def test_eventfds_are_whose_they_say(
    start: Callable[..., Server], later: contextlib.ExitStack, vectors: int
) -> None:
    server = start(vectors=vectors)
    clients = [later.enter_context(server.join()) for _ in range(4)]
    for client in clients:
        client.until(lambda books: len(books.peers) == 3)
    # A number of its own for each pair of ringer and vector: an eventfd adds up what it gets.
    for number, ringer in enumerate(clients):
        for target in clients:
            for vector in range(vectors):
                ringer.ring(target.id, vector, (1 + vector) << (8 * number))
        others = [client for client in clients if client is not ringer]
        assert [heard(client) for client in others] == [
            [(1 + vector) << (8 * number) for vector in range(vectors)]
        ] * 3
        assert heard(ringer) == [(1 + vector) << (8 * number) for vector in range(vectors)]
    for target in clients:
        for vector in range(vectors):
            for ringer in clients:
                ringer.ring(target.id, vector)
            assert target.rung(vector) == len(clients)
            assert [heard(client) for client in clients] == [[0] * vectors] * 4
    # One that left is heard no more by whoever held its eventfds, and hurts nobody.
    clients[0].close()
    for client in clients[1:]:
        client.until(lambda books: bool(books.gone))
        assert len(client.books.peers) == 2


def test_eventfds_do_not_block(start: Callable[..., Server], later: contextlib.ExitStack) -> None:
    """A peer that is rung and does not look must not stop the ringer."""
    server = start(vectors=2)
    one, two = (later.enter_context(server.join()) for _ in range(2))
    one.until(lambda books: bool(books.peers))
    for fd in [*one.books.own, *one.books.peers[two.id], *two.books.own, *two.books.peers[one.id]]:
        assert "eventfd" in os.readlink(f"/proc/self/fd/{fd}")
        assert not os.get_blocking(fd)
    one.ring(two.id, 1, (1 << 64) - 2)
    with pytest.raises(BlockingIOError):
        one.ring(two.id, 1)
    assert heard(two) == [0, (1 << 64) - 2]


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_memory_is_one(
    start: Callable[..., Server], later: contextlib.ExitStack, place: Path, kind: str
) -> None:
    file = place / "region"
    server = start(region=file if kind == "file" else "memfd", size="8M")
    fds = [later.enter_context(server.join()).books.memory for _ in range(3)]
    stats = [os.fstat(fd) for fd in fds]
    assert {(status.st_dev, status.st_ino, status.st_size) for status in stats} == {
        (stats[0].st_dev, stats[0].st_ino, 8 * MEGABYTE)
    }
    if kind == "file":
        assert os.path.samestat(file.stat(), stats[0])
    maps = [later.enter_context(mmap.mmap(fd, 8 * MEGABYTE)) for fd in fds]
    assert any(maps[0][:4096])  # formatted
    for number, mapped in enumerate(maps):
        mapped[-1 - number] = 7 + number
    assert {mapped[-3:] for mapped in maps} == {bytes([9, 8, 7])}


def test_memfd_keeps_its_size_and_stays_writable(start: Callable[..., Server]) -> None:
    server = start(size="8M")
    with server.join() as client:
        fd = client.books.memory
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        for size in 0, 4096, 8 * MEGABYTE - 1, 16 * MEGABYTE:
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        for seal in 0x8, 0x10:  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE: nobody after this one could map it
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    with server.join() as client, mmap.mmap(client.books.memory, 8 * MEGABYTE) as mapped:
        mapped[-1] = 1
        assert os.fstat(client.books.memory).st_size == 8 * MEGABYTE


def test_ids_come_once(start: Callable[..., Server]) -> None:
    """No id is given to a second client as long as anybody is here that saw the first."""
    server = start(vectors=1)
    rng = random.Random(4)
    here = [server.join() for _ in range(3)]
    try:
        for _ in range(150):
            new = server.join()
            for client in here:
                client.until(lambda books, id=new.id: id in books.peers)  # type: ignore[misc]
            seen = set().union(*(client.books.seen - {new.id} for client in here))
            assert new.id not in seen
            here.append(new)
            while len(here) > rng.randint(2, 5):
                left = here.pop(rng.randrange(len(here)))
                left.close()
                for client in here:
                    client.until(lambda books, id=left.id: id in books.gone)  # type: ignore[misc]
    finally:
        for client in here:
            client.close()


# The socket and the process.


def test_mode_and_second_server(start: Callable[..., Server], place: Path) -> None:
    server = start()
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    with server.join() as client:
        argv = [*COMMAND, "--socket", str(server.path), "--region", "memfd", "--size", "4M", "--vectors", "2"]
        second = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
        assert second.returncode not in (0, -signal.SIGTERM)
        assert str(server.path) in second.stderr
        assert "Traceback" not in second.stderr
        with server.join() as new:
            client.until(lambda books: new.id in books.peers)
    file = place / "file"
    file.write_text("not a socket")
    argv[argv.index(str(server.path))] = str(file)
    third = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
    assert third.returncode not in (0, -signal.SIGTERM)
    assert "Traceback" not in third.stderr
    assert file.read_text() == "not a socket"


def test_killed_and_started_again(
    start: Callable[..., Server], later: contextlib.ExitStack, place: Path
) -> None:
    file = place / "region"
    server = start(region=file)
    one, two = (later.enter_context(server.join()) for _ in range(2))
    one.until(lambda books: bool(books.peers))
    with mmap.mmap(one.books.memory, 0) as mapped:
        mapped[-4096:] = bytes(range(256)) * 16
        before = mapped[:]
    server.kill()
    for client in one, two:
        with pytest.raises((ServerGone, ConnectionResetError)):
            client.take()
    one.ring(two.id, 1)  # they go on without it
    assert heard(two) == [0, 1]
    again = start(region=file)
    assert stat.S_ISSOCK(again.path.stat().st_mode)
    new = later.enter_context(again.join())
    assert new.books.found == []
    assert os.path.samestat(os.fstat(new.books.memory), os.fstat(one.books.memory))
    with mmap.mmap(new.books.memory, 0) as mapped:
        assert mapped[:] == before


# Hostile clients.


def raw(server: Server) -> socket.socket:
    """A connection that nobody reads from."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(server.path))
    except BaseException:
        sock.close()
        raise
    return sock


def pour(sock: socket.socket, data: bytes, most: int = 8 * MEGABYTE) -> int:
    """Send until there is no room, or the server has had enough."""
    sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        while sent < most:
            sent += sock.send(data)
    return sent


def test_garbage(start: Callable[..., Server], later: contextlib.ExitStack) -> None:
    server = start()
    with unharmed(server) as pair:
        random_bytes = random.Random(1).randbytes(65536)
        messages = b"".join(MESSAGE.pack(n) for n in (0, pair.one.id, -1, pair.two.id, pair.two.id, 1 << 62))
        for data in random_bytes, messages * 1000, b"GET / HTTP/1.1\r\n\r\n" * 1000:
            pour(later.enter_context(raw(server)), data)
            pour(later.enter_context(server.join()).sock, data)
        for some in b"\0", b"\xff" * 7, MESSAGE.pack(pair.one.id), b"a" * 9:
            later.enter_context(raw(server)).sendall(some)
            later.enter_context(server.join()).sock.sendall(some)
        pair.welcome()
        pair.bells()
        server.check_idle()
        later.close()


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_half_closed(start: Callable[..., Server], later: contextlib.ExitStack, how: int) -> None:
    server = start()
    with unharmed(server) as pair:
        for _ in range(3):
            later.enter_context(raw(server)).shutdown(how)
            later.enter_context(server.join()).sock.shutdown(how)
        pair.welcome()
        pair.bells()
        server.check_idle()
        later.close()


def test_fds_thrown_at_it(start: Callable[..., Server], later: contextlib.ExitStack) -> None:
    server = start()
    with unharmed(server) as pair:
        before = server.fds()
        null = os.open("/dev/null", os.O_RDONLY)
        later.callback(os.close, null)
        for hostile in [raw(server) for _ in range(3)] + [server.join().sock for _ in range(3)]:
            later.enter_context(hostile)
            hostile.setblocking(False)
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                for fd in null, hostile.fileno():
                    for data in b"x", bytes(8):
                        for _ in range(5):
                            socket.send_fds(hostile, [data], [fd] * 250)
        pair.welcome()
        pair.bells()
        server.check_idle()
        eventually(lambda: server.fds() <= before + 6 * (1 + server.vectors), lambda: f"{server.fds()} fds")
        later.close()


def test_those_who_do_not_read(start: Callable[..., Server], later: contextlib.ExitStack) -> None:
    """Who never reads and who stopped after its handshake are dropped; nobody else loses anything."""
    server = start("--timeout", 1, vectors=8)
    with unharmed(server) as pair:
        never = later.enter_context(Client(server.path, 8, keep=False))
        pair.wait(lambda books: len(books.news) >= 5, "the client that never reads comes")
        stopped = later.enter_context(server.join(keep=False))
        pair.wait_here(stopped.id)
        (never_id,) = set(pair.two.books.peers) - {pair.one.id, stopped.id}
        came = [pair.welcome() for _ in range(60)]
        assert len(set(came)) == 60
        pair.wait_gone(never_id, stopped.id)
        for id in came:
            assert (
                pair.two.books.news.count(News(id, True)) == pair.two.books.news.count(News(id, False)) == 1
            )
        # What they were sent before is whole, then comes the end.
        for client in never, stopped:
            client.until_eof()
        assert never.id == never_id
        assert [news.id for news in stopped.books.news if news.came] == came[
            : len(stopped.books.news) // 2 + 1
        ][: sum(news.came for news in stopped.books.news)]
        later.close()


def test_slow_reader_stays(start: Callable[..., Server], later: contextlib.ExitStack) -> None:
    """A byte at a time, less than comes in, through a handshake that no socket buffer holds: but it takes."""
    server = start(vectors=64)
    with unharmed(server) as pair:
        for _ in range(3):
            later.enter_context(Follower(server.path, 64))
        slow = later.enter_context(Client(server.path, 64))
        bytes_taken = 0

        def sip(count: int) -> None:
            nonlocal bytes_taken
            for _ in range(count):
                slow.read(1)
                bytes_taken += 1
                if not bytes_taken % 8:
                    select.poll().poll(1)

        sip(200)
        came = []
        for _ in range(8):
            came.append(pair.welcome())
            sip(100)
        last = later.enter_context(server.join())
        while last.id not in slow.books.peers:
            sip(8)
        # Of those that came and went meanwhile it saw both or neither.
        told = [id for id in came if id in slow.books.gone]
        assert slow.books.news == [News(id, yes) for id in told for yes in (True, False)] + [
            News(last.id, True)
        ]
        assert slow.id in pair.one.books.peers
        pair.one.client.ring(slow.id, 63)
        assert slow.rung(63, PATIENCE) == 1
        later.close()


def test_connections_by_the_hundred(
    start: Callable[..., Server], later: contextlib.ExitStack, many_fds: int
) -> None:
    """All at once, and none of them reads: where the server is told to let one process do so."""
    count = min(300, many_fds // 8)
    server = start("--per-process", 0, "--clients", count + 3, vectors=1)
    with unharmed(server) as pair:
        before = len(pair.two.books.news)
        hostile = [later.enter_context(raw(server)) for _ in range(count)]
        came = lambda books: sum(news.came for news in books.news[before:]) >= count  # noqa: E731
        pair.wait(came, "all of them come")
        pair.welcome()
        pair.bells()
        for sock in hostile:
            sock.close()
        pair.wait(lambda books: len(books.peers) == 1, "all of them leave")


def test_connections_of_one_process(start: Callable[..., Server]) -> None:
    """By default one process does not get all that there are; others do not notice."""
    server = start()
    with unharmed(server) as pair, program(server, "crowd", 300) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "here\n"
        pair.welcome()
        pair.wait(lambda books: len(books.peers) >= 2, "some of them come")
        pair.bells()
        assert len(pair.one.books.peers) < 1 + 300
        server.check_idle()


def test_connections_that_close_at_once(start: Callable[..., Server]) -> None:
    server = start(vectors=1)
    with unharmed(server) as pair:
        for _ in range(2000):
            raw(server).close()
        pair.welcome()
        pair.bells()


def test_connections_closed_before_it_looks(start: Callable[..., Server]) -> None:
    server = start()
    with unharmed(server):
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for _ in range(300):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.setblocking(False)
                    try:
                        sock.connect(str(server.path))
                        sock.send(b"hello")
                    except BlockingIOError:  # as many as the queue takes
                        break
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_killed_in_the_handshake(start: Callable[..., Server]) -> None:
    server = start(vectors=64)
    with unharmed(server) as pair:
        for counts in [(0, 3, 16), (20, 17 + 70 * 8, 3 * 8 + 3 * 64 * 8)]:
            with contextlib.ExitStack() as stack:
                children = [stack.enter_context(program(server, "stay", count)) for count in counts]
                for child in children:
                    assert child.stdout is not None
                    assert child.stdout.readline() == "here\n"
            pair.welcome()
            pair.bells()


def test_file_cut_short_by_a_client(start: Callable[..., Server], place: Path) -> None:
    """A file cannot be sealed: whoever has it may cut it. That is no reason for the server to die."""
    server = start(region=place / "region")
    with unharmed(server) as pair:
        with server.join() as hostile:
            os.ftruncate(hostile.books.memory, 0)
        pair.wait_gone(hostile.id)
        pair.bells()
        with contextlib.suppress(ServerGone, ConnectionResetError), server.join():
            pass
        assert server.process.poll() is None
        os.ftruncate(pair.one.books.memory, 4 * MEGABYTE)


def test_more_clients_than_fds(start: Callable[..., Server], later: contextlib.ExitStack) -> None:
    """Those for whom there is no fd left wait or are sent away; those who are here do not notice."""
    server = start(vectors=4, fds=64)
    with unharmed(server) as pair:
        hostile = [later.enter_context(raw(server)) for _ in range(30)]
        pair.wait(lambda books: len(books.news) >= 8, "some of them come")
        pair.bells()
        server.check_idle()
        for sock in hostile:
            sock.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be another user, whose limits are not root's")
def test_fds_in_flight_run_out(start: Callable[..., Server]) -> None:
    """What is sent and not read counts for the server's user, and the kernel a limit for all of it.

    The kernel goes on counting it for a client that was dropped, until that closes its end.
    """
    server = start(vectors=4, fds=1024, user=300_000 + os.getpid() % 100_000)
    with unharmed(server) as pair, program(server, "crowd", 60) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "here\n"
        for _ in range(60):
            pair.welcome()
        pair.bells()


# Many for long.


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sixty_come_and_go_for_a_minute(start: Callable[..., Server]) -> None:
    come_and_go(start(vectors=2), processes=4, clients=15, seconds=60)


def test_some_come_and_go_for_a_second(start: Callable[..., Server]) -> None:
    come_and_go(start(vectors=3), processes=2, clients=5, seconds=1.5)


def come_and_go(server: Server, processes: int, clients: int, seconds: float) -> None:
    with unharmed(server) as pair:
        before = len(pair.two.books.news)
        children: list[subprocess.Popen[str]] = []
        said = []
        with contextlib.ExitStack() as stack:
            for seed in range(processes):
                child = program(server, "come-and-go", clients, seconds, seed)
                children.append(stack.enter_context(child))
            for process in children:
                lines, _ = process.communicate(timeout=seconds + PATIENCE)
                assert process.returncode == 0
                said += [json.loads(line) for line in lines.splitlines()]
        assert len(said) > processes * clients * seconds / 4
        pair.welcome()
        pair.wait(lambda books: len(books.peers) == 1, "all of them leave")
        # The books agree: all saw what the pair saw, from where they came in.
        told = pair.two.books.news[before:]
        arrivals = [news.id for news in told if news.came]
        settled = [client for client in said if client["settled"]]
        assert len(set(arrivals)) == len(arrivals)
        assert {client["id"] for client in settled} <= set(arrivals)
        assert len(settled) > len(said) / 2
        here: dict[int, set[int]] = {}
        now = {pair.one.id, pair.two.id}
        position = {}
        for index, news in enumerate(told):
            if news.came:
                here[news.id], position[news.id] = set(now), index + 1
            (now.add if news.came else now.remove)(news.id)
        for client in settled:
            assert set(client["found"]) == here[client["id"]]
            start = position[client["id"]]
            its = [News(*news) for news in client["news"]]
            assert its == told[start : start + len(its)]


# The client itself: each rule of its grammar can be broken.


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("1", "version is 0"),
        ("0f", "only the third"),
        ("0 3f", "only the third"),
        ("0 65536", "no id"),
        ("0 -1f", "only the third"),
        ("0 3 -1", "only the third"),
        ("0 3 5f", "comes with -1"),
        ("0 3 -1f 5", "middle of the handshake"),
        ("0 3 -1f 5f 6f", "middle of the vectors of 5"),
        ("0 3 -1f 5f 3f", "middle of the vectors of 5"),
        ("0 3 -1f 5f 5f 5f", "more vectors"),
        ("0 3 -1f 3f 5f", "middle of the vectors of 3"),
        ("0 3 -1f 3f 3f 3f", "more vectors of my own"),
        ("0 3 -1f 3f 3f 5", "not here"),
        ("0 3 -1f 3f 3f 3", "I left"),
        ("0 3 -1f 3f 3f 5f 5", "middle of the vectors"),
        ("0 3 -1f 3f 3f 5f 5f 5 5f", "seen to leave"),
        ("0 3 -1f 3f 3f 5f 5f 5 5", "not here"),
        ("0 3 -1f 3f 3f -1f", "no id"),
    ],
)
def test_grammar(words: str, wrong: str) -> None:
    books = Books(2)
    *good, bad = words.split()
    for word in good:
        books.take(int(word.rstrip("f")), -1 if word.endswith("f") else None)
    with pytest.raises(ProtocolError, match=wrong):
        books.take(int(bad.rstrip("f")), -1 if bad.endswith("f") else None)


def test_two_fds_and_half_a_message_are_found(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
        listener.listen()
        with Client(place / "socket", 1) as client, listener.accept()[0] as sock:
            socket.send_fds(sock, [bytes(8)], [0, 0])
            with pytest.raises(ProtocolError, match="2 descriptors"):
                client.take()
        with Client(place / "socket", 1) as client, listener.accept()[0] as sock:
            sock.send(bytes(3))
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="after 3 bytes"):
                client.take()
