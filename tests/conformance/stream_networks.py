"""Streams of bytes, asyncio's and anyio's, behind one interface: what test_streams.py runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

import shmsock
from tests.conformance.networks import (
    PATIENCE,
    SERVER,
    DotShm,
    Main,
    Network,
    Shm,
    T,
    Tcp,
    TransportNetwork,
    port_of,
)

__all__ = ["ANYIO_STREAMS", "STREAMS", "AnyioStreams", "AsyncioStream", "Stream", "StreamNetwork"]


class Stream:
    """One end. receive_some() says b"" at the end, whatever the library says."""

    async def send_all(self, data: bytes) -> None:
        raise NotImplementedError

    async def receive_some(self, size: int = 65536) -> bytes:
        raise NotImplementedError

    async def receive_exactly(self, size: int) -> bytes:
        """Raises EOFError."""
        raise NotImplementedError

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    def local(self) -> Any:
        raise NotImplementedError

    def remote(self) -> Any:
        raise NotImplementedError

    async def receive_all(self) -> bytes:
        found = bytearray()
        while data := await self.receive_some():
            found += data
        return bytes(found)


class AsyncioStream(Stream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send_all(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive_some(self, size: int = 65536) -> bytes:
        return await self.reader.read(size)

    async def receive_exactly(self, size: int) -> bytes:
        return await self.reader.readexactly(size)  # IncompleteReadError is an EOFError

    async def send_eof(self) -> None:
        self.writer.write_eof()

    async def aclose(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass

    def local(self) -> Any:
        return self.writer.get_extra_info("sockname")

    def remote(self) -> Any:
        return self.writer.get_extra_info("peername")


class AnyioStream(Stream):
    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._left = b""

    async def send_all(self, data: bytes) -> None:
        await self.stream.send(data)

    async def receive_some(self, size: int = 65536) -> bytes:
        if not self._left:
            try:
                data: bytes = await self.stream.receive(size)
            except anyio.EndOfStream:
                return b""
            assert data
            assert len(data) <= size
            return data
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    async def receive_exactly(self, size: int) -> bytes:
        while len(self._left) < size:
            try:
                self._left += await self.stream.receive(max(size - len(self._left), 1))
            except anyio.EndOfStream:
                raise EOFError from None
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()

    def local(self) -> Any:
        return self.stream.extra(anyio.abc.SocketAttribute.local_address)

    def remote(self) -> Any:
        return self.stream.extra(anyio.abc.SocketAttribute.remote_address)


Handler = Callable[[Any], Awaitable[None]]


class StreamNetwork(Network):
    """`connect` and `listen` on one kind of streams. Tests use anyio's tasks and timeouts: they fit all."""

    #: What is raised when the other side is gone, and for two receivers at once.
    broken: tuple[type[BaseException], ...]
    busy: type[BaseException]
    is_anyio = False

    async def connect(self, port: int) -> Any:
        raise NotImplementedError

    def listen(self, handler: Handler, port: int = 0) -> Any:
        """An async context manager that gives the port; the handler gets a Stream, closed when it returns."""
        raise NotImplementedError

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Any, Any]]:
        """(client, server)."""
        arrived, done = anyio.Event(), anyio.Event()
        ends: list[Any] = []

        async def handler(stream: Any) -> None:
            ends.append(stream)
            arrived.set()
            await done.wait()

        async with self.listen(handler) as port:
            client = await self.connect(port)
            try:
                with anyio.fail_after(PATIENCE):
                    await arrived.wait()
                yield client, ends[0]
            finally:
                done.set()
                with anyio.CancelScope(shield=True, deadline=anyio.current_time() + PATIENCE):
                    await client.aclose()


class AsyncioStreams(StreamNetwork):
    """asyncio's streams on a network of transports."""

    broken = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
    busy = RuntimeError

    def __init__(self, below: TransportNetwork) -> None:
        super().__init__(below.loop)
        self.below = below
        self.kind, self.control = below.kind, below.control
        self.new_loop = below.new_loop  # type: ignore[method-assign]

    async def open(self) -> None:
        self.below.stack = self.stack
        await self.below.open()

    async def connect(self, port: int) -> Any:
        return AsyncioStream(*await self.below.open_connection(port))

    async def connect_to_nobody(self) -> Any:
        return await self.below.create_connection(asyncio.Protocol, self.below.nobody, 7000)

    @asynccontextmanager
    async def listen(self, handler: Handler, port: int = 0) -> AsyncIterator[int]:
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            stream = AsyncioStream(reader, writer)
            try:
                await handler(stream)
            finally:
                await stream.aclose()
                tasks.discard(task)

        server = await self.below.start_server(serve, port)
        try:
            yield port_of(server)
        finally:
            server.close()
            if tasks:
                await asyncio.wait(tasks, timeout=PATIENCE)
            await server.wait_closed()


