"""Datagrams for asyncio: the transport over an endpoint of the engine, and create_datagram_endpoint()."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import socket
import threading
import warnings
from collections.abc import Callable
from typing import Any

from shmsock.address import SUFFIX, port_number
from shmsock.aio import names
from shmsock.aio.attach import current_node
from shmsock.aio.flow import FlowControl
from shmsock.aio.node import Node
from shmsock.aio.pseudosocket import PseudoSocket
from shmsock.aio.pump import DatagramOut
from shmsock.engine.datagrams import BROADCAST, DATAGRAM_MAX, Endpoint
from shmsock.errors import NodeClosedError, forked, wrong_thread

__all__ = ["DATAGRAM_MAX", "ShmDatagramTransport", "create_datagram_endpoint"]


class ShmDatagramTransport(FlowControl, asyncio.DatagramTransport):
    """A datagram transport as asyncio's UDP transport is. In addition: empty datagrams are sent on every
    Python, one above 65507 bytes raises OSError (EMSGSIZE) in sendto(), and pause_reading() has what arrives
    kept, up to Settings.datagram_queue_bytes."""

    max_size = DATAGRAM_MAX
    node: Node
    endpoint: Endpoint
    context: contextvars.Context

    def __init__(
        self,
        node: Node,
        endpoint: Endpoint,
        protocol: asyncio.DatagramProtocol,
        context: contextvars.Context,
        waiter: asyncio.Future[None] | None = None,
        *,
        numeric: bool = False,
        wide: bool = False,
        seen_as: Any = None,
    ) -> None:
        local, remote = endpoint.local, endpoint.remote
        if numeric:
            local, remote = _number(node, endpoint, wide)
        if seen_as is not None:
            local, remote = names.own_end(seen_as, local[1]), seen_as
            endpoint.aliases.append(seen_as)
            endpoint.shown = lambda source, section: seen_as
        self._socket = PseudoSocket(local, remote, lambda: -1, socket.SOCK_DGRAM)
        extra = {"sockname": local, "peername": remote, "socket": self._socket, "shmsock_node": node}
        super().__init__(extra, node.loop)
        self.node, self.endpoint, self.context, self._protocol = node, endpoint, context, protocol
        endpoint.sink = (protocol, context)
        self._outbox = DatagramOut(node.pump, endpoint.local[1], endpoint.routes, self)
        self.sendto = self._outbox.sendto  # type: ignore[method-assign]
        self._closing = self._lost = self._reading_paused = False
        self._sends_after_close = 0
        endpoint.handler = self
        endpoint.pause()
        node.transports.add(self)
        self._loop.call_soon(protocol.connection_made, self, context=context)
        self._loop.call_soon(self._begin, waiter)

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<ShmDatagramTransport {state} {self.endpoint.local} - {self.endpoint.remote}>"

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        """Begin to deliver, as connection_made() was called."""
        if not (self._reading_paused or self._closing):
            self.endpoint.resume()
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- protocol and reading

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol
        self.endpoint.sink = (protocol, self.context)

    def get_protocol(self) -> Any:
        return self._protocol

    def is_reading(self) -> bool:
        return not self._reading_paused and not self._closing

    def pause_reading(self) -> None:
        self._reading_paused = True
        self.endpoint.pause()

    def resume_reading(self) -> None:
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            self.endpoint.resume()

    # -- handler of the endpoint

    def datagram(self, data: bytes, source: tuple[str, int]) -> None:
        if not self._closing:
            self._call(self._protocol.datagram_received, data, source)

    def refused(self, error: OSError) -> None:
        if isinstance(error, NodeClosedError):
            self._force_close(error)
        elif not self._closing:
            self._call(self._protocol.error_received, error)

    def space(self) -> None:
        if self._protocol_paused:
            self.context.run(self._maybe_resume_protocol)
        if self._closing and not self.endpoint.unsent:
            self._end(None)

    def _call(self, callback: Callable[..., object], *args: Any) -> None:
        """Call the protocol. What it raises is reported, as asyncio's loop would, and nothing else
        happens."""
        try:
            self.context.run(callback, *args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._report(error, callback)

    def raised(self, error: BaseException, protocol: Any) -> None:
        """Report what datagram_received() raised when the extension called it."""
        self._report(error, protocol.datagram_received)

    def _report(self, error: BaseException, callback: Callable[..., object]) -> None:
        self._loop.call_exception_handler(
            {
                "message": f"Exception in callback {callback!r}",
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )

    # -- sending

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send a datagram, and never block; what waits for room is in get_write_buffer_size(), 64 bytes more
        for each.
        `addr`: (host, port), or ("*", port) for every peer that has the port.

        Raises TypeError, ValueError (connected elsewhere), OSError (EMSGSIZE); what else goes wrong is told
        by error_received()."""
        self._outbox.sendto(data, addr)

    def _send_slowly(self, data: Any, addr: Any) -> None:
        self._check_thread()
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if isinstance(addr, tuple) and addr and isinstance(addr[0], (bytes, bytearray)):
            addr = addr[0].decode("ascii", "replace"), *addr[1:]
        if self.endpoint.remote is not None and addr not in self.endpoint.aliases:
            if not self._is_remote(addr):
                raise ValueError(f"Invalid address: must be None or {self._extra['peername']}")
            addr = None
        if len(data) > DATAGRAM_MAX or isinstance(data, memoryview):
            data = bytes(data)
        if self._closing:
            self._sends_after_close += 1
            if self._sends_after_close >= 5:
                from asyncio.log import logger

                logger.warning("shmsock: sendto() on a closed transport: %r", self)
            return
        try:
            self.endpoint.send(data, addr)
        except NodeClosedError as error:
            self._force_close(error)
        except OSError as error:
            if len(data) > DATAGRAM_MAX:
                raise
            self._protocol.error_received(error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fatal_error(error, "Fatal write error on datagram transport")
        self._maybe_pause_protocol()

    def _is_remote(self, addr: Any) -> bool:
        """Does it stand for the connected address, in any spelling?"""
        try:
            return (self.endpoint.host(addr[0]), addr[1]) in self.endpoint.aliases
        except (OSError, TypeError, LookupError):
            return False

    def get_write_buffer_size(self) -> int:
        return self.endpoint.unsent

    @property
    def flushing(self) -> bool:
        """Whether it is closed, and not yet rid of what was sent."""
        return self._closing and bool(self.endpoint.unsent)

    def _check_thread(self) -> None:
        if threading.get_ident() != self.node.ident:
            raise wrong_thread(repr(self))
        if self.node.closed and os.getpid() != self.node.pid:
            raise forked(repr(self))

    # -- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Close: what was sent still goes out; then connection_lost(None) is called, not from within this
        call."""
        self._check_thread()
        if self._closing:
            return
        self._closing, self._outbox.can_write = True, False
        self.endpoint.pause()
        if not self.endpoint.unsent:
            self._end(None)

    def abort(self) -> None:
        """Close, and drop what waits; connection_lost(None) follows."""
        self._check_thread()
        self._force_close(None)

    def _force_close(self, error: BaseException | None) -> None:
        self._closing, self._outbox.can_write = True, False
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if self._lost:
            return
        self._lost = True
        self.endpoint.sink = None
        self.endpoint.close()
        self.node.transports.discard(self)
        self.node.flushed()
        if not self._loop.is_closed():
            self._loop.call_soon(self._call_connection_lost, error, context=self.context)

    def _call_connection_lost(self, error: Any) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self.endpoint.handler = None
            self._protocol = None  # type: ignore[assignment]  # as in ShmTransport

    def _fatal_error(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        )
        self._force_close(error)

    def node_closed(self) -> None:
        """End, as the node detaches."""
        self._force_close(None)

    def freed(self) -> None:
        """Take the slow way from now on, in a forked child: the next send finds out."""

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # Never into C from here, nor into the engine: the collector may run on any thread.
        if not getattr(self, "_lost", True):
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)


def _number(node: Node, endpoint: Endpoint, wide: bool) -> tuple[tuple[str, int], tuple[str, int] | None]:
    """Have internet addresses stand for names (names.py); returns (local, remote). `wide`: senders are told
    as an AF_INET6 socket does, if nothing was sent there before."""
    table, region = names.names_of(node.loop), node.region.url

    def host(given: Any) -> Any:
        if names.is_any_shm(given):
            return BROADCAST
        if not names.is_shm(given):
            if _is_number(given):
                raise OSError(
                    errno.ENETUNREACH,
                    f"{given} is not in shared memory, where this endpoint is: send to an address that "
                    f"getaddrinfo gave for a name ending in {SUFFIX}, or bind "
                    "an endpoint to a host of the network",
                )
            return given
        where, known = names.host_of(node.loop, given)
        if where not in (None, region):
            raise node.engine.listeners.unknown(given)  # a name of another region
        return known

    def shown(source: tuple[str, int], section: int) -> tuple[Any, ...]:
        """Return the sender's address in the form it was last sent to, as programs compare the two."""
        for to, route in endpoint.routes.items():
            same = route.port == source[1] and route.link.conn.peer == section
            if same and to is not None and names.is_address(to[0]):
                return (table.canonical(to[0]), *to[1:])
        plain = (table.address(region, source[0]), source[1])
        return (*plain, 0, names.SCOPE) if wide else plain

    endpoint.host, endpoint.shown = host, shown
    local, remote = (table.address(region, node.name), endpoint.local[1]), endpoint.remote
    if remote is not None and remote[0] != BROADCAST:
        remote = (table.address(region, remote[0]), remote[1])
        endpoint.aliases.append(remote)
    return local, remote


def _is_number(host: Any) -> bool:
    """Is it an internet address?"""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, str(host).partition("%")[0])
        except (OSError, ValueError):
            continue
        return True
    return False


