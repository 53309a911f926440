"""The driver: runs an engine on an event loop. It owns the pump, has the heartbeat and doorbells wake it, and
makes the calls that the engine leaves as events."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from shmsock.aio.doorbells import DoorbellListener
from shmsock.aio.pump import FastPath, Pump, extension, ready_queue, selector
from shmsock.engine.connection import Connection
from shmsock.engine.engine import Engine
from shmsock.errors import forked, other_memory, wrong_thread
from shmsock.region.doorbell import Doorbell
from shmsock.wakeup import LOCK, SUSPECTED_LOSS, Heartbeat

__all__ = ["Driver", "Handler", "Loop", "Opening", "slowness"]

log = logging.getLogger("shmsock")


class Loop(Protocol):
    """All that a node asks of its loop: asyncio's and uvloop's have it, and TrioLoop. It needs no timers: the
    heartbeat wakes the loop at the first beat after the engine's time has come (sh_due)."""

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
    """The handler of an engine's connection: transports, streams, and connections that wait to be opened."""

    def ready(self, bits: int) -> None: ...
    def failed(self, error: OSError) -> None: ...
    def freed(self) -> None: ...


@functools.cache
def slowness(call: Callable[[], int]) -> int:
    """Measure how many times slower than usual this machine runs code like ours, 1 to 10: an emulated guest
    needs longer windows, or no answer ever comes within them. It times calls that take about 0.1 us
    elsewhere, and takes the best of several tries. Once in a process for each `call`."""
    best = 1 << 62
    for _ in range(5):
        begin = time.perf_counter_ns()
        for _ in range(50):
            call()
        best = min(best, time.perf_counter_ns() - begin)
    return min(max(best // (50 * 200), 1), 10)


class Opening:
    """A connection that waits for its answer."""

    early: bool

    by_name = False
    waiter: asyncio.Future[None] | None = None
    error: OSError | None = None
    early = False

    async def answered(self, loop: Any) -> None:
        """Wait until connected() is called. Raises the argument of failed()."""
        self.waiter = loop.create_future()
        if self.error is not None:
            raise self.error
        await self.waiter

    def ready(self, bits: int) -> None:
        """Note that bytes came with the answer: they are read once the waiter has made a transport."""
        self.early = True

    def freed(self) -> None:
        """Do nothing: no transport has the connection yet."""

    def connected(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def failed(self, error: OSError) -> None:
        if self.waiter is None:
            self.error = error
        elif not self.waiter.done():
            self.waiter.set_exception(error)

    def silent(self, conn: Connection) -> None:
        """Fail if it was asked for by name: another of that name may answer."""
        if self.by_name:
            self.failed(
                ConnectionResetError(
                    errno.ECONNRESET, f"peer {conn.remote[0]!r} (section {conn.peer}) is silent"
                )
            )


class Driver:
    """Owns the pump of a node, which calls check(), heard(), attend() and pump_follows(). All methods are
    called by the thread of the loop."""

    def __init__(
        self,
        engine: Engine,
        heartbeat: Heartbeat,
        loop: Any,
        doorbell: Doorbell | None,
        slow: int,
        node: object,
        beat: Callable[[], object],
    ) -> None:
        """`slow`: see slowness(). `node`: named in messages. `beat`: called when the heartbeat wakes the loop
        for another reason than a peer's news."""
        self._engine, self._heartbeat, self._loop = engine, heartbeat, loop
        self._node, self._beat = node, beat
        self._ident, self._pid = threading.get_ident(), os.getpid()
        context = contextvars.Context()
        self.pump: Any = Pump(self, engine, heartbeat, loop, context, self._ident, ready_queue(loop))
        engine.datagrams.gate = functools.partial(FastPath, self.pump)
        engine.datagrams.inbox = functools.partial(extension.DatagramIn, self.pump)
        self._tune(slow)
        context.run(loop.add_reader, heartbeat.fd, self.pump._wake)
        listen = functools.partial(context.run, loop.add_reader)
        self.doorbells: DoorbellListener = DoorbellListener(
            engine, doorbell, listen, loop.remove_reader, self.pump.woken, node
        )
        self.pump.listens = doorbell is not None
        engine.home.stir = self.pump.stir
        engine.on_down, engine.on_alone = self._report_down, self._report_alone
        self.pump.begin_turn()

    def _tune(self, slow: int) -> None:
        lib, nd, us = self._engine.lib, self._engine.nd, self._engine.settings
        one_cpu = len(os.sched_getaffinity(0)) == 1
        hot_turns = getattr(self._loop, "hot_turns", 1 << 62)
        lib.sh_hot(nd, us.hot_us * 1000 * slow, hot_turns, one_cpu)
        # On one CPU a spin that does not yield only keeps the peer from answering.
        yield_ns = 0 if one_cpu else 1000
        lib.sh_node_settings(nd, us.hold_us * 1000, us.busy_poll_us * 1000 * slow, yield_ns)
        lib.sh_loop(nd, selector(self._loop))

    def check(self) -> None:
        """Raise ForkedError, WrongThreadError or NodeClosedError if the node may not be used here; asked
        before anything in C is touched."""
        if threading.get_ident() != self._ident:
            raise wrong_thread(repr(self._node))
        if os.getpid() != self._pid:
            raise forked(repr(self._node))
        self._engine.check()

    def pump_follows(self) -> None:
        """Schedule a pass for the loop's next turn. What the engine has just done may be for this very node,
        and no node kicks itself."""
        if not self._loop.is_closed():
            self.pump.begin_turn()

    def heard(self, news: int) -> None:
        """Find out why the heartbeat woke the loop, if not for a peer's news: a lock that fell, doorbells
        that may be lost, a beat that was asked for."""
        if news & LOCK:
            self.pump.unlocked = self._heartbeat.unlocked()
        self.pump.listens = self.doorbells.bell is not None
        if news & SUSPECTED_LOSS or self.pump.listens:
            self.doorbells.look()
        self._beat()

    def attend(self, words: list[int] | None, now: int) -> bool:
        """Have the engine take in what the core found in a pass, and make the calls that it left as events.
        Returns whether there were any."""
        unlocked, self.pump.unlocked = self.pump.unlocked, 0
        self._engine.attend(words, now, unlocked)
        return self._tell()

    def accepted(self, what: int, more: int, now: int) -> None:
        """Have the engine take in, outside of attend(), that the core has accepted a connection."""
        self._engine.handshake.accepted(what, more, now, self._call)

    def _tell(self) -> bool:
        events = self._engine.events
        told = len(events)
        for _ in range(told):  # what comes of these is for the next pass
            self._call(*events.popleft())
        return told > 0

    def _call(self, call: Callable[[Any], object], arg: Any) -> None:
        try:
            call(arg)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            owner = getattr(call, "__self__", None)
            self._loop.call_exception_handler(
                {
                    "message": f"shmsock: unhandled error in {call.__name__} of {owner!r}",
                    "exception": error,
                    "node": self._node,
                }
            )

    def _report_down(self, why: OSError) -> None:
        self._loop.call_exception_handler(
            {"message": f"shmsock: {self._node!r} is down", "exception": why, "node": self._node}
        )

    def _report_alone(self) -> None:
        log.warning("%r has listened for half a minute, and saw nobody else: %s", self._node, other_memory())

    def stop(self) -> None:
        """Have the loop wait for neither heartbeat nor doorbells any more. The loop must be open."""
        self.doorbells.close()
        self._loop.remove_reader(self._heartbeat.fd)
