"""A process that takes hold of all that a program can hold of a node, ends the node, and calls everything.

    python -m tests.aio.afterlife LOOP WAY REGION

Its exit code is 0 when each call returned, or raised what a program can expect. (What must not happen above
all is that one reads memory that is not mapped any more: that ends the process by a signal.)
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import random
import signal
import struct
import sys
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import anyio
from anyio.abc import SocketAttribute

import shmsock
import shmsock.anyio
from shmsock.aio import names
from shmsock.aio.pump import DatagramOut, FastPath, extension
from shmsock.aio.write_buffer import OutgoingFile
from shmsock.engine import layout as lay
from tests.aio.processes import runner

WAYS = [
    "aclose",
    "close",
    "lost",
    "lost_and_closed",
    "stopped_halfway",
    "loop_closed",
    "collected",
    "by_signal",
]
ON_TRIO = ["aclose", "close", "lost_and_closed", "run_ended"]

SPECIAL = ("__repr__", "__str__", "__del__", "__await__")
NOT_CALLED = (
    "_attach",
    "_listen",
    "mro",
)  # an engine's life begins with _attach(); _listen() asks the loop to watch nonsense
PROPER: tuple[type[BaseException], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,  # arguments are guessed
    NotImplementedError,
    LookupError,
    AssertionError,  # of asyncio's streams
    EOFError,  # asyncio.IncompleteReadError
    StopIteration,
    StopAsyncIteration,
    asyncio.CancelledError,
    asyncio.InvalidStateError,
    anyio.ClosedResourceError,
    anyio.BrokenResourceError,
    anyio.EndOfStream,
)


class Protocol(asyncio.Protocol, asyncio.DatagramProtocol):
    def eof_received(self) -> bool:
        return True


class Buffered(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        self.buffer = bytearray(4096)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer


# -- what is held, of node a, which has b as its peer

Held = list[Any]


async def of_anyio(a: Any, b: Any) -> Held:
    listener = await shmsock.anyio.create_shm_listener(local_port=7200, node=a)
    other = await shmsock.anyio.create_shm_listener(local_port=7201, node=b)
    stream = await shmsock.anyio.connect_shm(b.name, 7201, node=a)
    accepted = await other.accept()
    await accepted.send(bytes(100_000))
    back = await shmsock.anyio.connect_shm(a.name, 7200, node=b)
    taken, queued = await listener.accept(), await shmsock.anyio.connect_shm(a.name, 7200, node=b)
    free = await shmsock.anyio.create_shm_datagram_socket(local_port=7300, node=a)
    await free.sendto(b"x", a.name, 7300)
    connected = await shmsock.anyio.create_connected_shm_datagram_socket(a.name, 7300, node=a)
    await connected.send(b"x")
    await free.receive()
    sock = stream.extra(SocketAttribute.raw_socket)
    sock.fileno()
    asked = [
        stream.receive(),
        stream.send(b"x"),
        taken.receive(),
        free.receive(),
        connected.send(b"x"),
        listener.accept(),
    ]
    return [listener, stream, taken, free, connected, sock, asked, other, accepted, back, queued]


async def of_asyncio(a: Any, b: Any) -> Held:
    async def serve(reader: Any, writer: Any) -> None:
        writer.write(bytes(100_000))  # more than what a short cut takes at once
        await asyncio.sleep(3600)

    server = await shmsock.start_server(serve, None, 7000, node=a)
    other = await shmsock.start_server(serve, None, 7001, node=b)
    streams = [await shmsock.open_connection(b.name, 7001, node=a) for _ in range(4)]
    streams += [await shmsock.open_connection(a.name, 7000, node=node) for node in (a, b)]
    for reader, _ in streams:
        await reader.readexactly(1)
    streams[0][1].write(bytes(64 << 20))  # it waits for room
    protocols = [
        (await shmsock.create_connection(kind, b.name, 7001, node=a))[0] for kind in (Protocol, Buffered)
    ]
    free, _ = await shmsock.create_datagram_endpoint(Protocol, (None, 7100), node=a)
    connected, _ = await shmsock.create_datagram_endpoint(Protocol, None, (a.name, 7100), node=a)
    connected.sendto(b"x")
    socks = [x.get_extra_info("socket") for x in (streams[1][1], protocols[0], free)]
    for sock in socks:
        sock.fileno()
    socks += [sock.dup() for sock in socks[:2]]
    reader, writer = streams[2]
    asked = [
        reader.read(10),
        reader.readexactly(1 << 20),
        reader.readline(),
        reader.readuntil(),
        writer.drain(),
    ]
    await streams[3][0].readexactly(100_000 - 1)
    waiting = streams[3][0].read(10).__await__()
    connecting = a.connect(b.name, 7001)
    started = [waiting, waiting.send(None), connecting, connecting.send(None)]
    resolving: list[Any] = [
        lambda: names.known(a, b.name),
        lambda: names.names_of(a.loop).address(a.region.url, b.name),
        lambda: a.find(b.name, 7001, ()),
    ]
    return [server, streams, protocols, free, connected, socks, asked, started, resolving, other]


def beneath(a: Any) -> Held:
    """What attributes lead to. Nobody promises anything of these but that they do not crash."""
    engine = a.engine
    conns = list(engine.connections.values())
    endpoints = list(engine.datagrams)
    ports = []
    for conn in conns[:3]:  # made by hand: nobody tells them of the end
        ports.append(FastPath(a.pump, conn, Protocol()))
        ports[-1].can_read = ports[-1].can_write = True
        ports.append(extension.DatagramIn(a.pump, conn, {}))
    routes = endpoints[0].routes if endpoints else {}
    return [
        *(engine, engine.listeners, engine.datagrams, engine.peers, engine.layout, engine.memory),
        *(engine.handshake, engine.slots, engine.wakes, a.heartbeat, a.doorbell_listener, a.region),
        *(
            *conns,
            *endpoints,
            *engine.peers.all[:3],
            *engine.listeners,
            *ports,
            DatagramOut(a.pump, 7100, routes, Protocol()),
        ),
        *(*engine.datagrams._links.values(), *engine.datagrams.incoming, *engine.layout.survey()),
        *(t.fast_path for t in a.transports if hasattr(t, "fast_path")),
    ]


# -- what is called, and with what


def flat(thing: Any) -> Iterator[Any]:
    if isinstance(thing, (list, tuple)):
        for part in thing:
            yield from flat(part)
    elif thing is not None:
        yield thing


def settle(value: Any) -> None:
    """As a loop would, for a while."""
    if isinstance(value, asyncio.Future):
        value.cancel()
    elif hasattr(value, "send") and hasattr(value, "throw"):
        try:
            for _ in range(5):
                value.send(None)
            value.throw(asyncio.CancelledError())
        finally:
            value.close()
    elif hasattr(value, "__await__"):
        settle(value.__await__())
    elif isinstance(value, AsyncGenerator):
        settle(value.aclose())


def _same(thing: Any) -> Any:
    return thing


class Caller:
    def __init__(self, a: Any) -> None:
        engine = a.engine
        conn = next(iter(engine.connections.values()))
        endpoint = next(iter(engine.datagrams), None)
        transport = next((t for t in a.transports if hasattr(t, "supersede")), None)
        self.calls, self.bad, self.kept = 0, list[str](), list[Any]()
        self.later: list[Any] | None = None  # where coroutines cannot be driven by hand
        self.known: dict[str, Any] = {
            "addr": ("b", 7101), "args": (), "backlog": 10, "before": transport, "bits": 1, "callback":
            lambda *args: None, "conn": conn, "context": contextvars.copy_context(), "data": b"data",
            "default": None, "doorbell": None, "endpoint": endpoint, "error": OSError(9, "error"),
            "events": [], "exc": OSError(9, "exc"), "fd": -1, "file":
            OutgoingFile(-1, 0, 1, a.loop.create_future()), "flag": False, "group":
            list(engine.listeners)[:1], "handler": lambda *args: None, "host": "b", "hosts": [None],
            "identity": engine.peers.me, "ids": [1], "item": b"data", "key": "x", "kind": "ready",
            "length": 4096, "level": 1, "list_of_data": [b"data"], "listener":
            next(iter(engine.listeners)), "local": ("a", 1), "name": "b", "nbytes": 4096, "need": 4096,
            "now": 1 << 40, "now_ns": 1 << 40, "offset": 4096, "peer": engine.peers.all[1], "port": 7001,
            "ports": 7101 << 16 | 7101, "protocol": Protocol(), "remote": "b", "ring": (4096, 4096),
            "seen": "something", "separator": b"\n", "source": ("b", 1), "span": 4, "target": conn, "to":
            ("b", 7101), "tried": (), "unlocked": 2, "who": engine.peers.me, "why": OSError(9, "why"),
            "words": [1 << 24, 2 << 24 | 1, 1 << 32],
        }  # fmt: skip

    def arguments(self, call: Any) -> list[dict[str, Any] | tuple[Any, ...]]:
        """What to try: by the names of the parameters, where these are to be had."""
        try:
            parameters = list(inspect.signature(call).parameters.values())
        except (TypeError, ValueError):
            return [(), (b"x",), (10,), (Protocol(), contextvars.copy_context())]
        parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            return [(), (b"x",), (10,)]
        needed = {p.name: self.known.get(p.name, 1) for p in parameters if p.default is p.empty}
        return [needed, {p.name: self.known[p.name] for p in parameters if p.name in self.known} | needed]

    def call(self, what: str, call: Callable[[], Any], strict: bool) -> Any:
        self.calls += 1
        try:
            value = call()
            self.kept.append(value)
            if self.later is not None and inspect.iscoroutine(value):
                self.later.append(value)
            else:
                settle(value)
            return value
        except PROPER:
            return None
        except Exception as error:
            if strict and type(error).__name__ != "ExceptionGroup":
                self.bad.append(f"{what}: {error!r}")
            return None

    def all_of(self, thing: Any, strict: bool) -> None:
        """Every method and property."""
        kind = type(thing)
        for name in dir(kind):
            inner = name.startswith("_")
            ours = kind.__module__.startswith("shmsock") and not name.startswith("__")
            if name in NOT_CALLED or (inner and not ours and name not in SPECIAL):
                continue
            what, counts = f"{kind.__name__}.{name}", strict and not inner
            found = self.call(what, lambda name=name: getattr(thing, name), counts)  # type: ignore[misc]
            if not callable(found) or isinstance(found, type):
                continue
            for args in self.arguments(found):
                how = found if isinstance(args, tuple) else lambda *keys, f=found, a=args: f(**a)
                given = args if isinstance(args, tuple) else ()
                self.call(f"{what}{args}", lambda how=how, given=given: how(*given), counts)  # type: ignore[misc]

    def everything(self, held: Held, strict: bool = True) -> None:
        for thing in flat([held, held[::-1]]):
            if inspect.isfunction(thing):
                args = (1,) if inspect.signature(thing).parameters else ()
                self.call("a function", partial(thing, *args), strict)
            elif hasattr(thing, "send") and hasattr(thing, "throw"):
                self.call("something asked for", partial(_same, thing), False)
            else:
                self.all_of(thing, strict and not isinstance(thing, asyncio.Future))


# -- the ways that a node ends


def lose(node: Any) -> None:
    """Somebody takes its section: as when this process was stopped for too long."""
    with open(node.region.path, "r+b") as file:
        file.seek(node.engine.layout.section(node.section) + lay.CLAIM)
        file.write(struct.pack("<Q", 1234567))


def stop_halfway(node: Any) -> None:
    """A step of close() raises; those behind it are taken all the same."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    node.engine._give_back = interrupted
    try:
        node.close()
    except KeyboardInterrupt:
        del node.engine._give_back
        return
    raise AssertionError("nothing was raised")


