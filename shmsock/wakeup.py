"""The heartbeat of a node, which wakes its sleeping loop: one eventfd, filled by the heartbeat thread when a
peer's notify_seq moves, and when the engine wants a pass. (Doorbells have an eventfd of their own, which the
loop waits on as well.)

The heartbeat is native, holds no GIL and takes no signals. It also beats (others see that this process lives)
and watches the locks of peers under the same kernel.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from shmsock.engine.memory import Core
from shmsock.native._core import lib

__all__ = ["Heartbeat", "eventfd"]

BEAT_NS = 100_000_000
LOCK: int = lib.SH_HEARD_LOCK
SUSPECTED_LOSS: int = lib.SH_HEARD_SUSPECTED_LOSS


def eventfd() -> int:
    """Make a non-blocking eventfd. Raises OSError when descriptors run out."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class Heartbeat:
    """The heartbeat thread of one node. Owns the eventfd `fd`. After stop() calls do nothing."""

    fd: int

    def __init__(self, core: Core, nd: Any, *, lock_fd: int, look_cap_us: int, futex: bool = False) -> None:
        """Start the thread. `lock_fd`: the file whose locks are watched. `futex`: peers can wake this node by
        a futex. `look_cap_us`: the longest pause, in microseconds, between two polls of peers that cannot.
        Raises OSError."""
        self._core, self._lib, self._nd = core, core.lib, nd  # the thread looks at `nd`
        self.fd = eventfd()
        #: What `native` points to; whoever keeps that keeps this.
        self.private: Any = core.ffi.new("uint8_t[]", core.lib.sh_heartbeat_bytes())
        self.native: Any = core.ffi.cast("sh_heartbeat *", self.private)
        status = core.lib.sh_heartbeat_start(
            self.native, nd, self.fd, lock_fd, BEAT_NS, look_cap_us * 1000, int(futex)
        )
        if status < 0:
            os.close(self.fd)
            raise OSError(errno.EAGAIN, f"cannot start the heartbeat thread: {os.strerror(errno.EAGAIN)}")

    def arm(self, hurry: bool) -> bool:
        """Fall asleep: `fd` becomes readable once, when a notify_seq moved, or at the first beat after the
        engine wants a pass (`hurry`: at the next beat). False: one has moved already, and a pass must
        follow."""
        return bool(self._lib.sh_heartbeat_arm(self.native, hurry))

    def heard(self) -> int:
        """Empty the eventfd. Before the pump looks, never after: what comes in between must make it readable
        again. Returns what is to be asked besides: LOCK (see unlocked()),
        SUSPECTED_LOSS (a doorbell may be lost)."""
        bits: int = self._lib.sh_heartbeat_heard(self.native)
        return bits

    @property
    def address(self) -> int:
        """The address of `native`, what C calls sh_heartbeat."""
        return int(self._core.ffi.cast("uintptr_t", self.native))

    def watch(self, section: int, locked: bool) -> None:
        """Watch the lock of that section, or stop watching it."""
        self._lib.sh_heartbeat_watch(self.native, section, int(locked))

    def unlocked(self) -> int:
        """Return a mask of the watched sections whose lock fell."""
        mask: int = self._lib.sh_heartbeat_unlocked(self.native)
        return mask

    def stop(self) -> None:
        """Join the thread (it is never in the way for longer than a millisecond) and close the eventfd."""
        self._end(join=True)

    def forget(self) -> None:
        """Do the same in a forked child, where there is no thread to join."""
        self._end(join=False)

    def _end(self, join: bool) -> None:
        self._lib.sh_heartbeat_stop(self.native, join)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
