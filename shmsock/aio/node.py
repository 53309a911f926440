"""The node of one event loop: runs the engine's pump (turn.py), hands out its events, and is what connects,
listens and closes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator
from functools import partial
from types import coroutine
from typing import Any, Protocol

from shmsock.address import is_any, is_local, normalize_name
from shmsock.aio.doorbells import DoorbellListener
from shmsock.aio.pump import FastPath, Pump, extension, ready_queue, selector
from shmsock.aio.watch import Watch
from shmsock.engine import layout as lay
from shmsock.engine.connection import Connection
from shmsock.engine.datagrams import Endpoint
from shmsock.engine.engine import Engine
from shmsock.engine.handshake import MESSAGES_PER_PASS
from shmsock.engine.listeners import Listener
from shmsock.engine.peers import Peer
from shmsock.errors import NodeClosedError, address_unavailable, forked, other_memory, wrong_thread
from shmsock.region.base import Region
from shmsock.wakeup import LOCK, SUSPECTED_LOSS, Heartbeat

__all__ = ["Handler", "Loop", "Node", "slowness", "yield_once"]

log = logging.getLogger("shmsock")


class Loop(Protocol):
    """All that a node asks of its loop: asyncio's and uvloop's have it, and TrioLoop. No timers: each beat
    wakes the loop."""

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> object: ...
    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object: ...
    def add_reader(self, fd: int, callback: Callable[[], object]) -> object: ...
    def remove_reader(self, fd: int) -> object: ...
    def create_future(self) -> Any: ...
    def is_closed(self) -> bool: ...
    def is_running(self) -> bool: ...
    def call_exception_handler(self, context: dict[str, Any]) -> object: ...


class Handler(Protocol):
    """What an engine's connection belongs to."""

    def ready(self, bits: int) -> None: ...
    def failed(self, error: OSError) -> None: ...
    def freed(self) -> None: ...


@coroutine
def yield_once() -> Generator[None, None, None]:
    """Let the loop turn once."""
    yield


