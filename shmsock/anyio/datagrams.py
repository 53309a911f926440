"""Datagram sockets over the engine's endpoints."""

from __future__ import annotations

import socket
from collections import deque
from typing import TYPE_CHECKING

import anyio
from anyio import ClosedResourceError
from anyio.abc import UnreliableObjectStream
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from shmsock.aio.node import Node
from shmsock.aio.pump import DatagramOut
from shmsock.anyio.ends import RECEIVER, SENDER, Address, End, Resource, broken

if TYPE_CHECKING:
    from shmsock.engine.datagrams import Endpoint

__all__ = ["ConnectedShmDatagramSocket", "ShmDatagramSocket"]

QUEUE_MAX = 64  # datagrams kept here; what comes then waits in the endpoint, where bounds and counters are
UNSENT_MAX = 1 << 16  # bytes without room in a ring, from which on send() waits


class _DatagramEnd(End):
    """The end of a datagram socket: handler of an endpoint of the engine."""

    def __init__(self, node: Node, endpoint: Endpoint) -> None:
        super().__init__(node)
        self.endpoint = endpoint
        self.queue: deque[tuple[bytes, Address]] = deque()
        self.error: OSError | None = None
        self._paused = False
        self.send = DatagramOut(node.pump, endpoint.local[1], endpoint.routes, self).sendto
        endpoint.handler = self

    def _send_slowly(self, data: bytes, to: Address | None) -> None:
        """Send to an address that was not used before, or whatever else the extension leaves to Python."""
        self.endpoint.send(data, to)

    def datagram(self, data: bytes, source: Address) -> None:
        self.queue.append((data, source))
        if len(self.queue) >= QUEUE_MAX:
            self._paused = True
            self.endpoint.pause()
        self.wake(RECEIVER)

    def take(self) -> tuple[bytes, Address]:
        found = self.queue.popleft()
        if self._paused and not self.queue:
            self._paused = False
            self.endpoint.resume()
        return found

    def space(self) -> None:
        if self.flushing and not self.endpoint.unsent:
            self._finish()
        self.wake(SENDER)

    def refused(self, error: OSError) -> None:
        self.error = error
        self.wake(RECEIVER)
        self.wake(SENDER)

    def end(self) -> None:
        if self.endpoint.unsent and not self.node.closed:
            self.flushing = True  # what was sent last goes out first
            self.endpoint.pause()
            self.node.transports.add(self)
        else:
            self._finish()

    def _finish(self) -> None:
        self.flushing = False
        self.node.transports.discard(self)
        self.endpoint.close()
        self.node.flushed()


class _Datagrams(Resource):
    _end: _DatagramEnd

    def __init__(self, node: Node, endpoint: Endpoint) -> None:
        super().__init__(
            _DatagramEnd(node, endpoint), endpoint.local, endpoint.remote, lambda: -1, socket.SOCK_DGRAM
        )
        self._receiving, self._sending = (
            anyio.ResourceGuard("reading from"),
            anyio.ResourceGuard("writing to"),
        )

    def _check(self) -> None:
        end = self._end
        if end.closed:
            raise ClosedResourceError
        try:
            end.node.check()
            if end.error is not None:
                error, end.error = end.error, None  # told once
                raise error
        except OSError as error:
            raise broken(error) from error

    async def _take(self) -> tuple[bytes, Address]:
        end = self._end
        with self._receiving:
            await checkpoint()
            while True:
                if end.queue and not end.closed:
                    return end.take()
                self._check()
                await end.sleep(RECEIVER)

    async def _send(self, data: bytes, to: Address | None) -> None:
        end = self._end
        with self._sending:
            await checkpoint_if_cancelled()
            self._check()
            end.send(data, to)
            while end.endpoint.unsent > UNSENT_MAX and not end.closed and end.error is None:
                await end.sleep(SENDER)
            if end.node.lib.sh_over(end.node.nd):
                await cancel_shielded_checkpoint()


class ShmDatagramSocket(_Datagrams, UnreliableObjectStream[tuple[bytes, Address]]):
    """Datagrams from and to everybody, as anyio's UDPSocket. An address is (name, port); ("*", port) reaches
    all that have that port."""

    async def receive(self) -> tuple[bytes, Address]:
        """Wait for a datagram, and return it and where it came from. Raises ClosedResourceError. Cancelling
        loses none."""
        return await self._take()

    async def send(self, item: tuple[bytes, Address]) -> None:
        """Send (bytes, address), and wait while much of what was sent has no room yet. Raises socket.gaierror
        (nobody has the name), OSError (EMSGSIZE: more than 65507 bytes), ClosedResourceError. Cancelled, it
        has been sent, or not begun."""
        await self._send(*item)

    async def sendto(self, data: bytes, host: str, port: int) -> None:
        """Send `data` to (host, port): send() with the parts of its item. Raises, and when cancelled leaves,
        what send() does."""
        await self._send(data, (host, port))


class ConnectedShmDatagramSocket(_Datagrams, UnreliableObjectStream[bytes]):
    """Datagrams from and to one address, as anyio's ConnectedUDPSocket."""

    async def receive(self) -> bytes:
        """Wait for a datagram. Raises ClosedResourceError, BrokenResourceError (nobody had the port when
        something was sent; told once). Cancelling loses none."""
        return (await self._take())[0]

    async def send(self, item: bytes) -> None:
        """Send a datagram, and wait while much of what was sent has no room yet. Raises as receive() does,
        and OSError (EMSGSIZE: more than 65507 bytes). Cancelled, it has been sent, or not begun."""
        await self._send(item, None)
