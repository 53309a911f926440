"""The pump: the pass over what peers said, and the short cuts of reads and writes around it.

Both are types of native/extension. The pump is a callback of the loop, never a task: after a pass it comes
again by `call_soon` as long as bytes move, or lets the heartbeat watch and the loop sleep. Where the
extension is not to be had (a subinterpreter refuses its import), a plain pump serves, and all bytes take the
transports' ordinary way.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import gc
import importlib.machinery
import importlib.util
import threading
import time
import weakref
from typing import Any

from shmsock.engine.engine import Engine
from shmsock.wakeup import Heartbeat

__all__ = ["DatagramOut", "FastPath", "Pump", "extension", "ready_queue", "selector"]


def _load() -> Any:
    """Load the extension, which is in the same shared object as the core; None where it is refused."""
    from shmsock.native import _core

    name = "shmsock.native._extension"
    loader = importlib.machinery.ExtensionFileLoader(name, _core.__file__)
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError:
        return None
    return module


extension = _load()


def ready_queue(loop: Any) -> Any:
    """Find the loop's queue of ready callbacks, so that its length can be asked for; None where it cannot be
    found. asyncio's loops have it as _ready; uvloop hides it, but it is the one deque that has just grown by
    a handle."""
    if hasattr(loop, "_ready") or not isinstance(loop, asyncio.AbstractEventLoop):
        return getattr(loop, "_ready", None)
    handle = loop.call_soon(int)
    handle.cancel()
    deques = (d for d in gc.get_referents(loop) if type(d) is collections.deque and d and d[-1] is handle)
    return next(deques, None)


def selector(loop: Any) -> int:
    """Find the descriptor by which the loop waits for all others: readable when one of them is ready. -1
    where it cannot be found."""
    if hasattr(loop, "_get_backend_id"):  # uvloop
        return int(loop._get_backend_id())
    fileno = getattr(getattr(loop, "_selector", None), "fileno", None)
    return -1 if fileno is None else int(fileno())


class PlainPump:
    """Stands in for the extension's Pump, without its short cuts: one pass in each turn of the loop."""

    polled = 0  # passes that may be left out soon after the last: none here
    moot = 0

    def __init__(
        self,
        owner: Any,
        engine: Engine,
        heartbeat: Heartbeat,
        loop: Any,
        context: contextvars.Context,
        ident: int,
        queue: Any = None,
    ) -> None:
        self._owner, self._engine, self._heartbeat, self._loop = owner, engine, heartbeat, loop
        self.context, self.ident, self.queue = context, ident, queue
        self.scheduled = self.closed = self.hurry = self.listens = False
        self.unlocked = 0

    def begin_turn(self) -> None:
        """Give this turn of the loop a budget of its own, and schedule a pass for the next one."""
        if threading.get_ident() != self.ident:
            self._owner.check()  # raises
        self._engine.lib.sh_turn(self._engine.nd)
        self._loop.call_soon(self._pump, context=self.context)
        self.scheduled = True

    def fit(self) -> bool:
        """Leave it to check() whether the node may be used."""
        return False

    def stir(self) -> None:
        """Have a pass scheduled, after what the engine has done, unless one is."""
        if not (self.scheduled or self.closed):
            self._owner.pump_follows()

    def over(self) -> bool:
        """Is the budget of this turn, which is begun if need be, used up?"""
        if self.closed:
            return False
        if not self.scheduled:
            self.begin_turn()
        return bool(self._engine.lib.sh_over(self._engine.nd))

    def may_spin(self) -> bool:
        """Say no: it is not known what else is to be run."""
        return False

    def spin_for_answer(self, section: int, slot: int) -> None:
        """Leave messages to the next pass."""

    def will_run(self) -> None:
        """Note that the pump woke a task; here nobody asks."""

    def runs(self) -> None:
        """Note that the task runs."""

    def woken(self) -> None:
        """Make a pass, as the loop was kicked."""
        if not self.scheduled:
            self._pump()

    def _wake(self) -> None:
        if not self.closed:
            news = self._heartbeat.heard()
            if news or self.listens or self.hurry:
                self._owner.heard(news)
            self.woken()

    def _pump(self) -> None:
        self.scheduled = not self.closed  # calls made from here need not schedule another pass
        if self.closed:
            return
        again = True
        try:
            now = time.monotonic_ns()
            told = self._owner.attend(self._engine.poll(), now)
            if not (told or self.closed):
                lib, nd, owed = self._engine.lib, self._engine.nd, any(self._engine.owed)
                again = bool(lib.sh_stay_hot(nd, time.monotonic_ns(), owed)) or not self._fall_asleep()
        finally:
            self.scheduled = False
            if again and not self.closed:
                self.begin_turn()

    def _fall_asleep(self) -> bool:
        """Arm the heartbeat. Returns False if a peer had news first. (A node that is over sleeps for
        good.)"""
        return not self._engine.alive or self._heartbeat.arm(self.hurry)


class NoFastPath:
    """Stands in for the extension's FastPath: every call takes the ordinary way."""

    can_read = property(lambda self: False, lambda self, may: None)
    reader, used, direct = None, False, False
    sink, poured = -1, 0

    def __init__(self, pump: Any, conn: Any, transport: Any) -> None:
        self.can_write = False
        self._transport = weakref.ref(transport)

    def write(self, data: Any) -> None:
        """Write as ShmTransport.write() does."""
        if (transport := self._transport()) is not None:
            transport._write_rest(data, 0)

    def take(self, most: int) -> None:
        """Take nothing."""

    def take_into(self, buffer: Any) -> None:
        """Take nothing."""

    def put(self, data: Any) -> int:
        """Put nothing into the ring."""
        return 0

    def attach(self, reader: Any, is_open: bool) -> None:
        """Do nothing: the transport feeds that reader."""

    def forget(self) -> None:
        """Do nothing: there is no reader."""

    def receive(self, protocol: Any, context: contextvars.Context, buffered: bool = False) -> None:
        """Do nothing: the transport delivers."""

    def pour(self) -> int:
        """Do nothing: the protocol is given the bytes."""
        return 0

    def hang_up(self) -> bool:
        """Do nothing: Connection.close() does it."""
        return False

    def detach(self) -> None:
        """Do nothing."""


class NoDatagramOut:
    """Stands in for the extension's DatagramOut."""

    def __init__(self, pump: Any, port: int, routes: dict[Any, Any], transport: Any) -> None:
        self.can_write = False
        self._transport = weakref.ref(transport)

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send as ShmDatagramTransport.sendto() does."""
        if (transport := self._transport()) is not None:
            transport._send_slowly(data, addr)


Pump: Any = PlainPump if extension is None else extension.Pump
FastPath: Any = NoFastPath if extension is None else extension.FastPath
DatagramOut: Any = NoDatagramOut if extension is None else extension.DatagramOut
