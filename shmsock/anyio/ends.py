"""What streams, listeners and datagram sockets have in common: an end that the node knows, and what the user
holds."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Awaitable, Callable, Generator, Mapping
from types import coroutine
from typing import Any

import anyio
from anyio import BrokenResourceError
from anyio.abc import AsyncResource, SocketAttribute
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from shmsock.aio.node import Node
from shmsock.aio.pseudosocket import PseudoSocket

__all__ = ["RECEIVER", "SENDER", "Address", "End", "Resource", "ShmAttribute", "broken", "checkpoints"]

RECEIVER, SENDER = 0, 1
Address = tuple[str, int]


class ShmAttribute(anyio.TypedAttributeSet):
    """Attributes of streams, listeners and datagram sockets, beside those of SocketAttribute."""

    #: the node behind it
    node: Node = anyio.typed_attribute()
    #: the peer's section
    peer: int = anyio.typed_attribute()


def broken(cause: BaseException) -> BrokenResourceError:
    error = BrokenResourceError(str(cause))
    error.__cause__ = cause
    return error


Checkpoint = Callable[[], Awaitable[None]]


def checkpoints(node: Node) -> tuple[Checkpoint, Checkpoint]:
    """Return checkpoint() for a task that polls its ring next, and checkpoint_if_cancelled(). Those of
    anyio.lowlevel look the backend up each time."""
    loop = node.loop
    if hasattr(loop, "checkpoint"):
        return loop.checkpoint, loop.checkpoint_if_cancelled

    @coroutine
    def turn() -> Generator[None, None, None]:
        node.pump.polled = 2
        yield

    token = getattr(anyio.lowlevel, "current_token", None)  # anyio 4.11
    return turn, token().backend_class.checkpoint_if_cancelled if token else checkpoint_if_cancelled


class End:
    """What node and engine know of a stream, a listener or a datagram socket, so that one that is dropped can
    be collected. At most one task waits on each side."""

    node: Node
    closed: bool
    flushing = False

    def __init__(self, node: Node) -> None:
        self.node, self.closed = node, False
        self._waiters: list[Any] = [None, None]
        self._woken = [False, False]
        node.transports.add(self)

    async def sleep(self, side: int) -> None:
        """Wait until wake() is called for that side."""
        waiter = self._waiters[side] = self.node.loop.create_future()
        try:
            if not self.closed:  # else closed just now by a signal handler, and nobody would wake us
                await waiter
        finally:
            self._waiters[side] = None
            if self._woken[side]:
                self._woken[side] = False
                self.node.pump.runs()

    def wake(self, side: int) -> None:
        waiter = self._waiters[side]
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
            self._woken[side] = True
            self.node.pump.will_run()

    def close(self) -> None:
        """Close this end; tasks that wait get ClosedResourceError. Raises RuntimeError on another thread."""
        if not self.closed and self.node.engine.alive:
            self.node.check()
        self.node_closed()

    def node_closed(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self.node.loop.is_closed():
            self.wake(RECEIVER)
            self.wake(SENDER)
        self.node.transports.discard(self)
        self.end()

    def end(self) -> None:
        """Close what is below, in the engine."""

    def freed(self) -> None:
        """Do nothing, in a forked child: the next call finds out."""


class Resource(AsyncResource, anyio.TypedAttributeProvider):
    """What the user holds: closes its end, and warns when it is collected unclosed."""

    def __init__(
        self,
        end: End,
        local: Address,
        remote: Address | None,
        fileno: Callable[[], int],
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> None:
        self._end, self._local, self._remote = end, local, remote
        self._sock = PseudoSocket(local, remote, fileno, kind)

    def __repr__(self) -> str:
        peer = f" - {self._remote}" if self._remote else ""
        return f"<{type(self).__name__} {'closed' if self._end.closed else 'open'} {self._local}{peer}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # Never into C from here: the collector may run on any thread, while the loop's own is inside C.
        end = getattr(self, "_end", None)
        if end is not None and not (end.closed or end.node.closed):
            end.node.call(end.close)
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        found: dict[Any, Callable[[], Any]] = {
            ShmAttribute.node: lambda: self._end.node,
            SocketAttribute.family: lambda: self._sock.family,
            SocketAttribute.local_address: lambda: self._local,
            SocketAttribute.local_port: lambda: self._local[1],
            SocketAttribute.raw_socket: lambda: self._sock,
        }
        if (remote := self._remote) is not None:
            found[SocketAttribute.remote_address] = lambda: remote
            found[SocketAttribute.remote_port] = lambda: remote[1]
        return found

    def close(self) -> None:
        """Close this end as aclose() does, where nothing can be awaited. Raises WrongThreadError."""
        self._end.close()

    async def aclose(self) -> None:
        """Close this end. What was sent arrives, also when this is cancelled; connections that accept() has
        not returned are reset. Harmless when repeated."""
        self.close()
        await checkpoint()
