"""One process of the soak: a server, and many clients of all peers, on one loop:
`python -m tests.soak.peer CONFIGURATION` (JSON). It tells a line of JSON a second, and each fault at once.

Standard input: "stop" ends its clients, after which it says so; then "end" ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

import shmsock
import shmsock.anyio as shm
from tests.aio.processes import pattern
from tests.soak.exchange import (
    KINDS,
    LEAVING,
    STUCK_S,
    Broken,
    Kind,
    Pipe,
    Wrong,
    accept_side,
    open_side,
    read_header,
)
from tests.soak.hand import Hand

PORT, TLS, DATAGRAMS = 7000, 7001, 7002
DATAGRAM = struct.Struct(">QI")
TICK_S = 0.05
LOST = 3
"""The exit code of a process whose node ended, as its section was overwritten."""
LATE_S = 2.0
"""A timer that comes so much later than asked for, beside what the kernel gave to others, hangs."""


class StreamPipe:
    """asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, size: int) -> bytes:
        return await self._reader.read(size)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.write_eof()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    def abort(self) -> None:
        self._writer.transport.abort()


class TlsPipe(StreamPipe):
    async def end(self) -> None:
        """TLS has no half-close: the opener closes."""


class AnyioPipe:
    """anyio's, whatever the backend."""

    def __init__(self, stream: shm.ShmStream) -> None:
        self._stream = stream

    async def read(self, size: int) -> bytes:
        try:
            return await self._stream.receive(size)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ConnectionResetError(repr(error)) from error

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ConnectionResetError(repr(error)) from error

    async def end(self) -> None:
        await self._stream.send_eof()

    async def close(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        self._stream.close()


Handler = Callable[[Pipe], Awaitable[None]]


class Streams:
    """asyncio's face."""

    node: shmsock.Node

    def __init__(self, certificates: str) -> None:
        self._server, self._client = (
            ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
        )
        self._server.load_cert_chain(f"{certificates}/server.pem")
        self._client.load_verify_locations(f"{certificates}/ca.pem")
        self._known = {"ssl": self._client, "server_hostname": "soak"}

    async def connect(self, host: str, tls: bool) -> Pipe:
        if tls:
            return TlsPipe(
                *await shmsock.open_connection(
                    host, TLS, node=self.node, ssl=self._client, server_hostname="soak"
                )
            )
        return StreamPipe(*await shmsock.open_connection(host, PORT, node=self.node))

    @asynccontextmanager
    async def serve(self, handle: Handler) -> AsyncIterator[None]:
        def accept(
            kind: type[StreamPipe],
        ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
            async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await handle(kind(reader, writer))

            return client

        plain = await shmsock.start_server(accept(StreamPipe), None, PORT, node=self.node)
        secure = await shmsock.start_server(accept(TlsPipe), None, TLS, node=self.node, ssl=self._server)
        async with plain, secure:
            yield


class Anyio:
    """anyio's face."""

    node: shmsock.Node

    async def connect(self, host: str, tls: bool) -> Pipe:
        try:
            stream = await shm.connect_shm(host, PORT, node=self.node)
        except anyio.BrokenResourceError as error:
            raise ConnectionResetError(repr(error)) from error
        assert isinstance(stream, shm.ShmStream)
        return AnyioPipe(stream)

    @asynccontextmanager
    async def serve(self, handle: Handler) -> AsyncIterator[None]:
        async with (
            await shm.create_shm_listener(local_port=PORT, node=self.node) as listener,
            anyio.create_task_group() as group,
        ):

            async def client(stream: shm.ShmStream) -> None:
                await handle(AnyioPipe(stream))

            group.start_soon(listener.serve, client)
            yield
            group.cancel_scope.cancel()


class Peer:
    def __init__(self, configuration: dict[str, Any]) -> None:
        self.name: str = configuration["name"]
        self.loop: str = configuration["loop"]
        self.hosts: list[str] = configuration["hosts"]
        self.secure: list[str] = configuration["secure"]
        self.clients: int = configuration["clients"]
        self.pause_s: float = configuration["pause_s"]
        self.bulk: int = configuration["bulk"]
        self.dice = random.Random(configuration["seed"])
        self.settings = shmsock.Settings(**configuration["settings"])
        self.region: str = configuration["region"]
        self.file: str = configuration["file"]
        self.lies: str | None = configuration["lies"]
        self.face = Anyio() if configuration["face"] == "anyio" else Streams(configuration["certificates"])
        self.counts: Counter[str] = Counter()
        self.late_s = 0.0
        self.stopping = False

    def scribbled(self, words: int) -> None:
        self.counts["words"] += words

    def say(self, **what: Any) -> None:
        print(json.dumps({"name": self.name, "at": time.monotonic(), **what}), flush=True)

    def fault(self, kind: str, host: str, error: BaseException) -> None:
        self.say(fault=kind, host=host, error=f"{type(error).__name__}: {error}")

    async def _exchange(self, host: str, pipe: Pipe, kind: Kind, side: Callable[[], Awaitable[int]]) -> None:
        """One side of an exchange, and what came of it."""
        try:
            try:
                right = await side()
            finally:
                await self._close(pipe)
            self.counts.update(bytes=right, exchanges=1)
        except Wrong as error:
            self.fault("wrong", host, error)
        except TimeoutError as error:
            self.fault("stuck", host, error)
        except (OSError, Broken) as error:
            if kind not in LEAVING:
                self.fault("broken", host, error)

    async def _close(self, pipe: Pipe) -> None:
        with anyio.CancelScope(shield=True), anyio.fail_after(STUCK_S):
            await pipe.close()

    async def accepted(self, pipe: Pipe) -> None:
        dice = random.Random(self.dice.random())
        try:
            head = await read_header(pipe)
        except (ConnectionError, TimeoutError):
            head = None  # the opener tells, if it should not be
        if head is None:
            with suppress(ConnectionError):
                await self._close(pipe)
            return
        await self._exchange(head[0], pipe, head[-1], partial(accept_side, pipe, head, dice))

    async def connection(self, dice: random.Random) -> None:
        tls = isinstance(self.face, Streams) and dice.random() < 0.1
        host = dice.choice(self.secure if tls else self.hosts)
        try:
            with anyio.fail_after(30):
                pipe = await self.face.connect(host, tls)
        except TimeoutError as error:
            self.fault("stuck", host, error)
        except OSError as error:
            self.fault("broken", host, error)
        else:
            self.counts["connects"] += 1
            kind = Kind.QUESTIONS if tls else dice.choice(KINDS)
            side = partial(open_side, pipe, self.name, kind, dice, self.pause_s, self.bulk)
            await self._exchange(host, pipe, kind, side)

    async def datagrams(self, dice: random.Random) -> None:
        """Some there, and those back that were not dropped: whole, of this socket, and none twice."""
        host = dice.choice(self.hosts)
        try:
            async with await shm.create_connected_shm_datagram_socket(
                host, DATAGRAMS, node=self.face.node
            ) as socket:
                sent: dict[bytes, None] = {}
                for number in range(dice.randint(1, 50)):
                    data = DATAGRAM.pack(dice.getrandbits(63), number) + pattern(
                        number, 0, dice.randint(0, 1400)
                    )
                    sent[data] = None
                    await socket.send(data)
                with anyio.move_on_after(0.5):
                    while sent:
                        data = await socket.receive()
                        if data not in sent:
                            raise Wrong(
                                f"a datagram that this socket did not send, or has had: {data[:32].hex()}"
                            )
                        del sent[data]
                        self.counts["datagrams"] += 1
        except Wrong as error:
            self.fault("wrong", host, error)
        except (OSError, anyio.BrokenResourceError) as error:
            self.fault("broken", host, error)

    async def echo_datagrams(self) -> None:
        async with await shm.create_shm_datagram_socket(local_port=DATAGRAMS, node=self.face.node) as socket:
            while True:
                data, sender = await socket.receive()
                try:
                    await socket.sendto(data, *sender)
                except (OSError, anyio.BrokenResourceError):
                    pass  # who asked is gone

    async def client(self, seed: float) -> None:
        dice = random.Random(seed)
        while not self.stopping:
            self.face.node.check()
            await anyio.sleep(dice.random() * self.pause_s)
            await (self.datagrams if dice.random() < 0.1 else self.connection)(dice)

    async def tick(self) -> None:
        """How late a timer of this loop comes, beside the time that the kernel gave to other processes."""

        def waited_s() -> float:
            with open("/proc/thread-self/schedstat", encoding="ascii") as file:
                return int(file.read().split()[1]) / 1e9

        while True:
            start, waited = time.monotonic(), waited_s()
            await anyio.sleep(TICK_S)
            late = time.monotonic() - start - TICK_S - (waited_s() - waited)
            self.late_s = max(self.late_s, late)
            if late > LATE_S:
                self.say(fault="late", host=self.name, error=f"a timer came {late:.2f} s late")

    def sample(self, node: Any) -> dict[str, Any]:
        with open("/proc/self/status", encoding="ascii") as file:
            status = dict(line.split(":", 1) for line in file)
        statistics = node.statistics()
        late, self.late_s = self.late_s, 0.0
        return {
            "memory": int(status["RssAnon"].split()[0]) * 1024,
            "threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "late_s": round(late, 4),
            "cpu_s": round(time.process_time(), 2),
            **self.counts,
            **{key: statistics[key] for key in ("connections", "free_slots", "arena_free_bytes", "peers")},
        }

    async def report(self, node: Any) -> None:
        while True:
            self.say(sample=self.sample(node))
            await anyio.sleep(1)

    async def main(self) -> None:
        async with shmsock.attach(self.region, name=self.name, settings=self.settings) as node:
            self.face.node = node
            if self.lies:
                everywhere = self.lies == "everywhere"
                engine = node.engine
                Hand(self.file, engine.layout, engine.section, everywhere, self.scribbled).start()
            fresh = self.sample(node)
            async with self.face.serve(self.accepted), anyio.create_task_group() as group:
                group.start_soon(self.echo_datagrams)
                self.say(ready=True, sample=fresh)
                group.start_soon(self.tick)
                group.start_soon(self.report, node)
                async with anyio.create_task_group() as clients:
                    for _ in range(self.clients):
                        clients.start_soon(self.client, self.dice.random())
                    await self.told()
                    self.stopping = True
                self.say(stopped=True)
                await self.told()
                for _ in range(200):
                    if not node.statistics()["connections"]:
                        break
                    await anyio.sleep(0.05)  # ends that are on their way
                group.cancel_scope.cancel()
            self.say(ended=True, sample=self.sample(node))

    async def told(self) -> None:
        """A line of standard input."""
        await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


def run(peer: Peer) -> None:
    backend = "trio" if peer.loop == "trio" else "asyncio"
    options = {"use_uvloop": peer.loop == "uvloop"} if backend == "asyncio" else {}
    try:
        anyio.run(peer.main, backend=backend, backend_options=options)
    except BaseException:
        if not peer.face.node.closed:
            raise
        sys.exit(LOST)  # whatever it was that noticed


if __name__ == "__main__":
    run(Peer(json.loads(sys.argv[1])))
