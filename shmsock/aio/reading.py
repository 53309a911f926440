"""The reading half of a transport: how bytes come up to a protocol.

A stream reader in direct mode (streams.py) takes them from the ring itself; any other protocol gets them from
here, by data_received() or into its own buffer.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio.sslproto import SSLProtocol
from typing import TYPE_CHECKING, Any

from shmsock.aio.flow import FlowControl
from shmsock.aio.pseudosocket import PollFd
from shmsock.engine.connection import DATA, EMPTY, EOF, YIELD, Connection, State

if TYPE_CHECKING:
    from shmsock.aio.node import Node

__all__ = ["ReadSide"]

DELIVER_MAX = 256 * 1024  # bytes given to one protocol in one pass


class ReadSide(FlowControl, asyncio.Transport):
    """What ShmTransport is made of."""

    node: Node
    conn: Connection
    fast_path: Any
    context: contextvars.Context
    _protocol: asyncio.BaseProtocol
    reader: Any
    _reading: bool
    _closing: bool
    _lost: bool
    _broken: OSError | None
    _pending: bytearray

    _reading_paused = False
    _read_eof = False
    _unread = b""  # taken from the ring already, for the next protocol
    _poll: PollFd | None = None  # what the pseudo-socket's fileno() gives

    if TYPE_CHECKING:  # the other half's

        def ready(self, bits: int) -> None: ...
        def _check_thread(self) -> None: ...
        def force_close(self, error: BaseException | None) -> None: ...
        def _fatal_error(self, error: BaseException, message: str) -> None: ...
        def _write_failed(self) -> None: ...

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Ends direct mode for good: bytes that the reader took already stay in its buffer, the rest goes to
        `protocol`."""
        before: Any = self._protocol
        if getattr(before, "_fast_path", None) is self.fast_path:
            del before._fast_path  # a writer of streams, which drains into another transport now
        self._protocol = protocol
        reader = self._undirect()
        if reader is not None and isinstance(protocol, SSLProtocol):
            # What the pump moved there unasked begins the handshake. (A buffer of which somebody holds a
            # memoryview cannot be emptied.)
            self._unread, reader._buffer = bytes(reader._buffer), bytearray()
        self.reader = None
        self._read_eof = False  # it was told to the one before
        if not self._lost:
            self._loop.call_soon(self._resumed, context=self.node.context)

    def _undirect(self) -> Any:
        """Neither a reader nor the pump takes bytes from the ring any more. What is in the buffer of the
        reader, which is returned, can still be read."""
        self.fast_path.detach()
        reader = self.reader() if self.reader is not None else None
        if reader is not None:
            reader._direct = False
        return reader

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_reading(self) -> bool:
        return not self._reading_paused and not self._closing

    def fileno(self) -> int:
        """A descriptor that is readable while there is something to read, or the end; -1 after the end.
        Raises WrongThreadError."""
        if self._lost or self.node.closed:
            return -1
        self._check_thread()
        if self._poll is None:
            self._poll = PollFd()
            self.fast_path.can_read = False  # the short cuts tell nobody that they have emptied the ring
            self.fast_path.receive(None, self.context)
        self.update_poll()
        return self._poll.fd

    def update_poll(self) -> None:
        """Called whenever what fileno() tells may have changed."""
        if self._poll is not None and not self._lost:
            reader = self.reader() if self.reader is not None else None
            taken = reader is not None and (reader._buffer or reader._eof)
            self._poll.update(bool(taken) or self._read_eof or self.conn.available() not in (EMPTY, 0))

    def pause_reading(self) -> None:
        self._reading_paused = True
        self.fast_path.receive(None, self.context)
        if self._broken is not None and self.reader is None:
            self.force_close(self._broken)

    def resume_reading(self) -> None:
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            if self.reader is None:
                self._loop.call_soon(self._resumed, context=self.node.context)

    def _resumed(self) -> None:
        if not self._lost and self.reader is None:
            if not (self.node.scheduled or self.node.closed):
                self.node.begin_turn()
            self.ready(DATA)

    def _receiving(self) -> bool:
        return not (self._reading_paused or self._closing or self._lost or self.reader)

    def _deliver(self) -> None:
        """Protocol mode: hand over what is there, within the turn's budget, and come again if more is."""
        given, over, nd = 0, self.node.lib.sh_over, self.node.nd
        self._let_through()
        while given < DELIVER_MAX and self._receiving():
            protocol: Any = self._protocol
            deliver = (
                self._deliver_buffered
                if isinstance(protocol, asyncio.BufferedProtocol)
                else self._deliver_bytes
            )
            n = deliver(protocol)
            if n <= 0:
                if n == EOF:
                    self.got_eof()
                elif n not in (0, EMPTY, YIELD) and self.conn.error is not None:
                    self._read_in_vain()
                return
            given += n
            if over(nd):
                break
        if self._receiving():
            self._loop.call_soon(self._resumed, context=self.node.context)

    def _let_through(self) -> None:
        """From now on the pump may give bytes to the protocol itself, until any of this changes."""
        usual = self._poll is None and not self._unread and self._receiving()
        if usual and not isinstance(self._protocol, asyncio.BufferedProtocol):
            self.fast_path.receive(self._protocol, self.context)

    def _deliver_bytes(self, protocol: Any) -> int:
        """How many bytes were given to data_received(), or a status."""
        data = self._take(DELIVER_MAX)
        if isinstance(data, int):
            return data
        self._guarded("data_received", protocol.data_received, data)
        return len(data)

    def _deliver_buffered(self, protocol: Any) -> int:
        """How many bytes were put into the protocol's own buffer, or a status."""
        there = len(self._unread) or self.conn.available()
        if there <= 0:
            return there
        buffer = self._guarded("get_buffer", protocol.get_buffer, there)
        replaced = self._protocol is not protocol
        if replaced or not self._receiving():
            return 0
        try:
            with memoryview(buffer) as whole, whole.cast("B") as view:  # it may be resized right afterwards
                if not view:
                    raise RuntimeError("get_buffer() returned an empty buffer")
                if view.readonly:
                    raise TypeError("get_buffer() returned a buffer that cannot be written")
                data = self._take(min(len(view), DELIVER_MAX))
                if isinstance(data, int):
                    return data
                view[: len(data)] = data
        except BaseException as error:
            self._fatal_error(error, "Fatal error: protocol.get_buffer() call failed.")
            return 0
        self._guarded("buffer_updated", protocol.buffer_updated, len(data))
        return len(data)

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
        """The connection broke, and all that had come was read. Of a peer that died that is the end, as when
        the kernel of a killed process closes its sockets: at an error, TLS and stock readers would forget
        what they still hold."""
        if self.conn.orphaned_ns and self.reader is None:
            self.got_eof()
        else:
            self.force_close(self.conn.error)

    def _discard(self) -> None:
        given = 0
        while isinstance(data := self.conn.read(DELIVER_MAX), bytes):
            given += len(data)
            if given >= DELIVER_MAX:
                self._loop.call_soon(self.ready, DATA, context=self.node.context)
                return
        if data == EOF:
            self._read_eof = True

    def got_eof(self) -> None:
        """FIN was read. The protocol says whether the write side stays open."""
        protocol: Any = self._protocol
        if self._read_eof or protocol is None:
            return
        self._read_eof = True
        if self.reader is not None:  # called by a reader, maybe from within this very context (an eager task)
            keep = protocol.eof_received()
        else:
            keep = self._guarded("eof_received", protocol.eof_received)
        if self._lost:
            return
        if self.conn.state is State.FREE and self._pending:
            self._write_failed()  # that was the end of the connection, and nobody comes back to say so
        elif self._broken is not None:
            self.force_close(None if isinstance(protocol, SSLProtocol) else self._broken)
        elif not keep:
            self.close()
