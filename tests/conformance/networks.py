"""One suite over many networks, with plain TCP and UDP as the control: what a test here says, they do.

Shared memory may differ in what docs/differences-from-tcp.md says, and in nothing else.

Where the two controls differ from each other (asyncio and uvloop do here and there, and so do Python's
versions), either answer is right for shared memory, and the test says so.

A test takes the fixture `net` of its module, is a coroutine function, and runs once on every network:
test_streams.py on the networks of bytes, test_transports.py, test_servers.py and test_tls.py on those of
transports and protocols, test_datagrams.py on those of datagrams, test_anyio_tls.py and
test_anyio_datagrams.py on anyio's. `-k "tcp or udp"` is the control alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import pytest
import uvloop

import shmsock
from shmsock.testing import make_region
from tests.aio import conftest
from tests.aio.processes import pattern as endless

T = TypeVar("T")
PATIENCE = 20.0
"""Seconds that anything here may take on a busy machine."""
Main = Callable[[], Awaitable[T]]
CLIENT, SERVER = "client", "server"
"""What the nodes are called: the implicit one of the loop, and an explicit one beside it."""

BASES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    if left := asyncio.all_tasks(loop):
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))


def run_on(factory: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on a loop of one's own, as 3.12's loop_factory= has it."""
    loop = factory()
    try:
        return loop.run_until_complete(main)
    finally:
        failed = sys.exc_info()[0] is not None
        # uvloop's close() waits forever when the warning about what is open is an error
        with warnings.catch_warnings(record=True) as left:
            warnings.simplefilter("always", ResourceWarning)
            try:
                _cancel_all(loop)
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
            finally:
                loop.close()
        if not failed:
            for warning in left:
                warnings.warn(warning.message, stacklevel=2)


async def until(condition: Callable[[], Any]) -> None:
    """Poll: some things have no event."""
    await conftest.until(condition, seconds=PATIENCE)


async def turns(n: int = 5) -> None:
    """Of the loop."""
    for _ in range(n):
        await asyncio.sleep(0)


class Network:
    """What all have in common: a name, a loop, and what it complained about in `reports`, which a test takes
    out."""

    kind = ""
    #: The control: what it does is what is asked for.
    control = False

    def __init__(self, loop: str = "asyncio") -> None:
        self.loop = loop
        self.reports: list[dict[str, Any]] = []
        self.stack: AsyncExitStack

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.loop}"

    def __repr__(self) -> str:
        return self.id

    @property
    def is_uvloop_itself(self) -> bool:
        """The control on uvloop, which does some things its own way."""
        return self.control and self.loop == "uvloop"

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return BASES[self.loop]()

    async def open(self) -> None:
        """What must be there before a test begins; `stack` ends it."""

    def run(self, main: Main[T], timeout: float = 2 * PATIENCE) -> T:
        async def inside() -> T:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda loop, context: self.reports.append(context))
            async with AsyncExitStack() as self.stack:
                await self.open()
                return await asyncio.wait_for(main(), timeout)

        return run_on(self.new_loop, inside())

    def reported(self) -> list[BaseException | None]:
        """What the loop's exception handler got, which is thereby taken note of."""
        found = [context.get("exception") for context in self.reports]
        self.reports.clear()
        return found