async def end(node: Any, way: str) -> None:
    if way == "aclose":
        await node.aclose()
    elif way == "close":
        node.close()
    elif way == "stopped_halfway":
        stop_halfway(node)
    elif way.startswith("lost"):
        lose(node)
        if way == "lost_and_closed":
            await anyio.sleep(0.3)  # the pump tells of it
            node.close()
    if way != "lost":
        await anyio.sleep(0.01)  # connection_lost()


async def two_nodes(region: str, hold: Any) -> tuple[Any, Any, Held, Held, Caller]:
    a, b = await shmsock.attach(region, name="a"), await shmsock.attach(region, name="b")
    held = await hold(a, b)
    return a, b, held, beneath(a), Caller(a)


async def ends_in_its_loop(region: str, way: str, hold: Any) -> Caller:
    a, b, held, inner, caller = await two_nodes(region, hold)
    await end(a, way)
    if hold is of_anyio:
        caller.later = []
    caller.everything([a, *held])
    caller.everything(inner, strict=False)
    for work in caller.later or ():
        try:
            with anyio.move_on_after(0.01):
                await work
        except Exception as error:
            if not isinstance(error, PROPER) and type(error).__name__ != "ExceptionGroup":
                caller.bad.append(repr(error))
    a.close()
    b.close()
    return caller


