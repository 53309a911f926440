"""Datagrams: asyncio's endpoints, and anyio's sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio

import shmsock
from tests.conformance.networks import CLIENT, PATIENCE, SERVER, DotShm, Network
from tests.conformance.stream_networks import AnyioStreams

__all__ = ["ANYIO_DATAGRAMS", "DATAGRAMS", "AnyioDatagrams", "DatagramNetwork", "Datagrams"]


class Datagrams(asyncio.DatagramProtocol):
    """Writes down what happens to it, looks that it happens in order, and can be waited for."""

    transport: Any = None

    def __init__(self) -> None:
        self.events: list[str] = []
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.error: BaseException | None = None
        self._changed: list[asyncio.Future[None]] = []

    def happened(self, what: str) -> None:
        assert (what == "made") == (self.events == [])
        assert "lost" not in self.events, f"{what} after the end"
        self.events.append(what)
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)
        self._changed.clear()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.happened("made")

    def datagram_received(self, data: Any, addr: Any) -> None:
        assert type(data) is bytes
        self.received.append((data, addr))
        self.happened("datagram")

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)
        self.happened("error")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc
        self.happened("lost")

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._changed.append(waiter)
            try:
                await asyncio.wait_for(waiter, PATIENCE)
            except asyncio.TimeoutError:
                raise AssertionError(f"still not: {self.events[:20]} ...") from None

    async def next(self) -> tuple[bytes, Any]:
        await self.until(lambda: self.received)
        return self.received.pop(0)

    async def lost(self) -> BaseException | None:
        await self.until(lambda: "lost" in self.events)
        return self.error

    def address(self) -> Any:
        """Where others send to it."""
        return self.transport.get_extra_info("sockname")


class DatagramNetwork(Network):
    bind: Any
    host: Any
    nobody: Any
    foreign: Any

    async def endpoint(self, factory: Any, **kwargs: Any) -> tuple[Any, Any]:
        return await asyncio.get_running_loop().create_datagram_endpoint(factory, **kwargs)

    async def serve(self, port: int = 0, factory: Any = Datagrams, **kwargs: Any) -> Any:
        """An endpoint for everybody: its protocol."""
        return (await self.endpoint(factory, local_addr=(self.bind, port), **kwargs))[1]

    async def connect(self, port: int, factory: Any = Datagrams, **kwargs: Any) -> Any:
        """An endpoint connected to that of serve()."""
        return (await self.endpoint(factory, remote_addr=(self.host, port), **kwargs))[1]


class Udp(DatagramNetwork):
    kind, control = "udp", True
    bind = host = "127.0.0.1"
    nobody, foreign = "nobody.invalid", "192.0.2.1"


class ShmDatagrams(DatagramNetwork):
    """Those that serve are at one node, those that connect at another."""

    kind = "shm"
    bind, host, nobody, foreign = None, SERVER, "nobody", "elsewhere"
    node: Any

    async def open(self) -> None:
        self.node = await self.stack.enter_async_context(shmsock.attach(name=SERVER))

    async def endpoint(self, factory: Any, **kwargs: Any) -> tuple[Any, Any]:
        node = None if "remote_addr" in kwargs else self.node
        return await shmsock.create_datagram_endpoint(factory, node=node, **kwargs)


class DotShmDatagrams(DatagramNetwork):
    kind = "dotshm"
    bind, host, nobody, foreign = "*.shm", f"{CLIENT}.shm", "nobody.shm", "elsewhere.shm"

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return DotShm(self.loop).new_loop()


class UdpOnDotShm(Udp):
    """UDP itself, on a loop that knows `.shm`, where an endpoint that is not connected decides at each
    sendto()."""

    kind = "udp-on-dotshm"

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return DotShm(self.loop).new_loop()


DATAGRAMS: list[DatagramNetwork] = [
    made(loop) for made in (Udp, ShmDatagrams, DotShmDatagrams, UdpOnDotShm) for loop in ("asyncio", "uvloop")
]


class AnyioDatagrams(AnyioStreams):
    async def socket(self, port: int = 0) -> Any:
        raise NotImplementedError

    async def connected(self, port: int) -> Any:
        raise NotImplementedError

    @staticmethod
    def address(sock: Any) -> Any:
        return sock.extra(anyio.abc.SocketAttribute.local_address)

    @staticmethod
    def port(sock: Any) -> int:
        port: int = sock.extra(anyio.abc.SocketAttribute.local_port)
        return port


class AnyioUdp(AnyioDatagrams):
    kind, control = "anyio-udp", True

    async def socket(self, port: int = 0) -> Any:
        return await anyio.create_udp_socket(local_host="127.0.0.1", local_port=port)

    async def connected(self, port: int) -> Any:
        return await anyio.create_connected_udp_socket("127.0.0.1", port)


class AnyioShmDatagrams(AnyioDatagrams):
    kind = "anyio-shm"
    node: Any

    async def open(self) -> None:
        import shmsock.anyio

        self.node = await self.stack.enter_async_context(shmsock.anyio.attach(name=SERVER))

    async def socket(self, port: int = 0) -> Any:
        return await shmsock.anyio.create_shm_datagram_socket(local_port=port, node=self.node)

    async def connected(self, port: int) -> Any:
        return await shmsock.anyio.create_connected_shm_datagram_socket(SERVER, port)


ANYIO_DATAGRAMS: list[AnyioDatagrams] = [
    made(loop) for made in (AnyioUdp, AnyioShmDatagrams) for loop in ("asyncio", "uvloop", "trio")
]
