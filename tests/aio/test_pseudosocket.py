"""What libraries ask of a socket."""

from __future__ import annotations

import errno
import pickle
import select
import socket
import struct
from collections.abc import Callable

import pytest

from shmsock.aio.pseudosocket import PollFd, PseudoSocket


def test_a_socket_to_look_at() -> None:
    sock = PseudoSocket(("a", 1), ("b", 2), lambda: 5)
    assert (sock.family, sock.type, sock.proto) == (socket.AF_INET, socket.SOCK_STREAM, 0)
    assert (sock.getsockname(), sock.getpeername(), sock.fileno()) == (("a", 1), ("b", 2), 5)
    assert "('a', 1)" in repr(sock)
    assert sock.gettimeout() == 0
    assert not sock.getblocking()
    assert not sock.get_inheritable()
    sock.settimeout(0)
    sock.setblocking(False)
    refused: Callable[[], object]
    for refused in (lambda: sock.settimeout(1), lambda: sock.setblocking(True)):
        with pytest.raises(ValueError):
            refused()
    impossible: Callable[[], object]
    for impossible in (lambda: sock.shutdown(socket.SHUT_RDWR), lambda: sock.dup()):
        with pytest.raises(OSError) as info:
            impossible()
        assert info.value.errno == errno.EOPNOTSUPP
    with pytest.raises(TypeError, match="Cannot serialize"):
        pickle.dumps(sock)


def test_options_are_remembered() -> None:
    sock = PseudoSocket(("a", 1), None, lambda: -1, socket.SOCK_DGRAM)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_DGRAM
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 4) == b"\1\0\0\0"
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger
    with pytest.raises(OSError) as info:
        sock.getpeername()
    assert info.value.errno == errno.ENOTCONN


def test_a_descriptor_to_poll() -> None:
    poll = PollFd()
    seen = select.poll()
    seen.register(poll.fd, select.POLLIN)
    for readable in (False, True, True, False, False, True):
        poll.update(readable)
        assert bool(seen.poll(0)) == readable
    poll.close()
    assert poll.fd == -1
    poll.close()
