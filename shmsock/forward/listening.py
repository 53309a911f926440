"""Listening sockets of the kernel: TCP and UNIX. What is accepted stays a socket, from which nothing is read
until its target is connected."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

from shmsock.forward.endpoints import TCP, UNIX, Endpoint

__all__ = ["SocketListener", "taken"]

log = logging.getLogger("shmsock.forward")

BACKLOG = 1024
AT_ONCE = 64
"""Connections that are accepted in one turn of the loop."""
PAUSE_S = 0.5
"""The pause after the process, or the kernel, ran out of descriptors."""


def taken(endpoint: Endpoint, error: OSError) -> OSError:
    """Build the error for an endpoint that cannot be listened on: it names it, and says what to do."""
    known = {
        errno.EADDRINUSE: "another process (or rule) listens there: stop it, or choose another port",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EACCES: "not permitted: ports below 1024, and other users' directories, are root's",
    }
    why = known.get(error.errno or 0) or error.strerror or str(error)
    return OSError(error.errno, f"cannot listen on {endpoint}: {why}")


class SocketListener:
    """Listens on an endpoint, and gives each connection, (socket, address), to `accepted`."""

    def __init__(self, endpoint: Endpoint, mode: str, accepted: Callable[[Any, Any], object]) -> None:
        self._endpoint, self._mode, self._accepted = endpoint, mode, accepted
        self._socks: list[socket.socket] = []
        self._file: tuple[int, int] | None = None
        self._loop = asyncio.get_running_loop()

    async def open(self) -> Endpoint:
        """Listen. Returns the endpoint, with the port that was chosen if it was 0. Raises OSError."""
        try:
            if self._endpoint.kind == UNIX:
                self._bind_file()
            else:
                await self._bind()
            for sock in self._socks:
                sock.setblocking(False)
                sock.listen(BACKLOG)
                self._loop.add_reader(sock, self._ready, sock)
        except OSError as error:
            self.close()
            raise taken(self._endpoint, error) from error
        if self._endpoint.kind == UNIX:
            return self._endpoint
        return Endpoint(TCP, self._endpoint.host, self._socks[0].getsockname()[1])

    async def _bind(self) -> None:
        host, port = None if self._endpoint.host == "*" else self._endpoint.host, self._endpoint.port
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, proto, _, address in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, proto)
            except OSError:
                continue  # no IPv6 here
            self._socks.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # What it accepts inherits these two.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if not port and len(self._socks) > 1:
                address = (address[0], self._socks[0].getsockname()[1], *address[2:])
            try:
                sock.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise
                self._socks.pop().close()  # `localhost` is ::1 too, also where there is no IPv6
        if not self._socks:
            raise OSError(errno.EADDRNOTAVAIL, "no address")

    def _bind_file(self) -> None:
        path = self._endpoint.host
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socks.append(sock)
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and _is_left(path):
                os.unlink(path)
        before = os.umask(0o777 & ~int(self._mode, 8)) if self._mode else None
        try:
            sock.bind(path)
        finally:
            if before is not None:
                os.umask(before)
        made = os.lstat(path)
        self._file = made.st_dev, made.st_ino

    def permit(self, mode: str) -> None:
        """Give the socket file these permissions. Raises OSError."""
        os.chmod(self._endpoint.host, int(mode, 8))

    def _ready(self, listener: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("%s: cannot accept: %s; trying again", self._endpoint, error.strerror)
                self._loop.remove_reader(listener)
                self._loop.call_later(PAUSE_S, self._go_on, listener)
                return
            sock.setblocking(False)
            self._accepted(sock, address)

    def _go_on(self, listener: socket.socket) -> None:
        if listener in self._socks:
            self._loop.add_reader(listener, self._ready, listener)

    def close(self) -> None:
        """Listen no more; harmless when repeated."""
        socks, self._socks = self._socks, []
        for sock in socks:
            if sock.fileno() >= 0:
                self._loop.remove_reader(sock)
            sock.close()
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                there = os.lstat(self._endpoint.host)
                if (there.st_dev, there.st_ino) == file:
                    os.unlink(self._endpoint.host)


def _is_left(path: str) -> bool:
    """Does nobody listen on this UNIX socket any more?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
