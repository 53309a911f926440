"""anyio over shared memory, on its asyncio and its trio backend: connect_shm, create_shm_listener, datagrams.

Names, parameters, exceptions and cancellation are those of anyio's TCP and UDP: a cancelled receive() takes
nothing with it, and what a cancelled send() had put into the ring stays there. Both are always cancel points.
receive() lets other tasks run each time (on trio: each time that one could, and every 50 us), send() when it
waits or the turn's budget is used up. What a run of trio sees of the node behind it is told in
shmsock/aio/trio_loop.py.
"""

from __future__ import annotations

import ssl
from dataclasses import KW_ONLY, dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, overload

import anyio
from anyio.abc import ByteStream, ByteStreamConnectable
from anyio.streams.tls import TLSStream

from shmsock.address import check_port
from shmsock.aio.attach import attach, current_node, node_if_any, on_current_node
from shmsock.aio.fallback import Fallback, is_answer, targets, tell
from shmsock.aio.node import Node
from shmsock.anyio.datagrams import ConnectedShmDatagramSocket, ShmDatagramSocket
from shmsock.anyio.ends import ShmAttribute
from shmsock.anyio.streams import ShmListener, ShmStream

__all__ = [
    "ConnectedShmDatagramSocket",
    "ShmAttribute",
    "ShmConnectable",
    "ShmDatagramSocket",
    "ShmListener",
    "ShmStream",
    "attach",
    "connect_shm",
    "create_connected_shm_datagram_socket",
    "create_shm_datagram_socket",
    "create_shm_listener",
]

Host = str | int | IPv4Address | IPv6Address | None


def _host(host: Host) -> str | int | None:
    return str(host) if isinstance(host, (IPv4Address, IPv6Address)) else host


@overload
async def connect_shm(
    remote_host: Host,
    remote_port: int,
    *,
    local_port: int = ...,
    tls: Literal[False] = ...,
    ssl_context: None = ...,
    tls_standard_compatible: bool = ...,
    tls_hostname: None = ...,
    region: str | None = ...,
    name: str | None = ...,
    node: Node | None = ...,
) -> ShmStream: ...


@overload
async def connect_shm(
    remote_host: Host,
    remote_port: int,
    *,
    local_port: int = ...,
    tls: bool = ...,
    ssl_context: ssl.SSLContext | None = ...,
    tls_standard_compatible: bool = ...,
    tls_hostname: str | None = ...,
    region: str | None = ...,
    name: str | None = ...,
    node: Node | None = ...,
) -> ShmStream | TLSStream: ...


@overload
async def connect_shm(
    remote_host: Host,
    remote_port: int,
    *,
    local_port: int = ...,
    tls: bool = ...,
    ssl_context: ssl.SSLContext | None = ...,
    tls_standard_compatible: bool = ...,
    tls_hostname: str | None = ...,
    region: str | None = ...,
    name: str | None = ...,
    node: Node | None = ...,
    fallback: Fallback,
) -> ByteStream: ...


async def connect_shm(
    remote_host: Host,
    remote_port: int,
    *,
    local_port: int = 0,
    tls: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_standard_compatible: bool = True,
    tls_hostname: str | None = None,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
    fallback: Fallback = None,
) -> ByteStream:
    """Connect to `remote_port` of the peer named `remote_host`, as anyio.connect_tcp() does over TCP, with
    TLS when one of `tls`, `ssl_context` and `tls_hostname` says so.

    `remote_host`: a peer's name, a section number, or None or "localhost" for this machine. `local_port`: the
    own port; 0: one is chosen. `tls_hostname`: the name that the certificate must have; None: `remote_host`.
    `tls_standard_compatible`: an end without TLS's own closing is an error. `region`, `name`: see attach();
    the implicit node of this run is used, unless `node` is given. `fallback`: a host, or (host, port), to
    connect to over TCP when the peer is not in the region (`local_port` means nothing then); None: what
    SHMSOCK_HOSTS says of the name.

    Returns a stream; `stream.extra(ShmAttribute.peer, None)` is None of one over TCP. Raises
    socket.gaierror (nobody has the name), ConnectionRefusedError (nobody listens there),
    ConnectionResetError (the peer went away), OSError (ENOBUFS: no slot or no memory for a ring),
    ssl.SSLError, and what attach() raises. There is no timeout; cancelling gives up, and leaves nothing
    behind.
    """
    port, local_port, host = check_port(remote_port), check_port(local_port), _host(remote_host)
    where, used = targets(host, port, fallback), node

    async def connect(on: Node) -> ByteStream:
        nonlocal used
        used = on
        return ShmStream(on, await on.connect(host, port, local_port, impatient=bool(where)))

    if where and node is None and await node_if_any(region, name) is None:
        stream = await _over_tcp(host, where, None)
    else:
        try:
            stream = await on_current_node(node, region, name, connect)
        except OSError as error:
            if not where or is_answer(error, used, host):
                raise
            stream = await _over_tcp(host, where, error)
    if not (tls or tls_hostname or ssl_context):
        return stream
    try:
        return await TLSStream.wrap(
            stream,
            server_side=False,
            hostname=tls_hostname or str(remote_host),
            ssl_context=ssl_context,
            standard_compatible=tls_standard_compatible,
        )
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _over_tcp(host: Host, where: list[tuple[str, int]], why: OSError | None) -> ByteStream:
    """Connect to the first of `where` that answers. Raises what the last attempt did."""
    for number, (address, port) in enumerate(where, 1):
        tell(host, address, port, why)
        try:
            return await anyio.connect_tcp(address, port)
        except OSError as error:
            if number == len(where):
                raise error from why
    raise AssertionError("there is an address")