def fixture_for(networks: list[Any]) -> Any:
    """The fixture `net` of a module."""

    @pytest.fixture(
        params=[pytest.param(net, marks=[pytest.mark.control] * net.control) for net in networks], ids=str
    )
    def net(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        network = request.param
        network.reports.clear()
        if network.control:
            yield network
        else:
            path = make_region(size=32 << 20, peers=4)  # small ones are made quickly
            monkeypatch.setenv("SHMSOCK_REGION", path)
            monkeypatch.setenv("SHMSOCK_NAME", CLIENT)
            yield network
            os.unlink(path)
        told = "\n".join(f"{context}" for context in network.reports)
        assert not told, f"the loop reported what no test asked for:\n{told}"

    return net


# -- transports and protocols ------------------------------------------------------------------------------

Factory = Callable[[], asyncio.BaseProtocol]


class TransportNetwork(Network):
    """Where stream transports come from."""

    bind: Any  # to listen for everybody
    host: Any  # to connect to who listens
    nobody: str  # a host that does not exist
    foreign: str  # somebody else's address

    async def connect(self, factory: Any, port: Any, **kwargs: Any) -> tuple[Any, Any]:
        """create_connection() to what serve() made."""
        return await self.create_connection(factory, self.host, port, **kwargs)

    async def serve(self, factory: Any, port: Any = 0, **kwargs: Any) -> Any:
        return await self.create_server(factory, self.bind, port, **kwargs)

    async def create_connection(self, factory: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return await asyncio.get_running_loop().create_connection(factory, *args, **kwargs)

    async def create_server(self, factory: Any, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.get_running_loop().create_server(factory, *args, **kwargs)

    async def open_connection(self, port: Any, **kwargs: Any) -> Any:
        return await asyncio.open_connection(self.host, port, **kwargs)

    async def start_server(self, callback: Any, port: Any = 0, **kwargs: Any) -> Any:
        return await asyncio.start_server(callback, self.bind, port, **kwargs)


class Tcp(TransportNetwork):
    kind, control = "tcp", True
    bind = host = "127.0.0.1"
    nobody, foreign = "nobody.invalid", "192.0.2.1"


class Shm(TransportNetwork):
    """The module's functions, between two nodes."""

    kind = "shm"
    bind, host, nobody, foreign = None, SERVER, "nobody", "elsewhere"
    node: shmsock.Node

    async def open(self) -> None:
        self.node = await self.stack.enter_async_context(shmsock.attach(name=SERVER))

    async def create_connection(self, factory: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return await shmsock.create_connection(factory, *args, **kwargs)

    async def create_server(self, factory: Any, *args: Any, **kwargs: Any) -> Any:
        return await shmsock.create_server(factory, *args, node=self.node, **kwargs)

    async def open_connection(self, port: Any, **kwargs: Any) -> Any:
        return await shmsock.open_connection(self.host, port, **kwargs)

    async def start_server(self, callback: Any, port: Any = 0, **kwargs: Any) -> Any:
        return await shmsock.start_server(callback, self.bind, port, node=self.node, **kwargs)


class DotShm(TransportNetwork):
    """The loop's own methods, on a loop that knows `.shm`; one node, which talks to itself."""

    kind = "dotshm"
    bind, host, nobody, foreign = "*.shm", f"{CLIENT}.shm", "nobody.shm", "elsewhere.shm"

    def new_loop(self) -> asyncio.AbstractEventLoop:
        made: asyncio.AbstractEventLoop = shmsock.loop_factory(BASES[self.loop])()
        return made


def port_of(server: Any) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


TRANSPORTS: list[TransportNetwork] = [
    made(loop) for made in (Tcp, Shm, DotShm) for loop in ("asyncio", "uvloop")
]


class Happenings(asyncio.BaseProtocol):
    """Writes down what happens to it, looks that it happens in order, and can be waited for."""

    transport: Any = None

    def __init__(self) -> None:
        self.events: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.paused = False
        self._changed: list[asyncio.Future[None]] = []

    keep_open = False

    def happened(self, what: str) -> None:
        if what == "made":
            assert self.events == []
        else:
            assert "made" in self.events
            assert "lost" not in self.events, f"{what} after the end"
        if what != "data" or self.events[-1] != "data":
            self.events.append(what)
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)
        self._changed.clear()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.happened("made")

    def eof_received(self) -> bool | None:
        assert "eof" not in self.events
        self.happened("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        assert not self.paused
        self.paused = True
        self.happened("pause")

    def resume_writing(self) -> None:
        assert self.paused
        self.paused = False
        self.happened("resume")

    def connection_lost(self, error: BaseException | None) -> None:
        self.error = error
        self.happened("lost")

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._changed.append(waiter)
            try:
                await asyncio.wait_for(waiter, PATIENCE)
            except asyncio.TimeoutError:
                raise AssertionError(f"still not: {self.events}, {len(self.data)} bytes") from None

    async def made(self) -> None:
        await self.until(lambda: "made" in self.events)

    async def got(self, size: int) -> bytes:
        """Exactly so many bytes, which are taken out."""
        await self.until(lambda: len(self.data) >= size or "lost" in self.events)
        assert len(self.data) == size
        taken = bytes(self.data)
        self.data.clear()
        return taken

    async def eof(self) -> None:
        await self.until(lambda: "eof" in self.events)

    async def lost(self) -> BaseException | None:
        await self.until(lambda: "lost" in self.events)
        return self.error

    @property
    def is_lost(self) -> bool:
        return "lost" in self.events


class Recorder(Happenings, asyncio.Protocol):
    """That, for a protocol that is given bytes."""

    def data_received(self, data: Any) -> None:
        assert type(data) is bytes
        assert data
        assert "eof" not in self.events
        self.data += data
        self.happened("data")


class KeepsOpen(Recorder):
    keep_open = True


@asynccontextmanager
async def pair(
    net: TransportNetwork, client: Factory = Recorder, server: Factory = Recorder
) -> AsyncIterator[tuple[Any, Any]]:
    """The protocols at both ends of one connection. What the test leaves open is aborted."""
    accepted: list[Any] = []
    arrived = asyncio.Event()

    def factory() -> asyncio.BaseProtocol:
        accepted.append(server())
        arrived.set()
        return accepted[-1]  # type: ignore[no-any-return]

    listening = await net.serve(factory)
    _, protocol = await net.connect(client, port_of(listening))
    ends = [protocol]
    try:
        await asyncio.wait_for(arrived.wait(), PATIENCE)
        ends.append(accepted[0])
        await accepted[0].made()
        yield protocol, accepted[0]
    except BaseException:
        listening.close()
        for end in ends:
            if end.transport is not None and "lost" not in end.events:
                end.transport.abort()
        raise
    listening.close()
    for end in ends:
        if "lost" not in end.events:
            end.transport.abort()
            await end.lost()
    await listening.wait_closed()


def pattern(seed: int, size: int) -> bytes:
    """Bytes of which each that is lost, doubled or moved shows."""
    return endless(seed, 0, size)
