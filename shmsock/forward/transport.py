"""Transports of the forwarders' own: for kernel sockets, and what nc's standard input and output share with
them. They read from the socket straight into the ring where much comes, and send from a copy of it, which no
event loop's own can do, and they read nothing at all before they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from functools import partial
from typing import Any

from shmsock.aio.transport import ShmTransport
from shmsock.aio.write_buffer import OutgoingSocket
from shmsock.forward.endpoints import UNIX, Endpoint

__all__ = ["LINGER_0", "MOST", "DescriptorTransport", "SocketTransport", "connected"]

MOST = 1 << 18
"""Bytes that are read at once, and that may wait to be written before the other side pauses."""
SMALL = 1 << 14
"""Up to so many bytes, an object and the extension's quick write are cheaper than pouring."""
READS = 4
"""Reads of one socket in one turn of the loop."""
LINGER_0 = struct.pack("ii", 1, 0)


class DescriptorTransport(asyncio.Transport):
    """Reads `source` and writes `sink`, by the methods that its classes have. It is paused at first."""

    def __init__(self, protocol: Any, source: Any, sink: Any) -> None:
        super().__init__()
        self.protocol, self.loop = protocol, asyncio.get_running_loop()
        self._source, self._sink = source, sink
        self._reading = self._closing = self._eof = self._full = self._waits = False
        self._queue: deque[memoryview] = deque()
        self._queued, self._most = 0, MOST

    # -- to be provided

    def receive(self, most: int) -> bytes:
        """Read what there is. Raises OSError."""
        raise NotImplementedError

    def send(self, data: memoryview) -> int:
        """Write what there is room for. Raises OSError."""
        raise NotImplementedError

    def end_output(self) -> None:
        """Let the reader know the end."""
        raise NotImplementedError

    def released(self) -> None:
        """Close what was open; connection_lost() follows."""

    # -- reading

    def resume_reading(self) -> None:
        if not (self._reading or self._closing):
            self._reading = True
            self.loop.add_reader(self._source, self.readable)

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self._source)

    def readable(self) -> None:
        """Give what there is to the protocol."""
        self.take(MOST)

    def take(self, most: int) -> int:
        """Read once, and give it to the protocol. Returns how many bytes."""
        try:
            data = self.receive(most)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.lose(error)
            return 0
        if data:
            self.protocol.data_received(data)
        else:
            self.at_eof()
        return len(data)

    def at_eof(self) -> None:
        self.pause_reading()
        self.protocol.eof_received()

    # -- writing

    def write(self, data: Any) -> None:
        if self._closing or self._eof:
            return
        rest = memoryview(data)
        if not self._queue:
            rest = self._put(rest)
        if rest and not self._closing:
            self._queue.append(rest)
            self._queued += len(rest)
            if not self._waits:
                self._wait()
            if self._queued > self._most and not self._full:
                self._full = True
                self.protocol.pause_writing()

    def _wait(self) -> None:
        self._waits = True
        self.loop.add_writer(self._sink, self._flush)

    def _put(self, data: memoryview) -> memoryview:
        """Write what there is room for. Returns the rest."""
        try:
            while data:
                data = data[self.send(data) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.lose(error)
        return data

    def _flush(self) -> None:
        while self._queue:
            first = self._queue[0]
            rest = self._put(first)
            if self._closing and not self._queue:
                return  # lost
            self._queued -= len(first) - len(rest)
            if rest:
                self._queue[0] = rest
                break
            self._queue.popleft()
        if self._queued <= self._most // 4 and self._full:
            self._full = False
            self.protocol.resume_writing()
        if not self._queue and self._waits:
            self._waits = False
            self.loop.remove_writer(self._sink)
            if self._eof:
                self.end_output()
            if self._closing:
                self._release(None)

    def write_eof(self) -> None:
        if not (self._eof or self._closing):
            self._eof = True
            if not self._queue:
                self.end_output()

    def can_write_eof(self) -> bool:
        return True

    # -- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self.pause_reading()
            self._closing = True
            if not self._queue:
                self._release(None)

    def abort(self) -> None:
        self.lose(None)

    def lose(self, error: BaseException | None) -> None:
        """End at once: what waits to be written is lost."""
        over = self._closing and not self._queue
        self.pause_reading()
        self._closing = True
        self._queue.clear()
        if not over:
            self._release(error)

    def _release(self, error: BaseException | None) -> None:
        if self._waits:
            self._waits = False
            self.loop.remove_writer(self._sink)
        self.released()
        self.loop.call_soon(self.protocol.connection_lost, error)


class SocketTransport(DescriptorTransport):
    """A kernel socket, TCP's or UNIX's. `into`: a transport of shared memory to which all that comes goes."""

    def __init__(self, protocol: Any, sock: socket.socket) -> None:
        super().__init__(protocol, sock, sock)
        self._sock = sock
        self.into: ShmTransport | None = None
        self._bulk = False  # the last time there was more than SMALL
        self._pouring: OutgoingSocket | None = None  # it waits for room in the ring
        self.poured = 0
        self._from: Any = None  # the fast path of a ring whose bytes the kernel takes
        protocol.connection_made(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._sock if name == "socket" else default

    def receive(self, most: int) -> bytes:
        return self._sock.recv(most)

    def send(self, data: memoryview) -> int:
        return self._sock.send(data)

    def end_output(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def released(self) -> None:
        if self._pouring is not None:
            self._pouring.over.cancel()
        if self._from is not None:
            self._from.sink = -1  # another file may have the number next
        self._sock.close()

    def take_from(self, source: ShmTransport) -> None:
        """Have the pump send what comes to `source` by itself, as long as nothing waits here;
        its protocol's sink_refused() calls hold()."""
        if not self._queue:
            self._from, self._most = source.fast_path, 0
            self._from.sink = self._sock.fileno()

    def hold(self) -> None:
        """Pause the other side until the socket takes more."""
        if not (self._closing or self._full):
            self._full = True
            self._wait()
            self.protocol.pause_writing()

    def reset(self) -> None:
        """End in a way that the other end takes for a reset, not for EOF."""
        if not self._closing or self._queue:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        self.abort()

    def readable(self) -> None:
        """Give what there is to the other side, until nothing is left: when a reset comes along with bytes,
        uvloop calls this once and never again."""
        for _ in range(READS):
            if self._bulk and self.into is not None:
                return self._pour(self.into)
            count = self.take(MOST if self.into is None else SMALL)
            if not (count and self._reading):
                return
            self._bulk = count >= SMALL
        self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._reading:
            self.readable()

    def resume_reading(self) -> None:
        if self._pouring is None:
            super().resume_reading()

    def _pour(self, into: ShmTransport) -> None:
        """Have the kernel put what the socket has into the ring, as long as there is something and room."""
        source = OutgoingSocket(self._sock.fileno(), self.loop.create_future())
        try:
            into.begin_file(source)
        except OSError as error:
            source.end(error)
        if source.over.done():
            self._poured(source, source.over)
        else:
            self.pause_reading()
            self._pouring = source
            source.over.add_done_callback(partial(self._poured, source))

    def _poured(self, source: OutgoingSocket, over: asyncio.Future[None]) -> None:
        waited, self._pouring = self._pouring is not None, None
        self.poured += source.sent
        if over.cancelled() or self._closing:
            return
        error = over.exception()
        if isinstance(error, (BlockingIOError, InterruptedError)):
            self._bulk = source.sent > SMALL
            if waited:
                self.resume_reading()
        elif error is None:
            self.at_eof()
        elif self.into is not None and not self.into.is_closing():
            self.lose(error)

    @property
    def bytes_poured(self) -> int:
        return self.poured + (self._pouring.sent if self._pouring else 0)


async def connected(endpoint: Endpoint, source: str | None = None) -> socket.socket:
    """Connect a socket to an endpoint of TCP or UNIX. `source`: the own address. Raises OSError; cancelling
    resets what was begun."""
    loop = asyncio.get_running_loop()
    if endpoint.kind == UNIX:
        return await _connected(socket.AF_UNIX, endpoint.host, None)
    try:
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        socket.inet_pton(family, endpoint.host)
        found: list[Any] = [(family, endpoint.address)]
    except OSError:
        infos = await loop.getaddrinfo(*endpoint.address, type=socket.SOCK_STREAM)
        found = [(family, address) for family, *_, address in infos]
        if source is not None:  # IPv4
            found = [one for one in found if one[0] == socket.AF_INET] or found
    for family, address in found[:-1]:
        with contextlib.suppress(OSError):
            return await _connected(family, address, source)
    family, address = found[-1]
    return await _connected(family, address, source)


async def _connected(family: int, address: Any, source: str | None) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if source is not None:
            sock.bind((source, 0))
        with contextlib.suppress(BlockingIOError):
            sock.connect(address)
            return sock
        # On this machine it is done by now, which a second connect() tells; else that waits for it.
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock
    except BaseException:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        sock.close()
        raise
