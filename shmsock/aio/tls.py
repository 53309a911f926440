"""TLS over a shared-memory transport: asyncio's own implementation, on every loop (uvloop's refuses foreign
transports)."""

from __future__ import annotations

import asyncio
import ssl
import sys
from asyncio import sslproto
from asyncio.sslproto import SSLProtocol
from dataclasses import dataclass
from errno import ECONNRESET
from typing import Any

__all__ = ["Tls", "client_tls", "flushes", "server_tls", "start_tls", "tell_above", "without_transport"]


@dataclass(frozen=True)
class Tls:
    """What the arguments `ssl=` and those beside it ask for. Times in seconds; None: asyncio's defaults."""

    context: ssl.SSLContext | None
    server_side: bool
    server_hostname: str | None = None
    handshake_timeout: float | None = None
    shutdown_timeout: float | None = None

    def wrap(self, loop: Any, protocol: asyncio.BaseProtocol, waiter: asyncio.Future[None]) -> SSLProtocol:
        """Make the protocol that stands between the transport and `protocol`; `waiter` is told when hands
        were shaken. Raises ValueError for a timeout that is not positive."""
        timeouts = {"ssl_handshake_timeout": self.handshake_timeout}
        if sys.version_info >= (3, 11):  # 3.10 waits for no shutdown
            timeouts["ssl_shutdown_timeout"] = self.shutdown_timeout
        made: Any = SSLProtocol
        wrapped: SSLProtocol = made(
            loop, protocol, self.context, waiter, self.server_side, self.server_hostname, **timeouts
        )
        return wrapped


_NOTHING = (None, None, None)


def _only_with_ssl(ssl_given: bool, **values: object) -> None:
    for name, value in values.items():
        if value is not None and not ssl_given:
            raise ValueError(f"{name} is only meaningful with ssl")


def client_tls(
    ssl_argument: ssl.SSLContext | bool | None,
    host: Any,
    server_hostname: str | None,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> Tls | None:
    """Read the arguments of a client. None: no TLS. Raises ValueError where loop.create_connection() does."""
    if not ssl_argument and (server_hostname, handshake_timeout, shutdown_timeout) == _NOTHING:
        return None
    _only_with_ssl(bool(ssl_argument), server_hostname=server_hostname)
    if server_hostname is None and ssl_argument:
        if not host or not isinstance(host, str):
            raise ValueError("You must set server_hostname when using ssl without a host")
        server_hostname = host
    _only_with_ssl(
        bool(ssl_argument), ssl_handshake_timeout=handshake_timeout, ssl_shutdown_timeout=shutdown_timeout
    )
    if not ssl_argument:
        return None
    context = (
        None if isinstance(ssl_argument, bool) else ssl_argument
    )  # None: SSLProtocol makes a default one
    return Tls(context, False, server_hostname, handshake_timeout, shutdown_timeout)


def server_tls(
    ssl_argument: ssl.SSLContext | None, handshake_timeout: float | None, shutdown_timeout: float | None
) -> Tls | None:
    """Read the arguments of a server. None: no TLS. Raises TypeError and ValueError where
    loop.create_server() does."""
    if isinstance(ssl_argument, bool):
        raise TypeError("ssl argument must be an SSLContext or None")
    given = ssl_argument is not None
    _only_with_ssl(given, ssl_handshake_timeout=handshake_timeout, ssl_shutdown_timeout=shutdown_timeout)
    if ssl_argument is None:
        return None
    return Tls(ssl_argument, True, None, handshake_timeout, shutdown_timeout)


def tell_above(tls: Any) -> None:
    """Tell the protocol above of the end, ahead of connection_lost(). asyncio's code keeps an end under the
    handshake from the protocol above; but a protocol that start_tls() was given was connected before, and
    tasks that read from it, or wait until it is closed, would wait forever."""
    if not hasattr(tls, "_waiter"):
        return  # somebody's own, which was never begun
    if sys.version_info < (3, 11):
        if not (tls._session_established or tls._call_connection_made):
            tls._session_established = True
            if tls._app_transport is not None:
                tls._app_transport._closed = True  # as connection_lost() does else: it was never in use
    elif tls._app_state is sslproto.AppProtocolState.STATE_CON_MADE:
        tls._set_state(sslproto.SSLProtocolState.UNWRAPPED)  # as connection_lost() does, too late


def flushes(protocol: Any) -> bool:
    """Was TLS closed above, and is its transport open only until all of it has gone out?"""
    if not isinstance(protocol, SSLProtocol):
        return False
    tls: Any = protocol
    if sys.version_info < (3, 11):
        return bool(tls._in_shutdown)
    return tls._state in (sslproto.SSLProtocolState.FLUSHING, sslproto.SSLProtocolState.SHUTDOWN)


def without_transport(below: Any) -> OSError:
    """Say why there is no TLS over that transport. asyncio's code has its waiter succeed when this side
    closes the connection under the handshake, and has no transport to show then."""
    node = below.get_extra_info("shmsock_node")
    if node is not None and (node.closed or not node.engine.alive):
        failure: OSError = node.engine.failure()
        return failure
    return ConnectionResetError(ECONNRESET, f"connection lost, hands cannot be shaken: {below!r} is closed")


async def start_tls(
    loop: Any,
    transport: Any,
    protocol: asyncio.BaseProtocol,
    sslcontext: ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> Any:
    """Do as loop.start_tls() does, for our transports on any loop. Returns the transport that `protocol`
    should use from now on. Cancelled or failed, it closes `transport`.

    Raises ConnectionResetError when either side has closed the connection, or does before hands are shaken,
    NodeClosedError when the node was closed."""
    if transport.is_closing():
        raise without_transport(transport)
    timeouts = {"ssl_handshake_timeout": ssl_handshake_timeout}
    if sys.version_info >= (3, 11):
        timeouts["ssl_shutdown_timeout"] = ssl_shutdown_timeout
    start: Any = asyncio.BaseEventLoop.start_tls
    made = await start(
        loop,
        transport,
        protocol,
        sslcontext,
        server_side=server_side,
        server_hostname=server_hostname,
        **timeouts,
    )
    if made is None:
        raise without_transport(transport)
    return made
