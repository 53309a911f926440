"""The ways in: create_connection, create_server, open_connection, start_server. Parameters, defaults, order
and exceptions are those of asyncio's functions of the same names."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import operator
import socket
import ssl as _ssl
from asyncio.streams import _DEFAULT_LIMIT  # type: ignore[attr-defined]
from asyncio.tasks import _enter_task, _leave_task  # what loops call around each step of a task
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, SupportsIndex

from shmsock.address import Address, port_number
from shmsock.aio.attach import current_node, known_node, node_if_any, on_current_node
from shmsock.aio.fallback import Fallback, TcpStreamWriter, is_answer, over_tcp, targets, uses_hosts
from shmsock.aio.node import Node
from shmsock.aio.pseudosocket import Duplicate
from shmsock.aio.server import Server
from shmsock.aio.streams import (
    ShmServerProtocol,
    ShmStreamReader,
    ShmStreamReaderProtocol,
    ShmStreamWriter,
    adopt,
)
from shmsock.aio.tls import Tls, client_tls, server_tls, without_transport
from shmsock.aio.transport import ShmTransport
from shmsock.engine.connection import Connection, State

__all__ = ["create_connection", "create_server", "open_connection", "start_server"]

log = logging.getLogger("shmsock")
Otherwise = Callable[[OSError | None], Awaitable[tuple[Any, Any]]]
_NO_SOCKETS = (
    "sock= is for kernel sockets: give host and port, the name of a peer and a port of it; a connection of "
    'this package goes on with the dup() of its get_extra_info("socket")'
)


async def create_connection(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str | int | Address | None = None,
    port: int | None = None,
    *,
    ssl: _ssl.SSLContext | bool | None = None,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    sock: Any = None,
    local_addr: tuple[str | None, int] | None = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    happy_eyeballs_delay: float | None = None,
    interleave: int | None = None,
    all_errors: bool = False,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
    numeric: bool = False,
    seen_as: Any = None,
    otherwise: Otherwise | None = None,
    fallback: Fallback = None,
) -> tuple[Any, Any]:
    """Connect to `port` of the peer named `host`, as loop.create_connection() does over TCP.

    `host`: a peer's name, a section number, an address that a peer publishes (of the module ipaddress), or
    None or "localhost" for this machine. `sock`, instead of host
    and port: the dup() of a connection's get_extra_info("socket"); that connection goes on under this
    protocol, and its transport is closed. `local_addr`: only its port counts. `ssl`, `server_hostname` and
    the timeouts, in seconds, are asyncio's. `region`, `name`: see attach(); the implicit node of this loop is
    used, unless `node` is given. `numeric`: the transport tells internet addresses instead of names,
    `seen_as`: this one of the peer. `otherwise`: another way to connect; it is given what this one failed
    with before any protocol was made, and what it returns is returned. `family`, `proto`, `flags` and what is
    about several addresses are accepted and mean nothing, over memory.

    `fallback`: a host, or (host, port), to connect to over TCP when the peer is not in the region; None: what
    SHMSOCK_HOSTS says of the name. Which way it went: get_extra_info("shmsock_path", "tcp").

    Returns (transport, protocol). Raises socket.gaierror (nobody has the name), ConnectionRefusedError
    (nobody listens there), ConnectionResetError (the peer went away), OSError (ENOBUFS: no slot or no memory
    for a ring; EBADF: `sock` was closed or used), with `ssl` what asyncio raises when hands cannot be shaken,
    and what attach() raises.

    There is no timeout: a peer whose loop is blocked is waited for. Cancelling gives up, and leaves nothing
    behind.
    """
    tls = client_tls(ssl, host, server_hostname, ssl_handshake_timeout, ssl_shutdown_timeout)
    if sock is not None:
        return await _go_on(protocol_factory, sock, (host, port), tls)
    if port is None:
        if host is None:
            raise ValueError("host and port was not specified and no sock specified")
        raise ValueError(f"no port of {host!r} was given: pass the one that a server of it listens on")
    local_port, number = port_number(local_addr[1]) if local_addr else 0, port_number(port)

    used: Node | None = None
    where = targets(host, number, fallback)
    if where:
        kept: dict[str, Any] = {
            "ssl": ssl,
            "family": family,
            "proto": proto,
            "flags": flags,
            "local_addr": local_addr,
            "server_hostname": tls and tls.server_hostname,
            "ssl_handshake_timeout": ssl_handshake_timeout,
            "ssl_shutdown_timeout": ssl_shutdown_timeout,
            "happy_eyeballs_delay": happy_eyeballs_delay,
            "interleave": interleave,
            "all_errors": all_errors,
        }
        otherwise = partial(over_tcp, protocol_factory, host, where, kept)
        if node is None and await node_if_any(region, name) is None:
            return await otherwise(None)

    transport: Any = None

    def make(on: Node, conn: Connection) -> None:
        nonlocal transport
        transport = ShmTransport(on, conn, None, contextvars.copy_context(), numeric=seen_as or numeric)

    async def connect(on: Node) -> Connection:
        nonlocal used
        used, known, impatient = on, asked.pop(on, None), otherwise is not None
        return await on.connect(host, number, local_port, make, impatient=impatient, asked=known)

    at_once = None if otherwise or local_port else node or known_node(region, name)
    conn = None if at_once is None else at_once.ask_again(host, number, make)
    if conn is None or conn.state is not State.OPEN:
        asked = {at_once: conn}
        try:
            conn = await on_current_node(node, region, name, connect)
        except OSError as error:
            if otherwise is None or (where and is_answer(error, used, host)):
                raise
            return await otherwise(error)
    shaken = None if tls is None else transport.node.loop.create_future()
    try:
        protocol, transport._protocol = _protocols(protocol_factory, tls, shaken)
    except BaseException:
        conn.close()
        raise
    if where:
        log.info("%r goes through memory, to port %d of section %d", host, number, conn.peer)
    return await _started(transport, protocol, shaken, conn.handler.early)


def _as_callback(transport: ShmTransport, early: bool) -> None:
    """Start as a callback of the loop would, in which no task is the current one."""
    loop, task = transport.node.loop, asyncio.current_task()
    if task is not None:
        _leave_task(loop, task)
    try:
        transport.context.run(transport.start_now, early)
    finally:
        if task is not None:
            _enter_task(loop, task)


def _protocols(
    factory: Callable[[], asyncio.BaseProtocol], tls: Tls | None, shaken: asyncio.Future[None] | None
) -> tuple[asyncio.BaseProtocol, asyncio.BaseProtocol]:
    """Make the user's protocol, and the one that the transport gives bytes to."""
    protocol = factory()
    if tls is not None and shaken is not None:
        return protocol, tls.wrap(shaken.get_loop(), protocol, shaken)
    adopt(protocol)
    return protocol, protocol


