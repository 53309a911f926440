"""Regions of an ivshmem server, against one that can be told to do anything wrong, and against ours."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsock import region
from shmsock.errors import RegionError, RegionFormatError, RegionNotFoundError, RegionPermissionError
from shmsock.region import ivshmem
from shmsock.region.ivshmem import IvshmemDoorbell, open_ivshmem
from shmsock.region.ivshmem_protocol import MAX_VECTORS
from tests.region.conftest import open_files
from tests.region.fake_ivshmem import MEMORY, OWN_ID, VERSION, FakeServer, Step

MIB = 1 << 20
PATIENCE_S = ivshmem.PATIENCE_S
Forked = Callable[[Callable[[], Any]], Any]


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take a server more than two seconds to get a word in."""
    monkeypatch.setattr(ivshmem, "PATIENCE_S", 20.0)


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def server(socket_path: str) -> Iterator[FakeServer]:
    made = FakeServer(socket_path)
    yield made
    made.close()


@pytest.fixture
def all_said(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that listens when the server has said everything."""
    greet = IvshmemDoorbell.greet

    def late(doorbell: IvshmemDoorbell, deadline: float) -> Generator[Any, None, int]:
        assert server.said_all.wait(20)
        return greet(doorbell, deadline)

    monkeypatch.setattr(IvshmemDoorbell, "greet", late)


def told(doorbell: IvshmemDoorbell) -> list[int]:
    """What news() says, once there are some."""
    poll = select.poll()
    poll.register(doorbell.server_fd, select.POLLIN)
    assert poll.poll(20_000)
    return doorbell.news()


def rung(doorbell: IvshmemDoorbell) -> int:
    """What drain() says, once we were rung."""
    poll = select.poll()
    poll.register(doorbell.fd, select.POLLIN)
    assert poll.poll(20_000)
    return doorbell.drain()


def ring(doorbell: IvshmemDoorbell, peer: int, times: int = 1) -> None:
    reach = doorbell.reach(peer)
    assert reach is not None
    assert (reach.kind, reach.offset, reach.value) == ("eventfd", 0, 0)
    for _ in range(times):
        assert os.write(reach.fd, (1).to_bytes(8, sys.byteorder)) == 8


# -- what works


def test_two_peers(server: FakeServer) -> None:
    with server.open() as one, server.open() as two:
        one.mmap[5:8] = b"abc"
        assert two.mmap[5:8] == b"abc"
        assert (one.url, one.kind, one.path) == (f"ivshmem:{server.path}", "ivshmem", server.path)
        assert (one.size, one.writable, one.write_combining) == (MIB, True, False)
        bell, other = one.doorbell, two.doorbell
        assert (bell.id, other.id, bell.vectors, other.vectors) == (0, 1, 1, 1)
        assert bell.reach(1) is None  # the server said so, and nobody listened yet
        assert told(bell) == []
        ring(bell, 1, 3)
        ring(other, 0)
        assert (rung(other), rung(bell)) == (3, 1)
        assert (other.drain(), bell.drain()) == (0, 0)
        assert bell.reach(0) is None
        assert other.reach(1) is None
        assert bell.reach(77) is None
        assert server.rung(0) == server.rung(1) == 0
    assert one.closed
    assert (bell.fd, bell.server_fd, bell.reach(1)) == (-1, -1, None)


def test_by_url(server: FakeServer) -> None:
    accepted = server.open(opener=lambda path: region.open(f"ivshmem:{path}"))
    with accepted as opened:
        assert opened.kind == "ivshmem"
        assert opened.doorbell is not None


def test_raw_bytes(server: FakeServer) -> None:
    view = server.open(opener=lambda path: region.open_region(f"ivshmem:{path}"))
    with view:
        assert len(view) == MIB
        assert server.gone(0)


def test_relative_path_becomes_absolute(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.path.dirname(server.path))
    with server.open(opener=lambda path: open_ivshmem(os.path.basename(path))) as opened:
        assert opened.url == f"ivshmem:{server.path}"


def test_read_only(server: FakeServer) -> None:
    with server.open() as writer, server.open(writable=False) as reader:
        writer.lock_section(3)
        assert reader.section_locked(3)
        with pytest.raises(TypeError):
            reader.mmap[0] = 1
        with pytest.raises(RegionError, match="read-only"):
            reader.lock_section(4)


def test_another_process(server: FakeServer) -> None:
    """Its memory, its ring, its lock, and its end."""
    program = """if True:
        import os, select, sys
        from shmsock.region.ivshmem import open_ivshmem
        opened = open_ivshmem(sys.argv[1])
        opened.lock_section(5)
        opened.mmap[:5] = b"hello"
        os.write(opened.doorbell.reach(0).fd, bytes([7, 0, 0, 0, 0, 0, 0, 0]))
        sys.stdin.read()"""
    with server.open() as ours:
        argv = [sys.executable, "-c", program, server.path]
        with subprocess.Popen(argv, stdin=subprocess.PIPE) as other:
            try:
                number = server.accept()
                assert rung(ours.doorbell) == 7
                assert ours.mmap[:5] == b"hello"
                assert ours.section_locked(5)
                assert told(ours.doorbell) == []
                ring(ours.doorbell, number)
                assert server.rung(number) == 1
            finally:
                other.kill()
        assert server.gone(number)
        assert not ours.section_locked(5)
        server.leave(number)
        assert told(ours.doorbell) == [number]
        assert ours.doorbell.reach(number) is None
        assert not ours.doorbell.lost


def test_several_vectors(server: FakeServer) -> None:
    """Only the first is rung; the others are counted and let go."""
    server.vectors = 3
    peer = server.join()
    with server.open() as opened:
        bell = opened.doorbell
        assert bell.vectors == 3
        ring(bell, peer)
        assert [server.rung(peer, vector) for vector in range(3)] == [1, 0, 0]
        os.eventfd_write(server.peers[bell.id][1], 1)
        os.eventfd_write(server.peers[bell.id][0], 1)
        assert rung(bell) == 1
        before = len(open_files())
        newcomer = server.join()
        assert told(bell) == []
        ring(bell, newcomer)
        assert [server.rung(newcomer, vector) for vector in range(3)] == [1, 0, 0]
        assert len(open_files()) == before + 3 + 1  # the server's, ours


@pytest.mark.parametrize("peers", [0, 2])
def test_messages_in_pieces(server: FakeServer, peers: int) -> None:
    server.pieces = 3
    for _ in range(peers):
        server.join()
    with server.open() as opened:
        assert opened.doorbell.id == peers
        newcomer = server.join()
        assert told(opened.doorbell) == []
        ring(opened.doorbell, newcomer)


def test_half_a_message_waits_for_the_rest(server: FakeServer) -> None:
    with server.open() as opened:
        message = (7).to_bytes(8, "little")
        server.say(0, message[:3])
        assert told(opened.doorbell) == []
        assert not opened.doorbell.lost
        server.leave(server.join(7))  # its messages come in between
        server.say(0, message[3:])
        assert told(opened.doorbell) == []
        assert opened.doorbell.lost  # which is nonsense then


def test_memory_may_come_late(server: FakeServer) -> None:
    """QEMU takes what follows the id in any order, and there are servers that rely on it."""
    server.join()
    server.edit = lambda burst: [*burst[:MEMORY], *burst[MEMORY + 1 :], burst[MEMORY]]
    with server.open() as opened:
        assert (opened.doorbell.id, opened.doorbell.vectors, opened.size) == (1, 1, MIB)


def test_first_vector_is_enough(server: FakeServer) -> None:
    """Without others, nobody knows how many are to come: they are taken whenever they do."""
    server.vectors = 2
    late: list[Step] = []

    def hold_back(burst: list[Step]) -> list[Step]:
        late.append(burst.pop())
        return burst

    server.edit = hold_back
    with server.open() as opened:
        assert opened.doorbell.vectors == 1
        server.say(0, late[0])
        assert told(opened.doorbell) == []
        assert opened.doorbell.vectors == 2


@pytest.mark.usefixtures("all_said")
def test_peers_that_left_meanwhile(server: FakeServer) -> None:
    one, two = server.join(), server.join()
    server.edit = lambda burst: [*burst[:-1], (one, []), burst[-1], (two, [])]
    with server.open() as opened:
        assert opened.doorbell.reach(one) is opened.doorbell.reach(two) is None


def test_descriptors_are_ours_alone(server: FakeServer) -> None:
    peer = server.join()
    with server.open() as opened:
        reach = opened.doorbell.reach(peer)
        assert reach is not None
        for fd in (reach.fd, opened.doorbell.fd):
            assert not os.get_inheritable(fd)
            assert not os.get_blocking(fd)
        assert not os.get_inheritable(opened.doorbell.server_fd)


def test_drain_never_waits(server: FakeServer) -> None:
    """Others share the description, and may make it blocking."""
    with server.open() as opened:
        os.set_blocking(server.peers[0][0], True)
        assert os.get_blocking(opened.doorbell.fd)
        assert opened.doorbell.drain() == 0


# -- memory and locks


def test_locks_are_not_shared_with_the_server(server: FakeServer) -> None:
    """What is passed is everybody's description: a lock on it would be everybody's."""
    with server.open() as one, server.open() as two:
        assert one.can_lock
        assert one.lock_section(2)
        assert not two.lock_section(2)
        assert two.section_locked(2)
        one.close()
        assert not two.section_locked(2)
        assert two.lock_section(2)


def test_locks_of_the_file(server: FakeServer, shared: Path) -> None:
    """Who opens the server's file by its name sees the same locks."""
    name = shared / "memory"
    name.write_bytes(bytes(MIB))
    os.close(server.memory)
    server.memory = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    with server.open() as one, region.open(name) as two:
        assert one.identity == two.identity
        one.mmap[100] = 7
        assert two.mmap[100] == 7
        assert one.lock_section(1)
        assert two.section_locked(1)
        assert not two.lock_section(1)
        assert not one.sparse


def test_memory_that_may_not_be_opened_again(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there are no locks: on the passed descriptor they would be the server's."""
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "no")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with server.open() as one, server.open() as two:
        assert (one.can_lock, one.lock_fd) == (False, -1)
        assert one.lock_section(1)
        assert two.lock_section(1)
        one.mmap[0] = 1
        assert two.mmap[0] == 1
        assert one.identity == two.identity
        one.ensure(0, MIB)


def test_holes_are_filled(server: FakeServer) -> None:
    """Without looking at them: that would take their pages."""
    size = MIB // 2
    with server.open() as opened:
        assert opened.sparse
        assert opened.describe().filesystem == "tmpfs"
        assert opened.peek(4096) == bytes(4096)
        assert os.fstat(server.memory).st_blocks == 0
        opened.ensure(0, size)
        assert os.fstat(server.memory).st_blocks * 512 == size
        assert opened.describe().allocated == size


def test_sealed_memory(server: FakeServer) -> None:
    """As our server makes it: it cannot be truncated under us."""
    fcntl.fcntl(server.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with server.open() as opened:
        opened.ensure(0, MIB)
    with server.open() as opened:
        assert not opened.sparse


def test_truncated_memory(server: FakeServer) -> None:
    with server.open() as opened:
        os.ftruncate(server.memory, 4096)
        with pytest.raises(RegionFormatError, match="was truncated to 4 KiB"):
            opened.ensure(0, MIB)


def test_describe(server: FakeServer) -> None:
    with server.open() as opened:
        assert (opened.url, opened.kind, opened.path) == (f"ivshmem:{server.path}", "ivshmem", server.path)
        assert server.path in repr(opened.doorbell)


# -- who comes and goes


def test_leaving_is_known(server: FakeServer) -> None:
    peers = [server.join() for _ in range(3)]
    with server.open() as opened:
        bell, before = opened.doorbell, len(open_files())
        assert bell.news() == []
        server.leave(peers[1])
        server.leave(peers[0])
        assert told(bell) == [peers[1], peers[0]]
        assert bell.reach(peers[0]) is bell.reach(peers[1]) is None
        assert bell.reach(peers[2]) is not None
        assert len(open_files()) == before - 2 * 2  # the server's and ours
        server.tell((peers[0], []))  # it left already
        server.leave(peers[2])
        assert told(bell) == [peers[2]]
        assert not bell.lost


def test_an_id_used_again(server: FakeServer) -> None:
    """Ours does not do that before all know that it is free. Who came is who is rung."""
    peer = server.join()
    with server.open() as opened:
        server.leave(peer)
        server.join(peer)
        assert told(opened.doorbell) == [peer]
        ring(opened.doorbell, peer)
        assert server.rung(peer) == 1


def test_news_is_bounded(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivshmem, "BATCH", 4)
    with server.open() as opened:
        for _ in range(5):
            server.leave(server.join())
        assert [told(opened.doorbell), told(opened.doorbell), told(opened.doorbell)] == [[1, 2], [3, 4], [5]]
        assert opened.doorbell.news() == []


def test_only_so_many_peers(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those beyond are counted, not kept; and never is a second vector taken for a first."""
    monkeypatch.setattr(ivshmem, "MAX_PEERS", 2)
    server.vectors = 2
    one, two, three = server.join(), server.join(), server.join()
    with server.open() as opened:
        bell, before = opened.doorbell, len(open_files())
        assert [bell.reach(peer) is None for peer in (one, two, three)] == [False, False, True]
        assert "has more than 2 peers" in caplog.text
        halves = [os.eventfd(0), os.eventfd(0)]
        server.tell((99, halves[:1]))
        server.leave(one)
        server.tell((99, halves[1:]))
        assert told(bell) == [one]
        assert bell.reach(99) is None
        four = server.join()
        assert told(bell) == []
        ring(bell, four)
        assert server.rung(four) == 1
        server.leave(three)
        assert told(bell) == [three]
        for fd in halves:
            os.close(fd)
        assert len(open_files()) == before - 2 - 1 - 2 + 2 + 1
        assert caplog.text.count("has more than") == 1


def test_newcomer_with_other_vectors_is_logged(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """It is known when the next one comes, and said once."""
    server.vectors = 2
    server.join()
    with server.open() as opened:
        for count in (2, 1, 3):
            server.join(vectors=count)
        server.join()
        assert told(opened.doorbell) == []
        assert not opened.doorbell.lost
    (said,) = caplog.messages
    assert "gave peer 3 1 vectors and us 2, expected one number for all" in said


# -- a server that goes, or goes mad


def test_server_dies(server: FakeServer) -> None:
    peer = server.join()
    with server.open() as opened:
        bell = opened.doorbell
        number = bell.server_fd
        server.leave(server.join())
        server.die()
        assert told(bell) == [peer + 2]
        assert f"the ivshmem server at {server.path} has gone" in bell.lost
        assert "start the server and all of its peers anew" in bell.lost
        assert bell.server_fd == number
        assert number in open_files()  # whoever watches it can still stop
        assert bell.news() == []
        ring(bell, peer)  # known eventfds go on ringing
        assert server.rung(peer) == 1
        assert bell.drain() == 0
        opened.mmap[0] = 1


def test_server_dies_right_after_the_first_messages(server: FakeServer) -> None:
    server.hang_up = True
    with server.open() as opened:
        opened.doorbell.news()
        assert "has gone" in opened.doorbell.lost


MAD: dict[str, tuple[Step, str]] = {
    "no id": ((65536, []), "message 65536"),
    "negative": ((-2, []), "message -2"),
    "memory without any": ((-1, []), "message -1"),
    "garbage": (b"GET / HT", "message "),
    "we left": ((0, []), "the news that we left"),
}


@pytest.mark.parametrize("what", MAD)
def test_nonsense_later(server: FakeServer, what: str) -> None:
    step, says = MAD[what]
    with server.open() as opened:
        bell = opened.doorbell
        server.leave(server.join())
        server.say(0, step)
        assert told(bell) == [1]  # what was said before counts
        assert "cannot be understood any more" in bell.lost
        assert says in bell.lost
        server.join()
        assert bell.news() == []
        assert bell.reach(2) is None


def test_memory_again(server: FakeServer) -> None:
    with server.open() as opened:
        server.say(0, (-1, [server.memory]))
        assert told(opened.doorbell) == []
        assert "message -1" in opened.doorbell.lost


def test_too_many_vectors(server: FakeServer) -> None:
    for peer in (0, 5):
        with server.open() as opened:
            number = opened.doorbell.id
            fd = os.eventfd(0)
            for _ in range(MAX_VECTORS + 1):
                server.say(number, (number if peer == 0 else peer, [fd]))
            os.close(fd)
            assert told(opened.doorbell) == []
            assert f"more than {MAX_VECTORS} vectors" in opened.doorbell.lost


def test_what_is_no_eventfd_is_not_rung(server: FakeServer, tmp_path: Path) -> None:
    """It might be made longer, or wait."""
    with server.open() as opened, open(tmp_path / "file", "wb") as file:
        server.say(0, (1, [file.fileno()]))
        assert told(opened.doorbell) == []
        assert "no eventfd" in opened.doorbell.lost
        assert opened.doorbell.reach(1) is None


@pytest.mark.parametrize("count", [2, 3, 100])
def test_too_many_descriptors(server: FakeServer, count: int) -> None:
    fd = os.eventfd(0)
    with server.open() as opened:
        before = len(open_files())
        server.say(0, (1, [fd] * count))
        assert told(opened.doorbell) == []
        assert "descriptor" in opened.doorbell.lost
        assert len(open_files()) == before
    os.close(fd)


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Leave room for so many more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def limit(room: int) -> None:
        top = 200
        while (fd := os.open("/dev/null", os.O_RDONLY)) < top:
            taken.append(fd)
        os.close(fd)
        for _ in range(room):
            os.close(taken.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in taken:
        os.close(fd)


def test_no_descriptors_left(server: FakeServer, few_files: Callable[[int], None]) -> None:
    with server.open() as opened:
        server.join()
        server.join()
        few_files(1)
        assert told(opened.doorbell) == []
        assert "ulimit -n" in opened.doorbell.lost
        assert opened.doorbell.reach(1) is not None
        assert opened.doorbell.reach(2) is None


def test_no_descriptors_left_at_first(server: FakeServer, few_files: Callable[[int], None]) -> None:
    for _ in range(4):
        server.join()
    few_files(2 + 1 + 1 + 2)  # the server: a connection, an eventfd; the client: a socket, memory, 2 peers
    with pytest.raises(RegionError, match="ulimit -n") as caught:
        server.open()
    assert caught.value.errno == errno.EMFILE


# -- the first messages, broken


def replace(position: int, *steps: Step) -> Callable[[list[Step]], list[Step]]:
    return lambda burst: [*burst[:position], *steps, *burst[position + 1 :]]


BROKEN: dict[str, tuple[Callable[[list[Step]], list[Step]], int, str]] = {
    "version 1": (replace(VERSION, (1, [])), errno.EPROTONOSUPPORT, "version 1 of the protocol, expected 0"),
    "a banner": (
        replace(VERSION, b"SSH-2.0-OpenSSH_9.2"),
        errno.EPROTO,
        "b'SSH-2.0-', expected .* not an iv",
    ),
    "negative version": (replace(VERSION, (-1, [])), errno.EPROTO, "not an ivshmem server"),
    "id too large": (replace(OWN_ID, (65536, [])), errno.EPROTO, "the id 65536, expected one of 0 to 65535"),
    "an old server": (lambda burst: burst[OWN_ID:], errno.EPROTO, "the id -1, with a .* before QEMU 2.5"),
    "memory without a descriptor": (replace(MEMORY, (-1, [])), errno.EPROTO, "message -1"),
    "memory twice": (lambda burst: [*burst[:3], burst[2], *burst[3:]], errno.EPROTO, "message -1"),
    "a peer out of range": (lambda burst: [*burst[:3], (70000, [])], errno.EPROTO, "message 70000"),
    "we left": (lambda burst: [*burst[:3], (0, [])], errno.EPROTO, "that we left"),
    "ends at once": (lambda burst: [], errno.ECONNRESET, "closed the connection without the version"),
    "ends early": (lambda burst: burst[:2], errno.ECONNRESET, "without the shared memory"),
    "ends in a message": (lambda burst: [*burst[:2], b"\xff"], errno.EPROTO, "after 1 bytes of a message"),
    "no vectors": (lambda burst: burst[:3], errno.ECONNRESET, "without our first vector .*--vectors 1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_server(server: FakeServer, what: str) -> None:
    server.edit, code, says = BROKEN[what]
    server.hang_up = True
    before = open_files()
    with pytest.raises(RegionError, match=says) as caught:
        server.open()
    assert caught.value.errno == code
    assert caught.value.filename == server.path
    assert server.path in str(caught.value)
    for fds in server.peers.values():
        for fd in fds:
            before[fd] = "anon_inode:[eventfd]"
    assert open_files() == before


def with_descriptor(position: int, fd: int) -> Callable[[list[Step]], list[Step]]:
    def edit(burst: list[Step]) -> list[Step]:
        step = burst[position]
        assert not isinstance(step, bytes)
        burst[position] = (step[0], [fd])
        return burst

    return edit


@pytest.mark.parametrize("position", [VERSION, OWN_ID])
def test_descriptor_where_none_belongs(server: FakeServer, position: int) -> None:
    server.edit = with_descriptor(position, server.memory)
    with pytest.raises(RegionError, match="descriptor") as caught:
        server.open()
    assert caught.value.errno == errno.EPROTO
    assert server.gone(0)


class Clock:
    """For the client: time goes by when the server has said all that it will, or by `step` at each look."""

    def __init__(self, server: FakeServer, step: float = 0) -> None:
        self.server, self.step, self.now = server, step, 0.0

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def wait_readable(self, sock: socket.socket, timeout: float) -> None:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if self.server.said_all.wait(20) and not poll.poll(0):
            self.now += timeout


@pytest.fixture
def clock(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(server)
    monkeypatch.setattr(ivshmem, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(ivshmem, "time", made)
    monkeypatch.setattr(ivshmem, "_wait_readable", made.wait_readable)
    return made


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
def test_server_that_hangs(server: FakeServer, kept: int, clock: Clock) -> None:
    """It has two seconds in sum, however much it says."""
    server.vectors = 2
    server.join()
    server.edit = lambda burst: burst[:kept]
    missing = ["version", "our id", "memory", "our first vector", "our first vector"][kept]
    with pytest.raises(RegionError, match=f"2 s went by without .*{missing}.* hangs") as caught:
        server.open()
    assert caught.value.errno == errno.ETIMEDOUT
    assert clock.now == 2
    assert server.gone(1)


def test_server_that_talks_on_and_on(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivshmem, "time", Clock(server, step=0.1))
    server.edit = lambda burst: [*burst[:3], *((7, []) for _ in range(300))]
    with pytest.raises(RegionError, match="went by without our first vector"):
        server.open()


@pytest.mark.parametrize(("ours", "says"), [(2, r"peer 0 has 1, peer 1 2"), (1, r"peer 0 has 1, peer 1 2")])
def test_peers_that_differ_in_vectors(server: FakeServer, ours: int, says: str) -> None:
    server.join(vectors=1)
    server.join(vectors=2)
    server.vectors = ours
    with pytest.raises(RegionError, match=rf"differ in how many vectors.*{says}") as caught:
        server.open()
    assert caught.value.errno == errno.EPROTO
    assert server.gone(2)


@pytest.mark.usefixtures("all_said")
def test_more_vectors_than_the_others(server: FakeServer) -> None:
    server.join(vectors=1)
    server.vectors = 3
    with pytest.raises(RegionError, match=r"differ .*we have 3, the others 1"):
        server.open()


def test_fewer_vectors_than_the_others(server: FakeServer, clock: Clock) -> None:
    server.join(vectors=2)
    with pytest.raises(RegionError, match=r"as many vectors as its other peers have \(1 of 2\)"):
        server.open()


# -- memory that is none


@pytest.mark.parametrize(
    ("size", "says"), [(0, "gave 0 bytes of memory, expected at least 4 KiB"), (4095, "4095 bytes")]
)
def test_too_little_memory(server: FakeServer, size: int, says: str) -> None:
    os.ftruncate(server.memory, size)
    with pytest.raises(RegionFormatError, match=says):
        server.open()
    assert server.gone(0)


def test_memory_that_cannot_be_mapped_so_large(server: FakeServer) -> None:
    os.ftruncate(server.memory, 1 << 62)
    with pytest.raises(RegionError, match="cannot be mapped") as caught:
        server.open()
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("path", ["/dev/zero", "/", "pipe"])
def test_memory_that_is_no_file(server: FakeServer, path: str) -> None:
    os.close(server.memory)
    if path == "pipe":
        server.memory, other = os.pipe()
        os.close(other)
    else:
        server.memory = os.open(path, os.O_RDONLY)
    with pytest.raises(RegionError, match="that is no file") as caught:
        server.open()
    assert caught.value.errno == errno.EPROTO


def test_memory_that_may_not_be_written(server: FakeServer) -> None:
    fcntl.fcntl(server.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(RegionPermissionError, match="opened read-only, or sealed"):
        server.open()
    with server.open(writable=False) as opened:
        assert not opened.writable


# -- nothing to connect to


def test_no_socket(socket_path: str) -> None:
    for path in (socket_path, socket_path + "/x/y"):
        with pytest.raises(RegionNotFoundError, match="shmsock ivshmem-server --socket") as caught:
            open_ivshmem(path)
        assert caught.value.filename == path


def test_nobody_listens(server: FakeServer) -> None:
    server.die()
    with pytest.raises(RegionError, match=r"nobody listens at .*shmsock ivshmem-server --socket") as caught:
        open_ivshmem(server.path)
    assert caught.value.errno == errno.ECONNREFUSED


def test_no_socket_but_a_file(path: str) -> None:
    with pytest.raises(RegionError, match=f"is no socket.*file:{path}") as caught:
        open_ivshmem(path)
    assert caught.value.errno == errno.ENOTSOCK


def test_a_socket_of_another_kind(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(socket_path)
        with pytest.raises(RegionError, match="expected a stream socket") as caught:
            open_ivshmem(socket_path)
    assert caught.value.errno == errno.EPROTOTYPE


def test_path_too_long(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="expected at most 107") as caught:
        open_ivshmem(str(tmp_path / ("x" * 107)))
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.parametrize("closed", ["socket", "directory"])
def test_no_permission(shared: Path, as_nobody: Forked, closed: str) -> None:
    directory = shared / "d"
    directory.mkdir(mode=0o700 if closed == "directory" else 0o755)
    server = FakeServer(str(directory / "s"))
    os.chmod(server.path, 0o600)
    try:
        error, code = as_nobody(lambda: open_ivshmem(server.path))
    finally:
        server.close()
    assert isinstance(error, RegionPermissionError)
    assert code == errno.EACCES
    assert "uid 65534" in str(error)
    assert ("mode 0600" if closed == "socket" else "a directory on the way") in str(error)


def test_server_that_lets_nobody_in(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivshmem, "PATIENCE_S", 0.05)
    waiting = []
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.setblocking(False)
        waiting.append(client)
        try:
            client.connect(server.path)
        except BlockingIOError:
            break
    with pytest.raises(RegionError, match="lets nobody in") as caught:
        open_ivshmem(server.path)
    assert caught.value.errno == errno.ETIMEDOUT
    for client in waiting:
        client.close()


# -- the end


def test_closing_leaves(server: FakeServer) -> None:
    """At once, even though a forked child still has a copy of the connection."""
    opened = server.open()
    copy = os.dup(opened.doorbell.server_fd)
    view = memoryview(opened.mmap)
    with pytest.raises(BufferError):
        opened.close()
    assert opened.doorbell.drain() == 0
    view.release()
    opened.close()
    opened.close()
    assert server.gone(0)
    os.close(copy)


def test_unclosed_region(server: FakeServer) -> None:
    opened = server.open()
    with pytest.warns(ResourceWarning, match="unclosed region ivshmem:"):
        del opened
    assert server.gone(0)


def test_forked_child_lets_go(server: FakeServer, forked: Forked) -> None:
    """Of its own copies: the parent stays a peer."""
    peer = server.join()
    with server.open() as opened:

        def child() -> tuple[bool, int]:
            before = len(open_files())
            opened.drop_inherited()
            return opened.closed, before - len(open_files())

        # The lock's, our eventfd, the peer's, the connection; and what the mapping holds.
        assert forked(child) == (True, 5)
        newcomer = server.join()
        assert told(opened.doorbell) == []
        assert not opened.doorbell.lost
        ring(opened.doorbell, peer)
        ring(opened.doorbell, newcomer)
        os.eventfd_write(server.peers[opened.doorbell.id][0], 2)
        assert rung(opened.doorbell) == 2


# -- with our own server


@pytest.fixture
def real(socket_path: str) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "shmsock", "ivshmem-server", "--socket", socket_path]
    argv += ["--region", "memfd", "--size", "4M", "--vectors", "2"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(socket_path + "-ready")
        notified.settimeout(60)
        env = {**os.environ, "NOTIFY_SOCKET": socket_path + "-ready"}
        with subprocess.Popen(argv, env=env) as process:
            try:
                assert notified.recv(100) == b"READY=1"
                yield process
            finally:
                process.kill()


def test_our_server(real: subprocess.Popen[bytes], socket_path: str) -> None:
    with open_ivshmem(socket_path) as one, open_ivshmem(socket_path) as two:
        assert one.doorbell.id != two.doorbell.id
        assert (one.size, one.can_lock) == (4 * MIB, True)
        assert two.doorbell.vectors == 2
        one.mmap[-1] = 9
        assert two.mmap[-1] == 9
        assert one.lock_section(1)
        assert two.section_locked(1)
        while one.doorbell.reach(two.doorbell.id) is None:
            assert told(one.doorbell) == []
        ring(one.doorbell, two.doorbell.id, 2)
        ring(two.doorbell, one.doorbell.id)
        assert rung(two.doorbell) == 2
        assert rung(one.doorbell) == 1
        one.close()
        assert told(two.doorbell) == [one.doorbell.id]
        with open_ivshmem(socket_path) as three:
            while two.doorbell.reach(three.doorbell.id) is None:
                assert told(two.doorbell) == []
            real.send_signal(signal.SIGKILL)
            while not two.doorbell.lost:
                told(two.doorbell)
            assert "has gone" in two.doorbell.lost
            assert told(three.doorbell) == []
            assert "has gone" in three.doorbell.lost
            ring(two.doorbell, three.doorbell.id)
            assert rung(three.doorbell) == 1


def test_info(real: subprocess.Popen[bytes], socket_path: str) -> None:
    argv = [sys.executable, "-m", "shmsock", "info", f"ivshmem:{socket_path}"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert f"region ivshmem:{socket_path}: 4 MiB" in said
    assert f"memory of the ivshmem server at {socket_path} (tmpfs" in said
    assert re.search(r"doorbell: we are peer 0, with [12] vectors?\n", said)  # the second may come late
    assert "format version" in said
