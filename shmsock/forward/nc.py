"""Standard input and output as one side of a relay: what `shmsock nc` is made of."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import Any, cast

from shmsock.aio.endpoints import create_connection, create_server
from shmsock.forward.relay import Relay, ShmSide, Side
from shmsock.forward.transport import DescriptorTransport

__all__ = ["connect", "listen"]

PIPE_BYTES = 1 << 20


class Stdio(DescriptorTransport):
    """Standard input and output, of whatever kind: pipes, files, terminals, sockets. Flags of both stay as
    they are, as other processes share them."""

    def __init__(self, protocol: Side) -> None:
        super().__init__(protocol, 0, 1)
        self._socket: socket.socket | None = None
        kind = os.fstat(1).st_mode
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(1))
        elif stat.S_ISFIFO(kind):
            with contextlib.suppress(OSError):  # another user's pipe: then a full one holds us up
                self._sink = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK)
        for fd in (0, 1):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        protocol.connection_made(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def resume_reading(self) -> None:
        try:
            super().resume_reading()
        except PermissionError:  # a file, which is always readable
            self.loop.call_soon(self._read_file)

    def pause_reading(self) -> None:
        with contextlib.suppress(OSError):
            super().pause_reading()

    def _read_file(self) -> None:
        if self._reading:
            self.readable()
            self.loop.call_soon(self._read_file)

    def receive(self, most: int) -> bytes:
        try:
            return os.read(0, most)
        except BlockingIOError:
            raise
        except OSError:
            return b""  # a terminal that is gone

    def send(self, data: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        return os.write(self._sink, data)

    def end_output(self) -> None:
        """Let the reader of standard output know the end, while input may go on."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            return
        nothing = os.open(os.devnull, os.O_WRONLY)
        for fd in {self._sink, 1}:
            os.dup2(nothing, fd)
        os.close(nothing)


class _Session:
    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.relay = Relay(Side, ShmSide, self._over)
        self.error: BaseException | None = None

    def _over(self, relay: Relay) -> None:
        if not self.over.done():
            self.over.set_result(None)

    async def run(self) -> None:
        if not self.relay.target.lost:
            Stdio(self.relay.client)
            await self.over
        error = self.relay.error
        if error is not None:
            raise error


async def connect(host: str, port: int, timeout: float | None = None, **mine: str | None) -> None:
    """Connect standard input and output to `port` of a peer, until both have ended. `mine`: region and name,
    as create_connection() takes them. Raises what that does, TimeoutError, BrokenPipeError (nobody reads our
    output), and ConnectionResetError."""
    session = _Session()
    target, more = cast(Any, session.relay.target), cast(Any, mine)
    try:
        await asyncio.wait_for(create_connection(lambda: target, host, port, **more), timeout)
    except asyncio.TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"{host!r} does not answer within {timeout:g} s") from None
    await session.run()


async def listen(port: int, **mine: str | None) -> None:
    """Wait for one connection to `port`, and then do as connect() does."""
    session = _Session()
    target, more = cast(Any, session.relay.target), cast(Any, mine)
    accepted = asyncio.get_running_loop().create_future()

    def factory() -> Any:
        if accepted.done():
            raise ConnectionRefusedError("one connection was waited for")
        accepted.set_result(None)
        return target

    server = await create_server(factory, None, port, **more)
    await accepted
    server.close()
    await session.run()
