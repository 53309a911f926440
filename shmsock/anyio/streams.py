"""Byte streams and their listeners, straight on the engine's connections.

Bytes are copied once between ring and user, and leave the ring only after the last await of receive(), so
that cancelling loses none.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream
from anyio.abc import ByteStream, Listener, TaskGroup
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from shmsock.aio.node import Node
from shmsock.aio.pseudosocket import PollFd
from shmsock.aio.pump import FastPath
from shmsock.anyio.ends import RECEIVER, SENDER, End, Resource, ShmAttribute, broken, checkpoints
from shmsock.engine.connection import (
    DONE,
    EMPTY,
    EOF,
    MOVED,
    SPACE,
    YIELD,
    Connection,
    State,
)
from shmsock.engine.listeners import Listener as PortListener
from shmsock.errors import wrong_thread

__all__ = ["ShmListener", "ShmStream"]

T = TypeVar("T", bytes, int)


class _WriteAfterEof(BrokenResourceError, RuntimeError):
    """Raised by send() after send_eof(): anyio's TCP raises one of these on trio and the other on asyncio."""


class _StreamEnd(End):
    """The end of a stream: handler of a connection of the engine."""

    def __init__(self, node: Node, conn: Connection) -> None:
        super().__init__(node)
        self.conn = conn
        self.live = conn.state is State.OPEN  # slot and ring are still this connection's
        self.fast_path = FastPath(node.pump, conn, self)
        self.fast_path.can_write = self.fast_path.can_read = self.live
        self.poll: PollFd | None = None
        conn.handler = self

    def ready(self, bits: int) -> None:
        if self.conn.state is not State.OPEN or self.conn.orphaned_ns:
            self.wake(RECEIVER)
            self.wake(SENDER)
        else:
            if bits & ~(SPACE | MOVED):
                self.wake(RECEIVER)
            if bits & (SPACE | DONE):
                self.wake(SENDER)
        self.update_poll()

    def failed(self, error: OSError) -> None:
        self.ready(0)

    def freed(self) -> None:
        self.live = self.fast_path.can_write = self.fast_path.can_read = False

    def end(self) -> None:
        self.freed()
        self.conn.handler = None
        if self.poll is not None:
            self.poll.close()
        if self.node.engine.alive:
            self.conn.close()

    def fileno(self) -> int:
        if self.closed:
            return -1
        if threading.get_ident() != self.node.ident:
            raise wrong_thread(repr(self.conn))
        self.poll, self.fast_path.can_read = self.poll or PollFd(), False  # each receive() tells it
        self.update_poll()
        return self.poll.fd

    def update_poll(self) -> None:
        if self.poll is not None and not self.closed:
            self.poll.update(self.conn.available() != EMPTY)