async def of_both(a: Any, b: Any) -> Held:
    return [*await of_asyncio(a, b), *await of_anyio(a, b)]


async def come_and_go(region: str) -> None:
    async with shmsock.attach(region, name="c"):
        pass


class Last:
    """Is collected with the node, and calls everything then."""

    def __init__(self, counted: Caller, caller: Caller, held: Held, inner: Held) -> None:
        self.counted, self.caller, self.held, self.inner = counted, caller, held, inner

    def __del__(self) -> None:
        self.caller.everything(self.held)
        self.caller.everything(self.inner, strict=False)
        self.counted.calls, self.counted.bad = self.caller.calls, self.caller.bad


def ends_with_its_loop(region: str, way: str, loop: asyncio.AbstractEventLoop) -> Caller:
    a, b, held, inner, caller = loop.run_until_complete(two_nodes(region, of_both))
    loop.close()
    if way == "loop_closed":
        asyncio.run(come_and_go(region))  # who attaches closes the nodes of loops that are closed
        caller.everything([a, *held])
        caller.everything(inner, strict=False)
        return caller
    b.close()
    counted = Caller(a)
    counted.known.clear()
    a.last = Last(counted, caller, [a, *held], inner)
    del a, b, held, inner, caller
    for _ in range(3):
        gc.collect()
    assert counted.calls, "it was not collected"
    return counted


