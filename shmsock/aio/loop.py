"""An event loop on which unmodified asyncio programs reach shared memory: hosts that end in `.shm` are peers
of the region, all others what they always were.

    asyncio.Runner(loop_factory=shmsock.loop_factory())        # asyncio's loop
    asyncio.Runner(loop_factory=shmsock.loop_factory(uvloop.Loop))

To listen: the own name with `.shm`, `*.shm` (the same: all peers), or `localhost.shm` (this machine). Such
transports tell internet addresses (names.py), as programs expect them; getaddrinfo and getnameinfo map both
ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

from shmsock.address import SUFFIX, port_number
from shmsock.aio import endpoints, names
from shmsock.aio.attach import current_node
from shmsock.aio.datagram import create_datagram_endpoint
from shmsock.aio.tls import start_tls
from shmsock.fabric.datagrams import BROADCAST

__all__ = ["loop_factory", "new_event_loop"]

if TYPE_CHECKING:
    _Base = asyncio.BaseEventLoop
else:
    _Base = object
#: Sockets that were to be connected to a peer, and its address.
_meant: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()
_KINDS = ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP))


def _in_shm(hosts: list[Any]) -> bool:
    """Raises ValueError for a mixture: one Server is of one kind."""
    kinds = {names.is_shm(host) for host in hosts}
    if len(kinds) > 1:
        raise ValueError(f"hosts in shared memory and others at once: {hosts!r}; make a server of each kind")
    return kinds == {True}


class _ShmLoop(_Base):
    """What is in front of the loop that it is mixed with."""

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """Programs that resolve a name, connect a socket of their own, and give it to create_connection()
        (aiohttp's client) are led to the peer there. The socket stays unconnected."""
        if not (isinstance(address, tuple) and len(address) == 2 and names.is_shm(address[0])):
            return await super().sock_connect(sock, address)
        region, peer = names.host_of(address[0])
        node = await current_node(region)
        node.find(peer, port_number(address[1]), ())  # refused here, where it is expected
        _meant.setdefault(self, weakref.WeakKeyDictionary())[sock] = address
        return None

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **kwds: Any
    ) -> tuple[Any, Any]:
        sock: Any = kwds.get("sock")
        address = None if sock is None or host is not None else _meant.get(self, {}).pop(sock, None)
        if address is not None:
            made = await self.create_connection(protocol_factory, *address, **{**kwds, "sock": None})
            sock.close()  # a transport owns its socket
            return made
        if not names.is_shm(host):
            return await super().create_connection(protocol_factory, host, port, **kwds)
        if kwds.get("ssl") and kwds.get("server_hostname") is None:
            kwds["server_hostname"] = host
        region, peer = names.host_of(host)
        return await endpoints.create_connection(
            protocol_factory, peer, port_number(port), region=region, numeric=True, **kwds
        )

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **kwds: Any
    ) -> Any:
        if isinstance(host, Iterable) and not isinstance(host, (str, bytes)):
            host = list(host)
        several = host if isinstance(host, list) else [host]
        if not _in_shm(several):
            return await super().create_server(protocol_factory, host, port, **kwds)
        found = [names.host_of(h) for h in several]
        hosts, region = [h for _, h in found], found[0][0]
        return await endpoints.create_server(
            protocol_factory, hosts, port, region=region, numeric=True, **kwds
        )

    async def create_datagram_endpoint(
        self, protocol_factory: Any, local_addr: Any = None, remote_addr: Any = None, **kwds: Any
    ) -> tuple[Any, Any]:
        given = [addr for addr in (local_addr, remote_addr) if addr and isinstance(addr, tuple)]
        if not any(names.is_shm(addr[0]) for addr in given):
            return await super().create_datagram_endpoint(
                protocol_factory, local_addr=local_addr, remote_addr=remote_addr, **kwds
            )
        regions = [names.host_of(addr[0])[0] for addr in given if names.is_shm(addr[0])]
        local, remote = (
            (names.host_of(addr[0])[1], *addr[1:]) if addr and names.is_shm(addr[0]) else addr
            for addr in (local_addr, remote_addr)
        )
        if remote and names.is_any_shm(remote_addr[0]):
            remote = (BROADCAST, *remote[1:])
        made: tuple[Any, Any] = await create_datagram_endpoint(
            protocol_factory, local, remote, region=regions[0], numeric=True, **kwds
        )
        return made

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        if not names.is_shm(host):
            return await super().getaddrinfo(host, port, family=family, type=type, proto=proto, flags=flags)
        region, peer = names.host_of(host)
        kinds = [(t, p) for t, p in _KINDS if type in (0, t) and proto in (0, p)]
        if family not in (0, socket.AF_INET) or not kinds:
            raise socket.gaierror(socket.EAI_FAMILY, f"{host!r} is in shared memory: AF_INET stands for it")
        node = await current_node(region)
        number = port_number(port)
        addresses = [names.numeric(node, section) for section in names.sections(node, peer, number)]
        return [(socket.AF_INET, t, p, "", (address, number)) for address in addresses for t, p in kinds]

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
        known = names.parse_numeric(sockaddr[0])
        if known is None:
            return await super().getnameinfo(sockaddr, flags)
        region, section = known
        if flags & socket.NI_NUMERICHOST:
            return sockaddr[0], str(sockaddr[1])
        peer, port = names.name_of(await current_node(region), section), str(sockaddr[1])
        if not flags & socket.NI_NUMERICSERV:
            with contextlib.suppress(OSError):
                port = socket.getservbyport(sockaddr[1])
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
        if fallback:
            file.seek(offset)  # where it stands means nothing, as with the kernel's sendfile
        send: Any = asyncio.BaseEventLoop.sendfile
        sent: int = await send(self, transport, file, offset, count, fallback=fallback)
        return sent

    _sendfile_fallback = asyncio.BaseEventLoop._sendfile_fallback  # type: ignore[attr-defined]


def _is_ours(transport: Any) -> bool:
    """A transport of this package, or asyncio's TLS over one (or over another such)."""
    return (
        hasattr(transport, "_start_tls_compatible") and transport.get_extra_info("shmsock_node") is not None
    )


@functools.cache
def _mixed(base: Hashable) -> Callable[[], asyncio.AbstractEventLoop]:
    kind: Any = base
    return type(f"Shm{kind.__name__}", (_ShmLoop, kind), {"__module__": __name__})


def loop_factory(
    base: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Callable[[], asyncio.AbstractEventLoop]:
    """Makes loops on which hosts that end in `.shm` are peers of the region: what asyncio.Runner,
    uvloop.run, pytest-asyncio and others take as `loop_factory`.

    `base`: the loop's class (asyncio.SelectorEventLoop, uvloop.Loop), or a function that makes such loops
    (uvloop.new_event_loop); None: asyncio's. Raises TypeError for anything else.
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
    """asyncio.new_event_loop(), with `.shm` hosts."""
    return loop_factory()()
