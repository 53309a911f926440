"""The server object: asyncio.Server's surface over one listener."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from shmsock.aio import names
from shmsock.aio.pseudosocket import PseudoSocket
from shmsock.aio.streams import adopt
from shmsock.aio.tls import Tls
from shmsock.aio.transport import ShmTransport
from shmsock.engine.connection import Connection
from shmsock.engine.listeners import Listener

if TYPE_CHECKING:
    from shmsock.aio.node import Node

__all__ = ["Server"]


def _shook_hands(transport: ShmTransport, waiter: asyncio.Future[None]) -> None:
    """End a connection whose handshake failed; the TLS code has logged why where that is of interest."""
    if waiter.cancelled() or waiter.exception() is not None:
        transport.close()


class Server(asyncio.AbstractServer):
    """What start_server() and create_server() return: asyncio.Server's methods, for one port of a node. The
    port is taken when this is made; connections are accepted from start_serving() on."""

    def __init__(
        self,
        node: Node,
        hosts: list[Any],
        port: int,
        factory: Callable[[], asyncio.BaseProtocol],
        *,
        reuse_port: bool,
        reuse_address: bool = True,
        keep_alive: bool = False,
        tls: Tls | None = None,
        numeric: Any = False,
    ) -> None:
        self._node, self._factory, self._tls, self._numeric = node, factory, tls, numeric
        self._context = contextvars.copy_context()
        # Each pass of the pump hands over all that it accepted: there is no backlog.
        self._listener: Listener | None = node.listen(hosts, port, backlog=0, reuse_port=reuse_port)
        port = self._listener.port
        address = names.address_of(node, node.name, port) if numeric else (node.name, port)
        #: Options of its pseudo-socket, which connections inherit.
        self.inherited: dict[tuple[int, int], Any] = {
            (socket.SOL_SOCKET, socket.SO_REUSEADDR): int(reuse_address),
            (socket.SOL_SOCKET, socket.SO_REUSEPORT): int(reuse_port),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE): int(keep_alive),
        }
        options = {**self.inherited, (socket.SOL_SOCKET, socket.SO_ACCEPTCONN): 1}
        self._socket = PseudoSocket(address, None, lambda: -1, options=options)
        self._serving = self._listener.serving = False
        self._listener.handler = self._accept
        self._forever: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._transports: set[ShmTransport] = set()
        node.servers.add(self)

    def __repr__(self) -> str:
        return (
            f"<shmsock.Server {self._socket.getsockname()} {'closed' if self._listener is None else 'open'}>"
        )

    # -- connections

    def _accept(self, conn: Connection) -> None:
        # A context of its own for each: contextvars of one client are never seen in another's handler.
        context = self._context.copy()
        context.run(self._made, conn, context)

    def _made(self, conn: Connection, context: contextvars.Context) -> None:
        try:
            protocol: asyncio.BaseProtocol = self._factory()
            waiter = None
            if self._tls is not None:
                waiter = self._node.loop.create_future()
                protocol = self._tls.wrap(self._node.loop, protocol, waiter)
            else:
                adopt(protocol)
        except BaseException:
            conn.close()
            raise
        transport = ShmTransport(self._node, conn, protocol, context, self, numeric=self._numeric)
        if waiter is None:
            transport.start_now()  # the engine tells right after this what is there already
        else:
            transport.start()
            waiter.add_done_callback(partial(_shook_hands, transport))

    def _attach(self, transport: ShmTransport) -> None:
        self._transports.add(transport)

    def _detach(self, transport: ShmTransport) -> None:
        self._transports.discard(transport)
        if self._listener is None and not self._transports:
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- asyncio.Server

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The stand-in for the listening socket, whose getsockname() tells (name, port); none when closed."""
        return () if self._listener is None else (self._socket,)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop of the node."""
        loop: asyncio.AbstractEventLoop = self._node.loop
        return loop

    def is_serving(self) -> bool:
        """Return whether connections are accepted."""
        return self._serving

    async def start_serving(self) -> None:
        """Accept connections from now on, also when this is cancelled; harmless when repeated."""
        self._start()
        await asyncio.sleep(0)

    def _start(self) -> None:
        if self._serving or self._listener is None:
            return
        self._serving = self._listener.serving = True

    async def serve_forever(self) -> None:
        """Accept connections until this is cancelled, or close() is called; then it closes the server (from
        Python 3.14 on, as asyncio's, its connections as well), waits as wait_closed() does, and raises
        CancelledError. Raises RuntimeError when the server is closed, or is
        awaited here already."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._listener is None:
            raise RuntimeError(f"server {self!r} is closed")
        self._start()
        self._forever = self._node.loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            try:
                self.close()
                if sys.version_info >= (3, 14):
                    self.close_clients()
                await self.wait_closed()
            finally:
                raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Stop listening, and give the port back. Connections that are open stay; harmless when repeated."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._serving = False
        self._node.servers.discard(self)
        listener.close()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        if not self._transports:
            self._wake()

    async def wait_closed(self) -> None:
        """Wait until close() was called and, as in Python from 3.12 on, the last connection has ended.
        Cancelling ends the waiting alone."""
        if self._listener is None and (not self._transports or sys.version_info < (3, 12)):
            return
        waiter = self._node.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def close_clients(self) -> None:
        """Close all connections (asyncio.Server has this from 3.13 on)."""
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """Reset all connections."""
        for transport in list(self._transports):
            transport.abort()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await self.wait_closed()
