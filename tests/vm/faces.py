"""Every face of the package, at one end of a region: `faces.py serve KIND` and `faces.py ask KIND HOST CA`.

KIND: asyncio, uvloop (protocols, streams, TLS, datagrams), stock-asyncio, stock-uvloop (asyncio's own
functions on the loop that knows `.shm` hosts) and trio (shmsock.anyio). All of them echo, on the same ports,
so that each talks with each. Who serves prints its CA's certificate as a line of JSON, and ends with its
standard input; who asks prints what it did.

`faces.py calm ROLE trio ...`: without spinning, and without TLS; what the node counted is printed last.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import shmsock

STREAM, TLS, PROTOCOL, DATAGRAM = 7000, 7001, 7002, 7003
MESSAGES, BULK = 200, 1_000_000


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class EchoDatagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class Collector(asyncio.Protocol):
    """Puts what comes into a queue, and b"" at the end."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()

    def data_received(self, data: bytes) -> None:
        self.queue.put_nowait(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.queue.put_nowait(b"")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.queue.put_nowait(data)

    def error_received(self, exc: OSError) -> None:
        raise exc

    async def exactly(self, n: int) -> bytes:
        found = b""
        while len(found) < n:
            data = await self.queue.get()
            if not data:
                raise EOFError(f"{n - len(found)} bytes are missing")
            found += data
        return found


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def server_context() -> tuple[str, ssl.SSLContext]:
    import trustme  # which takes seconds in a guest that is emulated

    ca, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    name = socket.gethostname()
    ca.issue_cert(name, f"{name}.shm").configure_cert(context)
    return ca.cert_pem.bytes().decode(), context


def client_context(pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=pem)
    return context


async def conversation(
    send: Callable[[bytes], Awaitable[None]], exactly: Callable[[int], Awaitable[bytes]], both: Any
) -> None:
    """Messages there and back, one at a time; then many bytes, both ways at once."""
    for i in range(MESSAGES):
        data = i.to_bytes(4, "big") * 16
        await send(data)
        assert await exactly(64) == data
    data = os.urandom(BULK)
    assert await both(send(data), exactly(BULK)) == data


async def at_once(sending: Any, receiving: Any) -> bytes:
    found: bytes = (await asyncio.gather(sending, receiving))[1]
    return found


async def end_of_input() -> None:
    await asyncio.to_thread(sys.stdin.buffer.read)


# -- asyncio: the package's own functions, or asyncio's on the loop that knows `.shm` hosts


async def serve_asyncio(stock: bool) -> None:
    pem, context = server_context()
    loop = asyncio.get_running_loop()
    if stock:
        host = socket.gethostname() + ".shm"
        await asyncio.start_server(handle, host, STREAM)
        await asyncio.start_server(handle, "*.shm", TLS, ssl=context)
        await loop.create_server(Echo, host, PROTOCOL)
        await loop.create_datagram_endpoint(EchoDatagrams, local_addr=(host, DATAGRAM))
    else:
        await shmsock.start_server(handle, None, STREAM)
        await shmsock.start_server(handle, None, TLS, ssl=context)
        await shmsock.create_server(Echo, None, PROTOCOL)
        await shmsock.create_datagram_endpoint(EchoDatagrams, local_addr=(None, DATAGRAM))
    print(json.dumps({"ca": pem}), flush=True)
    await end_of_input()


async def ask_asyncio(stock: bool, host: str, pem: str) -> list[str]:
    loop = asyncio.get_running_loop()
    own: Any = shmsock
    open_connection = asyncio.open_connection if stock else own.open_connection
    create_connection = loop.create_connection if stock else own.create_connection
    create_datagram_endpoint = loop.create_datagram_endpoint if stock else own.create_datagram_endpoint
    done = []

    for port, tls in ((STREAM, None), (TLS, client_context(pem))):
        reader, writer = await open_connection(host, port, ssl=tls)

        async def send(data: bytes, writer: asyncio.StreamWriter = writer) -> None:
            writer.write(data)
            await writer.drain()

        await conversation(send, reader.readexactly, at_once)
        if tls is not None:
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        done.append(f"{type(reader).__name__} over {type(writer.transport).__name__}")
        writer.close()
        await writer.wait_closed()

    transport, collector = await create_connection(Collector, host, PROTOCOL)

    async def write(data: bytes) -> None:
        transport.write(data)

    await conversation(write, collector.exactly, at_once)
    transport.close()
    assert await collector.queue.get() == b""
    done.append(f"protocol with {transport.get_extra_info('peername')}")

    udp, collector = await create_datagram_endpoint(Collector, remote_addr=(host, DATAGRAM))
    for size in (1, 0, 64, 1000, 65507, *[32] * 500):
        data = os.urandom(size)
        udp.sendto(data)
        assert await collector.queue.get() == data
    udp.close()
    done.append("datagrams")
    return done


def run_asyncio(main: Any, kind: str) -> Any:
    import uvloop

    stock = kind.startswith("stock-")
    base = uvloop.Loop if kind.endswith("uvloop") else asyncio.SelectorEventLoop
    loop = shmsock.loop_factory(base)() if stock else base()
    asyncio.set_event_loop(loop)
    try:
        result = loop.run_until_complete(main)
        loop.run_until_complete(loop.shutdown_asyncgens())
        return result
    finally:
        loop.close()


# -- anyio on trio


async def serve_trio(node: Any = None) -> None:
    import anyio
    import trio
    from anyio.streams.tls import TLSListener

    import shmsock.anyio as shm

    pem, context = ("", None) if node else server_context()

    async def echo(stream: Any) -> None:
        async with stream:
            try:
                while True:
                    await stream.send(await stream.receive())
            except anyio.EndOfStream:
                pass

    async def echo_datagrams(sock: Any) -> None:
        async for data, source in sock:
            await sock.send((data, source))

    async with anyio.create_task_group() as tasks:
        for port in (STREAM, PROTOCOL):
            tasks.start_soon((await shm.create_shm_listener(local_port=port, node=node)).serve, echo)
        if context is not None:
            secure = TLSListener(await shm.create_shm_listener(local_port=TLS), context)
            tasks.start_soon(secure.serve, echo)
        datagrams = await shm.create_shm_datagram_socket(local_port=DATAGRAM, node=node)
        tasks.start_soon(echo_datagrams, datagrams)
        print(json.dumps({"ca": pem}), flush=True)
        over = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wait() -> None:
            sys.stdin.buffer.read()
            token.run_sync_soon(over.set)

        threading.Thread(target=wait, daemon=True).start()
        await over.wait()
        tasks.cancel_scope.cancel()


async def ask_trio(host: str, pem: str, node: Any = None) -> list[str]:
    import anyio
    from anyio.streams.buffered import BufferedByteReceiveStream

    import shmsock.anyio as shm

    async def both(sending: Any, receiving: Any) -> bytes:
        found: list[bytes] = []

        async def receive() -> None:
            found.append(await receiving)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await sending
        return found[0]

    done = []
    for port in (STREAM,) if node else (STREAM, TLS, PROTOCOL):
        tls = client_context(pem) if port == TLS else None
        stream: Any = await shm.connect_shm(host, port, ssl_context=tls, node=node)
        await conversation(stream.send, BufferedByteReceiveStream(stream).receive_exactly, both)
        done.append(type(stream).__name__)
        await stream.aclose()
    async with await shm.create_connected_shm_datagram_socket(host, DATAGRAM, node=node) as sock:
        for size in (1, 0, 64, 1000, 65507, *[32] * 500):
            data = os.urandom(size)
            await sock.send(data)
            assert await sock.receive() == data
    done.append("datagrams")
    return done


async def calmly(work: Callable[..., Awaitable[list[str] | None]], *arguments: str) -> None:
    async with shmsock.attach(settings=shmsock.Settings(busy_poll_us=0, hot_us=0)) as node:
        done = await work(*arguments, node=node)
        print(json.dumps([done, node.statistics()]))


def main() -> None:
    if sys.argv[1] == "calm":
        import trio

        calm: Any = {"serve": serve_trio, "ask": ask_trio}[sys.argv[2]]
        trio.run(calmly, calm, *sys.argv[4:])
        return
    role, kind, *arguments = sys.argv[1:]
    if kind == "trio":
        import trio

        work: Any = serve_trio if role == "serve" else ask_trio
        made = trio.run(work, *arguments)
    else:
        stock = kind.startswith("stock-")
        made = run_asyncio(serve_asyncio(stock) if role == "serve" else ask_asyncio(stock, *arguments), kind)
    if role == "ask":
        print(json.dumps(made))


if __name__ == "__main__":
    main()
