"""Clients that wait for their target: what becomes of them when it is there, and when it is not."""

from __future__ import annotations

import select
import socket
from typing import Protocol

from shmsock.forward import socks5
from shmsock.forward.relay import Relay, reset
from shmsock.forward.transport import SocketTransport

__all__ = ["Client", "Peer", "Socket", "Socks5"]


class Client(Protocol):
    """What waits."""

    @property
    def gone(self) -> bool:
        """Has it been reset?"""

    async def joins(self) -> None:
        """Begin to read, as the target is connected. Raises OSError when it is gone."""

    async def refuse(self, error: BaseException) -> None:
        """Let it know that its target cannot be reached."""


class Peer:
    """A client in shared memory. It is connected, and paused."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    @property
    def gone(self) -> bool:
        return self._relay.client.lost

    async def joins(self) -> None:
        """Do nothing: it began to read when the target was connected."""

    async def refuse(self, error: BaseException) -> None:
        if not self.gone:
            reset(self._relay.client.transport)


class Socket:
    """A client that is a socket. Nothing of it has been read."""

    def __init__(self, relay: Relay, sock: socket.socket) -> None:
        self._relay, self._sock = relay, sock

    @property
    def gone(self) -> bool:
        """Has it been reset? (That it has said all it had to say is no reason to think so.)"""
        poll = select.poll()
        poll.register(self._sock, 0)
        return any(bits & (select.POLLERR | select.POLLHUP) for _, bits in poll.poll(0))

    async def joins(self) -> None:
        SocketTransport(self._relay.client, self._sock)

    async def refuse(self, error: BaseException) -> None:
        reset(self._sock)


class Socks5(Socket):
    """A client of SOCKS5, which waits for an answer."""

    async def joins(self) -> None:
        await socks5.reply(self._sock, socks5.GRANTED)
        await super().joins()

    async def refuse(self, error: BaseException) -> None:
        try:
            await socks5.reply(self._sock, socks5.code_of(error))
        except OSError:
            pass  # it does not want to know
        self._sock.close()