async def ends_by_signal(region: str) -> Caller:
    """In the middle of whatever it does, again and again."""
    draw, caller = random.Random(1), None

    async def serve(reader: Any, writer: Any) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    for _ in range(30):
        async with shmsock.attach(region, name="b") as b:
            server = await shmsock.start_server(serve, None, 7000, node=b)
            a = await shmsock.attach(region, name="a")
            reader, writer = await shmsock.open_connection("b", 7000, node=a)
            free, _ = await shmsock.create_datagram_endpoint(Protocol, (None, 7100), node=a)
            caller = caller or Caller(a)
            signal.signal(signal.SIGALRM, lambda *args, node=a: node.close())
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0001, 0.02))
            try:
                while True:
                    for size in (64, 10_000):
                        writer.write(bytes(size))
                        await writer.drain()
                        await reader.readexactly(size)
                    free.sendto(b"x", ("a", 7100))
                    await shmsock.create_connection(Protocol, "b", 7000, node=a)
                    caller.calls += 7
            except Exception:  # in the middle of anything: nothing is promised but that nothing crashes
                while not a.closed:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            server.close()
    assert caller is not None
    return caller


def main() -> int:
    name, way, region = sys.argv[1:]
    warnings.simplefilter("ignore")
    if name == "trio":
        import trio

        if way == "run_ended":
            a, b, held, inner, caller = trio.run(two_nodes, region, of_anyio)
            a.close()
            b.close()
            caller.everything([a, *held])
            caller.everything(inner, strict=False)
        else:
            caller = trio.run(ends_in_its_loop, region, way, of_anyio)
    elif way in ("loop_closed", "collected"):
        if name == "uvloop":
            import uvloop

            loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()
        caller = ends_with_its_loop(region, way, loop)
    else:

        async def quiet(main: Coroutine[Any, Any, Caller]) -> Caller:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
            return await main

        by_signal = way == "by_signal"
        caller = runner(name)(
            quiet(ends_by_signal(region) if by_signal else ends_in_its_loop(region, way, of_both))
        )
    print(f"{caller.calls} calls", *caller.bad, sep="\n", flush=True)
    caller.kept.clear()
    gc.collect()
    return int(bool(caller.bad))


if __name__ == "__main__":
    sys.exit(main())
