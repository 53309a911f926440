"""asyncio streams over shared memory: StreamReader and StreamWriter with a straight way to the ring.

The reader is asyncio's own with one hook replaced, `_wait_for_data`, and short cuts in read(n) and
readexactly(n): one call into C that spins, copies and gives the space back. Bytes leave the ring only after
the last await of an operation, so cancelling loses none.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

from shmsock.aio.node import Node, yield_once
from shmsock.aio.pump import extension
from shmsock.aio.tls import start_tls
from shmsock.aio.transport import ShmTransport
from shmsock.engine.connection import CLOSED, EMPTY, EOF, GROW, RESET, STALE, YIELD, State

__all__ = ["ShmStreamReader", "ShmStreamReaderProtocol", "ShmStreamWriter", "adopt"]

COPY_MAX = 1 << 20
IDLE_MAX = 4096  # bytes that the pump moves into a buffer that nobody reads
_get_ident = threading.get_ident

# What this module relies on inside asyncio. A Python that renames one of these must fail at import, not in
# the field.
_PRIVATE = ("_wakeup_waiter", "_wait_for_data", "_maybe_resume_transport")
_PRIVATE_STATE = ("_buffer", "_eof", "_exception", "_waiter", "_limit", "_loop", "_transport", "_paused")
_code = asyncio.StreamReader.__init__.__code__.co_names
if missing := [x for x in _PRIVATE if not hasattr(asyncio.StreamReader, x)] + [
    x for x in _PRIVATE_STATE if x not in _code
]:
    raise ImportError(f"asyncio.StreamReader of this Python has no {missing}: shmsock does not know it")


class ShmStreamReader(asyncio.StreamReader):
    """asyncio.StreamReader on a ring. Same methods, errors and limits."""

    _transport: Any
    _buffer: bytearray
    _eof: bool
    _exception: BaseException | None
    _waiter: asyncio.Future[None] | None
    _limit: int
    _loop: asyncio.AbstractEventLoop

    _direct = False  # bytes are taken from the ring, by this reader alone
    _fast_path: Any = SimpleNamespace(
        can_read=False, wake_pending=False, take=lambda *_: None
    )  # what the short cuts ask
    _spun = False  # a short cut has spun in vain just now
    _late: BaseException | None = None  # raised when what is in the buffer was read

    def _attach(self, transport: ShmTransport) -> None:
        """Direct mode from here on. (A method and not __init__: stock readers are adopted by changing their
        class.)"""
        self._fast_path = transport.fast_path
        self._direct = self._fast_path.can_read = transport.conn.state is not State.FREE
        self._node, self._conn, self._ep = transport.node, transport.conn, transport.conn.ep
        transport.reader = weakref.ref(self)
        if self._direct:
            self._fast_path.attach(self)

    def _maybe_resume_transport(self) -> None:
        """Called by asyncio whenever bytes were taken out of the buffer."""
        super()._maybe_resume_transport()  # type: ignore[misc]
        if isinstance(self._transport, ShmTransport):
            self._transport.update_poll()

    def set_exception(self, exc: Any) -> None:
        """As asyncio's, but what had arrived before a connection was lost can still be read."""
        self._fast_path.can_read = False
        if isinstance(exc, ConnectionError) and isinstance(self._transport, ShmTransport):
            if self._eof:
                return
            if self._buffer:
                self._late = exc
                self._wakeup_waiter()
                return
        if self._waiter is not None and self._waiter.done():
            self._exception = exc  # who was woken already looks at it next
            return
        super().set_exception(exc)

    def _wakeup_waiter(self) -> None:
        """As asyncio's, for a waiter that may have been woken already, by news before these."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        if self._late is not None:
            if self._buffer:
                raise self._late
            self._exception, self._late = self._late, None
        if self._exception is not None:
            raise self._exception

    # -- the short cuts

    async def read(self, n: int = -1) -> bytes:
        """As asyncio's: up to n bytes, b"" at EOF. Raises ConnectionResetError."""
        if n > 0 and not self._buffer:
            data: bytes | None = self._fast_path.take(n)
            if data is not None:
                return data
            self._spun = self._fast_path.can_read
        return await super().read(n)

    async def readexactly(self, n: int) -> bytes:
        """As asyncio's: n bytes, or asyncio.IncompleteReadError."""
        if 0 < n <= COPY_MAX and not self._buffer:
            data: bytes | None = self._fast_path.take(n, n)
            if data is not None:
                return data
            self._spun = self._fast_path.can_read
        return await super().readexactly(n)

    # -- the hook

    async def _wait_for_data(self, func_name: str) -> None:
        """Until there is something in the buffer, EOF, or an exception. What asyncio's own does with
        feed_data()."""
        if not self._direct:
            self._check()
            if isinstance(self._transport, ShmTransport):
                self._transport._check_thread()
            if not self._eof:  # connection_lost is on its way, or somebody feeds this reader
                await super()._wait_for_data(func_name)  # type: ignore[misc]
                self._check()
            return
        if self._waiter is not None:
            raise RuntimeError(
                f"{func_name}() called while another coroutine is already waiting for incoming data"
            )
        node = self._node
        room = self._room
        while self._direct:
            if not node.scheduled:
                node.begin_turn()
            status = self._pull(room, not self._spun and node.may_spin())
            self._spun = False
            if status > 0 or self._eof:
                return
            self._check()
            if status == YIELD:
                had = len(self._buffer)
                await yield_once()
                if len(self._buffer) != had:
                    return  # the pump took them in meanwhile, as nobody was waiting
                # Others may have used up this turn as well: a turn without bytes is enough.
                if self._direct and self._take_over(node.lib.sh_read_now(self._ep, min(room, COPY_MAX))) > 0:
                    return
                self._check()
            elif status == EMPTY and not node.lib.sh_arm(self._ep):
                await self._sleep(func_name)
                self._check()
                if self._eof:
                    return
        if not self._buffer and not self._eof:
            await self._sleep(func_name)
            self._check()

    async def _sleep(self, func_name: str) -> None:
        if self._waiter is not None:
            raise RuntimeError(
                f"{func_name}() called while another coroutine is already waiting for incoming data"
            )
        self._waiter = self._loop.create_future()
        port = self._fast_path
        port.can_read = False
        if self._direct and self._transport._poll is not None:
            self._transport.update_poll()
        try:
            await self._waiter
        except asyncio.CancelledError:
            if port.wake_pending:  # what it was woken for is to be told to those who look at the buffer
                self._loop.call_soon(self._on_ready, context=self._node.context)
            raise
        finally:
            self._waiter = None
            port.can_read = self._direct and self._exception is None and self._transport._poll is None
            if port.wake_pending:
                port.wake_pending = False
                self._node.runs()

    def _pull(self, room: int, spin: bool) -> int:
        """Move up to `room` bytes into the buffer. Returns how many, or a status that was acted upon."""
        span = self._node.lib.sh_read_begin(self._ep, min(room, COPY_MAX), 1, spin)
        if span == STALE:
            self._node.check()
        return self._take_over(span)

    def _take_over(self, span: int) -> int:
        if span > 0 and (span := self._append(span)) >= 0:
            return span
        transport = self._transport
        span = self._conn.ended_by(span)
        if span == EOF:
            if transport is not None:
                transport.got_eof()
        elif span == RESET and self._conn.error is not None:
            self.set_exception(self._conn.error)
            if transport is not None:
                transport.force_close(self._conn.error)
        elif span == RESET:
            self.feed_eof()
        return span

    def _append(self, span: int) -> int:
        """Move these bytes from the ring to the end of the buffer. Returns how many, or a status to be acted
        upon. 0: the buffer could not take them (somebody holds a memoryview of it, say), and that has ended
        the connection, as over TCP: behind a gap nothing is to be read."""
        n = span & 0xFFFFFFFF
        try:
            self._buffer += self._conn.copy(span)
            status = self._conn.taken(n)
            if status:
                del self._buffer[-n:]
        except BaseException as error:
            self.set_exception(error)
            if self._transport is not None:
                self._transport._raised(error, "data_received")
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                raise
            return 0
        return status or n

    def read_ahead(self) -> bool:
        """Take what asyncio's reader would have in its buffer by now: what had arrived, up to its limits. Are
        bytes left?"""
        while True:
            takes = self._direct and self._exception is None
            room = self._room - len(self._buffer) if takes else 0
            span = self._conn.span(room if room > 0 else 1)
            if span <= 0 or room <= 0:
                return span > 0
            if self._append(span) < 0:
                return False

    @property
    def _room(self) -> int:
        """So many bytes are taken into the buffer, at most."""
        return max(2 * self._limit, 1 << 16)

    def _on_ready(self) -> None:
        """The pump has news. Wake who waits; with nobody there, take in a little, so that at_eof() and who
        looks into the buffer (connection pools do) are told the truth."""
        if not self._direct:
            return
        waiter = self._waiter
        if waiter is not None:
            if not waiter.done():
                waiter.set_result(None)
                if not self._fast_path.wake_pending:
                    self._fast_path.wake_pending = True
                    self._node.will_run()
            return
        if len(self._buffer) < IDLE_MAX and not self._eof and self._exception is None:
            room = IDLE_MAX - len(self._buffer)
            while self._take_over(self._node.lib.sh_read_now(self._ep, room)) == GROW:
                pass