async def _started(
    transport: ShmTransport,
    protocol: asyncio.BaseProtocol,
    shaken: asyncio.Future[None] | None,
    early: bool = True,
) -> tuple[Any, Any]:
    """Start. `shaken`: with TLS, which sets it when hands have been shaken."""
    below: Any = transport.get_protocol()
    try:
        if shaken is None:
            _as_callback(transport, early)
            return transport, protocol
        transport.start()
        await shaken
    except BaseException:
        transport.close()
        raise
    above = below._app_transport
    if above is None:
        raise without_transport(transport)
    return above, protocol


async def _go_on(
    factory: Callable[[], asyncio.BaseProtocol], sock: Any, given: tuple[Any, Any], tls: Tls | None
) -> tuple[Any, Any]:
    """Go on with the connection that a duplicate of its pseudo-socket keeps open."""
    if given != (None, None):
        raise ValueError("host/port and sock can not be specified at the same time")
    if not isinstance(sock, Duplicate):
        raise ValueError(_NO_SOCKETS)
    before = sock.take(asyncio.get_running_loop())
    shaken = None if tls is None else before.node.loop.create_future()
    protocol, below = _protocols(factory, tls, shaken)
    transport = ShmTransport(before.node, before.conn, below, contextvars.copy_context())
    transport.supersede(before)
    sock.taken()
    return await _started(transport, protocol, shaken)


