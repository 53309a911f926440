"""Doorbells: how a process is kicked, and kicks others, beside the memory of a region.

A doorbell is a hint. It may be lost, late, or for nobody, and nothing says who kicked: what happened stands
in memory.
"""

from __future__ import annotations

import errno
import os
import select
from typing import NamedTuple

__all__ = ["Doorbell", "Reach"]


class Reach(NamedTuple):
    """The way to kick another peer: 8 bytes that say 1, written to its eventfd, or `value`, 4 bytes,
    written at `offset` of a device (a register)."""

    kind: str
    """"eventfd" or "register"."""
    fd: int
    offset: int = 0
    value: int = 0


class Doorbell:
    """Our doorbell, and the way to kick others by theirs. Belongs to a Region, which closes it."""

    id: int
    """Our peer id, 0 to 65535: others kick it."""
    vectors: int
    """Our vectors, 1 to 64 of them. Peers kick through vector 0."""
    fd: int
    """An eventfd: readable once somebody kicked."""
    server_fd = -1
    """Readable when the server has news: call news(). -1: nobody tells us."""
    lost = ""
    """Why there are no doorbells any more; "" while there are."""

    def reach(self, peer: int) -> Reach | None:
        """Tell how to kick the peer with that id; None when it is not known, or our own."""
        raise NotImplementedError

    def others(self) -> frozenset[int] | None:
        """The ids of all other peers there are now; None: nobody tells us."""
        return None

    def drain(self) -> int:
        """Count the kicks since the last call. Never waits, even if others made the eventfd blocking:
        a peer of an ivshmem server shares it with everybody."""
        data = bytearray(8)
        try:
            os.preadv(self.fd, [data], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:  # EOPNOTSUPP before Linux 5.8
            if error.errno != errno.EOPNOTSUPP:
                raise
            return os.eventfd_read(self.fd) if select.select([self.fd], [], [], 0)[0] else 0
        return int.from_bytes(data, "little")

    def news(self) -> list[int]:
        """Take in what the server said: the ids of peers that left. Never waits, never raises; `lost` is set
        when the server is gone or talks nonsense."""
        return []

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        raise NotImplementedError
