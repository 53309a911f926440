"""An event loop on which unmodified asyncio programs reach shared memory: hosts that end in `.shm` are peers
of the region, all others what they always were.

    asyncio.Runner(loop_factory=shmsock.loop_factory())        # asyncio's loop
    asyncio.Runner(loop_factory=shmsock.loop_factory(uvloop.Loop))

To listen: the own name with `.shm`, `*.shm` (the same: all peers), or `localhost.shm` (this machine). Such
transports tell internet addresses that stand for names (names.py), as programs expect them; getaddrinfo and
getnameinfo map both ways. They lead kernel sockets nowhere: socket.connect() to one fails at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import ssl
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from shmsock.address import SUFFIX, port_number
from shmsock.aio import endpoints, names
from shmsock.aio.attach import node_if_any, on_current_node
from shmsock.aio.datagram import create_datagram_endpoint
from shmsock.aio.fallback import targets
from shmsock.aio.joint import JointTransport
from shmsock.aio.pseudosocket import PseudoSocket
from shmsock.aio.sendfile import descriptor_of, send_file
from shmsock.aio.tls import start_tls
from shmsock.aio.transport import ShmTransport
from shmsock.engine.datagrams import BROADCAST

__all__ = ["ShmLoop", "host_in", "loop_factory", "meant_by", "new_event_loop"]

if TYPE_CHECKING:
    from shmsock.aio.node import Node

    _Base = asyncio.BaseEventLoop
else:
    _Base = object
#: Sockets that were to be connected to a peer, and its address.
_meant: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()
_KINDS = ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP))
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def _all_in_shm(hosts: list[Any], what: str) -> bool:
    """Raises ValueError for a mixture: a server, or an endpoint, is of one kind."""
    kinds = {names.is_shm(host) for host in hosts}
    if len(kinds) > 1:
        raise ValueError(f"hosts in shared memory and others at once: {hosts!r}; {what}")
    return kinds == {True}


def host_in(address: Any) -> Any:
    """Return the host of a socket address, if it has one."""
    return address[0] if isinstance(address, tuple) and len(address) in (2, 4) else None


def meant_by(loop: Any, sock: Any) -> Any:
    """Return the address that a kernel socket was to be connected to; None when there is none, or it is
    closed."""
    mine = _meant.get(loop)
    return mine.get(sock) if mine and isinstance(sock, socket.socket) and sock.fileno() >= 0 else None


async def _not_there(what: str, address: Any) -> NoReturn:
    raise OSError(
        errno.EOPNOTSUPP,
        f"{what}: {address!r} is in shared memory, where no kernel socket leads: give the socket to "
        "create_connection(sock=) once it is connected, or use asyncio.open_connection(host, port)",
    )


def _unless_meant(name: str) -> Any:
    """Wrap the loop's method for sockets without a transport, to refuse one that is connected to a peer in
    name only."""

    def method(self: Any, sock: Any, *args: Any, **kwds: Any) -> Any:
        address = meant_by(self, sock)
        if address is not None:
            return _not_there(f"{name}()", address)
        return getattr(super(ShmLoop, self), name)(sock, *args, **kwds)

    return method


class ShmLoop(_Base):
    """Methods that come before those of the loop it is mixed with, for hosts in shared memory."""

    _shown: Any = True  # how servers are told who connects: see names.shown()

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """Connect as asyncio's method does; to a peer in shared memory only note the address. Programs that
        give such a socket to create_connection() (aiohttp's client) are led to the peer there. The socket
        itself stays unconnected: sock_sendall() and the like raise OSError (EOPNOTSUPP), as this does for a
        socket of datagrams."""
        host = host_in(address)
        if not names.is_shm(host):
            if isinstance(sock, socket.socket):
                _meant.get(self, weakref.WeakKeyDictionary()).pop(sock, None)
            return await super().sock_connect(sock, address)
        return await self._mean(sock, names.host_of(self, host), address)

    async def _mean(self, sock: Any, host: tuple[str | None, Any], address: Any) -> None:
        """Note that a socket is to be connected to `host`, (region, peer), by that address."""
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError("Socket cannot be of type SSLSocket")
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        if sock.type != socket.SOCK_STREAM:
            await _not_there("sock_connect() of datagrams (see create_datagram_endpoint())", address)
        if sock.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        number = port_number(address[1])

        async def find(node: Node) -> object:
            return node.find(host[1], number, (), takes_turn=False)

        await on_current_node(None, host[0], None, find)  # refused here, where it is expected
        _meant.setdefault(self, weakref.WeakKeyDictionary())[sock] = address

    sock_recv = _unless_meant("sock_recv")
    sock_recv_into = _unless_meant("sock_recv_into")
    sock_sendall = _unless_meant("sock_sendall")
    sock_sendfile = _unless_meant("sock_sendfile")

    async def sock_sendto(self, sock: Any, data: Any, address: Any) -> int:
        if names.is_shm(host_in(address)):
            await _not_there("sock_sendto() (see create_datagram_endpoint())", address)
        sent: int = await super().sock_sendto(sock, data, address)  # type: ignore[misc]  # from 3.11 on
        return sent

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *scope: Any, **kwds: Any
    ) -> tuple[Any, Any]:
        sock: Any = kwds.get("sock")
        if isinstance(sock, PseudoSocket):  # a dup() of one
            return await endpoints.create_connection(protocol_factory, host, port, **kwds)
        address = meant_by(self, sock) if host is None and port is None else None
        if address is not None:
            del _meant[self][sock]
            try:
                if kwds.get("ssl") and kwds.get("server_hostname") is None:
                    raise ValueError("You must set server_hostname when using ssl without a host")
                return await self.create_connection(protocol_factory, *address[:2], **{**kwds, "sock": None})
            finally:
                sock.close()  # a transport owns its socket, and one that is not made closes it
        if not names.is_shm(host):
            return await super().create_connection(protocol_factory, host, port, *scope, **kwds)
        if kwds.get("ssl") and kwds.get("server_hostname") is None:
            kwds["server_hostname"] = host
        region, peer = names.host_of(self, host)
        return await endpoints.create_connection(
            protocol_factory, peer, port_number(port), region=region, numeric=True, **kwds
        )

    def kernel_connection(self, protocol_factory: Any, host: Any, port: Any, **kwds: Any) -> Any:
        """Connect over TCP, as the loop that this one is made of does."""
        return super().create_connection(protocol_factory, host, port, **kwds)

    async def connect_accepted_socket(self, protocol_factory: Any, sock: Any, **kwds: Any) -> tuple[Any, Any]:
        if isinstance(sock, PseudoSocket):
            return await endpoints.connect_accepted_socket(protocol_factory, sock, **kwds)
        made: tuple[Any, Any] = await super().connect_accepted_socket(protocol_factory, sock, **kwds)
        return made

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *scope: Any, **kwds: Any
    ) -> Any:
        if isinstance(host, Iterable) and not isinstance(host, (str, bytes, bytearray)):
            host = list(host)
        several = host if isinstance(host, list) else [host]
        if not _all_in_shm(several, "make a server of each kind"):
            return await super().create_server(protocol_factory, host, port, *scope, **kwds)
        found = [names.host_of(self, h) for h in several]
        hosts, region = [h for _, h in found], found[0][0]
        return await endpoints.create_server(
            protocol_factory, hosts, port, region=region, numeric=self._shown, **kwds
        )

    async def create_datagram_endpoint(
        self, protocol_factory: Any, local_addr: Any = None, remote_addr: Any = None, **kwds: Any
    ) -> tuple[Any, Any]:
        hosts = [host_in(local_addr), host_in(remote_addr)]
        if names.is_shm(hosts[0]) and hosts[1] is not None:
            _all_in_shm(hosts, "make an endpoint of each kind")
        if any(names.is_shm(host) for host in hosts):
            return await self._shm_endpoint(protocol_factory, local_addr, remote_addr, kwds)
        make: Any = functools.partial(
            super().create_datagram_endpoint, local_addr=local_addr, remote_addr=remote_addr, **kwds
        )
        if remote_addr or not _unconnected(kwds.get("sock"), kwds.get("family", 0)):
            made: tuple[Any, Any] = await make(protocol_factory)
            return made
        _, joint = await make(lambda: JointTransport(self, protocol_factory()))
        return joint, joint.get_protocol()

    async def _shm_endpoint(self, factory: Any, local: Any, remote: Any, kwds: Any) -> tuple[Any, Any]:
        region = None

        def plain(address: Any) -> Any:
            nonlocal region
            host = host_in(address)
            if not names.is_shm(host):
                return address if host is None else address[:2]
            found, host = names.host_of(self, host)
            region = region or found
            return host, address[1]

        local_addr, remote_addr = plain(local), plain(remote)
        if remote_addr and names.is_any_shm(remote[0]):
            remote_addr = (BROADCAST, remote_addr[1])
        made: tuple[Any, Any] = await create_datagram_endpoint(
            factory, local_addr, remote_addr, region=region, numeric=True, **kwds
        )
        return made

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        if not names.is_shm(host):
            return await super().getaddrinfo(host, port, family=family, type=type, proto=proto, flags=flags)
        kinds = [(t, p) for t, p in _KINDS if type in (0, t) and proto in (0, p)]
        if family not in (0, *_INTERNET) or not kinds:
            raise socket.gaierror(
                socket.EAI_FAMILY,
                f"{host!r} is in shared memory: internet addresses stand for it, of streams and datagrams",
            )
        table, number = names.names_of(self), port_number(port)
        if names.is_address(host):
            address = table.canonical(host)
        elif flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is a name, and AI_NUMERICHOST was asked for")
        else:
            region, peer = names.host_of(self, host)
            where = targets(peer, number, None)

            async def known(node: Node) -> Any:
                return table.address(node.region.url, names.known(node, peer))

            try:
                if where and await node_if_any(region) is None:
                    raise socket.gaierror(socket.EAI_NONAME, "there is no region")
                address = await on_current_node(None, region, None, known)
            except socket.gaierror:
                if not where:
                    raise
                look_up: Any = super().getaddrinfo
                return [
                    info
                    for ip, _ in where
                    if family in (0, socket.AF_INET6 if ":" in ip else socket.AF_INET)
                    for info in await look_up(ip, port, family=family, type=type, proto=proto, flags=flags)
                ]
        # Python's AF_INET sockets refuse such a string themselves.
        found = (address, number) if family == socket.AF_INET else (address, number, 0, names.SCOPE)
        canonical = f"{table.meant(address)[1]}{SUFFIX}" if flags & socket.AI_CANONNAME else ""
        return [
            (family or socket.AF_INET6, t, p, "" if i else canonical, found) for i, (t, p) in enumerate(kinds)
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
        if not (isinstance(sockaddr, tuple) and sockaddr and names.is_address(sockaddr[0])):
            return await super().getnameinfo(sockaddr, flags)
        table = names.names_of(self)
        _, peer = table.meant(sockaddr[0])
        port = str(sockaddr[1])
        if flags & socket.NI_NUMERICHOST:
            return table.canonical(sockaddr[0]), port
        if not flags & socket.NI_NUMERICSERV:
            with contextlib.suppress(OSError):
                port = socket.getservbyport(sockaddr[1], "udp" if flags & socket.NI_DGRAM else "tcp")
        return f"{peer}{SUFFIX}", port

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **kwds: Any) -> Any:
        if _is_ours(transport):
            return await start_tls(self, transport, protocol, sslcontext, **kwds)
        return await super().start_tls(transport, protocol, sslcontext, **kwds)

    async def sendfile(
        self, transport: Any, file: Any, offset: int = 0, count: int | None = None, *, fallback: bool = True
    ) -> int:
        if not _is_ours(transport):
            return await super().sendfile(transport, file, offset, count, fallback=fallback)
        if isinstance(transport, ShmTransport) and (fd := descriptor_of(file)) is not None:
            return await send_file(transport, file, fd, offset, count)
        if fallback:
            file.seek(offset)  # the file's position has no effect, as with the kernel's sendfile
        send: Any = asyncio.BaseEventLoop.sendfile
        sent: int = await send(self, transport, file, offset, count, fallback=fallback)
        return sent

    _sendfile_fallback = asyncio.BaseEventLoop._sendfile_fallback  # type: ignore[attr-defined]


def _unconnected(sock: Any, family: int) -> bool:
    """Is an internet endpoint asked for that is not connected? Then each sendto() decides where a datagram
    goes."""
    if sock is None:
        return family in (0, *_INTERNET)
    if getattr(sock, "family", 0) not in _INTERNET:
        return False
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def _is_ours(transport: Any) -> bool:
    """Is it a transport of this package, or asyncio's TLS over one (or over another such)?"""
    return (
        hasattr(transport, "_start_tls_compatible") and transport.get_extra_info("shmsock_node") is not None
    )


@functools.cache
def _mixed(base: Hashable) -> Callable[[], asyncio.AbstractEventLoop]:
    kind: Any = base
    if hasattr(kind, "shmsock_reach"):  # by `shmsock run`, before the first of these loops is made
        kind.shmsock_reach()
    if issubclass(kind, ShmLoop):  # under `shmsock run`, all loops are
        return kind  # type: ignore[no-any-return]
    return type(f"Shm{kind.__name__}", (ShmLoop, kind), {"__module__": __name__})


def loop_factory(
    base: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Callable[[], asyncio.AbstractEventLoop]:
    """Returns a function that makes event loops on which hosts that end in `.shm` are peers of the region:
    what asyncio.Runner, uvloop.run, pytest-asyncio and others take as `loop_factory`.

    `base`: the class of the loops (asyncio.SelectorEventLoop, uvloop.Loop), or a function that makes such
    loops (uvloop.new_event_loop); None: asyncio's. Raises TypeError for anything else.
    """
    kind: Any = asyncio.SelectorEventLoop if base is None else base
    if callable(kind) and not isinstance(kind, type):
        sample = kind()
        kind = type(sample)
        if isinstance(sample, asyncio.AbstractEventLoop):
            sample.close()
    if not isinstance(kind, type) or not issubclass(kind, asyncio.AbstractEventLoop):
        raise TypeError(f"{base!r} makes no event loop: give the class of one, or a function that makes one")
    base_class: Any = kind
    return _mixed(base_class)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Returns a new loop of asyncio's on which hosts that end in `.shm` are peers of the region. Raises
    what asyncio.new_event_loop() does."""
    return loop_factory()()