async def connect_accepted_socket(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    sock: Any,
    *,
    ssl: _ssl.SSLContext | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> tuple[Any, Any]:
    """Go on with the connection of which `sock` is the dup() of get_extra_info("socket"), as
    loop.connect_accepted_socket() does: with `ssl` on the server's side of TLS. Raises as
    create_connection(sock=) does."""
    tls = server_tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
    return await _go_on(protocol_factory, sock, (None, None), tls)


def _check_c_int(number: SupportsIndex) -> None:
    """Raise what socket.listen() does for a backlog: TypeError and OverflowError."""
    if not -(1 << 31) <= operator.index(number) < 1 << 31:
        raise OverflowError("Python int too large to convert to C int")


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: Any = None,
    port: int | None = None,
    *,
    family: int = socket.AF_UNSPEC,
    flags: int = socket.AI_PASSIVE,
    sock: Any = None,
    backlog: int = 100,
    ssl: _ssl.SSLContext | None = None,
    reuse_address: bool | None = None,
    reuse_port: bool | None = None,
    keep_alive: bool | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
    numeric: Any = False,
) -> Server:
    """Listen at `port`, and make a protocol for each connection to it, as loop.create_server() does over TCP.

    `host`: None, "" or the own name for all peers, "localhost" for those of this machine, or several of
    these. `port`: None or 0: one is chosen. `backlog`: how many connections may be accepted and not yet
    handled. `reuse_port`: several processes of one host may share the port. `ssl` and the timeouts, in
    seconds, are asyncio's. `start_serving`: accept at once. `region`, `name`, `node`: as for
    create_connection(). `numeric`: addresses are told as internet addresses, see names.shown(). `family`,
    `flags`, `reuse_address` and `keep_alive` are accepted and mean nothing.

    Returns a Server. Raises OSError (EADDRINUSE; EADDRNOTAVAIL: `host` is not this node), TypeError and
    OverflowError (`backlog` is no C int), and what attach() raises. Cancelling leaves nothing behind.
    """
    tls = server_tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
    if sock is not None:
        raise ValueError(_NO_SOCKETS)
    _check_c_int(backlog)
    node = node or await current_node(region, name, listening=True)
    several = isinstance(host, Iterable) and not isinstance(host, str)
    server = Server(
        node,
        list(host) if several else [host],
        port_number(port),
        protocol_factory,
        reuse_port=bool(reuse_port),
        reuse_address=reuse_address is None or bool(reuse_address),
        keep_alive=bool(keep_alive),
        tls=tls,
        numeric=numeric,
    )
    if start_serving:
        try:
            await server.start_serving()
        except BaseException:
            server.close()
            raise
    return server


async def open_connection(
    host: str | int | None = None,
    port: int | None = None,
    *,
    limit: int = _DEFAULT_LIMIT,
    **kwds: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to `port` of the peer named `host`, as asyncio.open_connection() does over TCP.

    `limit`: how long a line may be, in bytes, as asyncio's. All else is what create_connection() takes.
    Returns (reader, writer): an asyncio.StreamReader and an asyncio.StreamWriter. Raises what
    create_connection() does. Cancelling gives up, and leaves nothing behind.
    """
    given = kwds.pop("node", None), kwds.pop("region", None), kwds.pop("name", None)
    if kwds or port is None or uses_hosts():
        loop: Any = asyncio.get_running_loop()
        kwds.update(zip(("node", "region", "name"), given, strict=True))
        reader = ShmStreamReader(limit=limit, loop=loop)
        protocol = ShmStreamReaderProtocol(reader, loop=loop)
        transport, _ = await create_connection(lambda: protocol, host, port, **kwds)
        if isinstance(transport, ShmTransport):
            return reader, ShmStreamWriter(transport, protocol, reader, loop)
        tcp = transport.get_extra_info("shmsock_path") != "shm"
        return reader, (TcpStreamWriter if tcp else asyncio.StreamWriter)(transport, protocol, reader, loop)
    made: list[Any] = []
    number = port_number(port)

    def make(node: Node, conn: Connection) -> None:
        loop = node.loop
        reader = ShmStreamReader(limit, loop)
        protocol = ShmStreamReaderProtocol(reader, None, loop)
        transport = ShmTransport(node, conn, protocol, contextvars.copy_context())
        protocol.connection_made(transport)  # the protocol is ours alone
        made[:] = reader, ShmStreamWriter(transport, protocol, reader, loop), transport

    on = given[0] or known_node(given[1], given[2])
    conn = None if on is None else on.ask_again(host, number, make)
    if conn is None or conn.state is not State.OPEN:
        asked = {on: conn}
        conn = await on_current_node(
            *given, lambda node: node.connect(host, number, 0, make, asked=asked.pop(node, None))
        )
    reader, writer, transport = made
    transport.start_streams(conn.handler.early)
    return reader, writer


async def start_server(
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    host: Any = None,
    port: int | None = None,
    *,
    limit: int = _DEFAULT_LIMIT,
    **kwds: Any,
) -> Server:
    """Listen at `port`, and call `client_connected_cb(reader, writer)` for each connection to it, in a task
    when it is a coroutine function, as asyncio.start_server() does over TCP.

    `limit`: how long a line may be, in bytes, as asyncio's. All else is what create_server() takes. Returns a
    Server. Raises what create_server() does. Cancelling leaves nothing behind.
    """
    node = kwds.pop("node", None) or await current_node(
        kwds.pop("region", None), kwds.pop("name", None), listening=True
    )
    loop = node.loop

    def factory() -> asyncio.StreamReaderProtocol:
        return ShmServerProtocol(ShmStreamReader(limit, loop), client_connected_cb, loop)

    return await create_server(factory, host, port, node=node, **kwds)
