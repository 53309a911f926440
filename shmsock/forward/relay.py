"""Bytes between two transports: half-close, back-pressure and resets go through, both ways.

A relay has two sides, each the protocol of one transport. What a side reads is written to the other's
transport at once. From a socket the kernel copies into the ring, where much comes; from the ring the bytes
are sent without ever being an object, too. (They are one in slow cases, and go on to the next write.)

    one side reads EOF             write_eof() on the other; both have: both are closed
    one side's writes pause        the other reads no more until they go on
    one side is reset, or lost     the other is reset
    a side is not connected yet    the other reads nothing
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from shmsock.aio.transport import ShmTransport
from shmsock.forward.transport import LINGER_0, MOST, SocketTransport

__all__ = ["Relay", "ShmSide", "Side", "SocketSide", "reset"]


def reset(end: Any) -> None:
    """End a transport, or close a socket, in a way that the other end takes for a reset, not for EOF."""
    if isinstance(end, SocketTransport):
        return end.reset()
    sock = end if isinstance(end, socket.socket) else end.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    except (OSError, AttributeError):
        pass  # it is closed already, or not a socket
    if sock is end:
        sock.close()
    else:
        end.abort()


class Side(asyncio.Protocol):
    """One side of a relay."""

    transport: Any = None
    other: Side
    ended = False  # EOF was read
    lost = False
    full = False  # its transport asks for a pause of writes

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self._count = 0
        self.give: Callable[[Any], object] = _drop

    @property
    def received(self) -> int:
        """How many bytes were read from it."""
        return self._count

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.other.lost:
            reset(transport)  # the target went away meanwhile
        elif self.other.transport is not None:
            self.relay.joined()
        elif self is self.relay.client:
            self.relay.start(self.relay)

    def flow(self) -> None:
        """Give all that is read to the other side."""
        self.give = self.other.transport.write
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._count += len(data)
        self.give(data)

    def eof_received(self) -> bool:
        self.ended = True
        if self.other.transport is not None:
            self.other.finish()
        return True

    def finish(self) -> None:
        """Pass on the other side's EOF. When both have come, close both."""
        if self.ended:
            self.transport.close()
            self.other.transport.close()
        elif not self.transport.is_closing():
            self.transport.write_eof()

    def pause_writing(self) -> None:
        self.full = True
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.full = False
        if not self.other.lost:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self.give = _drop
        self.relay.lost(self, error)


class ShmSide(Side):
    """A side in shared memory."""

    def connection_made(self, transport: Any) -> None:
        transport.set_write_buffer_limits(MOST, MOST // 4)
        transport.pause_reading()
        super().connection_made(transport)

    def eof_received(self) -> bool:
        error = self.transport.conn.error
        if error is None:
            return super().eof_received()
        self.relay.broke(self, error)  # the peer is gone: protocols are told EOF, and programs were cut off
        return False

    @property
    def received(self) -> int:
        return self._count + (self.transport.fast_path.poured if self.transport else 0)

    def flow(self) -> None:
        if isinstance(self.other.transport, SocketTransport):
            self.other.transport.take_from(self.transport)
        super().flow()

    def sink_refused(self, code: int) -> None:
        """Wait until the socket of the other side takes more, if it is full; else that side has ended."""
        if code in (errno.EAGAIN, errno.EINTR):
            self.other.transport.hold()
        else:
            self.other.transport.lose(OSError(code, os.strerror(code)))


class SocketSide(Side):
    """A side that is a socket of the kernel."""

    transport: SocketTransport | None

    @property
    def received(self) -> int:
        return self._count + (self.transport.bytes_poured if self.transport else 0)

    def flow(self) -> None:
        assert self.transport is not None
        if isinstance(self.other.transport, ShmTransport):
            self.transport.into = self.other.transport
        super().flow()


def _drop(data: Any) -> None:
    """Forget what came after the end."""


class Relay:
    """A connection that was accepted, `client`, and the one that is made for it, `target`.

    `start` is called when a client is connected first, by a peer. `over` is called once, when nothing of it
    is left; `how` says by then how it ended, in words, `error` what reset it. `header`: what the
    target is sent first. `label`: the client, for people.
    """

    def __init__(
        self,
        client: type[Side],
        target: type[Side],
        over: Callable[[Relay], object],
        start: Callable[[Relay], object] = id,
    ) -> None:
        self.client, self.target = client(self), target(self)
        self.client.other, self.target.other = self.target, self.client
        self.start, self.over = start, over
        self.header, self.how, self.label = b"", "", ""
        self.error: BaseException | None = None
        self.began = time.monotonic()

    def joined(self) -> None:
        """Let bytes flow, as both sides are connected."""
        if self.header:
            self.target.transport.write(self.header)
        self.target.flow()
        self.client.flow()

    def broke(self, side: Side, error: BaseException | None) -> None:
        """Reset what is still connected, as `side` was reset, or is gone."""
        self.error = self.error or error
        if not self.how:
            who = "client" if side is self.client else "target"
            self.how = f"reset by {who}: {error}" if error else f"{who} lost"
        for end in (self.client, self.target):
            if end.transport is not None and not end.lost:
                end.give = _drop
                reset(end.transport)

    def lost(self, side: Side, error: BaseException | None) -> None:
        """Note that a side has ended."""
        other = side.other
        if not other.lost and (error is not None or not (side.ended and other.ended)):
            if isinstance(error, BrokenPipeError) and side.ended and other.transport is not None:
                self.how = self.how or "one side took no more"
                other.transport.close()  # all that was said arrives
            else:
                self.broke(side, error)
        if other.lost or other.transport is None:
            self.finish("closed")

    def finish(self, how: str) -> None:
        """Tell that nothing of it is left."""
        self.how = self.how or how
        over, self.over = self.over, id
        over(self)

    def abort(self, how: str) -> None:
        """Reset what is connected."""
        self.how = self.how or how
        self.broke(self.client, None)
