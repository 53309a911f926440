"""What CPython's tests of loops need to run over shared memory: a loop on which loopback TCP is redirected.

What a test opens or serves through its loop is a shared-memory transport. Where the other side is a socket
(often a blocking one in a thread), a relay joins it to shared memory: a node of its own, on the loop of a
thread of its own. Transports over shared memory are counted, and one over TCP is an error.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import unittest
from collections.abc import Callable, Coroutine
from typing import Any
from unittest import mock

import shmsock
from shmsock.aio.attach import current_node
from shmsock.aio.transport import ShmTransport
from shmsock.testing import make_region
from tests.aio.processes import PATIENCE

CHUNK = 16 << 10  # what the relay takes at once; it holds little, as a network would
LOOPBACK = (None, "", "127.0.0.1", "localhost")


class Relay:
    """Joins TCP sockets and shared-memory connections, one each: bytes, half-close, resets."""

    def __init__(self, region: str) -> None:
        self.loop = asyncio.SelectorEventLoop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._socks: list[socket.socket] = []
        self._stopping: asyncio.Event | None = None
        self._failed: BaseException | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(region, started.set), name="relay")
        self._thread.start()
        assert started.wait(PATIENCE)
        if self._failed is not None:
            self.stop()

    def _run(self, region: str, started: Callable[[], None]) -> None:
        async def main() -> None:
            self._stopping = asyncio.Event()
            async with shmsock.attach(region, name="relay") as self.node:
                started()
                await self._stopping.wait()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
            for _ in range(3):  # what was aborted just now has its end called soon
                await asyncio.sleep(0)
            for sock in self._socks:  # of tasks that never came to run
                sock.close()

        try:
            self.loop.run_until_complete(main())
        except BaseException as error:
            self._failed = error
        finally:
            self.loop.close()
            started()

    def stop(self) -> None:
        if self._stopping is not None and self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._failed is not None:
            raise self._failed

    async def call(self, step: Coroutine[Any, Any, Any]) -> Any:
        """Run in the relay's loop, wait in the caller's."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(step, self.loop))

    # -- in its own loop

    async def offer(self, sock: socket.socket) -> tuple[int, Any]:
        """(port, server): the first who connects there gets `sock`, which is closed when both are done."""

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server.close()
            self._spawn(self._join(sock, reader, writer))

        server = await shmsock.start_server(accept, None, 0, limit=CHUNK, node=self.node)
        return server.sockets[0].getsockname()[1], server

    async def withdraw(self, server: Any, sock: socket.socket) -> None:
        if server.sockets:
            server.close()
            sock.close()

    async def accept_on(self, sock: socket.socket, port: int) -> asyncio.Task[None]:
        """Everyone who connects to `sock` gets to `port` of the loop that is tested."""
        sock.setblocking(False)
        return self._spawn(self._accept(sock, port))

    def _spawn(self, step: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed = self._failed or task.exception()

    async def _accept(self, listening: socket.socket, port: int) -> None:
        with listening:
            while True:
                sock, _ = await self.loop.sock_accept(listening)
                self._socks.append(sock)
                self._spawn(self._reach(sock, port))

    async def _reach(self, sock: socket.socket, port: int) -> None:
        try:
            reader, writer = await shmsock.open_connection("main", port, limit=CHUNK, node=self.node)
        except BaseException as error:
            sock.close()
            if isinstance(error, ConnectionError):  # the server closed meanwhile
                return
            raise
        await self._join(sock, reader, writer)

    async def _join(
        self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        other, there = await asyncio.open_connection(sock=sock, limit=CHUNK)
        for each in (writer, there):
            each.transport.set_write_buffer_limits(CHUNK)
        ways = [
            self.loop.create_task(self._carry(reader, there)),
            self.loop.create_task(self._carry(other, writer)),
        ]
        try:
            await asyncio.gather(*ways)
            writer.close()
            there.close()
        except BaseException as error:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            # One side is gone, so the other goes: over TCP, asyncio's abort() is no more than a close.
            writer.transport.abort()
            there.transport.abort()
            if not isinstance(error, OSError):
                raise

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


class LoopbackServer:
    """What tests see of a server: its TCP address, which the relay serves. All else is our server's."""

    def __init__(self, loop: LoopbackLoop, server: Any, sock: socket.socket, accepting: Any) -> None:
        self._loop, self._server, self._sock, self._accepting = loop, server, sock, accepting
        self._port = sock.getsockname()[1]
        loop.servers[self._port] = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    @property
    def sockets(self) -> tuple[Any, ...]:
        return (self._sock,) if self._server.sockets else ()

    # Private ones that CPython's tests look at: both are None when it is closed and nobody waits.
    @property
    def _sockets(self) -> Any:
        return self.sockets or None

    @property
    def _waiters(self) -> Any:
        return self._server._waiters or None

    # Of 3.12's: a connection was made, or is over.
    def _attach(self) -> None:
        self._server._attach(self)

    def _detach(self) -> None:
        self._server._detach(self)

    def close(self) -> None:
        self._server.close()
        self._stop_accepting()

    async def serve_forever(self) -> None:
        try:
            await self._server.serve_forever()
        finally:
            self._stop_accepting()

    async def __aenter__(self) -> LoopbackServer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.__aexit__(*exc)
        self._stop_accepting()

    def _stop_accepting(self) -> None:
        if self._loop.servers.pop(self._port, None) is not None:
            self._sock.close()
            self._loop.relay.loop.call_soon_threadsafe(self._accepting.cancel)


Base: Any = shmsock.loop_factory(asyncio.SelectorEventLoop)


class LoopbackLoop(Base):  # type: ignore[misc]
    """A `.shm` loop that takes loopback addresses for names in shared memory."""

    def __init__(self, region_bytes: int) -> None:
        super().__init__()
        self.region = make_region(peers=2, size=region_bytes)
        self._env = mock.patch.dict(os.environ, SHMSOCK_REGION=self.region, SHMSOCK_NAME="main")
        self._env.start()
        self.node = self.run_until_complete(current_node())
        self._relay: Relay | None = None
        self.servers: dict[int, LoopbackServer] = {}
        self._given: list[socket.socket] = []

    @property
    def relay(self) -> Relay:
        if self._relay is None:  # not before it is used: tests count threads
            self._relay = Relay(self.region)
        return self._relay

    def close(self) -> None:
        if self.is_closed() or self.is_running():
            super().close()
            return
        try:
            for server in list(self.servers.values()):
                server.close()
            if not self.node.closed:  # asyncio.Runner did so already
                assert self.node.statistics()["healed"] == 0, "a wakeup was lost"
        finally:
            self.run_until_complete(self.shutdown_asyncgens())  # detaches the node
            super().close()
            for sock in self._given:
                sock.close()
            self._env.stop()
            relay, self._relay = self._relay, None
            if relay is not None:
                relay.stop()
            os.unlink(self.region)
        assert self.node.closed

    def _make_socket_transport(self, *args: Any, **kwds: Any) -> Any:
        raise AssertionError("this test went over TCP")

    _make_ssl_transport = _make_socket_transport

    # -- what is redirected

    async def create_connection(
        self, factory: Any, host: Any = None, port: Any = None, *, sock: Any = None, **kwds: Any
    ) -> Any:
        if kwds.get("ssl") and kwds.get("server_hostname") is None and host:
            kwds["server_hostname"] = host
        if sock is None and host not in LOOPBACK:
            raise AssertionError(f"this test connects to {host}")
        if sock is None and port in self.servers:
            return await self._connected(factory, "main.shm", port, kwds)
        if sock is None:
            sock = socket.socket()
            sock.setblocking(False)
            try:
                await self.sock_connect(sock, ("127.0.0.1", port))
            except BaseException:
                sock.close()
                raise
        else:
            # The test may still set options of its own.
            self._given.append(sock)
            sock = sock.dup()
        try:
            sock.setblocking(False)
            port, server = await self.relay.call(self.relay.offer(sock))
        except BaseException:
            sock.close()
            raise
        try:
            return await self._connected(factory, "relay.shm", port, kwds)
        except BaseException:
            await self.relay.call(self.relay.withdraw(server, sock))
            raise

    async def _connected(self, factory: Any, host: str, port: int, kwds: dict[str, Any]) -> Any:
        transport, protocol = await super().create_connection(factory, host, port, **kwds)
        return transport, protocol

    async def create_server(
        self, factory: Any, host: Any = None, port: Any = None, *, sock: Any = None, **kwds: Any
    ) -> Any:
        if sock is None:
            if host not in LOOPBACK:
                raise AssertionError(f"this test listens on {host}")
            sock = socket.create_server(("127.0.0.1", port or 0), backlog=kwds.get("backlog", 100))
        else:
            sock.listen(kwds.get("backlog", 100))
        port = sock.getsockname()[1]
        try:
            server = await super().create_server(factory, "main.shm", port, **kwds)
        except BaseException:
            sock.close()
            raise
        return LoopbackServer(
            self, server, sock, await self.relay.call(self.relay.accept_on(sock.dup(), port))
        )


class OverSharedMemory(unittest.TestCase):
    """In front of one of CPython's test cases: its loops are ours, and it is seen to use them."""

    loop: Any
    region_bytes = 64 << 20
    may_not_connect: frozenset[str] = frozenset()
    #: Have 0.1 s to connect, of which a busy host needs most for attaching the relay.
    in_a_hurry = frozenset({"test_handshake_timeout_handler_leak"})

    def setUp(self) -> None:
        super().setUp()
        if self._testMethodName in self.in_a_hurry:
            assert self.loop.relay is not None  # attached now

    def run(self, result: Any = None) -> Any:
        connected: list[Any] = []  # the loops of transports
        init = ShmTransport.__init__

        def counted(transport: Any, node: Any, *args: Any, **kwds: Any) -> None:
            connected.append(node.loop)
            init(transport, node, *args, **kwds)

        with (
            mock.patch.object(ShmTransport, "__init__", counted),
            mock.patch.object(asyncio, "new_event_loop", self.new_loop),
            mock.patch.object(asyncio.events, "new_event_loop", self.new_loop),
        ):
            result = super().run(result)
        if self._testMethodName not in self.may_not_connect:
            assert any(isinstance(loop, LoopbackLoop) for loop in connected), (
                "nothing went over shared memory"
            )
        return result

    def new_loop(self) -> LoopbackLoop:
        return LoopbackLoop(self.region_bytes)

    create_event_loop = new_loop
