"""What `get_extra_info("socket")` and `Server.sockets` give: no kernel socket, but what libraries ask of one.

The model is asyncio.trsock.TransportSocket. Addresses are those of the transport; options can be set and
are remembered, and mean nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from shmsock.wakeup import eventfd

__all__ = ["PollFd", "PseudoSocket"]


class PollFd:
    """An eventfd that is readable while the stream is: data, or its end."""

    def __init__(self) -> None:
        self.fd = eventfd()
        self._set = False

    def update(self, readable: bool) -> None:
        if readable and not self._set:
            os.eventfd_write(self.fd, 1)
        elif self._set and not readable:
            os.eventfd_read(self.fd)
        self._set = readable

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PseudoSocket:
    """`fileno` is asked for a descriptor to poll (POLLIN: data, or the end), -1 when there is none."""

    __slots__ = ("_fileno", "_options", "_peername", "_sockname", "type")

    family = socket.AF_INET
    proto = 0
    timeout = 0.0

    def __init__(
        self,
        sockname: tuple[str, int],
        peername: tuple[str, int] | None,
        fileno: Callable[[], int],
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> None:
        self._sockname, self._peername, self._fileno, self.type = sockname, peername, fileno, kind
        self._options: dict[tuple[int, int], Any] = {(socket.SOL_SOCKET, socket.SO_TYPE): int(kind)}

    def __repr__(self) -> str:
        peer = f", raddr={self._peername}" if self._peername else ""
        return f"<shmsock.PseudoSocket type={self.type!s}, laddr={self._sockname}{peer}>"

    def __getstate__(self) -> NoReturn:
        raise TypeError("Cannot serialize shmsock.PseudoSocket object")

    def fileno(self) -> int:
        """A descriptor to poll, never to read from: readable while there is data, or the end."""
        return self._fileno()

    def getsockname(self) -> tuple[str, int]:
        return self._sockname

    def getpeername(self) -> tuple[str, int]:
        """Raises OSError (ENOTCONN) when there is no peer, as a socket does."""
        if self._peername is None:
            raise OSError(107, "Transport endpoint is not connected")
        return self._peername

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """What setsockopt() was given, else 0."""
        value = self._options.get((level, option), 0)
        if buflen:
            return value if isinstance(value, bytes) else int(value).to_bytes(buflen, "little")
        return value if isinstance(value, int) else int.from_bytes(bytes(value), "little")

    def setsockopt(self, level: int, option: int, value: Any, optlen: int | None = None) -> None:
        """Remembered, without effect: there is no kernel socket."""
        self._options[level, option] = value if isinstance(value, int) else bytes(value or optlen or 0)

    def getblocking(self) -> bool:
        return False

    def gettimeout(self) -> float:
        return 0.0

    def settimeout(self, value: float | None) -> None:
        if value != 0:
            raise ValueError("settimeout(): only 0 timeout is allowed on transport sockets")

    def setblocking(self, flag: bool) -> None:
        if flag:
            raise ValueError("setblocking(): transport sockets cannot be blocking")

    def get_inheritable(self) -> bool:
        return False

    def shutdown(self, how: int) -> NoReturn:
        raise OSError(
            95, "there is no kernel socket to shut down: use the transport's write_eof() or abort()"
        )

    def dup(self) -> NoReturn:
        raise OSError(95, "there is no kernel socket behind a shmsock transport: it cannot be duplicated")