async def create_shm_listener(
    *,
    local_host: Host = None,
    local_port: int = 0,
    backlog: int = 65536,
    reuse_port: bool = False,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
) -> ShmListener:
    """Listen at `local_port` (0: one is chosen), as anyio.create_tcp_listener() does over TCP.

    `local_host`: None or the own name for all peers, "localhost" for those of this machine. `backlog`: how
    many connections may wait for accept(). `reuse_port`: several processes of one host may share the port.
    `region`, `name`, `node`: as for connect_shm(). Raises OSError (EADDRINUSE; EADDRNOTAVAIL: `local_host` is
    not this node), and what attach() raises. Cancelling leaves nothing behind.
    """
    port = check_port(local_port)
    node = node or await current_node(region, name, listening=True)
    return ShmListener(node, [_host(local_host)], port, backlog, reuse_port)


async def create_shm_datagram_socket(
    *,
    local_host: Host = None,
    local_port: int = 0,
    reuse_port: bool = False,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
) -> ShmDatagramSocket:
    """Take `local_port` (0: one is chosen) for datagrams from and to all peers, as anyio.create_udp_socket()
    does over UDP. The parameters and what cancelling does are those of create_shm_listener(). Raises what
    that does."""
    port = check_port(local_port)
    node = node or await current_node(region, name, listening=True)
    return ShmDatagramSocket(node, node.bind_datagram(_host(local_host), port, reuse_port=reuse_port))


async def create_connected_shm_datagram_socket(
    remote_host: Host,
    remote_port: int,
    *,
    local_host: Host = None,
    local_port: int = 0,
    reuse_port: bool = False,
    region: str | None = None,
    name: str | None = None,
    node: Node | None = None,
) -> ConnectedShmDatagramSocket:
    """Take `local_port` (0: one is chosen) for datagrams from and to (remote_host, remote_port) alone, as
    anyio.create_connected_udp_socket() does over UDP. `remote_host`: a peer's name, a section number, or None
    or "localhost" for this machine. Raises socket.gaierror (nobody has the remote name), and what
    create_shm_listener() does; other parameters and cancelling are as there."""
    remote, port = (_host(remote_host), check_port(remote_port)), check_port(local_port)
    node = node or await current_node(region, name, listening=True)
    return ConnectedShmDatagramSocket(
        node, node.bind_datagram(_host(local_host), port, reuse_port=reuse_port, remote=remote)
    )


@dataclass
class ShmConnectable(ByteStreamConnectable):
    """What connect_shm() needs to know, for programs that take an anyio connectable. Raises ValueError for a
    port that is none."""

    host: Host
    port: int
    _: KW_ONLY
    region: str | None = None
    name: str | None = None
    node: Node | None = None

    def __post_init__(self) -> None:
        if self.port < 1 or self.port > 65535:
            raise ValueError("port number out of range")

    async def connect(self) -> ShmStream:
        """Connect, as connect_shm() does. Raises anyio.ConnectionFailed, whatever the reason. Cancelling
        leaves nothing behind."""
        try:
            return await connect_shm(self.host, self.port, region=self.region, name=self.name, node=self.node)
        except OSError as error:
            raise anyio.ConnectionFailed(f"error connecting to {self.host}:{self.port}: {error}") from error
