"""asyncio streams over shared memory: StreamReader and StreamWriter with a straight way to the ring.

Direct mode is the extension's (native/extension/op.c): read(n), readexactly(n), readline() and drain() are
awaitables in C that spin, copy and give the space back. What they find unusual they leave to asyncio's
coroutines of the same names, which wait to be fed like any reader's: then the transport delivers for so long.
Bytes leave the ring only after the last await of an operation, so cancelling loses none.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import warnings
import weakref
from asyncio.streams import _DEFAULT_LIMIT  # type: ignore[attr-defined]
from collections import deque
from collections.abc import Generator
from dis import get_instructions
from errno import ECONNRESET
from functools import partial
from types import CoroutineType, SimpleNamespace, coroutine
from typing import Any

from shmsock.aio.direct import resume
from shmsock.aio.pump import extension
from shmsock.aio.tls import start_tls
from shmsock.aio.transport import ShmTransport
from shmsock.engine.connection import DATA, State

__all__ = ["ShmServerProtocol", "ShmStreamReader", "ShmStreamReaderProtocol", "ShmStreamWriter", "adopt"]

_KEEPS_WRITERS = sys.version_info < (3, 13)  # later ones let writers that their owners have dropped close

# What this module relies on inside asyncio. A Python that renames one of these must fail at import, not in
# the field.
_PRIVATE = ("_wakeup_waiter", "_wait_for_data", "_maybe_resume_transport")
_PRIVATE_STATE = ("_buffer", "_eof", "_exception", "_waiter", "_limit", "_loop", "_transport", "_paused")
_code = asyncio.StreamReader.__init__.__code__.co_names
if missing := [x for x in _PRIVATE if not hasattr(asyncio.StreamReader, x)] + [
    x for x in _PRIVATE_STATE if x not in _code
]:
    raise ImportError(f"asyncio.StreamReader of this Python has no {missing}: shmsock does not know it")


@coroutine
def yield_once() -> Generator[None, None, None]:
    """Let the loop turn once."""
    yield


class ShmStreamReader(asyncio.StreamReader):
    """asyncio.StreamReader, same methods, errors and limits. In direct mode its read(n), readexactly(n) and
    readline() take bytes from the ring as long as the buffer is empty; all else waits to be fed, as asyncio's
    does."""

    # What asyncio's constructor sets for each is the class's: connecting is little more than making objects.
    _transport: Any = None
    _buffer: bytearray
    _eof = _paused = False
    _exception: BaseException | None = None
    _waiter: asyncio.Future[None] | None = None
    _loop: asyncio.AbstractEventLoop

    _fast_path: Any = SimpleNamespace(can_read=False, take=lambda most: None)  # what the calls in C ask
    _late: BaseException | None = None  # raised when the buffer has been read

    def __init__(self, limit: int = _DEFAULT_LIMIT, loop: Any = None) -> None:
        if limit <= 0 or loop is None or loop.get_debug():
            super().__init__(limit, loop)
        else:
            self._limit, self._loop, self._buffer = limit, loop, bytearray()

    def _attach(self, transport: ShmTransport) -> None:
        """Begin direct mode. (A method and not __init__: stock readers are adopted by changing their
        class.)"""
        self._fast_path = transport.fast_path
        transport.fast_path.attach(self, transport.conn.state is not State.FREE)

    def _maybe_resume_transport(self) -> None:
        """Called by asyncio whenever bytes were taken out of the buffer."""
        super()._maybe_resume_transport()  # type: ignore[misc]
        if isinstance(self._transport, ShmTransport):
            self._transport.update_poll()

    def set_exception(self, exc: Any) -> None:
        """Do as asyncio's does, but let what had arrived before a connection was lost be read first."""
        self._fast_path.can_read = False
        if isinstance(exc, ConnectionError) and isinstance(self._transport, ShmTransport):
            if self._eof:
                return
            if self._buffer:
                self._late = exc
                self._wakeup_waiter()
                return
        if self._waiter is not None and self._waiter.done():
            self._exception = exc  # a waiter that was woken already checks it next
            return
        super().set_exception(exc)

    def _wakeup_waiter(self) -> None:
        """Wake as asyncio's does; the waiter may have been woken already, by news before these."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        if self._late is not None:
            if self._buffer:
                raise self._late
            self._exception, self._late = self._late, None
        if self._exception is not None:
            raise self._exception

    async def _wait_for_data(self, func_name: str) -> None:
        """Wait until fed; asyncio's coroutines call this."""
        transport = self._transport
        if self._waiter is not None or not isinstance(transport, ShmTransport):
            await super()._wait_for_data(func_name)  # type: ignore[misc]
            return
        self._check()
        transport._check_thread()
        if self._eof:
            return
        had = len(self._buffer)
        transport.feed(self)
        try:
            if not self._eof and len(self._buffer) == had and self._exception is None:
                await super()._wait_for_data(func_name)  # type: ignore[misc]
        finally:
            resume(transport.fast_path, self)
        self._check()

    def _on_ready(self) -> None:
        """Put what is there into the buffer. The extension calls this for a read that was cancelled after it
        had been woken, so that those who look at the buffer see the bytes."""
        if isinstance(self._transport, ShmTransport):
            self._transport.ready(DATA)


