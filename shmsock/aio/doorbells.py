"""Listening to a node's doorbell: counting its interrupts, following the ivshmem server's news, and falling
back to polling when doorbells do not arrive, arrive for nothing, or are gone for good."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shmsock.engine.engine import Engine
from shmsock.region.doorbell import Doorbell

__all__ = ["DoorbellListener"]

FLOOD_S = 60

log = logging.getLogger("shmsock")


class DoorbellListener:
    """Listens to one node's doorbell. `bell`: None when there is none, or none any more. `listen` and `leave`
    add and remove a reader of the loop, `woken` has the pump look, messages name `node`."""

    def __init__(
        self,
        engine: Engine,
        bell: Doorbell | None,
        listen: Callable[[int, Callable[[], None]], object],
        leave: Callable[[int], object],
        woken: Callable[[], object],
        node: object,
    ) -> None:
        self.bell = bell
        self._engine, self._listen, self._leave = engine, listen, leave
        self._woken, self._node = woken, node
        self._deaf_until, self._deaf_s = 0, 1
        if bell is not None:
            self._listen(bell.fd, self._rang)
            if bell.server_fd >= 0:
                self._listen(bell.server_fd, self._news)

    def _rang(self) -> None:
        self.hear()
        self._woken()

    def hear(self) -> None:
        """Count the interrupts, before the pump polls. Whatever they were for, a pass must follow: a peer
        kicks once for each sleep. A thousand doorbells in a second that are for nobody are not listened to
        for a while, longer each time."""
        engine, bell = self._engine, self.bell
        if bell is not None and not self._deaf_until:
            if engine.lib.sh_hear(engine.nd, bell.fd):
                log.warning(
                    "%r: a thousand interrupts within a second for nothing: polling for %d s",
                    self._node,
                    self._deaf_s,
                )
                self._leave(bell.fd)
                engine.wakes.withdraw()
                self._deaf_until = time.monotonic_ns() + self._deaf_s * 1_000_000_000
                self._deaf_s = min(self._deaf_s * 2, FLOOD_S)
        elif bell is not None and time.monotonic_ns() >= self._deaf_until:
            self._deaf_until = 0
            bell.drain()
            self._listen(bell.fd, self._rang)
            engine.wakes.restore(bell)

    def look(self) -> None:
        """Find out, when the heartbeat has woken the loop, whether a doorbell has been lost."""
        self.hear()
        engine = self._engine
        if lost := engine.lib.sh_lost(engine.nd):
            missed = [peer.name for peer in engine.peers.all if lost >> peer.section & 1]
            log.warning(
                "%r: doorbells of %s do not arrive: polling instead, until one does",
                self._node,
                ", ".join(missed),
            )

    def _news(self) -> None:
        """Take in what the ivshmem server says, or that it has gone."""
        engine, bell = self._engine, self.bell
        if bell is None:
            return
        engine.left_server(bell.news(), time.monotonic_ns())
        if bell.lost:
            log.warning(
                "%r goes on without doorbells (see woken_by in its statistics()): %s", self._node, bell.lost
            )
            self.close()
            engine.wakes.withdraw()
        self._woken()

    def close(self) -> None:
        """Stop listening. The loop must be open."""
        bell, self.bell = self.bell, None
        if bell is not None:
            if not self._deaf_until:
                self._leave(bell.fd)
            if bell.server_fd >= 0:
                self._leave(bell.server_fd)
