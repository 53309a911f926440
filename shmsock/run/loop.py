"""The loops of a program under `shmsock run`: `.shm` hosts are peers of the region, calls to mapped addresses
lead to peers, and chosen ports are offered in both places."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

from shmsock.address import Address, parsed_address
from shmsock.aio import endpoints, names
from shmsock.aio.attach import close_nodes, current_node, node_if_any
from shmsock.aio.datagram import create_datagram_endpoint
from shmsock.aio.loop import ShmLoop, host_in, meant_by
from shmsock.aio.node import Node
from shmsock.aio.published import peer_of, published_by
from shmsock.aio.server import Server
from shmsock.engine.connection import Connection
from shmsock.run.notices import offered, warn
from shmsock.run.rules import Rules
from shmsock.run.server import JointServer

__all__ = ["RunLoop"]

_MEANT_FOR_BOTH = ("ssl", "backlog", "keep_alive", "ssl_handshake_timeout", "ssl_shutdown_timeout")


class _Plain(str):
    """A host that is not to be led elsewhere. `infos`: what it was resolved to already."""

    infos: list[Any] | None = None


def _plain(host: Any, infos: list[Any] | None = None) -> _Plain:
    made = _Plain(host)
    made.infos = infos and [(*info[:4], (_plain(info[4][0]), *info[4][1:])) for info in infos]
    return made


@contextlib.contextmanager
def _mapped(address: Any, peer: Any) -> Iterator[None]:
    """Have errors name the address: nobody who asks for one expects that a name is not found."""
    try:
        yield
    except socket.gaierror as error:
        text = f"{address[0]} is mapped to {peer}: {error.strerror}"
        raise OSError(errno.EHOSTUNREACH, text) from None


def _over_tcp(name: str) -> Any:
    """Wrap the loop's method for sockets without a transport: one that was to lead to a peer is connected to
    the address itself."""

    def method(self: Any, sock: Any, *args: Any, **kwds: Any) -> Any:
        before = getattr(super(RunLoop, self), name)
        address = meant_by(self, sock)
        if address is None or names.is_shm(address[0]):
            return before(sock, *args, **kwds)
        return self._first_connected(sock, address, before, args, kwds)

    return method


class RunLoop(ShmLoop):
    """Methods that come before those of the class of loops that it is made a base of."""

    rules = Rules()

    def close(self) -> None:
        close_nodes(self)
        super().close()

    # -- where does a call lead

    async def _peer(self, host: Any, port: Any) -> str | Address | None:
        """Return what leads to the peer whose address that is; None: nobody's, or there is no region to be
        had."""
        address = parsed_address(host) if isinstance(host, str) else None
        if address is None or not isinstance(port, int):
            return None
        peer = self.rules.peer(address, port)
        if peer is None and not self.rules.trusts(address):
            return None
        node = await node_if_any(warn=partial(warn, "region"))
        return None if node is None else peer or peer_of(node, host, port)

    async def _resolved(
        self, host: Any, port: Any, kwds: dict[str, Any], kind: int = socket.SOCK_STREAM
    ) -> tuple[list[Any], Any, Any]:
        """Look a host up, unless it is an address. Returns what was found, the first address of it that is a
        peer's, and that peer."""
        if isinstance(host, str) and isinstance(port, int) and parsed_address(host):
            infos, addresses = [], [names.as_kernel_tells(host, port)]
        else:
            given = {key: kwds.get(key, 0) for key in ("family", "proto", "flags")}
            infos = await self.getaddrinfo(host, port, type=kind, **given)
            addresses = [info[4] for info in infos]
        for address in addresses:
            if (peer := await self._peer(*address[:2])) is not None:
                return infos, address, peer
        return infos, None, None

    async def getaddrinfo(self, host: Any, port: Any, **kwds: Any) -> list[Any]:
        if type(host) is _Plain and host.infos:
            return host.infos
        return await super().getaddrinfo(host, port, **kwds)

    # -- connecting

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *scope: Any, **kwds: Any
    ) -> tuple[Any, Any]:
        rules = self.rules
        if not host or not (rules.map or rules.auto) or kwds.get("sock") is not None or names.is_shm(host):
            return await super().create_connection(protocol_factory, host, port, *scope, **kwds)
        infos, address, peer = await self._resolved(host, port, kwds)
        if kwds.get("ssl") and kwds.get("server_hostname") is None:
            kwds["server_hostname"] = host
        if address is None:
            return await self._by_tcp(protocol_factory, host, port, infos, kwds)

        async def otherwise(error: OSError | None) -> tuple[Any, Any]:
            return await self._by_tcp(protocol_factory, host, port, infos, kwds)

        with _mapped(address, peer):
            return await endpoints.create_connection(
                protocol_factory,
                peer,
                address[1],
                numeric=True,
                seen_as=address,
                otherwise=None if isinstance(peer, str) else otherwise,
                **kwds,
            )

    async def _by_tcp(
        self, factory: Any, host: Any, port: Any, infos: list[Any], kwds: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Connect as the loop does, without looking up again what was."""
        if isinstance(self, asyncio.BaseEventLoop):
            host = _plain(host.decode() if isinstance(host, bytes) else host, infos)
        elif infos and kwds.get("local_addr") is None:  # uvloop's would look it up again
            sock = await self._connected(infos)
            return await super().create_connection(factory, sock=sock, **_of_sockets(kwds))
        return await super().create_connection(factory, host, port, **kwds)

    async def _connected(self, infos: list[Any]) -> socket.socket:
        """Connect a socket to the first address that can be reached, as uvloop does."""
        errors: list[OSError] = []
        for family, kind, proto, _, address in infos:
            sock = None
            try:
                sock = socket.socket(family, kind, proto)
                sock.setblocking(False)
                await super().sock_connect(sock, address)
                return sock
            except BaseException as error:
                if sock is not None:
                    sock.close()
                if not isinstance(error, OSError):
                    raise
                errors.append(error)
        if len({str(error) for error in errors}) == 1:
            raise errors[0]
        raise OSError(f"Multiple exceptions: {', '.join(map(str, errors))}")

    def kernel_connection(self, protocol_factory: Any, host: Any, port: Any, **kwds: Any) -> Any:
        """Connect over TCP, wherever the address leads by the rules."""
        return super().create_connection(protocol_factory, _plain(host), port, **kwds)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        host = host_in(address)
        if type(host) is _Plain:
            return await super().sock_connect(sock, (str(host), *address[1:]))
        peer = await self._peer(host, address[1]) if host and self._leads(sock) else None
        if peer is None:
            return await super().sock_connect(sock, address)
        with _mapped(address, peer):
            return await self._mean(sock, (None, peer), address)

    def _leads(self, sock: Any) -> bool:
        return bool(self.rules.map or self.rules.auto) and sock.type == socket.SOCK_STREAM

    async def _first_connected(
        self, sock: Any, address: Any, method: Any, args: tuple[Any, ...], kwds: dict[str, Any]
    ) -> Any:
        await super().sock_connect(sock, address)
        return await method(sock, *args, **kwds)

    sock_recv = _over_tcp("sock_recv")
    sock_recv_into = _over_tcp("sock_recv_into")
    sock_sendall = _over_tcp("sock_sendall")
    sock_sendfile = _over_tcp("sock_sendfile")

    async def create_datagram_endpoint(
        self, protocol_factory: Any, local_addr: Any = None, remote_addr: Any = None, **kwds: Any
    ) -> tuple[Any, Any]:
        host = host_in(remote_addr)
        if host and self.rules.map and kwds.get("sock") is None and not names.is_shm(host):
            _, address, peer = await self._resolved(host, remote_addr[1], kwds, socket.SOCK_DGRAM)
            if address is not None:
                with _mapped(address, peer):
                    local = (None, local_addr[1]) if local_addr else None
                    return await create_datagram_endpoint(
                        protocol_factory, local, (peer, address[1]), numeric=True, seen_as=address, **kwds
                    )
        return await super().create_datagram_endpoint(protocol_factory, local_addr, remote_addr, **kwds)

    # -- listening

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *scope: Any, **kwds: Any
    ) -> Any:
        own = await super().create_server(protocol_factory, host, port, *scope, **kwds)
        if isinstance(own, Server) or not self.rules.listen:
            return own
        bound = (sock.getsockname() for sock in own.sockets)  # of a family that may not be true (--fd)
        found = {port for port in map(_port_of, bound) if port in self.rules.listen}
        if not found:
            return own
        number = found.pop()  # all sockets of a server have one port
        offered.add(number)
        same = {key: kwds[key] for key in _MEANT_FOR_BOTH if key in kwds}
        used: Node | None = None

        async def offer(before: Server | None, serving: bool) -> Server:
            nonlocal used
            node = await current_node(listening=True)
            if before is not None and before.sockets:
                if node is used:
                    return before
                before.close()
            used = node
            return await endpoints.create_server(
                protocol_factory,
                None,
                number,
                reuse_port=True,
                numeric=self._shown,
                node=node,
                start_serving=serving,
                **same,
            )

        server = JointServer(self, own, number, kwds.get("start_serving", True), offer)
        await server.begin()
        return server

    @property
    def _shown(self) -> Any:
        return self._ends if self.rules.auto else True

    def _ends(self, node: Node, conn: Connection) -> tuple[Any, Any]:
        """Return both ends of a connection as a server sees them: the other by its published address, if that
        is in a range that is trusted."""
        for address in published_by(node, conn.peer):
            if self.rules.trusts(address):
                return names.shown(node, conn, names.as_kernel_tells(str(address), conn.remote[1]))
        return names.shown(node, conn, True)


def _port_of(address: Any) -> Any:
    """Return the port of an internet address."""
    return address[1] if isinstance(address, tuple) and isinstance(address[0], str) else None


def _of_sockets(kwds: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only goes with a host."""
    mine = (
        "family",
        "proto",
        "flags",
        "local_addr",
        "happy_eyeballs_delay",
        "interleave",
        "all_errors",
        "sock",
    )
    return {key: value for key, value in kwds.items() if key not in mine}
