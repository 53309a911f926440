"""A datagram transport for two ways: the loop's own UDP and shared memory, on a loop that knows `.shm` hosts.
It is not connected, and the address of each sendto() says which way a datagram goes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from typing import Any

from shmsock.aio import names
from shmsock.aio.attach import current_node
from shmsock.aio.datagram import DATAGRAM_MAX, ShmDatagramTransport, create_datagram_endpoint
from shmsock.engine.datagram_links import OVERHEAD
from shmsock.engine.settings import Settings
from shmsock.errors import datagram_too_long, wrong_thread

__all__ = ["JointTransport"]

HIGH_WATER = 64 << 10  # bytes that wait for the node: the protocol is asked to pause above


class _Behind(asyncio.DatagramProtocol):
    """The protocol of the endpoint in shared memory."""

    def __init__(self, joint: JointTransport) -> None:
        self._joint = joint

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._joint.get_protocol().datagram_received(data, addr)

    def error_received(self, exc: Exception) -> None:
        self._joint.get_protocol().error_received(exc)

    def pause_writing(self) -> None:
        self._joint._pause("shm")

    def resume_writing(self) -> None:
        self._joint._resume("shm")

    def connection_lost(self, exc: Exception | None) -> None:
        self._joint._shm_lost(exc)


class JointTransport(asyncio.DatagramTransport, asyncio.DatagramProtocol):
    """The loop's own UDP transport, whose protocol it is, with one in shared memory behind it. That is made
    when something is first sent to an address, or a name, of a peer; what is sent there meanwhile waits, up
    to Settings.datagram_queue_bytes. The program's protocol belongs to both: what either receives it is
    given, and their end is one. `get_extra_info` tells of the loop's own."""

    _kernel: Any = None

    def __init__(self, loop: Any, protocol: Any) -> None:
        super().__init__()
        self._loop, self._protocol, self._ident = loop, protocol, threading.get_ident()
        self._shm: ShmDatagramTransport | None = None
        self._making: asyncio.Task[None] | None = None
        self._waiting: deque[tuple[bytes, Any]] = deque()
        self._waiting_bytes = self._dropped = 0
        self._limits: tuple[int | None, int | None] = None, None
        self._paused_by: set[str] = set()
        self._closing = self._over = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<JointTransport {self._kernel!r} and {self._shm!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    # -- sending

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send to a host in shared memory, or to any other as the loop's own transport does."""
        if not (isinstance(addr, tuple) and addr and names.is_shm(addr[0])):
            self._kernel.sendto(data, addr)
        elif self._shm is not None:
            self._shm.sendto(data, addr)
        else:
            self._send_later(data, addr)

    def _send_later(self, data: Any, addr: Any) -> None:
        if threading.get_ident() != self._ident:
            raise wrong_thread(repr(self))
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        data = bytes(data)
        if len(data) > DATAGRAM_MAX:
            raise datagram_too_long(len(data), DATAGRAM_MAX)
        if self.is_closing():
            return
        try:
            region, _ = names.host_of(self._loop, addr[0])
        except OSError as error:
            self._protocol.error_received(error)
            return
        size = len(data) + OVERHEAD
        if self._waiting_bytes + size > Settings().datagram_queue_bytes:
            self._dropped += 1
            return
        self._waiting.append((data, addr))
        self._waiting_bytes += size
        if self._making is None:
            self._making = self._loop.create_task(self._make(region))
            self._making.add_done_callback(self._made)
        if self._waiting_bytes > HIGH_WATER:
            self._pause("waiting")

    async def _make(self, region: str | None) -> None:
        node = await current_node(region, listening=True)
        wide = self.get_extra_info("socket").family == socket.AF_INET6
        self._shm, _ = await create_datagram_endpoint(
            lambda: _Behind(self), node=node, numeric=True, wide=wide
        )
        node.engine.counts["datagrams_dropped_unsent"] += self._dropped
        self._dropped = 0
        self._shm.set_write_buffer_limits(*self._limits)
        while self._waiting:
            self._guarded(self._shm.sendto, *self._waiting.popleft())

    def _made(self, making: asyncio.Task[None]) -> None:
        """Tell why if the other endpoint could not be made, and what waited for it is dropped. Not before:
        who is told may send again at once."""
        self._making, self._waiting_bytes = None, 0
        self._waiting.clear()
        self._resume("waiting")
        if not making.cancelled() and isinstance(error := making.exception(), Exception):
            self._guarded(self._protocol.error_received, error)
        if self._shm is not None and self._closing:
            self._shm.close()
        self._end()

    def _guarded(self, callback: Any, *args: Any) -> None:
        try:
            callback(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._loop.call_exception_handler(
                {
                    "message": f"Exception in callback {callback!r}",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )

    def get_write_buffer_size(self) -> int:
        """Return how many bytes neither has sent yet."""
        behind = self._shm.get_write_buffer_size() if self._shm is not None else self._waiting_bytes
        unsent: int = self._kernel.get_write_buffer_size() + behind
        return unsent

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of each of the two transports."""
        self._kernel.set_write_buffer_limits(high, low)
        self._limits = high, low
        if self._shm is not None:
            self._shm.set_write_buffer_limits(high, low)

    def _pause(self, who: str) -> None:
        if not self._paused_by:
            self._guarded(self._protocol.pause_writing)
        self._paused_by.add(who)

    def _resume(self, who: str) -> None:
        if who in self._paused_by:
            self._paused_by.remove(who)
            if not self._paused_by:
                self._guarded(self._protocol.resume_writing)

    # -- the protocol of the loop's own

    def connection_made(self, transport: Any) -> None:
        self._kernel = transport
        self._protocol.connection_made(self)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._protocol.datagram_received(data, addr)

    def error_received(self, exc: Exception) -> None:
        self._protocol.error_received(exc)

    def pause_writing(self) -> None:
        self._pause("kernel")

    def resume_writing(self) -> None:
        self._resume("kernel")

    def connection_lost(self, exc: Exception | None) -> None:
        self._over, self._error = True, exc or self._error
        self._close_behind()
        self._end()

    # -- the transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._kernel.get_extra_info(name, default)

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing or bool(self._kernel.is_closing())

    def close(self) -> None:
        """Close both: what was sent still goes out; then connection_lost(None) is called, once."""
        self._kernel.close()
        self._close_behind()

    def _close_behind(self) -> None:
        self._closing = True
        if self._shm is not None:
            self._shm.close()

    def abort(self) -> None:
        """Close both, and drop what waits; connection_lost(None) follows, once."""
        self._closing = True
        self._kernel.abort()
        if self._making is not None:
            self._making.cancel()
        if self._shm is not None:
            self._shm.abort()

    def _shm_lost(self, exc: Exception | None) -> None:
        """Note the end of the endpoint in shared memory. If the node ended, the next sendto() looks for
        another. What else ends an endpoint (an address that is none) ends the whole: from another port, no
        answer would come back."""
        self._shm = None
        self._resume("shm")
        if exc is not None and not self._closing:
            if isinstance(exc, OSError):
                self._protocol.error_received(exc)
            else:
                self._error = exc
                self.abort()
        self._end()

    def _end(self) -> None:
        if self._over and self._shm is None and self._making is None and self._protocol is not None:
            protocol, self._protocol = self._protocol, None
            protocol.connection_lost(self._error)
