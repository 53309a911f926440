"""Messages of an ivshmem server: sent whole or not at all, put together from pieces, and nothing leaks."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from shmsock.errors import ProtocolViolation
from shmsock.region.ivshmem_protocol import MESSAGE, Receiver, send_message
from tests.region.conftest import open_files

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before


@pytest.fixture
def pair(no_leaks: None) -> Iterator[Pair]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def pipe(no_leaks: None) -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_numbers_and_descriptors_stay_together(pair: Pair, pipe: tuple[int, int]) -> None:
    sender, receiver = pair
    for number, fd in ((0, None), (65535, None), (-1, pipe[1]), (7, None), (8, pipe[0])):
        send_message(sender, number, fd)
    inbox = Receiver(receiver)
    assert [inbox.receive() for _ in range(2)] == [(0, -1), (65535, -1)]
    number, fd = inbox.receive()
    assert number == -1
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(fd, b"through")
    os.close(fd)
    assert os.read(pipe[0], 10) == b"through"
    assert inbox.receive() == (7, -1)
    number, fd = inbox.receive()
    assert (number, os.fstat(fd)) == (8, os.fstat(pipe[0]))
    os.close(fd)
    with pytest.raises(BlockingIOError):
        inbox.receive()


def test_bytes_are_little_endian(pair: Pair) -> None:
    send_message(pair[0], 258)
    assert pair[1].recv(100) == b"\2\1\0\0\0\0\0\0"


def test_pieces_become_a_message(pair: Pair, pipe: tuple[int, int]) -> None:
    sender, inbox = pair[0], Receiver(pair[1])
    data = MESSAGE.pack(513)
    send_fds(sender, data[:1], [pipe[0]])
    for at in range(1, 8):
        with pytest.raises(BlockingIOError):
            inbox.receive()
        sender.send(data[at : at + 1])
    number, fd = inbox.receive()
    assert number == 513
    os.close(fd)


def test_half_a_message_keeps_its_descriptor_until_closed(pair: Pair, pipe: tuple[int, int]) -> None:
    inbox = Receiver(pair[1])
    send_fds(pair[0], b"abc", [pipe[0]])
    before = len(open_files())
    with pytest.raises(BlockingIOError):
        inbox.receive()
    assert len(open_files()) == before + 1
    inbox.close()
    inbox.close()
    assert len(open_files()) == before


@pytest.mark.parametrize("count", [2, 3, 50])
def test_several_descriptors_are_refused_and_closed(pair: Pair, pipe: tuple[int, int], count: int) -> None:
    send_fds(pair[0], MESSAGE.pack(1), [pipe[0]] * count)
    with pytest.raises(ProtocolViolation, match="descriptor"):
        Receiver(pair[1]).receive()


def test_a_second_descriptor_in_the_second_half_is_refused(pair: Pair, pipe: tuple[int, int]) -> None:
    data = MESSAGE.pack(1)
    send_fds(pair[0], data[:4], [pipe[0]])
    send_fds(pair[0], data[4:], [pipe[0]])
    with pytest.raises(ProtocolViolation, match="several descriptors"):
        Receiver(pair[1]).receive()


def test_no_descriptor_free_is_an_error_not_a_message_without(pair: Pair, pipe: tuple[int, int]) -> None:
    send_message(pair[0], 5, pipe[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    inbox = Receiver(pair[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(ProtocolViolation, match="ulimit -n"):
            inbox.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_end_is_an_error(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(ConnectionResetError, match="closed the connection") as caught:
        Receiver(pair[1]).receive()
    assert not isinstance(caught.value, ProtocolViolation)


def test_the_end_inside_a_message_is_a_violation(pair: Pair, pipe: tuple[int, int]) -> None:
    send_fds(pair[0], b"12345", [pipe[0]])
    pair[0].close()
    with pytest.raises(ProtocolViolation, match="after 5 bytes"):
        Receiver(pair[1]).receive()


def test_sending_never_waits(pair: Pair) -> None:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1 << 20:
            send_message(pair[0], sent)
            sent += 1
    assert 0 < sent < 1 << 20
    inbox = Receiver(pair[1])
    assert [inbox.receive()[0] for _ in range(sent)] == list(range(sent))


def test_sending_to_nobody_is_an_error(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(OSError) as caught:
        send_message(pair[0], 1)
    assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)
