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
from anyio.abc import ByteStreamConnectable
from anyio.streams.tls import TLSStream

from shmsock.address import check_port
from shmsock.aio.attach import attach, current_node, on_current_node
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
) -> ShmStream | TLSStream:
    """Connect to `remote_port` of the peer named `remote_host`, as anyio.connect_tcp() does over TCP, with
    TLS when one of `tls`, `ssl_context` and `tls_hostname` says so.

    `remote_host`: a peer's name, a section number, or None or "localhost" for this machine. `local_port`: the
    own port; 0: one is chosen. `tls_hostname`: the name that the certificate must have; None: `remote_host`.
    `tls_standard_compatible`: an end without TLS's own closing is an error. `region`, `name`: see attach();
    the implicit node of this run is used, unless `node` is given.

    Returns a stream. Raises socket.gaierror (nobody has the name), ConnectionRefusedError (nobody listens
    there), ConnectionResetError (the peer went away), OSError (ENOBUFS: no slot or no memory for a ring),
    ssl.SSLError, and what attach() raises. There is no timeout; cancelling gives up, and leaves nothing
    behind.
    """
    port, local_port = check_port(remote_port), check_port(local_port)

    async def connect(on: Node) -> ShmStream:
        return ShmStream(on, await on.connect(_host(remote_host), port, local_port))

    stream = await on_current_node(node, region, name, connect)
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
    does over UDP. The parameters, what is raised and what cancelling does are those of
    create_shm_listener()."""
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
    anyio.create_connected_udp_socket() does over UDP. Raises socket.gaierror (nobody has the remote name),
    and what create_shm_listener() does."""
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
        """Connect, as connect_shm() does. Raises anyio.ConnectionFailed, whatever the reason."""
        try:
            return await connect_shm(self.host, self.port, region=self.region, name=self.name, node=self.node)
        except OSError as error:
            raise anyio.ConnectionFailed(f"error connecting to {self.host}:{self.port}: {error}") from error
