"""The transport of a shared-memory connection: asyncio's contract on top, one engine connection below.

The ordinary way of bytes is that of any transport: the pump delivers them to data_received(), or into the
protocol's own buffer. The extension does so as long as nothing unusual happens (FastPath.receive), else this
module. A stream reader in direct mode (streams.py) takes them from the ring itself while one of its calls
is awaited, and is given only a little when nobody waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import socket
import warnings
from asyncio.constants import _SendfileMode
from asyncio.log import logger
from asyncio.sslproto import SSLProtocol
from threading import get_ident
from typing import TYPE_CHECKING, Any

from shmsock.aio import names
from shmsock.aio.direct import DELIVER_MAX, fill, read_ahead, take, wanted
from shmsock.aio.flow import FlowControl
from shmsock.aio.pseudosocket import NO_LINGER, Duplicate, PollFd, fileno_of, stream_socket
from shmsock.aio.pump import FastPath
from shmsock.aio.tls import flushes, tell_above
from shmsock.aio.write_buffer import PIECE, OutgoingFile, WriteBuffer, flat, gathered
from shmsock.engine.connection import CLOSED, DATA, DONE, EMPTY, EOF, SPACE, STALE, YIELD, Connection, State
from shmsock.errors import forked, wrong_thread

if TYPE_CHECKING:
    from shmsock.aio.node import Node

__all__ = ["ShmTransport"]


class ShmTransport(FlowControl, asyncio.Transport):
    """A stream between two peers of a region. `get_extra_info` knows "peername" and "sockname", as (name,
    port), and "socket". `numeric`: internet addresses stand for the names; see names.shown()."""

    _start_tls_compatible = True
    _sendfile_compatible = _SendfileMode.FALLBACK

    # Values that most transports never change are the class's, which saves time in __init__.
    just_lost = False  # connection_lost(lost_by) comes in the next turn of the loop
    lost_by: BaseException | None = None
    _pending: WriteBuffer | None = None  # what the ring had no room for
    _eof_wanted = False  # write_eof() was called: FIN follows _pending
    _writes_after_loss = 0
    _wrote_in_vain = False
    broken: OSError | None = None  # the peer takes no more; what it wrote is still to be read
    _duplicates = 0  # of the pseudo-socket: they keep the connection open
    superseded = False  # the connection is another transport's
    _reading = _reading_paused = _read_eof = False  # whether it has begun, is paused, came to an end
    _unread = b""  # taken from the ring already, for the next protocol
    _poll: PollFd | None = None  # what the pseudo-socket's fileno() gives
    _closing = True  # or not started yet
    _lost = True  # connection_lost() is on its way, or was called; or this has not started

    def __init__(
        self,
        node: Node,
        conn: Connection,
        protocol: Any,
        context: contextvars.Context,
        server: Any = None,
        *,
        numeric: Any = False,
    ) -> None:
        # Not by asyncio's constructors, which take longer than all the rest.
        self._loop, self.node, self.conn = node.loop, node, conn
        self.context, self._protocol = context, protocol
        self.fast_path = fast_path = FastPath(node.pump, conn, self)
        self.write = fast_path.write  # type: ignore[method-assign]
        self._server, self._numeric = server, numeric

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<ShmTransport {state} {self.conn.local} - {self.conn.remote}>"

    def start(self) -> None:
        """Call connection_made(), then begin to read: each by call_soon."""
        self._begin()
        self._loop.call_soon(self._connection_made, context=self.context)
        self._loop.call_soon(self._begin_reading, context=self.node.context)

    def start_now(self, early: bool = False) -> None:
        """Start, with connection_made(), in the connection's context. As with asyncio's own, the task that
        waits runs before the first bytes are delivered. `early`: as of start_streams()."""
        self._begin()
        try:
            self._connection_made()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            what = {"message": "Exception in connection_made()", "exception": error}
            self._loop.call_exception_handler({**what, "transport": self, "protocol": self._protocol})
        if early or self.conn.state is not State.OPEN or self.conn.orphaned_ns:
            self._loop.call_soon(self._begin_reading, context=self.node.context)
        else:
            self._reading = True
            self._let_through()

    def start_streams(self, early: bool = False) -> None:
        """Start at once, for a protocol of streams: the caller calls its connection_made(). `early`: the
        engine has told somebody else of this connection; else nothing can be there yet."""
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
        if name == "sslcontext":  # asyncio's streams ask for it each time
            return default
        if self._extra is None:
            ends = self.conn.local, self.conn.remote
            local, remote = names.shown(self.node, self.conn, self._numeric) if self._numeric else ends
            self._extra = {"peername": remote, "sockname": local, "shmsock_path": "shm"}
            self._extra["shmsock_node"] = self.node
        extra = self._extra
        if name == "socket" and name not in extra:
            extra[name] = stream_socket(self, self._server.inherited if self._server else {})
        return extra.get(name, default)

    # -- events of the engine

    def ready(self, bits: int) -> None:
        """Act on what the engine saw: bytes, space, FIN, DONE or an error of the connection."""
        if self._lost or not self._reading:
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
                self._flush(spins=True)
            if self._pending and (bits & DONE or self.conn.orphaned_ns):
                self._write_failed()
            if self._lost:
                return
        if self._receiving() and not (self._read_eof and not self._unread):
            self._deliver()
        if self.conn.error is not None and not self._lost:
            self._read_in_vain()

    def connected(self) -> None:
        """Do nothing: that was seen before this was made."""

    def freed(self) -> None:
        """Let go of slot and ring: they are the engine's again, and soon another connection's."""
        self.fast_path.can_write = False
        self.fast_path.detach()

    def _ended(self) -> None:
        """End, as the engine released the connection: a reset, or the peer closed and all of it was read."""
        if self._unread and self._receiving():
            self._deliver()  # and finds the end behind it
            return
        if self.conn.error is not None:
            self._read_in_vain()
            return
        if self._pending:
            self._write_failed()
        if not (self._lost or self._closing) and (self.fast_path.used or not self._reading_paused):
            self.got_eof()

    # -- reading

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """End direct mode for good: what the reader took stays in its buffer, the rest goes to `protocol`."""
        before: Any = self._protocol
        if getattr(before, "_fast_path", None) is self.fast_path:
            del before._fast_path  # a writer of streams, which drains into another transport now
        self._protocol = protocol
        self.fast_path.detach()
        reader = self.fast_path.reader
        if reader is not None and isinstance(protocol, SSLProtocol):
            # What the pump moved there begins the handshake. (A buffer that is viewed cannot be emptied.)
            self._unread, reader._buffer = bytes(reader._buffer), bytearray()
        self.fast_path.forget()
        self._read_eof = False  # it was told to the one before
        if not self._lost:
            self._loop.call_soon(self._resumed, context=self.node.context)

    def feed(self, reader: Any) -> None:
        """Give the reader what is there, maybe after a spin, or have what comes delivered to it until direct
        mode is resumed: a coroutine of asyncio's is about to wait. An end is told at once."""
        if self._lost or self.fast_path.reader is not reader:  # another protocol's bytes are not for it
            return
        protocol: Any = self._protocol
        try:
            if take(self.fast_path, reader, protocol.data_received):
                return
        except BaseException as error:
            self._raised(error, "data_received")
            raise
        self.fast_path.can_read = False
        status = self.conn.available()
        if status == EOF or self.conn.error is not None:
            self._delivered(status)
        elif not self._reading_paused:
            self._loop.call_soon(self._resumed, context=self.node.context)

    def get_protocol(self) -> Any:
        return self._protocol

    def is_reading(self) -> bool:
        return not self._reading_paused and not self._closing

    def fileno(self) -> int:
        """Return a descriptor that is readable while there is something to read, or the end; -1 after the
        end. Raises WrongThreadError."""
        if self._lost or self.node.closed:
            return -1
        self._check_thread()
        if self._poll is None:
            self._poll = PollFd()
            self.fast_path.detach()  # the short cuts tell nobody that they have emptied the ring
            if self.fast_path.used:
                self._loop.call_soon(self._resumed, context=self.node.context)
        self.update_poll()
        return self._poll.fd

    def update_poll(self) -> None:
        """Called whenever what fileno() tells may have changed."""
        if self._poll is not None and not self._lost:
            reader = self.fast_path.reader
            taken = reader is not None and (reader._buffer or reader._eof)
            self._poll.update(bool(taken) or self._read_eof or self.conn.available() not in (EMPTY, 0))

    def pause_reading(self) -> None:
        self._reading_paused = True
        self.fast_path.receive(None, self.context)
        if self.broken is not None and not self.fast_path.used:
            self.force_close(self.broken)

    def resume_reading(self) -> None:
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            self._loop.call_soon(self._resumed, context=self.node.context)

    def _resumed(self) -> None:
        if not self._lost:
            if not (self.node.pump.scheduled or self.node.closed):
                self.node.pump.begin_turn()
            self.ready(DATA)

    def _receiving(self) -> bool:
        return not (self._reading_paused or self._closing or self._lost)

    def _deliver(self) -> None:
        """Hand over what is there, within the turn's budget. Whom that wakes runs before more is taken."""
        left = min(wanted(self.fast_path), DELIVER_MAX if (there := self._there()) <= 0 else there)
        self._let_through()
        while left > 0 and self._receiving():
            protocol: Any = self._protocol
            buffered = isinstance(protocol, asyncio.BufferedProtocol)
            n = self._deliver_buffered(protocol) if buffered else self._deliver_bytes(protocol, left)
            left -= n
            if n <= 0 or there <= 0 or self.node.lib.sh_over(self.node.nd):
                break
        if self._receiving():
            if (there := self._there()) <= 0:
                self._delivered(there)
            elif not self.fast_path.can_read:
                self._loop.call_soon(self._resumed, context=self.node.context)

    def _there(self) -> int:
        """Count the bytes that can be delivered; or return a status."""
        return len(self._unread) or self.conn.available()

    def _delivered(self, status: int) -> None:
        """Act on a status that says there was nothing to deliver: is that the end?"""
        if status == EOF:
            self.got_eof()
        elif status not in (0, EMPTY, YIELD) and self.conn.error is not None:
            self._read_in_vain()

    def _let_through(self) -> None:
        """Let the pump give bytes to the protocol itself, as long as nothing unusual is asked for."""
        if self._poll is None and not self._unread and not self.fast_path.used and self._receiving():
            buffered = isinstance(self._protocol, asyncio.BufferedProtocol)
            self.fast_path.receive(self._protocol, self.context, buffered)

    def _deliver_bytes(self, protocol: Any, most: int) -> int:
        """Give bytes to data_received(), or its socket. Returns how many, or a status."""
        if not self._unread and (poured := self.fast_path.pour()):
            return int(poured)
        data = self._take(most)
        if isinstance(data, int):
            return data
        self._guarded("data_received", protocol.data_received, data)
        return len(data)

    def _deliver_buffered(self, protocol: Any) -> int:
        """Put bytes into the protocol's own buffer. Returns how many, or a status."""
        there = self._there()
        if there <= 0:
            return there
        buffer = self._guarded("get_buffer", protocol.get_buffer, there)
        replaced = self._protocol is not protocol
        if replaced or not self._receiving():
            return 0
        try:
            n = fill(buffer, self._take)
        except BaseException as error:
            self._raised(error, "get_buffer")
            return 0
        if n > 0:
            self._guarded("buffer_updated", protocol.buffer_updated, n)
        return n

    def _take(self, most: int) -> bytes | int:
        if self._unread:
            data, self._unread = self._unread[:most], self._unread[most:]
            return data
        return self.conn.read(most)

    def _guarded(self, what: str, call: Any, *args: Any) -> Any:
        """Call the protocol, in the connection's context. What it raises ends the connection."""
        try:
            return self.context.run(call, *args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._raised(error, what)
            return None

    def _raised(self, error: BaseException, what: str) -> None:
        self._fatal_error(error, f"Fatal error: protocol.{what}() call failed.")

    def _read_in_vain(self) -> None:
        """End, as the connection broke and all that had come was read. A peer that died counts as EOF, as
        when the kernel of a killed process closes its sockets: at an error, TLS and stock readers would
        forget what they still hold."""
        if self.conn.orphaned_ns and not self.fast_path.used:
            self.got_eof()
        else:
            self.force_close(self.conn.error)

    def got_eof(self) -> None:
        """Tell the protocol that FIN was read; it says whether the write side stays open."""
        protocol: Any = self._protocol
        if self._read_eof or protocol is None:
            return
        self._read_eof = True
        if self.fast_path.used:  # called by a reader, maybe from within this very context (an eager task)
            keep = protocol.eof_received()
        else:
            keep = self._guarded("eof_received", protocol.eof_received)
        if self._lost:
            return
        if self.conn.state is State.FREE and self._pending:
            self._write_failed()  # that was the end of the connection, and nobody comes back to say so
        elif self.broken is not None:
            self.force_close(None if isinstance(protocol, SSLProtocol) else self.broken)
        elif not keep:
            self.close()

    # -- writing

    def _check_thread(self) -> None:
        if get_ident() != self.node.ident:
            raise wrong_thread(repr(self))
        if self.node.closed and os.getpid() != self.node.pid:
            raise forked(repr(self))

    def write(self, data: Any) -> None:
        """Write, and never block. What the ring has no room for is kept: see get_write_buffer_size(). Raises
        TypeError, RuntimeError after write_eof() or from another thread."""
        self.fast_path.write(data)

    def _write_rest(self, data: Any, taken: int) -> None:
        self._write_slowly(memoryview(data)[taken:] if taken > 0 else data)

    def _write_slowly(self, data: Any) -> None:
        self._check_thread()
        data = flat(data)
        if self._eof_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        size = len(data)
        if not size:
            return
        if self._lost or self.broken is not None:
            self._after_loss()
            return
        taken = 0
        if not self._pending:
            taken = self.conn.write(self.node.engine.ffi.from_buffer(data), min(size, PIECE))
            if taken == size:
                return
            if taken < 0:
                self._write_failed(taken, fresh=True)
                return
            self._pending = self._pending or WriteBuffer(self.conn)
        self._pending.add(memoryview(data)[taken:] if taken else data)
        self.fast_path.can_write = False
        if taken == PIECE:  # there may be room for more
            self._flush()
        self._maybe_pause_protocol()

    def writelines(self, list_of_data: Any) -> None:
        for data in gathered(list_of_data):
            self.write(data)

    def _after_loss(self) -> None:
        self._writes_after_loss += 1
        if self._writes_after_loss >= 5:
            logger.warning("shmsock: write() to a lost connection: %r", self)

    def _write_failed(self, status: int = CLOSED, *, fresh: bool = False) -> None:
        """Drop what waits to be written, as the peer reads no more. What it wrote before can still be read:
        the connection ends after that."""
        self._drop(error := self.conn.error)
        if status == STALE:
            error = self.node.engine.failure()
        if error is None and not self._closing:
            if fresh and not self._wrote_in_vain and not self.conn.orphaned_ns:
                # as over TCP: the first write after the peer closed is lost silently
                self._wrote_in_vain = True
                self._settle()
                self._resume_protocol()
                return
            why = f"{self.conn.remote} closed the connection and reads no more"
            error = BrokenPipeError(errno.EPIPE, why)
        unread = not self.fast_path.used and self._reading_paused  # nobody is going to read to the end
        if self._closing or self._read_eof or unread or self.conn.error is not None or status == STALE:
            self.force_close(error)
        else:
            self.broken, self.fast_path.can_write = error, False
            self._resume_protocol()

    def _drop(self, error: BaseException | None) -> None:
        if self._pending:
            closed = ConnectionError(f"the connection to {self.conn.remote} was closed")
            self._pending.drop(error if isinstance(error, OSError) else closed)

    async def send_file(self, file: OutgoingFile) -> None:
        """Send (a part of) a file, behind what was written before. Raises OSError."""
        try:
            self.begin_file(file)
            await file.over
        finally:
            if file.over.cancelled():
                self._flush()  # it may have been in the way of others

    def begin_file(self, file: OutgoingFile) -> None:
        """Do as send_file(), and leave the rest to the pump. Raises OSError."""
        self._check_thread()
        if self._lost or self.broken is not None:
            raise self.broken or ConnectionError("Connection closed by peer")
        self._pending = self._pending or WriteBuffer(self.conn)
        self._pending.add_file(file)
        self.fast_path.can_write = False
        self._flush()

    def _flush_again(self) -> None:
        if self._pending:
            self._pending.comes_again = False
        self.ready(SPACE)

    def _flush(self, spins: bool = False) -> None:
        """Put what was kept into the ring, as far as it has room."""
        pending = self._pending
        if not pending or self._lost:
            return
        status = pending.send(spins and self.node.pump.may_spin())
        if status < 0:
            self._write_failed(status)
            return
        if status and not pending.comes_again:
            pending.comes_again = True
            self._loop.call_soon(self._flush_again, context=self.node.context)
        self._pending = pending or None
        self._settle()
        self._resume_protocol()
        if not self._pending:  # the protocol may have written
            if self._closing:
                self._hang_up()
                self._end(None)
            elif self._eof_wanted:
                self.conn.finish()
            self.node.flushed()

    def _resume_protocol(self) -> None:
        if self._protocol_paused:  # a copy: drain() may be inside of the connection's own context
            self.context.copy().run(self._maybe_resume_protocol)

    def _settle(self) -> None:
        over = self._pending or self._closing or self._eof_wanted or self.broken
        self.fast_path.can_write = self.conn.state is State.OPEN and not over

    def write_eof(self) -> None:
        """Put FIN behind what was written; reading goes on."""
        self._check_thread()
        if self._closing or self._eof_wanted:
            return
        self._eof_wanted, self.fast_path.can_write = True, False
        if not self._pending:
            self.conn.finish()

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return len(self._pending) if self._pending else 0

    @property
    def flushing(self) -> bool:
        """Whether it is closed, and not yet rid of what was written."""
        return bool(self._pending) and (self._closing or self._eof_wanted or flushes(self._protocol))

    # -- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Flush, then FIN: what was written arrives. connection_lost(None) follows, not from within this
        call."""
        if not self.node.pump.fit():
            self._check_thread()
        if self._closing:
            return
        self._closing, self.fast_path.can_write = True, False
        if not self._pending:
            self._hang_up()
            self._end(None)

    def _hang_up(self) -> None:
        """FIN; or, when bytes are left that nobody will read, a reset behind what was written: the peer shall
        know that they were lost. A TCP socket closed with bytes in it does the same (RFC 2525, 2.17).

        A stream reader has read what asyncio's would have. Of TLS what is left may be records that no program
        asked for, session tickets say, for which the peer's program shall not lose what it has not read."""
        if self._duplicates:
            return
        if self.conn.state is State.OPEN and self.fast_path.hang_up():
            return self.conn.let_go()
        if self._read_eof or isinstance(self._protocol, SSLProtocol):
            left = False
        else:
            left = self.conn.available() > 0
            if left:
                try:
                    read_ahead(self.fast_path, self.conn)
                except Exception as error:
                    self._raised(error, "data_received")
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
        self._drop(error)
        if self.node.engine.alive and not self._duplicates:
            sock = self._extra and self._extra.get("socket")
            if sock and sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == NO_LINGER:
                self.conn.abort()
            else:
                self._hang_up()
        self._end(error)

    failed = _force_close = force_close  # asyncio's TLS code calls it by that name

    def _end(self, error: BaseException | None) -> None:
        if self._lost:
            return
        self._lost, self.just_lost, self.lost_by = True, True, error
        node = self.node
        if self._poll is not None:
            self._poll.close()
        self.fast_path.detach()
        node.transports.discard(self)
        if node._flushed is not None:
            node.flushed()
        if not node.loop.is_closed():
            node.loop.call_soon(self.call_connection_lost, error, context=self.context)

    def call_connection_lost(self, error: BaseException | None) -> None:
        if not self.just_lost:  # it was called at once, by streams
            self.node.pump.moot -= 1
            return
        self.just_lost = False
        if isinstance(self._protocol, SSLProtocol):
            tell_above(self._protocol)
        try:
            if self._protocol is not None:  # it was told already
                self._protocol.connection_lost(error)
        finally:
            if self.conn.handler is self and not self._duplicates:
                self.conn.handler = None
            self._protocol = None  # as over TCP: no cycle is left for the collector
            server, self._server = self._server, None
            if server is not None:
                server._detach(self)

    def _fatal_error(self, error: BaseException, message: str = "Fatal error on transport") -> None:
        try:
            if not isinstance(error, OSError):
                what = {"message": message, "exception": error}
                self._loop.call_exception_handler({**what, "transport": self, "protocol": self._protocol})
        finally:  # also at Ctrl-C in there
            self.force_close(error)

    # -- duplicates of its pseudo-socket

    def duplicate(self) -> Duplicate:
        """Make what dup() returns. Raises OSError (EBADF) after the end."""
        self._check_thread()
        if (self._lost and not self._duplicates) or self.superseded:
            raise OSError(errno.EBADF, f"{self!r} has ended: there is nothing to duplicate")
        self._duplicates += 1
        return Duplicate(self, fileno_of(self))

    def let_go(self) -> None:
        """Note that a duplicate was closed: what this transport left open ends with the last of them."""
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
        before.fast_path.detach()
        reader = before.fast_path.reader
        self._unread, before._unread = before._unread, b""
        if reader is not None:
            self._unread = bytes(reader._buffer) + self._unread
            reader._buffer.clear()
        self._pending, before._pending = before._pending, None
        self._eof_wanted, self.broken, self._numeric = before._eof_wanted, before.broken, before._numeric
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
                self._drop(None)
                self.conn.cut()
            else:
                self._hang_up()
            self._end(None)

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # Never into C from here: the collector may run on any thread, while the loop's own is inside C.
        if not getattr(self, "_lost", True):
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
