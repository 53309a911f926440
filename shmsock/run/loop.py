"""The loops of a program under `shmsock run`: `.shm` hosts are peers of the region, calls to mapped addresses
lead to peers, and chosen ports are offered in both places."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

from shmsock.aio import endpoints, names
from shmsock.aio.attach import current_node
from shmsock.aio.datagram import create_datagram_endpoint
from shmsock.aio.loop import ShmLoop, host_in, meant_by
from shmsock.aio.node import Node
from shmsock.aio.server import Server
from shmsock.run.notices import warn
from shmsock.run.rules import Rules, canonical
from shmsock.run.server import PATIENCE_S, RETRY_S, JointServer

__all__ = ["RunLoop"]

_INTERNET = (socket.AF_INET, socket.AF_INET6)
_MEANT_FOR_BOTH = ("ssl", "backlog", "keep_alive", "ssl_handshake_timeout", "ssl_shutdown_timeout")


def peer_of(node: Node, address: str, port: int) -> str | int | None:
    """Return the peer that publishes an address and offers that port; None: nobody does."""
    return None


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
    _attach_again = 0.0  # after an attempt that failed

    # -- where does a call lead

    async def _peer(self, host: Any, port: Any) -> Any:
        """Return the peer that an address leads to: by name, or section; None: it is not a peer's."""
        address = canonical(host)
        if address is None or not isinstance(port, int):
            return None
        peer = self.rules.peer(address, port)
        if peer is None and not self.rules.may_be_published(address):
            return None
        node = await self._node(address)
        return None if node is None else peer or peer_of(node, address, port)

    async def _node(self, address: str) -> Node | None:
        """Return the node of this loop; None while there is none to be had, and after a warning."""
        if self.time() < self._attach_again:
            return None
        try:
            return await asyncio.wait_for(current_node(), PATIENCE_S)
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            self._attach_again = self.time() + RETRY_S
            why = str(error) or "it takes too long to get a section of the region"
            warn(
                "region", f"connections to {address} go over TCP alone: {why} (tried again from time to time)"
            )
            return None

    async def _resolved(
        self, host: Any, port: Any, kwds: dict[str, Any], kind: int = socket.SOCK_STREAM
    ) -> tuple[list[Any], Any, Any]:
        """Look a host up, unless it is an address. Returns what was found, the first address of it that is a
        peer's, and that peer."""
        if isinstance(host, str) and isinstance(port, int) and canonical(host):
            infos, addresses = [], [(host, port)]
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
        if address is not None:
            with _mapped(address, peer):
                return await endpoints.create_connection(
                    protocol_factory, peer, address[1], numeric=True, seen_as=address, **kwds
                )
        if isinstance(self, asyncio.BaseEventLoop):
            host = _plain(host.decode() if isinstance(host, bytes) else host, infos)
        elif infos and kwds.get("local_addr") is None:  # uvloop's would look it up again
            sock = await self._connected(infos)
            return await super().create_connection(protocol_factory, sock=sock, **_of_sockets(kwds))
        return await super().create_connection(protocol_factory, host, port, *scope, **kwds)

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
        found = {s.getsockname()[1] for s in own.sockets if s.family in _INTERNET} & self.rules.listen
        if not found:
            return own
        number = found.pop()  # all sockets of a server have one port
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
                numeric=True,
                node=node,
                start_serving=serving,
                **same,
            )

        server = JointServer(self, own, number, kwds.get("start_serving", True), offer)
        await server.begin()
        return server


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
