"""What `get_extra_info("socket")` and `Server.sockets` give: no kernel socket, but what libraries ask of one.

The model is asyncio.trsock.TransportSocket. Addresses are those of the transport; options read as those of
asyncio's sockets, can be set and are remembered, and mean nothing.
"""

from __future__ import annotations

import os
import socket
import struct
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from shmsock.errors import wrong_thread
from shmsock.wakeup import eventfd

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["NO_LINGER", "Duplicate", "PollFd", "PseudoSocket", "fileno_of", "stream_socket"]

NO_LINGER = struct.pack("ii", 1, 0)
_PROTOCOLS = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}


class Duplicable(Protocol):
    """What a pseudo-socket and its duplicates ask of a transport."""

    superseded: bool
    node: Any

    def fileno(self) -> int: ...
    def get_extra_info(self, name: str) -> Any: ...
    def duplicate(self) -> Duplicate: ...
    def let_go(self) -> None: ...


class PollFd:
    """An eventfd that is readable while the stream is: data, or its end."""

    def __init__(self) -> None:
        self.fd = eventfd()
        self._set = False

    def update(self, readable: bool) -> None:
        try:
            if readable and not self._set:
                os.eventfd_write(self.fd, 1)
            elif self._set and not readable:
                os.eventfd_read(self.fd)
        except OSError:
            pass  # the program has read or closed it, and polls in vain: no bytes are lost by that
        self._set = readable

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PseudoSocket:
    """Stands in for a socket. `fileno` is asked for a descriptor to poll (POLLIN: data, or the end), -1 when
    there is none.
    `options`: what is set already, by (level, option). `duplicate` makes what dup() gives."""

    __slots__ = ("_duplicate", "_fileno", "_options", "_peername", "_sockname", "type")

    proto = 0
    timeout = 0.0

    def __init__(
        self,
        sockname: tuple[str, int],
        peername: tuple[str, int] | None,
        fileno: Callable[[], int],
        kind: socket.SocketKind = socket.SOCK_STREAM,
        *,
        options: dict[tuple[int, int], Any] | None = None,
        duplicate: Callable[[], Duplicate] | None = None,
    ) -> None:
        self._sockname, self._peername, self._fileno, self.type = sockname, peername, fileno, kind
        self._duplicate = duplicate
        self._options: dict[tuple[int, int], Any] = {
            (socket.SOL_SOCKET, socket.SO_TYPE): int(kind),
            (socket.SOL_SOCKET, socket.SO_DOMAIN): int(self.family),
            (socket.SOL_SOCKET, socket.SO_PROTOCOL): _PROTOCOLS[kind],
            **(options or {}),
        }

    @property
    def family(self) -> socket.AddressFamily:
        """The family of the addresses that stand for names; AF_INET where addresses are names."""
        return socket.AF_INET6 if ":" in self._sockname[0] else socket.AF_INET

    def __repr__(self) -> str:
        peer = f", raddr={self._peername}" if self._peername else ""
        return f"<shmsock.PseudoSocket type={self.type!s}, laddr={self._sockname}{peer}>"

    def __getstate__(self) -> NoReturn:
        raise TypeError("Cannot serialize shmsock.PseudoSocket object")

    def fileno(self) -> int:
        """Return a descriptor to poll, never to read from: readable while there is data, or the end. Raises
        WrongThreadError on another thread than the loop's."""
        return self._fileno()

    def getsockname(self) -> tuple[str, int]:
        return self._sockname

    def getpeername(self) -> tuple[str, int]:
        """Return the peer's address. Raises OSError (ENOTCONN) when there is no peer, as a socket does."""
        if self._peername is None:
            raise OSError(107, "Transport endpoint is not connected")
        return self._peername

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """Return what setsockopt() was given, else what asyncio's sockets have, else 0."""
        value = self._options.get((level, option), 0)
        if buflen:
            return value if isinstance(value, bytes) else int(value).to_bytes(buflen, "little")
        return value if isinstance(value, int) else int.from_bytes(bytes(value), "little")

    def setsockopt(self, level: int, option: int, value: Any, optlen: int | None = None) -> None:
        """Remember an option, without effect: there is no kernel socket."""
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

    def dup(self) -> Duplicate:
        """Return an object that keeps the connection open when its transport is closed.
        create_connection(sock=) of the same loop goes on with it: database drivers begin TLS on an open
        connection like this.

        Raises OSError: EBADF when the connection has ended; EOPNOTSUPP when there is none (a listener, or
        datagrams)."""
        if self._duplicate is None:
            raise OSError(
                95, "there is no kernel socket behind a shmsock transport: only a connection has a dup()"
            )
        return self._duplicate()


def fileno_of(transport: Duplicable) -> Callable[[], int]:
    """Return what asks it for its descriptor, without keeping it."""
    me = weakref.ref(transport)

    def ask() -> int:
        found = me()
        return -1 if found is None else found.fileno()

    return ask


def stream_socket(transport: Duplicable, options: dict[tuple[int, int], Any]) -> PseudoSocket:
    """Make the pseudo-socket of a connection, which does not keep the transport."""
    me, address = weakref.ref(transport), transport.get_extra_info

    def duplicate() -> Duplicate:
        found = me()
        if found is None:
            raise OSError(9, "the connection has ended: there is nothing to duplicate")
        return found.duplicate()

    return PseudoSocket(
        address("sockname"),
        address("peername"),
        fileno_of(transport),
        options={(socket.IPPROTO_TCP, socket.TCP_NODELAY): 1, **options},
        duplicate=duplicate,
    )


class Duplicate(PseudoSocket):
    """What dup() returns. One that is not used is closed by close(), or by the collector."""

    __slots__ = ("_transport",)

    def __init__(self, transport: Duplicable, fileno: Callable[[], int]) -> None:
        self._transport: Duplicable | None = transport
        address = transport.get_extra_info
        super().__init__(address("sockname"), address("peername"), fileno, duplicate=transport.duplicate)
        self._options = address("socket")._options

    def take(self, loop: Any) -> Any:
        """Return the transport whose connection it is; create_connection() goes on with that.

        Raises OSError (EBADF) when it was closed or used, RuntimeError on another thread or loop."""
        transport = self._transport
        if transport is None or transport.superseded:
            raise OSError(9, f"{self!r} was closed, or its connection goes on elsewhere: take another dup()")
        transport.node.check()
        if transport.node.loop is not loop:
            raise wrong_thread(repr(self))
        return transport

    def taken(self) -> None:
        """Note that the connection goes on elsewhere: there is nothing left to close."""
        self._transport = None

    def detach(self) -> int:
        """Close it, and return -1, as there is no descriptor."""
        self.close()
        return -1

    def close(self) -> None:
        """Close it, and end the connection if this was the last to hold it open; harmless when repeated."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.let_go()

    def __enter__(self) -> Duplicate:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Never into C from here: the collector may run on any thread.
        transport = getattr(self, "_transport", None)
        if transport is not None:
            transport.node.call(transport.let_go)