class ShmStreamWriter(asyncio.StreamWriter):
    """asyncio.StreamWriter; its drain() costs little when there is nothing to wait for."""

    _transport: ShmTransport
    _reader: Any
    _fast_path: Any = SimpleNamespace(can_write=False)

    def __init__(self, transport: ShmTransport, protocol: Any, reader: Any, loop: Any) -> None:
        # asyncio's makes a future, too, that nobody uses
        self._transport, self._protocol, self._reader, self._loop = transport, protocol, reader, loop
        self.write = transport.write  # type: ignore[method-assign]  # one call less on the way
        self._fast_path = transport.fast_path

    async def wait_closed(self) -> None:
        """Wait as asyncio's does. For a task that has just closed connection_lost() is called at once: as
        with reads that find something, the loop turns when the budget of this turn is used up."""
        protocol: Any = self._protocol
        transport: Any = self._transport
        if getattr(transport, "just_lost", False):
            if transport.node.pump.over():
                await yield_once()
            # a program's own protocol is told by the loop
            ours = type(protocol).connection_lost is _connection_lost and transport._protocol is protocol
            if not ours or transport.lost_by is not None:
                await yield_once()
            elif transport.just_lost:
                transport.call_connection_lost(None)
                transport.node.pump.moot += 1
        if not protocol._connection_lost or getattr(protocol, "_closed", self) is not None:  # else it is over
            await protocol._get_close_waiter(self)

    async def start_tls(
        self,
        sslcontext: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        """Begin TLS as asyncio's does from Python 3.11 on, here on every loop and version: from here on all
        is encrypted, and this writer is a plain asyncio.StreamWriter."""
        protocol: Any = self._protocol
        if not self._fast_path.can_write:
            await self.drain()  # not otherwise: it may let the loop turn, and the peer's handshake come early
        transport = await start_tls(
            self._loop,
            self._transport,
            protocol,
            sslcontext,
            server_side=protocol._client_connected_cb is not None,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        self.__dict__.pop("write", None)
        self.__class__ = asyncio.StreamWriter  # type: ignore[assignment]
        self._transport = protocol._transport = transport
        protocol._over_ssl = True

    def __del__(self) -> None:
        # asyncio's own closes here; the collector may run on another thread than the loop's, where that is
        # not allowed
        transport = getattr(self, "_transport", None)
        if transport is None or transport.is_closing() or transport.node.closed:
            return
        if transport.node.loop.is_closed():
            warnings.warn("loop is closed", ResourceWarning, stacklevel=2)
            return
        transport.node.call(transport.close)
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2)


class ShmStreamReaderProtocol(asyncio.StreamReaderProtocol):
    """Puts its reader into direct mode as soon as there is a transport, and waits for space as reads wait for
    bytes."""

    # As of the reader; and these two are made when they are needed.
    _closed: Any = None
    _drain_waiters: Any = ()
    _transport: Any = None
    _client_connected_cb: Any = None
    _stream_reader_wr: Any = None
    _stream_writer: Any = None
    _task: Any = None
    _paused = _connection_lost = _reject_connection = _over_ssl = False
    _fast_path: Any = None  # the FastPath

    def __init__(self, stream_reader: Any, client_connected_cb: Any = None, loop: Any = None) -> None:
        if stream_reader is None or loop is None or loop.get_debug():
            super().__init__(stream_reader, client_connected_cb, loop)
            return
        self._loop, self._stream_reader_wr = loop, weakref.ref(stream_reader)
        if client_connected_cb is not None:
            self._client_connected_cb, self._strong_reader = client_connected_cb, stream_reader

    def _get_close_waiter(self, stream: Any) -> Any:
        if self._closed is None:
            self._closed = self._loop.create_future()
            if self._connection_lost:
                self._closed.set_result(None)
        return self._closed

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None or self._paused or self._closed is not None:
            closed = self._get_close_waiter(None)
            super().connection_lost(exc)
            if exc is not None and not closed.cancelled():
                closed.exception()  # nobody need ask for it, and the collector may finalize it before __del__
            return
        self._connection_lost = True
        reader = None if self._stream_reader_wr is None else self._stream_reader_wr()
        if type(reader) is ShmStreamReader and reader._waiter is None:
            reader._eof = True
        elif reader is not None:
            reader.feed_eof()
        self._stream_reader_wr = self._stream_writer = self._task = self._transport = None

    def __del__(self) -> None:
        """Do nothing: asyncio's does here what connection_lost() has done."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        reader = self._stream_reader  # type: ignore[attr-defined]
        if isinstance(transport, ShmTransport):
            self._fast_path = transport.fast_path
            if isinstance(reader, ShmStreamReader):
                reader._attach(transport)
            if reader is not None and self._client_connected_cb is None and not self._reject_connection:
                self._transport = reader._transport = transport  # which is all that asyncio's does then
                return
        super().connection_made(transport)

    async def _drain_helper(self) -> None:
        """Wait until the protocol may write on; asyncio's drain() awaits this. Raises ConnectionResetError,
        BrokenPipeError."""
        transport = self._transport
        if isinstance(transport, ShmTransport):
            transport._check_thread()
            if transport.node.pump.over():
                await yield_once()
        self._drain_waiters = self._drain_waiters or deque()
        await super()._drain_helper()  # type: ignore[misc]
        if isinstance(transport, ShmTransport):
            if transport.broken is not None:
                raise transport.broken
            if self._paused and self._connection_lost:
                raise ConnectionResetError(ECONNRESET, "Connection lost")  # and not all of it was written


_connection_lost = ShmStreamReaderProtocol.connection_lost


class ShmServerProtocol(ShmStreamReaderProtocol):
    """That of start_server(): begins the handler of a connection as asyncio's does in Python 3.13."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        callback, reader = self._client_connected_cb, self._stream_reader  # type: ignore[attr-defined]
        if not isinstance(transport, ShmTransport):  # TLS is between
            super().connection_made(transport)
            return
        self._client_connected_cb = None
        super().connection_made(transport)
        self._client_connected_cb = callback
        writer = ShmStreamWriter(transport, self, reader, self._loop)
        if _KEEPS_WRITERS:
            self._stream_writer = writer
        handling = callback(reader, writer)
        if type(handling) is CoroutineType or asyncio.iscoroutine(handling):
            self._task = self._loop.create_task(handling)
            self._task.add_done_callback(partial(_handled, transport))
        self._strong_reader = None


def _handled(transport: ShmTransport, task: asyncio.Task[None]) -> None:
    """Close the connection if its handler failed, or was cancelled."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        what = {"message": "Unhandled exception in client_connected_cb", "exception": error}
        transport.node.loop.call_exception_handler({**what, "transport": transport})
    if error is not None or task.cancelled():
        transport.close()


def _sets(*kinds: Any) -> set[str]:
    """Return the attributes that their constructors set."""
    return {x.argval for kind in kinds for x in get_instructions(kind.__init__) if x.opname == "STORE_ATTR"}


_bases = asyncio.StreamReader, *asyncio.StreamReaderProtocol.__mro__[:2]
if (
    _sets(*_bases)
    - {"_source_traceback"}
    - {*dir(ShmStreamReader), *dir(ShmStreamReaderProtocol)}
    - _sets(ShmStreamReader, ShmStreamReaderProtocol)
):  # a later Python's set something that ours know nothing of
    del ShmStreamReader.__init__, ShmStreamReaderProtocol.__init__

for _name in ("read", "readexactly", "readline"):
    setattr(ShmStreamReader, _name, extension.method(_name, getattr(asyncio.StreamReader, _name)))
ShmStreamWriter.drain = extension.method("drain", asyncio.StreamWriter.drain)  # type: ignore[method-assign]
ShmStreamReaderProtocol._drain_helper = extension.method(  # type: ignore[method-assign]
    "_drain_helper", ShmStreamReaderProtocol._drain_helper
)


def adopt(protocol: asyncio.BaseProtocol) -> None:
    """Give stock streams the straight way: exactly asyncio's protocol over exactly asyncio's reader, as its
    open_connection() and start_server() make them, become ours."""
    if type(protocol) is asyncio.StreamReaderProtocol:
        reader = protocol._stream_reader  # type: ignore[attr-defined]
        if type(reader) is asyncio.StreamReader:
            reader.__class__ = ShmStreamReader
            protocol.__class__ = ShmStreamReaderProtocol
