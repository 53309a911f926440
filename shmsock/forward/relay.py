"""Bytes between two transports: half-close, back-pressure and resets go through, both ways.

A relay has two sides, each the protocol of one transport. What a side reads is written to the other's
transport at once. From a socket the kernel copies into one buffer for all, and from there the bytes go into
the ring; from the ring they become an object, which the kernel takes.

    one side reads EOF             write_eof() on the other; both have: both are closed
    one side's writes pause        the other reads no more until they go on
    one side is reset, or lost     the other is reset
    a side is not connected yet    the other reads once at most, and what it read is kept
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Relay", "ShmSide", "Side", "SocketSide", "reset"]

LINGER_0 = struct.pack("ii", 1, 0)
MOST = 1 << 18
"""Bytes that are read at once, and that may wait in a transport before its other side pauses."""
COPIED = 1 << 14
"""Up to so many bytes, to make an object for the extension's quick write is cheaper than the other way."""
_buffer = memoryview(bytearray(MOST))


def reset(end: Any) -> None:
    """End a transport, or close a socket, in a way that the other end takes for a reset, not for EOF."""
    sock = end if isinstance(end, socket.socket) else end.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    except (OSError, AttributeError):
        pass  # it is closed already, or not a socket
    if sock is end:
        sock.close()
    else:
        end.abort()


class Side(asyncio.BaseProtocol):
    """One side of a relay. `received`: bytes that were read from it."""

    transport: Any = None
    other: Side
    ended = False  # EOF was read
    lost = False
    full = False  # its transport asks for a pause of writes
    copies_at_once = False  # its transport's write() keeps no view of what it is given

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.received = 0
        self.early: list[bytes] = []
        self.give: Callable[[Any], object] = self._hold

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(MOST, MOST // 4)
        if self.other.lost:
            reset(transport)  # the target went away meanwhile
        elif self.other.transport is not None:
            self.relay.joined()
        else:
            transport.pause_reading()
            if self is self.relay.client:
                self.relay.start(self.relay)

    def _hold(self, data: Any) -> None:
        """Keep what was read before the other side is there. (uvloop's sockets go on reading when they are
        paused by connection_made().)"""
        self.early.append(bytes(data))
        self.transport.pause_reading()

    def flow(self) -> None:
        """Give what was kept to the other side, and from now on all that is read."""
        self.give = self.other.transport.write
        for data in self.early:
            self.give(data)
        self.early.clear()
        if self.ended:
            self.other.finish()
        elif not self.other.full:
            self.transport.resume_reading()

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


class ShmSide(Side, asyncio.Protocol):
    """A side in shared memory."""

    copies_at_once = True

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.give(data)

    def eof_received(self) -> bool:
        error = self.transport.conn.error
        if error is None:
            return super().eof_received()
        self.relay.broke(self, error)  # the peer is gone: protocols are told EOF, and programs were cut off
        return False


class SocketSide(Side, asyncio.BufferedProtocol):
    """A side that is a socket. All read into one buffer, which is empty again before another reads."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes
        if nbytes > COPIED and self.other.copies_at_once:
            self.give(_buffer[:nbytes])
        else:
            self.give(bytes(_buffer[:nbytes]))


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