def slowness(call: Callable[[], int]) -> int:
    """How many times slower than usual this machine runs such code as ours, 1 to 10: the windows of an
    emulated guest must be longer, or no answer ever comes within them. Measured by calls that take about 0.1
    us elsewhere, the best of several tries."""
    best = 1 << 62
    for _ in range(5):
        begin = time.perf_counter_ns()
        for _ in range(50):
            call()
        best = min(best, time.perf_counter_ns() - begin)
    return min(max(best // (50 * 200), 1), 10)


class _Opening:
    """A connection that waits for its answer."""

    def __init__(self, waiter: asyncio.Future[None], by_name: bool) -> None:
        self.waiter, self.by_name = waiter, by_name
        self.early = False

    def ready(self, bits: int) -> None:
        """Bytes came with the answer: they are looked at when the waiter has made a transport of it."""
        self.early = True

    def freed(self) -> None:
        """Nobody was given it yet."""

    def connected(self) -> None:
        if not self.waiter.done():
            self.waiter.set_result(None)

    def failed(self, error: OSError) -> None:
        if not self.waiter.done():
            self.waiter.set_exception(error)

    def silent(self, conn: Connection) -> None:
        """Another of that name may answer."""
        if self.by_name:
            self.failed(
                ConnectionResetError(
                    errno.ECONNRESET, f"peer {conn.remote[0]!r} (section {conn.peer}) is silent"
                )
            )


class Node(Pump):  # type: ignore[misc]
    """This process's side of a region, for one event loop. Made by attach(); not thread-safe, as asyncio's
    objects are not."""

    closed: bool
    scheduled: bool

    def __init__(
        self, region: Region, engine: Engine, heartbeat: Heartbeat, loop: Loop, slow: int = 1
    ) -> None:
        self.region, self.engine, self.heartbeat = region, engine, heartbeat
        self.loop: Any = loop  # a Loop to the node; asyncio's transports know it as theirs
        self.lib, self.nd = engine.lib, engine.nd
        self.name, self.section = engine.name, engine.section
        engine.home.url = region.url
        super().__init__(
            engine, heartbeat, loop, contextvars.Context(), threading.get_ident(), ready_queue(loop)
        )
        if extension is not None:
            engine.datagrams.gate = partial(FastPath, self)
            engine.datagrams.inbox = partial(extension.DatagramIn, self)
        self.pid = os.getpid()
        self.transports: set[Any] = set()
        self.servers: set[Any] = set()
        self._flushed: asyncio.Future[None] | None = None
        self.guard: Any = None  # what detaches an implicit node when its loop ends
        self.watch = Watch(self)
        us = engine.settings
        one_cpu = len(os.sched_getaffinity(0)) == 1
        hot_turns = getattr(loop, "hot_turns", 1 << 62)
        self.lib.sh_hot(self.nd, us.hot_us * 1000 * slow, hot_turns, one_cpu)
        # On one CPU a spin that does not yield only keeps the peer from answering.
        yield_ns = 0 if one_cpu else 1000
        self.lib.sh_node_settings(self.nd, us.hold_us * 1000, us.busy_poll_us * 1000 * slow, yield_ns)
        self.lib.sh_loop(self.nd, selector(loop))
        self.context.run(loop.add_reader, heartbeat.fd, self._wake)
        self.doorbell_listener = DoorbellListener(
            self, region.doorbell if engine.settings.doorbells else None
        )
        self.listens = self.doorbell_listener.bell is not None
        engine.home.stir = self.stir
        engine.on_down, engine.on_alone = self._report_down, self._report_alone
        self.begin_turn()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"section {self.section}"
        return f"<shmsock.Node {self.name!r} {self.region.url} {state}>"

    # -- the pump

    def _pump_follows(self) -> None:
        """What the engine has just done may be for this very node, which sleeps: nobody rings it for that."""
        if not self.loop.is_closed():
            self.begin_turn()

    def check(self) -> None:
        """Raises ForkedError, RuntimeError (another thread) or NodeClosedError, before anything in C is
        touched."""
        if threading.get_ident() != self.ident:
            raise wrong_thread(repr(self))
        if os.getpid() != self.pid:
            raise forked(repr(self))
        self.engine.check()

    def _heard(self, news: int) -> None:
        if news & LOCK:
            self.unlocked = self.heartbeat.unlocked()
        self.listens = self.doorbell_listener.bell is not None
        if news & SUSPECTED_LOSS or self.listens:
            self.doorbell_listener.look()
        self.flushed()

    def _attend(self, words: list[int] | None, now: int) -> bool:
        events = self.engine.events
        unlocked, self.unlocked = self.unlocked, 0
        self.engine.attend(words, now, unlocked)
        told = len(events)
        for _ in range(told):  # what comes of these is for the next pass
            call, arg = events.popleft()
            try:
                call(arg)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                owner = getattr(call, "__self__", None)
                self.loop.call_exception_handler(
                    {
                        "message": f"shmsock: unhandled error in {call.__name__} of {owner!r}",
                        "exception": error,
                        "node": self,
                    }
                )
        return told > 0

    def _report_down(self, why: OSError) -> None:
        self.loop.call_exception_handler(
            {"message": f"shmsock: {self!r} is down", "exception": why, "node": self}
        )

    def _report_alone(self) -> None:
        log.warning("%r has listened for half a minute, and saw nobody else: %s", self, other_memory())

    # -- names

    def find(self, host: Any, port: int, tried: tuple[int, ...]) -> Peer:
        """Who is to be asked for (host, port). Raises socket.gaierror, ConnectionRefusedError,
        NodeClosedError."""
        self.check()
        return self.engine.listeners.find(host, port, exclude=tried)

    def peer_name(self, host: str) -> str:
        """The one spelling of a peer's name. Raises socket.gaierror for what is none."""
        return self.engine.listeners.peer_name(host)

    async def connect(
        self,
        host: Any,
        port: int,
        local_port: int = 0,
        meanwhile: Callable[[Connection], object] = lambda conn: None,
    ) -> Connection:
        """A connection in OPEN. Raises what find() does, OSError (ENOBUFS), ConnectionResetError when the
        peer goes away. While a peer is asked there is time for something else, to be done for each that is.

        Cancelled, it takes the request back; nothing is left.
        """
        tried: tuple[int, ...] = ()
        refused: OSError | None = None
        while True:
            try:
                peer = self.find(host, port, tried)
            except OSError as error:
                if refused is None or isinstance(error, NodeClosedError):
                    raise
                raise refused from None  # the last one there was
            waiter = self.loop.create_future()
            local = (self.name, local_port or self.engine.listeners.ephemeral())
            conn = self.engine.connect(peer.section, port, local=local, remote=peer.name)
            conn.handler = _Opening(waiter, not isinstance(host, int))
            if self.closed:  # by a signal handler, under all this: then nobody answers
                self.check()
            try:
                meanwhile(conn)
                await waiter
                self.engine.check()  # closed just now?
                return conn
            except (ConnectionRefusedError, ConnectionResetError) as error:
                tried, refused = (*tried, peer.section), error  # another of that name may take it
                conn.handler = None
                if self.engine.alive:
                    conn.close()  # of one that was silent
            except BaseException:
                conn.handler = None
                if self.engine.alive:
                    conn.close()  # the peer that has accepted it sees an end
                raise

    def listen(self, hosts: list[Any], port: int, *, backlog: int, reuse_port: bool) -> Listener:
        """Listen for all peers, or for those of this machine when every host is a loopback. Raises OSError
        (EADDRNOTAVAIL, EADDRINUSE)."""
        self.check()
        local_only = self._local_only(hosts)
        # Each pass of the pump hands over all that it accepted: whoever came in one pass is no backlog.
        backlog = max(backlog, MESSAGES_PER_PASS * self.engine.layout.peers)
        return self.engine.listen(port, backlog=backlog, reuse_port=reuse_port, local_only=local_only)

    def bind_datagram(
        self, host: Any, port: int, *, reuse_port: bool = False, remote: tuple[Any, int] | None = None
    ) -> Endpoint:
        """A port for datagrams (0: one is chosen), under the rules of listen(). `remote`: connected to there.
        Raises what listen() does, and socket.gaierror when nobody has the remote name."""
        self.check()
        return self.engine.datagrams.bind(
            port, reuse_port=reuse_port, local_only=self._local_only([host]), remote=remote
        )

    def _local_only(self, hosts: list[Any]) -> bool:
        """Is every host a loopback? Raises OSError (EADDRNOTAVAIL) for one that is not this node's."""
        for host in hosts:
            if not is_local(host) and not is_any(host) and not self._own(host):
                raise address_unavailable(host, [self.name])
        return all(is_local(host) for host in hosts)

    def _own(self, host: Any) -> bool:
        try:
            return host == self.section if isinstance(host, int) else normalize_name(host) == self.name
        except ValueError:
            return False

    # -- the end

    def flushed(self) -> None:
        """A transport got rid of what it held, or time went by."""
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    async def aclose(self) -> None:
        """Detach. Closed writers get up to `flush_s` to hand over what they still hold; everything else is
        closed as the end of the process would."""
        if self.closed or os.getpid() != self.pid:
            return
        end = time.monotonic() + self.engine.settings.flush_s
        try:
            while self.engine.alive and time.monotonic() < end and any(t.flushing for t in self.transports):
                self._flushed, self.hurry = self.loop.create_future(), True
                await self._flushed  # each beat of the heartbeat ends it
        finally:
            self.close()

    def close(self) -> None:
        """Detach at once; harmless when repeated. Raises RuntimeError on another thread while the loop
        runs."""
        if self.closed:
            return
        if threading.get_ident() != self.ident and self.loop.is_running():
            raise wrong_thread(repr(self))
        self.closed = True
        if os.getpid() != self.pid:
            return
        self.lib.sh_node_own(self.nd)  # at exit, the thread of the loop may be gone
        # From the last to the first, whatever one of them raises (Ctrl-C, say): nobody may look for memory
        # that is not there any more.
        with contextlib.ExitStack() as steps:
            steps.callback(self.region.close)
            steps.callback(lambda: self.engine.memory.release(self.engine.failure()))
            steps.callback(self.heartbeat.stop)
            steps.callback(self._leave)
            steps.callback(self._end_transports)
            if not self.loop.is_closed():
                steps.callback(self.doorbell_listener.close)
                steps.callback(self.loop.remove_reader, self.heartbeat.fd)

    def _end_transports(self) -> None:
        for transport in list(self.transports):
            transport.node_closed()

    def _leave(self) -> None:
        opening = [c.handler for c in self.engine.connections.values() if isinstance(c.handler, _Opening)]
        self.engine.leave()
        if not self.loop.is_closed():
            for server in list(self.servers):
                server.close()
            for waiting in opening:
                waiting.failed(self.engine.failure())

    def inherited(self) -> None:
        """In a forked child: everything of the parent's is inert here."""
        self.closed = True
        self.engine.abandon(OSError(9, str(forked(repr(self)))))
        for transport in self.transports:
            transport.freed()  # so that all calls take the slow way, where they find out
        self.heartbeat.forget()
        self.region.drop_inherited()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # The loop holds its node, so that loop is over, and nobody can be inside C with this node.
        if not getattr(self, "closed", True):
            try:
                _warn(f"unclosed node {self!r}", ResourceWarning, source=self)
            finally:
                self.close()

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Run something of this node from __del__, possibly on another thread: later, in the loop."""
        if not self.closed and not self.loop.is_closed():
            try:
                self.loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                pass  # the loop was closed just now

    def statistics(self) -> dict[str, Any]:
        """Counters since attach, and what is so now. Of waking: `rung` and `suppressed` (not rung, as the
        peer was awake, or had been rung), `received` and `spurious`, doorbells and futexes alike; `healed`:
        lost, or forgotten, and found by a slow look; `woken_by`: by name, how each peer wakes this node,
        "doorbell", "futex" or "polling"; `wakes`: how this node wakes each peer, "doorbell", "futex" or
        "nothing"; `doorbell`: the own id on the ivshmem server, or None;
        `doorbell_lost`: why there is none any more. `names`: who is there; `peers`: how many, this one
        included. `region_replaced`: what became of the file or device, when who attaches now gets another one
        or none; else "". `alone`: nobody else was ever seen."""
        counts: dict[str, Any] = dict(self.engine.statistics())
        counts["name"], counts["section"], counts["region"] = self.name, self.section, self.region.url
        counts["names"] = sorted(self.engine.peers.names()) if self.engine.alive else []
        counts["alone"] = self.engine.peers.alone
        self.watch.look()
        counts["region_replaced"] = str(self.watch)
        counts["state"] = "closed" if self.closed else "attached" if self.engine.alive else "down"
        counts["format"] = lay.VERSION
        bell = self.region.doorbell
        counts["doorbell"] = (
            self.doorbell_listener.bell.id if self.doorbell_listener.bell is not None else None
        )
        counts["doorbell_lost"] = bell.lost if bell is not None else ""
        wakes = self.engine.wakes
        counts["woken_by"], counts["wakes"] = wakes.of_all(wakes.way), wakes.of_all(wakes.way_out)
        return counts
