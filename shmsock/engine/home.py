"""What all parts of one engine have in common: its section, its node in the core, and what a pass is owed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from shmsock.engine.counters import OF_ENGINE
from shmsock.engine.layout import Layout
from shmsock.engine.memory import Memory
from shmsock.engine.settings import Settings
from shmsock.engine.trace import Trace, trace_of
from shmsock.errors import node_closed
from shmsock.region.private import zeros

__all__ = ["Home"]


class Home:
    """The own section of a region, and the node in C that writes it.

    Parts of the engine are given this one object instead of the engine itself, which is above them. What is
    set later (`stir`, `down`, `url`, `hint`) is the engine's, or that of the driver: whatever runs the engine
    in an event loop.
    """

    layout: Layout
    memory: Memory
    name: str
    rng: random.Random
    section: int
    settings: Settings
    ffi: Any
    lib: Any

    def __init__(
        self, layout: Layout, section: int, name: str, settings: Settings, rng: random.Random
    ) -> None:
        self.layout, self.memory = layout, layout.memory
        self.section, self.name, self.settings, self.rng = section, name, settings, rng
        #: Told of each event, in words; None: nobody asked for that.
        self.trace: Trace | None = trace_of(name, section)
        self.ffi, self.lib = layout.memory.core
        #: What `nd` points to; whoever keeps that keeps this.
        self.private: Any = zeros(self.lib.sh_node_bytes(layout.geometry))
        self.nd: Any = self.memory.node(self.private, layout.geometry, section)
        #: Where the core puts bytes that it takes out of a ring, and a buffer whose slices are bytes.
        room = self.ffi.new("char[]", self.lib.SH_COPY_MAX)
        self.room: tuple[Any, Any] = room, self.ffi.buffer(room)
        self.counts: dict[str, int] = dict.fromkeys(OF_ENGINE, 0)
        #: Called whenever something was published, or an event is to be told, maybe outside of a pass: one
        #: should follow. (The own node may be the peer, and nobody kicks itself.)
        self.stir: Callable[[], object] = lambda: None
        #: What messages call the region, and what else they say of where it is.
        self.url = "the region"
        self.hint: Callable[[], str] = str
        #: Events, oldest first: a function and its argument, called after the pass and not in it.
        self.events: deque[tuple[Callable[[Any], object], Any]] = deque()
        self.condemned: set[int] = set()  # peers that broke the rules too often: the pump drops them
        #: While one of these is not empty, a pass is owed.
        self.owed: tuple[Any, ...] = (self.events, self.condemned)
        #: Ends all that there is; called once, when the section turns out to be lost.
        self.down: Callable[[OSError], object] = self.end
        #: Why this node is over; None while it is not.
        self.ended: OSError | None = None

    def emit(self, call: Callable[[Any], object], arg: Any = None) -> None:
        """Have `call(arg)` called after this pass, or after the next one."""
        self.events.append((call, arg))
        self.stir()

    def now(self) -> int:
        """Return monotonic nanoseconds by the core's clock, for calls that come from outside of a pass."""
        return int(self.lib.sh_clock())

    # -- life

    @property
    def alive(self) -> bool:
        return self.ended is None

    def end(self, why: OSError) -> None:
        """End the node: nothing is stored from now on. Of several reasons the first stands."""
        if self.trace and self.ended is None:
            self.trace("over: %s", why)
        self.ended = self.ended or why
        self.lib.sh_node_inert(self.nd)

    def is_inert(self) -> bool:
        """Has the core stopped storing, as the section may be another's by now?"""
        return bool(self.lib.sh_node_is_inert(self.nd))

    def failure(self) -> OSError:
        """Return the error that says why this node may not touch the region any more."""
        return self.ended or node_closed(
            self.name,
            "its section was taken by another (this process or VM was stopped for too long), or the region "
            "was zeroed",
        )

    def check(self) -> None:
        """Raise NodeClosedError (or what else ended it) when this node is over. A node whose section was
        taken finds it out here, at its next call, and not only in the pump."""
        if self.ended is None and self.is_inert():
            self.down(self.failure())
        if self.ended is not None:
            raise self.ended
