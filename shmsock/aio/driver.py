"""The node of one event loop: runs the engine's pump as a callback, hot while bytes move, cold on one
eventfd.

The pump is the same for every loop: look, hand out events, decide whether to come again by `call_soon` or to
let the keeper watch. It is a callback, never a task, in a context of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator
from types import coroutine
from typing import Any, Protocol

from shmsock.address import is_any, is_local, normalize_name
from shmsock.aio.doorbells import Ear
from shmsock.errors import address_unavailable, forked, wrong_thread
from shmsock.fabric import layout as lay
from shmsock.fabric.connection import Connection
from shmsock.fabric.datagrams import Endpoint
from shmsock.fabric.handshake import MESSAGES_PER_PASS
from shmsock.fabric.listeners import Listener
from shmsock.fabric.node import Engine
from shmsock.fabric.peers import Peer
from shmsock.region.base import Region
from shmsock.wakeup import DOUBT, LOCK, Keeper

__all__ = ["Handler", "Loop", "Node", "slowness", "yield_once"]

CREDIT_CAP_NS = 5_000_000
SKIP_NS = 50_000


class Loop(Protocol):
    """All that a node asks of its loop: asyncio's and uvloop's have it, and TrioLoop. No timers: the keeper
    rings with every beat."""

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

    def __init__(self, waiter: asyncio.Future[None]) -> None:
        self.waiter = waiter

    def ready(self, bits: int) -> None:
        """Bytes came with the answer: they are looked at when the waiter has made a transport of it."""

    def freed(self) -> None:
        """Nothing was made of it yet."""

    def connected(self) -> None:
        if not self.waiter.done():
            self.waiter.set_result(None)

    def failed(self, error: OSError) -> None:
        if not self.waiter.done():
            self.waiter.set_exception(error)


class Node:
    """This process's side of a region, for one event loop. Made by attach(); not thread-safe, as asyncio's
    objects are not."""

    def __init__(self, region: Region, engine: Engine, keeper: Keeper, loop: Loop, slow: int = 1) -> None:
        self.region, self.engine, self.keeper = region, engine, keeper
        self.loop: Any = loop  # a Loop to the node; asyncio's transports know it as theirs
        self.lib, self.nd = engine.lib, engine.nd
        self.name, self.section = engine.name, engine.section
        self.ident = threading.get_ident()
        self.pid = os.getpid()
        self.context = contextvars.Context()
        self.scheduled = False  # the pump will run in the next turn of the loop
        self.transports: set[Any] = set()
        self.servers: set[Any] = set()
        self._flushed: asyncio.Future[None] | None = None
        self.guard: Any = None  # what detaches an implicit node when its loop ends
        #: What the loop runs next; whenever a read asks, the pump is in it, so more than one means: do not
        #: spin. uvloop and trio keep theirs to themselves: there it stands for the pump and for the tasks
        #: that the pump woke and that have not run yet.
        self.queue: Any = getattr(loop, "_ready", None)
        self._known = self.queue is not None
        if not self._known:
            self.queue = [None]
        self._moved = 0
        self._unlocked = 0  # mask of sections whose lock fell
        self._last_pump = self._last_hit = time.monotonic_ns()
        self._gap = 1 << 62
        self._credit = CREDIT_CAP_NS
        #: A reader is about to look at its ring itself, after this turn of the loop: so many passes of the
        #: pump may be left out, soon after the last one. What a pass acknowledges, the peer must tell anew.
        self.polled = 0
        self._idle_turns, self._hot_turns = 0, getattr(loop, "hot_turns", 1 << 62)
        self._one_cpu = len(os.sched_getaffinity(0)) == 1
        us = engine.settings
        self._hot_ns = us.hot_us * 1000 * slow
        # On one CPU a spin that does not yield only keeps the peer from answering.
        yield_ns = 0 if self._one_cpu else 1000
        self.lib.sh_node_settings(self.nd, us.hold_us * 1000, us.busy_poll_us * 1000 * slow, yield_ns)
        self.context.run(loop.add_reader, keeper.fd, self._wake)
        self.ear = Ear(self, region.doorbell if engine.settings.doorbells else None)
        self.closed = False
        self.begin_turn()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"section {self.section}"
        return f"<shmsock.Node {self.name!r} {self.region.url} {state}>"

    # -- the pump

    def check(self) -> None:
        """Raises ForkedError, RuntimeError (another thread) or NodeClosedError, before anything in C is
        touched."""
        if threading.get_ident() != self.ident:
            raise wrong_thread(repr(self))
        if os.getpid() != self.pid:
            raise forked(repr(self))
        self.engine.check()

    def begin_turn(self) -> None:
        """What happens now happens in a turn of the loop that has its own budget, and a pump follows it."""
        if threading.get_ident() != self.ident:
            raise wrong_thread(repr(self))
        self.scheduled = True
        self.lib.sh_turn(self.nd)
        self.loop.call_soon(self._pump, context=self.context)

    def may_spin(self) -> bool:
        """Nothing else is to be run by this loop, as far as can be known. (The pump must be scheduled.)"""
        return len(self.queue) < 2

    def will_run(self) -> None:
        """The pump woke a task."""
        if not self._known:
            self.queue.append(None)

    def runs(self) -> None:
        """And it runs."""
        if not self._known:
            self.queue.pop()

    def _wake(self) -> None:
        """A bell moved, or it is time for a look."""
        if self.closed:
            return
        news = self.keeper.heard()
        if news & LOCK:
            self._unlocked = self.keeper.unlocked()
        if news & DOUBT or self.ear.bell is not None:
            self.ear.look()
        if self._flushed is not None:
            self.flushed()
        if not self.scheduled:
            self._pump()

    def woken(self) -> None:
        """Something rang: look."""
        if not self.scheduled:
            self._pump()

    def _pump(self) -> None:
        self.scheduled = False
        if self.closed:
            return
        now = time.monotonic_ns()
        if self.polled:
            self.polled -= 1
            if now - self._last_pump < SKIP_NS:
                self.begin_turn()
                return
        engine = self.engine
        unlocked, self._unlocked = self._unlocked, 0
        events = engine.pump(now, unlocked)
        for i, (kind, target, arg) in enumerate(events):
            try:
                if kind != "ready":
                    self._dispatch(kind, target, arg)
                elif (handler := target.handler) is not None:
                    handler.ready(arg)
            except (SystemExit, KeyboardInterrupt):
                engine.put_back(events[i + 1 :])  # the loop may be run again, by asyncio.run to clean up
                raise
            except BaseException as error:
                self.loop.call_exception_handler(
                    {
                        "message": f"shmsock: unhandled error in {kind} of {target!r}",
                        "exception": error,
                        "node": self,
                    }
                )
        if self.scheduled or self.closed:
            return
        # Those who were told of something run first: going to sleep can wait.
        if events or self._stay_hot(now) or not self._fall_asleep(now):
            self.begin_turn()

    def _fall_asleep(self, now: int) -> bool:
        """False: somebody was quicker. A node that is over sleeps for good."""
        engine = self.engine
        return not engine.alive or self.keeper.arm(now if self._flushed else engine.next_deadline())

    def _stay_hot(self, now: int) -> bool:
        """Come again at once? When something is owed; or when bytes moved, they moved shortly before as well,
        and looking in vain has not used more than a quarter of the time."""
        moved = self.lib.sh_moved(self.nd)
        since, self._last_pump = now - self._last_pump, now
        if moved != self._moved:
            self._moved = moved
            self._gap, self._last_hit, self._idle_turns = now - self._last_hit, now, 0
            self._credit = min(self._credit + since, CREDIT_CAP_NS)
        else:
            self._idle_turns += 1
            hot = now - self._last_hit < self._hot_ns
            self._credit = (
                max(self._credit - since, 0) if hot else min(self._credit + since // 4, CREDIT_CAP_NS)
            )
        if not self.engine.quiet:
            return True
        hot = (
            self._gap < self._hot_ns
            and now - self._last_hit < self._hot_ns
            and self._credit > 0
            and self._idle_turns < self._hot_turns
        )
        if hot and (self._idle_turns or self._one_cpu):
            os.sched_yield()  # whoever is to answer may need this CPU
        return hot

    def _dispatch(self, kind: str, target: Any, arg: Any) -> None:
        if kind == "accepted":
            target.pending -= 1
            if target.handler is None or target.closed:
                arg.abort()
            else:
                target.handler(arg)
        elif kind == "connected":
            target.handler.connected()
        elif kind == "endpoint":
            target.happened()
        elif kind == "failed":
            target.handler.failed(arg)
        elif kind == "down":
            self.loop.call_exception_handler(
                {"message": f"shmsock: {self!r} is down", "exception": arg, "node": self}
            )

    # -- names

    def find(self, host: Any, port: int, tried: tuple[int, ...]) -> Peer:
        """Who is to be asked for (host, port). Raises socket.gaierror, ConnectionRefusedError."""
        return self.engine.listeners.find(host, port, exclude=tried)

    def peer_name(self, host: str) -> str:
        """The one spelling of a peer's name. Raises socket.gaierror for what is none."""
        return self.engine.listeners.peer_name(host)

    async def connect(self, host: Any, port: int, local_port: int = 0) -> Connection:
        """A connection in OPEN. Raises what find() does, OSError (ENOBUFS), ConnectionResetError when the
        peer goes away.

        Cancelled, it takes the request back; nothing is left.
        """
        self.check()
        tried: tuple[int, ...] = ()
        refused: OSError | None = None
        while True:
            try:
                peer = self.find(host, port, tried)
            except OSError:
                if refused is None:
                    raise
                raise refused from None  # the last one there was
            waiter = self.loop.create_future()
            local = (self.name, local_port or self.engine.listeners.ephemeral())
            conn = self.engine.connect(peer.section, port, local=local, remote=peer.name)
            conn.handler = _Opening(waiter)
            if not self.scheduled:
                self.begin_turn()
            try:
                await waiter
                self.engine.check()  # closed just now?
                return conn
            except (ConnectionRefusedError, ConnectionResetError) as error:
                tried, refused = (*tried, peer.section), error  # reuse_port: another may take it
            except BaseException:
                conn.handler = None
                if not self.engine._failure:
                    conn.close()  # who has accepted it sees an end
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
                self._flushed = self.loop.create_future()
                await self._flushed  # each beat of the keeper ends it
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
        if not self.loop.is_closed():
            self.loop.remove_reader(self.keeper.fd)
            self.ear.close()
        for transport in list(self.transports):
            transport.node_closed()
        opening = [c.handler for c in self.engine.connections.values() if isinstance(c.handler, _Opening)]
        self.engine.leave()
        if not self.loop.is_closed():
            for server in list(self.servers):
                server.close()
            for waiting in opening:
                waiting.failed(self.engine.failure())
        self.keeper.stop()
        self.engine.memory.release()
        self.region.close()

    def inherited(self) -> None:
        """In a forked child: everything of the parent's is inert here."""
        self.closed = True
        self.engine.abandon(OSError(9, str(forked(repr(self)))))
        for transport in self.transports:
            transport.freed()  # so that all calls take the slow way, where they find out
        self.keeper.forget()
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
        "doorbell", "futex" or "polling"; `doorbell`: the own id on the ivshmem server, or None;
        `doorbell_lost`: why there is none any more. `names`: who is there; `peers`: how many, this one
        included."""
        counts: dict[str, Any] = dict(self.engine.statistics())
        counts["name"], counts["section"], counts["region"] = self.name, self.section, self.region.url
        counts["names"] = sorted(self.engine.peers.names())
        counts["state"] = "closed" if self.closed else "attached" if self.engine.alive else "down"
        counts["format"] = lay.VERSION
        bell = self.region.doorbell
        counts["doorbell"] = self.ear.bell.id if self.ear.bell is not None else None
        counts["doorbell_lost"] = bell.lost if bell is not None else ""
        counts["woken_by"] = self.engine.wakes.ways()
        return counts
