"""Standard input and output as one side of a relay: what `shmsock nc` is made of."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections import deque
from typing import Any

from shmsock.aio.endpoints import create_connection, create_server
from shmsock.forward.relay import MOST, Relay, ShmSide, Side

__all__ = ["connect", "listen"]

PIPE_BYTES = 1 << 20


class StdioSide(Side, asyncio.Protocol):
    """The side of standard input and output."""

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.give(data)


class Stdio(asyncio.Transport):
    """Reads one descriptor and writes another, of whatever kind: pipes, files, terminals, sockets. The flags
    of both stay as they are, as other processes share them."""

    def __init__(self, protocol: StdioSide, source: int = 0, sink: int = 1) -> None:
        super().__init__()
        self._loop, self._protocol = asyncio.get_running_loop(), protocol
        self._source, self._sink = source, sink
        self._reading = self._closing = self._eof = self._waits = self._full = False
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._socket: socket.socket | None = None
        kind = os.fstat(sink).st_mode
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(sink))
        elif stat.S_ISFIFO(kind):
            with contextlib.suppress(OSError):  # another user's pipe: then a full one holds us up
                self._sink = os.open(f"/proc/self/fd/{sink}", os.O_WRONLY | os.O_NONBLOCK)
        for fd in (source, sink):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        protocol.connection_made(self)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Leave them as they are."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    # -- reading

    def resume_reading(self) -> None:
        if self._reading or self._closing:
            return
        self._reading = True
        try:
            self._loop.add_reader(self._source, self._readable)
        except PermissionError:  # a file, which is always readable
            self._loop.call_soon(self._read_file)

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            with contextlib.suppress(OSError, ValueError):
                self._loop.remove_reader(self._source)

    def _read_file(self) -> None:
        if self._reading:
            self._readable()
            self._loop.call_soon(self._read_file)

    def _readable(self) -> None:
        try:
            data = os.read(self._source, MOST)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""  # a terminal that is gone, a reset socket
        if data:
            self._protocol.data_received(data)
        else:
            self.pause_reading()
            self._protocol.eof_received()

    # -- writing

    def write(self, data: Any) -> None:
        if self._closing or self._eof:
            return
        rest = memoryview(data)
        if not self._queue:
            rest = self._put(rest)
        if rest:
            self._queue.append(rest)
            self._queued += len(rest)
            if not self._waits:
                self._waits = True
                self._loop.add_writer(self._sink, self._flush)
            if self._queued > MOST and not self._full:
                self._full = True
                self._protocol.pause_writing()

    def _put(self, data: memoryview) -> memoryview:
        """Write what there is room for. Returns the rest."""
        try:
            while data:
                n = (
                    self._socket.send(data, socket.MSG_DONTWAIT)
                    if self._socket
                    else os.write(self._sink, data)
                )
                data = data[n:]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._lose(error)
            return data[:0]
        return data

    def _flush(self) -> None:
        while self._queue:
            first = self._queue.popleft()
            rest = self._put(first)
            self._queued -= len(first) - len(rest)
            if rest:
                self._queue.appendleft(rest)
                break
        if self._queued <= MOST // 4 and self._full:
            self._full = False
            self._protocol.resume_writing()
        if not self._queue and self._waits:
            self._waits = False
            self._loop.remove_writer(self._sink)
            if self._eof:
                self._end_output()
            if self._closing:
                self._loop.call_soon(self._protocol.connection_lost, None)

    def write_eof(self) -> None:
        self._eof = True
        if not self._queue:
            self._end_output()

    def _end_output(self) -> None:
        """Let the reader of standard output know the end, while input may go on."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            return
        nothing = os.open(os.devnull, os.O_WRONLY)
        if self._sink != 1:
            os.dup2(nothing, self._sink)
        os.dup2(nothing, 1)
        os.close(nothing)

    # -- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self.pause_reading()
            self._closing = True
            if not self._queue:
                self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self._lose(None)

    def _lose(self, error: OSError | None) -> None:
        waited = self._closing and not self._queue  # connection_lost() is on its way
        self.pause_reading()
        self._closing = True
        self._queue.clear()
        self._queued = 0
        if self._waits:
            self._waits = False
            self._loop.remove_writer(self._sink)
        if not waited:
            self._loop.call_soon(self._protocol.connection_lost, error)


class _Session:
    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.relay = Relay(StdioSide, ShmSide, self._over)
        self.error: BaseException | None = None

    def _over(self, relay: Relay) -> None:
        if not self.over.done():
            self.over.set_result(None)

    async def run(self) -> None:
        client: Any = self.relay.client
        if not self.relay.target.lost:
            Stdio(client)
            await self.over
        error = self.relay.error
        if error is not None:
            raise error


async def connect(host: str, port: int, timeout: float | None = None) -> None:
    """Connect standard input and output to `port` of a peer, until both have ended. Raises what
    create_connection() does, TimeoutError, BrokenPipeError (nobody reads our output), and
    ConnectionResetError."""
    session = _Session()
    target: Any = session.relay.target
    try:
        await asyncio.wait_for(create_connection(lambda: target, host, port), timeout)
    except asyncio.TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"{host!r} does not answer within {timeout:g} s") from None
    await session.run()


async def listen(port: int) -> None:
    """Wait for one connection to `port`, and then do as connect() does."""
    session = _Session()
    target: Any = session.relay.target
    accepted = asyncio.get_running_loop().create_future()

    def factory() -> Any:
        if accepted.done():
            raise ConnectionRefusedError("one connection was waited for")
        accepted.set_result(None)
        return target

    server = await create_server(factory, None, port)
    await accepted
    server.close()
    await session.run()
