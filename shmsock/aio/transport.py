"""The transport of a shared-memory connection: asyncio's contract on top, one engine connection below.

Two ways lead the bytes to the user. In direct mode a stream reader takes them from the ring itself
(streams.py), and the transport only wakes it. Otherwise the pump delivers them to the protocol (reading.py).
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import socket
import struct
import threading
import warnings
import weakref
from asyncio.constants import _SendfileMode
from asyncio.sslproto import SSLProtocol
from functools import partial
from typing import TYPE_CHECKING, Any

from shmsock.aio import names
from shmsock.aio.pseudosocket import Duplicate, PseudoSocket
from shmsock.aio.pump import FastPath, extension
from shmsock.aio.reading import ReadSide
from shmsock.aio.tls import flushes, tell_above
from shmsock.engine.connection import (
    BAD,
    CLOSED,
    DATA,
    FIN,
    REL,
    RESET_BIT,
    SPACE,
    STALE,
    Connection,
    State,
)
from shmsock.errors import forked, wrong_thread

if TYPE_CHECKING:
    from shmsock.aio.node import Node
    from shmsock.aio.server import Server

__all__ = ["ShmTransport"]

UNUSUAL = FIN | REL | RESET_BIT | BAD
NO_LINGER = struct.pack("ii", 1, 0)
_get_ident = threading.get_ident


def _set_result(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _fileno_of(transport: weakref.ref[ShmTransport]) -> int:
    found = transport()
    return -1 if found is None else found.fileno()


def _duplicate_of(transport: weakref.ref[ShmTransport]) -> Duplicate:
    found = transport()
    if found is None:
        raise OSError(errno.EBADF, "the connection has ended: there is nothing to duplicate")
    return found.duplicate()


class ShmTransport(ReadSide):
    """A stream between two peers of a region. `get_extra_info` knows "peername" and "sockname", as (name,
    port), and "socket". `numeric`: internet addresses stand for the names."""

    _start_tls_compatible = True
    _sendfile_compatible = _SendfileMode.FALLBACK

    # What is so of most transports all their lives is the class's: few attributes are made soon. All others
    # are made in __init__: an object that gets one later, when there are many of its kind, gets a dict too.
    just_lost = False  # connection_lost() comes in the next turn of the loop
    _eof_wanted = False  # write_eof() was called: FIN follows _pending
    _writes_after_loss = 0
    _wrote_in_vain = False
    _broken: OSError | None = None  # the peer takes no more; what it wrote is still to be read
    _duplicates = 0  # of the pseudo-socket: they keep the connection open
    superseded = False  # the connection is another transport's

    def __init__(
        self,
        node: Node,
        conn: Connection,
        protocol: asyncio.BaseProtocol,
        context: contextvars.Context,
        server: Server | None = None,
        *,
        numeric: bool = False,
    ) -> None:
        local, remote = conn.local, conn.remote
        if numeric:
            address, url = names.names_of(node.loop).address, node.region.url
            local, remote = (address(url, local[0]), local[1]), (address(url, remote[0]), remote[1])
        super().__init__({"peername": remote, "sockname": local, "shmsock_node": node}, node.loop)
        self.node, self.conn, self.context, self._protocol = node, conn, context, protocol
        self.fast_path = FastPath(node, conn, self)
        if extension is not None:
            self.write = self.fast_path.write  # type: ignore[method-assign]
        self._server = server
        self.reader: Any = None  # weak reference to a reader in direct mode, which takes bytes from the ring
        self._reading = False  # it has begun
        self._closing = True  # or not started yet
        self._lost = True  # connection_lost() is on its way, or was called; or this has not started
        self._pending = bytearray()  # what the ring had no room for
        self.space_waiters: list[asyncio.Future[bool]] = []  # of drain()

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<ShmTransport {state} {self.conn.local} - {self.conn.remote}>"

    def start(self, waiter: asyncio.Future[None] | None = None) -> None:
        """connection_made(), then `waiter` is told, then reading begins: each by call_soon. As with asyncio's
        own, who waits runs before the first bytes are delivered."""
        self._begin()
        call_soon, context = self._loop.call_soon, self.node.context
        call_soon(self._connection_made, context=self.context)
        if waiter is None:
            call_soon(self._begin_reading, context=context)
        else:
            call_soon(_set_result, waiter)
            call_soon(partial(call_soon, self._begin_reading, context=context), context=context)

    def start_streams(self, early: bool = False) -> None:
        """The same at once, for a protocol of streams, whose connection_made() makes a task at most, with a
        turn of its own; the caller calls it. `early`: the engine has told somebody else of this connection;
        else there is nothing to look for yet."""
        self._begin()
        if self.conn.state is State.FREE:
            self.freed()
        if early:
            self._begin_reading()
        self._reading = True

    def _begin(self) -> None:
        self._closing = self._lost = False
        self.conn.handler = self
        self.node.transports.add(self)
        if self._server is not None:
            self._server._attach(self)

    def _connection_made(self) -> None:
        if self.conn.state is State.FREE:
            self.freed()
        self._protocol.connection_made(self)  # may be the eager task of a client callback

    def _begin_reading(self) -> None:
        self._reading = True
        self.ready(DATA | SPACE)  # also what came before

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket" and name not in self._extra:
            me = weakref.ref(self)
            self._extra[name] = PseudoSocket(
                self._extra["sockname"],
                self._extra["peername"],
                partial(_fileno_of, me),
                options={
                    (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
                    **(self._server.inherited if self._server is not None else {}),
                },
                duplicate=partial(_duplicate_of, me),
            )
        return self._extra.get(name, default)

    # -- events of the engine

    def ready(self, bits: int) -> None:
        """The engine saw something: bytes, space, FIN, REL or an error of the connection."""
        if self._lost or not self._reading:
            return
        if (  # what happens most is short: the way of a byte from a cold start is mostly this code's own
            self.reader is not None
            and self.conn.state is State.OPEN
            and not (bits & UNUSUAL or self._pending or self.space_waiters or self._poll is not None)
            and (reader := self.reader()) is not None
        ):
            reader._on_ready()
            return
        try:
            self._heed(bits)
            if self._poll is not None:
                self.update_poll()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # no memory for what came, say, and no other news will come of it
            self._fatal_error(error, "Fatal read error on shared-memory transport")

    def _heed(self, bits: int) -> None:
        if self.conn.state is State.FREE and not (self._unread and self._receiving()):
            self._ended()
            return
        if self._pending:
            if bits & SPACE:
                self._flush()
            if self._pending and (bits & REL or self.conn.orphaned_ns):
                self._write_failed()
            if self._lost:
                return
        reader = self.reader() if self.reader is not None else None
        if reader is not None:
            reader._on_ready()
        elif self.reader is not None:
            self._discard()  # its owner dropped the reader: as asyncio's reader would, read and forget
        elif not (self._reading_paused or self._closing or (self._read_eof and not self._unread)):
            self._deliver()
        if self.conn.error is not None and not self._lost and reader is None:
            self._read_in_vain()

    def failed(self, error: OSError) -> None:
        self.force_close(error)

    def freed(self) -> None:
        """Slot and ring are the engine's again, and soon another connection's: hands off."""
        self.fast_path.can_write = False
        self._undirect()

    def _ended(self) -> None:
        """The engine released the connection: a reset, or the peer closed it and all of it was read."""
        if self._unread and self._receiving():
            self._deliver()  # and finds the end behind it
            return
        if self.conn.error is not None:
            self._read_in_vain()
            return
        if self._pending:
            self._write_failed()
        if not (self._lost or self._closing) and (self.reader is not None or not self._reading_paused):
            self.got_eof()

    # -- writing

    def _check_thread(self) -> None:
        if _get_ident() != self.node.ident:
            raise wrong_thread(repr(self))
        if self.node.closed and os.getpid() != self.node.pid:
            raise forked(repr(self))

    def write(self, data: Any) -> None:
        """Never blocks. What the ring has no room for is kept; get_write_buffer_size() says how much that is.

        Raises TypeError, RuntimeError after write_eof() or from another thread.
        """
        if self.fast_path.can_write and type(data) is bytes:
            n = len(data)
            taken = self.node.lib.sh_write(self.conn.ep, data, n)
            if taken == n:
                if not self.node.scheduled:
                    self.node.begin_turn()
                return
            self._write_rest(data, taken)
        else:
            self._write_slowly(data)

    def _write_rest(self, data: Any, taken: int) -> None:
        self._write_slowly(memoryview(data)[taken:] if taken > 0 else data)

    def _write_slowly(self, data: Any) -> None:
        self._check_thread()
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._eof_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if not size:
            return
        if isinstance(data, memoryview) and not (data.ndim == data.itemsize == 1 and data.c_contiguous):
            data = data.cast("B") if data.c_contiguous else memoryview(bytes(data))
        if self._lost or self._broken is not None:
            self._after_loss()
            return
        if not self._pending:
            taken = self.conn.write(self.node.engine.ffi.from_buffer(data), size)
            if taken == size:
                return
            if taken < 0:
                self._write_failed(taken, fresh=True)
                return
            data = memoryview(data)[taken:]
        self._pending += data
        self.fast_path.can_write = False
        self._maybe_pause_protocol()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def _after_loss(self) -> None:
        self._writes_after_loss += 1
        if self._writes_after_loss >= 5:
            from asyncio.log import logger

            logger.warning("shmsock: write() to a lost connection: %r", self)

    def _write_failed(self, status: int = CLOSED, *, fresh: bool = False) -> None:
        """The peer reads no more. What it wrote before is still worth reading: the connection ends with
        that."""
        error = self.conn.error
        self._pending.clear()
        if status == STALE:
            error = self.node.engine.failure()
        if error is None and not self._closing:
            if fresh and not self._wrote_in_vain and not self.conn.orphaned_ns:
                # as over TCP: the first write after the peer closed is lost silently
                self._wrote_in_vain = True
                self._settle()
                self._resume_protocol()
                self._wake_writer()
                return
            error = BrokenPipeError(
                errno.EPIPE, f"{self.conn.remote} closed the connection and reads no more"
            )
        unread = self.reader is None and self._reading_paused  # nobody is going to read to the end
        if self._closing or self._read_eof or unread or self.conn.error is not None or status == STALE:
            self.force_close(error)
        else:
            self._broken, self.fast_path.can_write = error, False
            self._resume_protocol()
            self._wake_writer()

    def _flush(self) -> bool:
        """Put what was kept into the ring, as far as it has room. Returns whether the protocol may write on
        for that."""
        pending = self._pending
        if pending:
            view = self.node.engine.ffi.from_buffer(pending)
            try:
                taken = self.conn.write(view, len(pending))
            finally:
                self.node.engine.ffi.release(view)
            if taken < 0:
                self._write_failed(taken)
                return False
            del pending[:taken]
            self._settle()
            self._resume_protocol()
        resumed = not self._protocol_paused
        self._wake_writer(resumed)
        if not pending:
            if self._closing:
                self._finish_close()
            elif self._eof_wanted:
                self.conn.finish()
            self.node.flushed()
        return resumed

    @property
    def may_resume(self) -> bool:
        """The protocol is paused, and waiting may help."""
        return self._protocol_paused and not self._closing and self._broken is None

    def _resume_protocol(self) -> None:
        if self._protocol_paused:  # a copy: drain() may be inside of the connection's own context
            self.context.copy().run(self._maybe_resume_protocol)

    def _settle(self) -> None:
        is_open = self.conn.state is State.OPEN
        self.fast_path.can_write = is_open and not (
            self._pending or self._closing or self._eof_wanted or self._broken
        )

    def _wake_writer(self, resumed: bool = False) -> None:
        """Each drain() that waits is told once: whether it may go on, or has to look what happened."""
        for waiter in self.space_waiters:
            if not waiter.done():
                waiter.set_result(resumed)

    def write_eof(self) -> None:
        """FIN behind what was written; reading goes on."""
        self._check_thread()
        if self._closing or self._eof_wanted:
            return
        self._eof_wanted, self.fast_path.can_write = True, False
        if not self._pending:
            self.conn.finish()

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return len(self._pending)

    @property
    def flushing(self) -> bool:
        """Closed, and not yet rid of what was written."""
        return bool(self._pending) and (self._closing or self._eof_wanted or flushes(self._protocol))

    # -- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Flush, then FIN: what was written arrives. connection_lost(None) follows, not from within this
        call."""
        self._check_thread()
        if self._closing:
            return
        self._closing, self.fast_path.can_write = True, False
        if not self._pending:
            self._finish_close()

    def _finish_close(self) -> None:
        self._hang_up()
        self._end(None)

    def _hang_up(self) -> None:
        """FIN; or, when bytes are left that nobody will read, a reset behind what was written: the peer shall
        know that they were lost. A TCP socket closed with bytes in it does the same (RFC 2525, 2.17).

        A stream reader has read what asyncio's would have. Of TLS what is left may be records that no program
        asked for, session tickets say, for which the peer's program shall not lose what it has not read."""
        if self._duplicates:
            return
        reader = self.reader() if self.reader is not None else None
        if self._read_eof or isinstance(self._protocol, SSLProtocol):
            left = False
        elif reader is not None:
            left = reader.read_ahead()
        else:
            left = self.conn.available() > 0
        if left:
            self.conn.cut()
        else:
            self.conn.close()

    def abort(self) -> None:
        """Close at once: what the ring had no room for is lost, what was published still arrives, and then
        the end, as when a TCP socket is closed. (As there, it is a reset with SO_LINGER of 0 s set on the
        pseudo-socket.) connection_lost(None) follows."""
        self._check_thread()
        self.force_close(None)

    def force_close(self, error: BaseException | None) -> None:
        """As abort(), and connection_lost(error) follows."""
        if self._lost:
            return
        self._closing, self.fast_path.can_write = True, False
        self._pending.clear()
        if self.node.engine.alive and not self._duplicates:
            if self._linger() == NO_LINGER:
                self.conn.abort()
            else:
                self._hang_up()
        self._end(error)

    def _linger(self) -> Any:
        sock = self._extra.get("socket")
        return sock and sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)

    _force_close = force_close  # asyncio's TLS code calls it by this name

    def _end(self, error: BaseException | None) -> None:
        if self._lost:
            return
        self._lost = self.just_lost = True
        node = self.node
        if self._poll is not None:
            self._poll.close()
        self._undirect()
        node.transports.discard(self)
        node.flushed()
        if self.space_waiters:
            self._wake_writer()
        if not self._loop.is_closed():
            self._loop.call_soon(self._call_connection_lost, error, context=self.context)

    def _call_connection_lost(self, error: BaseException | None) -> None:
        self.just_lost = False
        if self.space_waiters:
            self._wake_writer()
        if isinstance(self._protocol, SSLProtocol):
            tell_above(self._protocol)
        try:
            self._protocol.connection_lost(error)  # type: ignore[arg-type]
        finally:
            if self.conn.handler is self and not self._duplicates:
                self.conn.handler = None
            self._protocol = None  # type: ignore[assignment]  # as over TCP: no cycle is left for the collector
            server, self._server = self._server, None
            if server is not None:
                server._detach(self)

    def _fatal_error(self, error: BaseException, message: str = "Fatal error on transport") -> None:
        try:
            if not isinstance(error, OSError):
                self._loop.call_exception_handler(
                    {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
                )
        finally:  # also at Ctrl-C in there
            self.force_close(error)

    # -- duplicates of its pseudo-socket

    def duplicate(self) -> Duplicate:
        """What dup() gives. Raises OSError (EBADF) after the end."""
        self._check_thread()
        if (self._lost and not self._duplicates) or self.superseded:
            raise OSError(errno.EBADF, f"{self!r} has ended: there is nothing to duplicate")
        self._duplicates += 1
        return Duplicate(self, partial(_fileno_of, weakref.ref(self)))

    def let_go(self) -> None:
        """A duplicate was closed: what this transport left open ends with the last of them."""
        if self.superseded or self.node.closed:
            return
        self._check_thread()
        self._duplicates -= 1
        if self._lost and not self._duplicates:
            self.conn.handler = None
            self._hang_up()

    def supersede(self, before: ShmTransport) -> None:
        """Go on with the connection of `before`, which ends: with what it took from the ring and nobody has
        read, and with what waits to be written. To be called ahead of start()."""
        reader = before._undirect()
        self._unread, before._unread = before._unread, b""
        if reader is not None:
            self._unread = bytes(reader._buffer) + self._unread
            reader._buffer.clear()
        self._pending, before._pending = before._pending, bytearray()
        self._eof_wanted, self._broken = before._eof_wanted, before._broken
        self._extra.update({name: before._extra[name] for name in ("peername", "sockname")})
        self.get_extra_info("socket")._options = before.get_extra_info("socket")._options
        before.superseded, before._closing, before.fast_path.can_write = True, True, False
        before._end(None)
        self._settle()

    def node_closed(self) -> None:
        """The node detaches: like a process's end, what is open is closed."""
        self._duplicates = 0
        if not self._lost:
            self._closing, self.fast_path.can_write = True, False
            if self._pending:
                self._pending.clear()
                self.conn.cut()
            else:
                self._hang_up()
            self._end(None)

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # Never into C from here: the collector may run on any thread, while the loop's own is inside C.
        if not getattr(self, "_lost", True):
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
