"""When the pump runs. It is a callback of the loop, never a task: after a look it comes again by `call_soon`,
as long as bytes move, or lets the heartbeat watch and the loop sleep.

What runs at every message is here twice: as Python over cffi, and in C (native/extension), which is used
unless SHMSOCK_ACCELERATOR is 0. Both do the same.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import gc
import importlib.machinery
import importlib.util
import os
import threading
import time
from typing import Any

from shmsock.engine.connection import COPY_MAX, SH_TAKE
from shmsock.engine.engine import Engine
from shmsock.errors import wrong_thread
from shmsock.wakeup import Heartbeat

GLANCE_NS, SPIN_NS = 3_000, 50_000  # of a pump in one go; then the loop looks after others

__all__ = ["DatagramOut", "FastPath", "Pump", "extension", "ready_queue", "selector"]


def _load() -> Any:
    """The extension's module, which is in the same shared object as the core; None: there is none, or it is
    not wanted."""
    if os.environ.get("SHMSOCK_ACCELERATOR", "1") == "0":
        return None
    from shmsock.native import _core

    name = "shmsock.native._extension"
    loader = importlib.machinery.ExtensionFileLoader(name, _core.__file__)
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError:
        return None  # built without it
    return module


extension = _load()


def ready_queue(loop: Any) -> Any:
    """What the loop runs next, as a container that can be asked for its length; None where it is not to be
    had. asyncio's loops have it as _ready; uvloop keeps it to itself, but it is the one deque that has just
    grown by a handle."""
    if hasattr(loop, "_ready") or not isinstance(loop, asyncio.AbstractEventLoop):
        return getattr(loop, "_ready", None)
    handle = loop.call_soon(int)
    handle.cancel()
    deques = (d for d in gc.get_referents(loop) if type(d) is collections.deque and d and d[-1] is handle)
    return next(deques, None)


def selector(loop: Any) -> int:
    """The descriptor by which the loop waits for all others: readable when one of them is ready. -1 where it
    is not to be had."""
    if hasattr(loop, "_get_backend_id"):  # uvloop
        return int(loop._get_backend_id())
    fileno = getattr(getattr(loop, "_selector", None), "fileno", None)
    return -1 if fileno is None else int(fileno())


class _Pump:
    """The pump's side of a node. What it does seldom is the node's: check(), _heard() and _attend()."""

    def __init__(
        self,
        engine: Engine,
        heartbeat: Heartbeat,
        loop: Any,
        context: contextvars.Context,
        ident: int,
        queue: Any = None,
    ) -> None:
        self._engine, self._keeper, self._loop, self.context = engine, heartbeat, loop, context
        self._lib, self._nd = engine.lib, engine.nd
        self.ident = ident
        self.scheduled = False  # the pump will run in the next turn of the loop
        self.closed = False
        self.hurry = False  # the heartbeat's next beat is waited for
        self.listens = False  # there is more than the heartbeat to hear
        self.unlocked = 0  # mask of sections whose lock fell
        #: A reader is about to look at its ring itself, after this turn of the loop: so many passes of the
        #: pump may be left out, soon after the last one. What a pass acknowledges, the peer must tell anew.
        self.polled = 0
        #: What the loop runs next; whenever a read asks, the pump is in it, so more than one means: do not
        #: spin. Where it is not known (trio) it stands for the pump and for the tasks that the pump woke and
        #: that have not run yet.
        self.queue: Any = queue
        self._known = queue is not None
        if not self._known:
            self.queue = [None]

    def begin_turn(self) -> None:
        """What happens now happens in a turn of the loop that has its own budget, and a pump follows it."""
        if threading.get_ident() != self.ident:
            raise wrong_thread(repr(self))
        self._lib.sh_turn(self._nd)
        self._loop.call_soon(self._pump, context=self.context)
        self.scheduled = True

    def stir(self) -> None:
        """The engine has done something: a pump follows."""
        if not (self.scheduled or self.closed):
            self._pump_follows()

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
        news = self._keeper.heard()
        if news or self.listens or self.hurry:
            self._heard(news)
        self.woken()

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
            if self._lib.sh_pumped_just_now(self._nd, now):
                self.begin_turn()
                return
        self.scheduled = True  # for all that is called from here a pump follows: this one
        words, again = self._engine.look(), True
        try:
            while True:
                told, now = self._attend(words, now), time.monotonic_ns()
                # Nothing else is to be run: this turn may go on with the pump.
                alone = self._known and not self.queue and not any(self._engine.owed)
                if self.closed or (told and not alone):
                    return  # those who were told of something run first: going to sleep can wait
                hot = self._lib.sh_stay_hot(self._nd, now, any(self._engine.owed))
                if not hot:
                    again = told or not self._fall_asleep()
                if hot > 2 and not alone:
                    os.sched_yield()
                if hot < 2 or not alone:
                    return
                # What those who were told did may be the loop's to pass on: uvloop holds writes to sockets
                # back until the turn ends.
                if (words := self._engine.look_on(now, GLANCE_NS if told else SPIN_NS)) == []:
                    return
        finally:
            self.scheduled = False
            if again and not self.closed:
                self.begin_turn()

    def _fall_asleep(self) -> bool:
        """False: somebody was quicker. A node that is over sleeps for good."""
        return not self._engine.alive or self._keeper.arm(self.hurry)

    def _pump_follows(self) -> None:
        """None is scheduled, and one should be."""
        raise NotImplementedError

    def _heard(self, news: int) -> None:
        """The heartbeat has more to tell than that a bell moved; or something else has."""
        raise NotImplementedError

    def _attend(self, words: list[int] | None, now: int) -> bool:
        """Hand out what a look found. True: there was something."""
        raise NotImplementedError


class _FastPath:
    """What the short cuts of one connection ask. `calm`: writes go straight to the ring and drain() has
    nothing to wait for. `fast`: a reader takes its bytes from the ring, no exception is set, and nobody
    waits. `woken`: the pump has woken who waits."""

    __slots__ = (
        "_conn",
        "_ep",
        "_room",
        "_take",
        "_taken",
        "_turn",
        "can_read",
        "can_write",
        "drains",
        "wake_pending",
    )

    def __init__(self, turn: Any, conn: Any, transport: Any) -> None:
        self._turn, self._conn, self._ep, self._take = turn, conn, conn.ep, conn.engine.lib.sh_take
        self.can_write, self.drains, self.can_read, self.wake_pending = True, 0, False, False
        self._room, self._taken = conn.engine.memory.room

    def take(self, most: int, least: int = 1) -> bytes | None:
        """`least` to `most` bytes, maybe after a spin; None: the slow way."""
        if not self.can_read:
            return None
        turn, take = self._turn, self._take
        if not turn.scheduled:
            turn.begin_turn()
        n = take(self._ep, self._room, most if most < COPY_MAX else COPY_MAX, least, len(turn.queue) < 2)
        if 0 < n <= SH_TAKE:
            try:
                data: bytes = self._taken[:n]
            except BaseException as error:  # the ring has them no more: what follows would follow a gap
                self._conn.broke(error)
                raise
            return data
        found = self._conn.take(n) if n > 0 else None
        return found if isinstance(found, bytes) else None

    def put(self, data: Any) -> int | None:
        """For a send(): how many bytes went into the ring; None: all of them, and others need not run
        yet."""
        if not (self.can_write and type(data) is bytes and data):
            return 0
        turn, conn = self._turn, self._conn
        lib = conn.engine.lib
        taken: int = lib.sh_write(conn.ep, data, len(data))
        if not turn.scheduled:
            turn.begin_turn()
        return None if taken == len(data) and not lib.sh_over(conn.engine.nd) else max(taken, 0)

    def attach(self, reader: Any) -> None:
        """A reader in direct mode."""

    def receive(self, protocol: Any, context: contextvars.Context) -> None:
        """From now on the pump gives bytes to `protocol`, in that context; None: to nobody. (Here it leaves
        that to the transport.)"""

    def detach(self) -> None:
        """No reader takes bytes any more."""
        self.can_read = False


class _DatagramOut:
    """The short cut of a datagram transport. `calm`: it is not being closed."""

    def __init__(self, turn: Any, port: int, routes: dict[Any, Any], transport: Any) -> None:
        self.can_write = True


Pump: Any = _Pump if extension is None else extension.Pump
FastPath: Any = _FastPath if extension is None else extension.FastPath
DatagramOut: Any = _DatagramOut if extension is None else extension.DatagramOut
