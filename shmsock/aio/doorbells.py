"""A node's ear at its doorbell: counts what rings, follows the ivshmem server's news, and falls back to
polling when doorbells do not arrive, arrive for nothing, or are gone for good."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from shmsock.region.doorbell import Doorbell

if TYPE_CHECKING:
    from shmsock.aio.node import Node

__all__ = ["DoorbellListener"]

STORM_S = 60

log = logging.getLogger("shmsock")


class DoorbellListener:
    """`bell`: None when there is none, or none any more."""

    def __init__(self, node: Node, bell: Doorbell | None) -> None:
        self.node, self.bell = node, bell
        self._deaf_until, self._deaf_s = 0, 1
        if bell is not None:
            self._listen(bell.fd, self._rang)
            if bell.server_fd >= 0:
                self._listen(bell.server_fd, self._news)

    def _listen(self, fd: int, callback: object) -> None:
        self.node.context.run(self.node.loop.add_reader, fd, callback)

    def _rang(self) -> None:
        self.hear()
        self.node.woken()

    def hear(self) -> None:
        """Count what rang; before the pump looks. Whatever it was for, a pump must follow: who rang for this
        sleep does not ring again. A thousand doorbells in a second that are for nobody are not listened to
        for a while, longer each time."""
        node, bell = self.node, self.bell
        if bell is not None and not self._deaf_until:
            if node.lib.sh_hear(node.nd, bell.fd):
                log.warning(
                    "%r: a thousand interrupts within a second for nothing: polling for %d s",
                    node,
                    self._deaf_s,
                )
                node.loop.remove_reader(bell.fd)
                node.engine.wakes.withdraw()
                self._deaf_until = time.monotonic_ns() + self._deaf_s * 1_000_000_000
                self._deaf_s = min(self._deaf_s * 2, STORM_S)
        elif bell is not None and time.monotonic_ns() >= self._deaf_until:
            self._deaf_until = 0
            bell.drain()
            self._listen(bell.fd, self._rang)
            node.engine.wakes.restore(bell)

    def look(self) -> None:
        """When the heartbeat has woken the loop: has a doorbell been lost?"""
        self.hear()
        node = self.node
        if lost := node.lib.sh_lost(node.nd):
            missed = [peer.name for peer in node.engine.peers.all if lost >> peer.section & 1]
            log.warning(
                "%r: doorbells of %s do not arrive: polling instead, until one does", node, ", ".join(missed)
            )

    def _news(self) -> None:
        """The ivshmem server says something, or nothing any more."""
        node, bell = self.node, self.bell
        if bell is None:
            return
        node.engine.left_server(bell.news(), time.monotonic_ns())
        if bell.lost:
            log.warning(
                "%r goes on without doorbells (see woken_by in its statistics()): %s", node, bell.lost
            )
            self.close()
            node.engine.wakes.withdraw()
        node.woken()

    def close(self) -> None:
        """Listen no more. The loop must be open."""
        bell, self.bell = self.bell, None
        if bell is not None:
            if not self._deaf_until:
                self.node.loop.remove_reader(bell.fd)
            if bell.server_fd >= 0:
                self.node.loop.remove_reader(bell.server_fd)