class AnyioStreams(StreamNetwork):
    """anyio's, on a backend: "asyncio", "uvloop" or "trio"."""

    broken = (anyio.BrokenResourceError,)
    busy = anyio.BusyResourceError
    is_anyio = True

    @property
    def backend(self) -> dict[str, Any]:
        if self.loop == "trio":
            return {"backend": "trio"}
        return {"backend": "asyncio", "backend_options": {"use_uvloop": self.loop == "uvloop"}}

    def run(self, main: Main[T], timeout: float = 2 * PATIENCE) -> T:
        async def inside() -> T:
            if self.loop != "trio":
                loop = asyncio.get_running_loop()
                loop.set_exception_handler(lambda loop, context: self.reports.append(context))
            async with AsyncExitStack() as self.stack:
                await self.open()
                with anyio.fail_after(timeout):
                    return await main()

        return anyio.run(inside, **self.backend)

    async def make_listener(self, port: int) -> Any:
        raise NotImplementedError

    async def connect_tls(self, port: int, **kwargs: Any) -> Any:
        """A TLSStream: the library's own connect with tls=True."""
        raise NotImplementedError

    @asynccontextmanager
    async def listen(self, handler: Handler, port: int = 0) -> AsyncIterator[int]:
        async def serve(stream: Any) -> None:
            async with stream:
                await handler(AnyioStream(stream))

        async with (
            await self.make_listener(port) as listener,
            anyio.create_task_group() as handlers,
            anyio.create_task_group() as serving,
        ):
            serving.start_soon(listener.serve, serve, handlers)
            yield listener.extra(anyio.abc.SocketAttribute.local_port)
            serving.cancel_scope.cancel()


class AnyioTcp(AnyioStreams):
    kind, control = "anyio-tcp", True

    async def connect(self, port: int) -> Any:
        return AnyioStream(await anyio.connect_tcp("127.0.0.1", port))

    async def connect_tls(self, port: int, **kwargs: Any) -> Any:
        return await anyio.connect_tcp("127.0.0.1", port, tls=True, **kwargs)

    async def connect_to_nobody(self) -> Any:
        return await anyio.connect_tcp("nobody.invalid", 7000)

    async def make_listener(self, port: int) -> Any:
        return (await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)).listeners[0]


class AnyioShm(AnyioStreams):
    """Between two nodes."""

    kind = "anyio-shm"
    node: Any

    async def open(self) -> None:
        import shmsock.anyio

        self.node = await self.stack.enter_async_context(shmsock.anyio.attach(name=SERVER))

    async def connect(self, port: int) -> Any:
        return AnyioStream(await shmsock.anyio.connect_shm(SERVER, port))

    async def connect_tls(self, port: int, **kwargs: Any) -> Any:
        return await shmsock.anyio.connect_shm(SERVER, port, tls=True, **kwargs)

    async def connect_to_nobody(self) -> Any:
        return await shmsock.anyio.connect_shm("nobody", 7000)

    async def make_listener(self, port: int) -> Any:
        return await shmsock.anyio.create_shm_listener(local_port=port, node=self.node)


class AnyioDotShm(AnyioStreams):
    """Stock anyio on a loop that knows `.shm`."""

    kind = "anyio-dotshm"

    @property
    def backend(self) -> dict[str, Any]:
        return {"backend": "asyncio", "backend_options": {"loop_factory": DotShm(self.loop).new_loop}}

    async def connect(self, port: int) -> Any:
        return AnyioStream(await anyio.connect_tcp(DotShm.host, port))

    async def connect_to_nobody(self) -> Any:
        return await anyio.connect_tcp(DotShm.nobody, 7000)

    @asynccontextmanager
    async def listen(self, handler: Handler, port: int = 0) -> AsyncIterator[int]:
        # anyio binds its listeners itself, to kernel sockets: asyncio's server is at the other end
        async with AsyncioStreams(DotShm(self.loop)).listen(handler, port) as made:
            yield made


ANYIO_STREAMS: list[AnyioStreams] = [
    made(loop) for made in (AnyioTcp, AnyioShm) for loop in ("asyncio", "uvloop", "trio")
]
STREAMS: list[StreamNetwork] = [
    *(AsyncioStreams(below(loop)) for below in (Tcp, Shm, DotShm) for loop in ("asyncio", "uvloop")),
    *ANYIO_STREAMS,
    *(AnyioDotShm(loop) for loop in ("asyncio", "uvloop")),
]