async def drain(transport: ShmTransport) -> bool:
    """Until the protocol may write again, or its connection is closing. True: that was waited for, and what
    was written has gone out: the connection may end before who waited runs. Raises BrokenPipeError."""
    node = transport.node
    if not node.closed:
        if not node.scheduled:
            node.begin_turn()
        if node.lib.sh_over(node.nd):
            await yield_once()
    return not transport.fast_path.can_write and await _wait_for_space(transport, node)


async def _wait_for_space(transport: ShmTransport, node: Node) -> bool:
    transport._check_thread()
    lib, resumed = node.lib, False
    while not resumed and transport.may_resume:
        is_open = transport.conn.state is State.OPEN
        space = lib.sh_wait_space(transport.conn.ep, node.may_spin()) if is_open else CLOSED
        if space == 0:
            waiter = node.loop.create_future()
            transport.space_waiters.append(waiter)
            try:
                resumed = await waiter
            finally:
                transport.space_waiters.remove(waiter)
        else:
            resumed = transport._flush()  # or it finds out that there is none, and acts on it
            if space > 0 and lib.sh_over(node.nd):
                await yield_once()
        if not node.scheduled:
            node.begin_turn()
    if not resumed and transport._broken is not None:
        raise transport._broken
    return resumed


class ShmStreamWriter(asyncio.StreamWriter):
    """asyncio.StreamWriter with a drain() that costs little when there is nothing to wait for."""

    _transport: ShmTransport
    _reader: Any
    _fast_path: Any = SimpleNamespace(can_write=False)

    def _attach(self) -> ShmStreamWriter:
        self.write = self._transport.write  # type: ignore[method-assign]  # one call less on the way
        self._fast_path = self._transport.fast_path
        return self

    async def drain(self) -> None:
        """Wait until the peer has taken enough. Raises ConnectionResetError, BrokenPipeError. Cancelling
        loses nothing."""
        port = self._fast_path
        if port.can_write:
            # Reads look at the clock each time; of drains every eighth is enough to keep a turn within its
            # budget.
            port.drains += 1
            if port.drains & 7:
                return
            node = self._transport.node
            if port.can_read and node.scheduled and not node.lib.sh_over(node.nd):
                return
            port.drains -= 1  # the protocol's helper, which is asked next, counts it
        await super().drain()

    async def wait_closed(self) -> None:
        """As asyncio's. Who has just closed waits for the turn of the loop in which connection_lost() is
        told, and not for another in which it wakes up."""
        if getattr(self._transport, "just_lost", False):
            await yield_once()
        await self._protocol._get_close_waiter(self)  # type: ignore[attr-defined]

    async def start_tls(
        self,
        sslcontext: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        """As asyncio's (which has it from 3.11 on), on every loop and version: from here on all is
        encrypted, and this writer is a plain asyncio.StreamWriter."""
        protocol: Any = self._protocol  # type: ignore[attr-defined]
        if not self._fast_path.can_write:
            await self.drain()  # not otherwise: it may let the loop turn, and the peer's handshake come early
        transport = await start_tls(
            self._loop,  # type: ignore[attr-defined]
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
    """Takes its reader into direct mode as soon as there is a transport, and waits for space as reads wait
    for bytes."""

    _transport: Any
    _fast_path: Any = SimpleNamespace(can_write=False)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        reader = self._stream_reader  # type: ignore[attr-defined]
        if isinstance(transport, ShmTransport):
            self._fast_path = transport.fast_path
            if isinstance(reader, ShmStreamReader):
                reader._attach(transport)
        super().connection_made(transport)

    async def _drain_helper(self) -> None:
        """asyncio's drain() awaits this; as ShmStreamWriter.drain."""
        port = self._fast_path
        if port.can_write:
            port.drains += 1
            if port.drains & 7:
                return
        await self._drain_slowly()

    async def _drain_slowly(self) -> None:
        transport = self._transport
        if isinstance(transport, ShmTransport):
            if await drain(transport):
                return
            if transport.is_closing():
                await asyncio.sleep(0)  # connection_lost() comes first, and says what is to be raised
        await super()._drain_helper()  # type: ignore[misc]


if extension is not None:
    method, reader, writer = extension.method, asyncio.StreamReader, asyncio.StreamWriter
    for _name in ("read", "readexactly", "readline"):
        setattr(ShmStreamReader, _name, method(_name, reader, getattr(reader, _name)))
    ShmStreamWriter.drain = method("drain", writer, writer.drain)  # type: ignore[method-assign]
    ShmStreamReaderProtocol._drain_helper = method(  # type: ignore[method-assign]
        "_drain_helper", asyncio.StreamReaderProtocol, ShmStreamReaderProtocol._drain_slowly
    )


def adopt(protocol: asyncio.BaseProtocol) -> None:
    """Give stock streams the straight way: exactly asyncio's protocol over exactly asyncio's reader, as its
    open_connection() and start_server() make them, become ours."""
    if type(protocol) is asyncio.StreamReaderProtocol:
        reader = protocol._stream_reader  # type: ignore[attr-defined]
        if type(reader) is asyncio.StreamReader:
            reader.__class__ = ShmStreamReader
            protocol.__class__ = ShmStreamReaderProtocol