class ShmStream(Resource, ByteStream):
    """A stream of bytes between two peers of a region, as anyio's SocketStream is one over TCP. One task may
    receive while another sends; a second one on the same side gets BusyResourceError."""

    _end: _StreamEnd

    def __init__(self, node: Node, conn: Connection) -> None:
        end = _StreamEnd(node, conn)
        super().__init__(end, conn.local, conn.remote, end.fileno)
        self._node, self._conn, self._fast_path = node, conn, end.fast_path
        self._receiving = self._sending = self._shut = self._wrote_in_vain = False
        self._turn, self._if_cancelled = checkpoints(node)

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {**super().extra_attributes, ShmAttribute.peer: lambda: self._conn.peer}

    @property
    def ended(self) -> bool:
        """Whether this end is closed, or the peer is gone, or has closed its own and all it sent was read."""
        return not self._end.live or bool(self._conn.orphaned_ns)

    # -- receiving

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for bytes, and return 1 to `max_bytes` of them. Raises EndOfStream when the peer has sent all,
        ClosedResourceError after aclose(), BrokenResourceError when the connection was reset. Cancelling
        loses no byte."""
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        if self._receiving:
            raise BusyResourceError("reading from")
        self._receiving = True
        try:
            await self._turn()
            data: bytes | None = self._fast_path.take(max_bytes)
            return await self._receive_slowly(self._conn.read, max_bytes) if data is None else data
        finally:
            self._receiving = False

    async def receive_into(self, buffer: Any) -> int:
        """Wait for bytes, put them into `buffer`, as many as there are and it has room for, and return their
        number: receive() without a copy. Raises what that does, and BufferError or TypeError for what is no
        writable buffer. Cancelling loses no byte."""
        room = memoryview(buffer).cast("B")
        if room.readonly or not room:
            raise TypeError("the buffer must be writable, and not empty")
        if self._receiving:
            raise BusyResourceError("reading from")
        self._receiving = True
        try:
            await self._turn()
            n: int | None = self._fast_path.take_into(room)
            if n is not None:
                return n
            with self._node.engine.ffi.from_buffer(room) as to:
                return await self._receive_slowly(self._conn.read_into, to, len(room))
        finally:
            self._receiving = False

    async def _receive_slowly(self, read: Callable[..., T | int], *where: Any) -> T:
        end, node, conn = self._end, self._node, self._conn
        while end.live:
            if not node.pump.scheduled:
                node.pump.begin_turn()
            data: Any = read(*where)
            if isinstance(data, bytes) or data > 0:
                end.update_poll()
                return data  # type: ignore[no-any-return]
            if data == EOF:
                raise EndOfStream
            if data not in (EMPTY, YIELD):
                break
            if not node.lib.sh_arm(conn.ep):
                await end.sleep(RECEIVER)
        raise self._failure() or EndOfStream

    def _failure(self) -> Exception | None:
        """Return what both directions raise, if anything."""
        if self._end.closed:
            return ClosedResourceError()
        try:
            self._node.check()
        except OSError as error:
            return broken(error)
        return None if self._conn.error is None else broken(self._conn.error)

    # -- sending

    async def send(self, item: bytes) -> None:
        """Send all of `item`, and wait until it is in the ring. Raises ClosedResourceError after aclose(),
        BrokenResourceError when the peer reads no more or send_eof() was called. Cancelled, what had room in
        the ring stays there, and arrives."""
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await self._if_cancelled()
            taken = self._fast_path.put(item)
            if taken is None:
                return
            if taken and taken == len(item):
                await cancel_shielded_checkpoint()
            else:
                await self._send_rest(memoryview(item).cast("B"), taken)
        finally:
            self._sending = False

    def send_nowait(self, item: bytes) -> int:
        """Put into the ring what there is room for, without waiting, and return how many bytes that is. 0 as
        well when nothing more can be sent, and for what is no bytes object: send() says why. Raises
        BusyResourceError while something is being sent."""
        if self._sending:
            raise BusyResourceError("writing to")
        taken: int | None = self._fast_path.put(item)
        return len(item) if taken is None else taken

    async def _send_rest(self, data: memoryview, sent: int) -> None:
        node, fresh = self._node, not sent
        while True:
            if (failure := self._failure()) is not None:
                raise failure
            if self._shut:
                raise _WriteAfterEof("send_eof() was called: nothing more can be sent")
            rest = data[sent:]
            taken = self._conn.write(node.engine.ffi.from_buffer(rest), len(rest)) if rest else 0
            if taken < 0:
                if fresh and not self._wrote_in_vain and not self._conn.orphaned_ns:
                    self._wrote_in_vain = True  # as over TCP: the first one after the peer closed is lost
                    return
                raise self._failure() or self._reads_no_more()
            sent += taken
            if sent == len(data):
                return
            fresh = False
            await self._room()

    def _reads_no_more(self) -> BrokenResourceError:
        return broken(BrokenPipeError(errno.EPIPE, f"{self._conn.remote} closed the connection"))

    async def _room(self) -> None:
        """Wait until there is room in the ring, or something that send() finds out."""
        end, pump, lib = self._end, self._node.pump, self._node.lib
        while end.live:
            if not pump.scheduled:
                pump.begin_turn()
            if lib.sh_wait_space(self._conn.ep, pump.may_spin()):
                if lib.sh_over(self._node.nd):
                    await checkpoint()
                return
            await end.sleep(SENDER)

    async def send_eof(self) -> None:
        """Have the peer get EndOfStream behind what was sent; receiving goes on. Raises
        ClosedResourceError, BusyResourceError while something is being sent. Cancelled, it is not begun."""
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await self._if_cancelled()
            if self._end.closed:
                raise ClosedResourceError
            if not self._shut:
                self._node.check()
                self._shut, self._fast_path.can_write = True, False
                self._conn.finish()
            await cancel_shielded_checkpoint()
        finally:
            self._sending = False


class _ListenerEnd(End):
    def __init__(self, node: Node, listener: PortListener) -> None:
        super().__init__(node)
        self.listener = listener
        self.queue: deque[Connection] = deque()
        listener.handler = self._accepted

    def _accepted(self, conn: Connection) -> None:
        self.queue.append(conn)
        self.wake(RECEIVER)

    def take(self) -> Connection:
        self.listener.taken()
        return self.queue.popleft()

    def end(self) -> None:
        self.listener.close()
        while self.queue:
            self.queue.popleft().abort()


class ShmListener(Resource, Listener[ShmStream]):
    """Connections to one port, as anyio's SocketListener."""

    _end: _ListenerEnd

    def __init__(self, node: Node, hosts: list[Any], port: int, backlog: int, reuse_port: bool) -> None:
        below = node.listen(hosts, port, backlog=min(max(backlog, 1), 65536), reuse_port=reuse_port)
        super().__init__(_ListenerEnd(node, below), (node.name, below.port), None, lambda: -1)
        self._accepting = anyio.ResourceGuard("accepting connections from")

    async def accept(self) -> ShmStream:
        """Wait for the next connection, and return its stream. Raises ClosedResourceError. Cancelling loses
        none."""
        end = self._end
        with self._accepting:
            await checkpoint()
            while not (end.queue or end.closed):
                await end.sleep(RECEIVER)
            if end.closed:
                raise ClosedResourceError
            return ShmStream(end.node, end.take())

    async def serve(self, handler: Callable[[ShmStream], Any], task_group: TaskGroup | None = None) -> None:
        """Start `handler(stream)` for each connection, in `task_group` or one of its own, until this is
        cancelled. Raises ClosedResourceError after aclose()."""
        if task_group is None:
            async with anyio.create_task_group() as own:
                await self.serve(handler, own)
        else:
            while True:
                task_group.start_soon(handler, await self.accept())