def _address(addr: Any) -> tuple[Any, int] | None:
    if not addr:
        return None
    if not (isinstance(addr, tuple) and len(addr) == 2):
        raise TypeError(f"2-tuple is expected: (host, port), not {addr!r}")
    return addr[0], port_number(addr[1])


async def create_datagram_endpoint(
    protocol_factory: Callable[[], Any],
    local_addr: tuple[Any, int] | None = None,
    remote_addr: tuple[Any, int] | None = None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    reuse_port: bool | None = None,
    allow_broadcast: bool | None = None,
    sock: Any = None,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
    numeric: bool = False,
    wide: bool = False,
    seen_as: Any = None,
) -> tuple[ShmDatagramTransport, Any]:
    """Take a port for datagrams, as loop.create_datagram_endpoint() does over UDP.

    `local_addr`: (host, port) to receive at: None, "" or the own name for all peers, "localhost" for those of
    this machine; port 0, or no address: one is chosen. `remote_addr`: (host, port) to be connected to: the
    endpoint sends there, and takes only what comes from there. `reuse_port`: several endpoints of one host
    may share the port; a sender stays with one of them as long as that lives. `region`, `name`: see attach();
    the implicit node of this loop is used, unless `node` is given. `numeric`: addresses are told as internet
    addresses, `wide`: those that datagrams come from as (address, port, flowinfo, scope), `seen_as`: the
    remote one as this. `flags` and
    `allow_broadcast` are accepted and mean nothing: ("*", port) is allowed always.

    Datagrams have 0 to 65507 bytes, arrive whole, and in order between two peers; engine/datagrams.py says
    when one may be lost. Returns (transport, protocol). Raises OSError (EADDRINUSE; EADDRNOTAVAIL: the local
    host is not this node), socket.gaierror (nobody has the remote name), and what attach() raises. Cancelling
    gives the port back.
    """
    if sock is not None:
        raise ValueError("sock= is for kernel sockets: give local_addr, remote_addr, or both")
    if family not in (0, socket.AF_INET, socket.AF_INET6):
        raise ValueError(f"family is {family!r}: there is none in shared memory, leave it out")
    if proto not in (0, socket.IPPROTO_UDP):
        raise ValueError(f"proto is {proto!r}: there is none in shared memory, leave it out")
    local, remote = _address(local_addr), _address(remote_addr)
    node = node or await current_node(region, name, listening=True)
    host, port = local or (None, 0)
    endpoint = node.bind_datagram(host, port, reuse_port=bool(reuse_port), remote=remote)
    try:
        protocol = protocol_factory()
        waiter = node.loop.create_future()
        transport = ShmDatagramTransport(
            node,
            endpoint,
            protocol,
            contextvars.copy_context(),
            waiter,
            numeric=numeric,
            wide=wide,
            seen_as=seen_as,
        )
    except BaseException:
        endpoint.close()
        raise
    try:
        await waiter
    except BaseException:
        transport.close()
        raise
    return transport, protocol
