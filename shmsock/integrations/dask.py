"""A backend of dask.distributed for `shm://` and `tcp+shm://`, which distributed finds by itself.

`shm://NAME:PORT` is a port of a peer of the region. `tcp+shm://HOST:PORT/NAME:PORT@REGION` is both: who is
attached to that region connects through it, everybody else over TCP. A listener of `tcp+shm://` offers both,
or TCP alone where it has no region.

On the wire a message is the number of its frames and of all their bytes, the size of each, and the frames as
they are: never split, and each read into memory of its own, so that an array needs no further copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import struct
import sys
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import accumulate, pairwise
from typing import Any

from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import BaseListener, Comm, CommClosedError, Connector, FatalCommClosedError
from distributed.comm.registry import Backend, get_backend
from distributed.comm.utils import from_frames, to_frames
from distributed.protocol.utils import host_array
from distributed.utils import ensure_memoryview

from shmsock.address import default_name, is_any, is_local, normalize_name
from shmsock.aio.attach import ATTACH_S, current_node, node_if_any, on_current_node
from shmsock.aio.node import Node
from shmsock.anyio import ShmAttribute, ShmListener, ShmStream, create_shm_listener
from shmsock.errors import RegionError

__all__ = ["Shm", "ShmBackend", "TcpShmBackend"]

HEAD = struct.Struct("<QQ")
SMALL = 1 << 17  # bytes up to which a message is written and read in one piece
FRAGMENTED = 1 << 25, 1 << 15  # likewise, if its frames have fewer bytes than this on the average
MOST_FRAMES = 1 << 24

log = logging.getLogger("shmsock")
Handler = Callable[[Comm], Awaitable[None]]


def _in_one(count: int, total: int) -> bool:
    return total < SMALL or (total < FRAGMENTED[0] and total // count < FRAGMENTED[1])


def _pieces(frames: list[Any]) -> tuple[list[Any], int]:
    """Return what a message is on the wire, in pieces that are not empty, and how many bytes that is."""
    views = [ensure_memoryview(frame) for frame in frames]
    sizes: list[int] = [view.nbytes for view in views]
    head = HEAD.pack(len(sizes), sum(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    pieces = [head, *(view for view in views if view.nbytes)]
    return [b"".join(pieces)] if _in_one(len(sizes), sum(sizes)) else pieces, len(head) + sum(sizes)


async def _fill(stream: ShmStream, room: memoryview) -> memoryview:
    at = 0
    while at < len(room):
        at += await stream.receive_into(room[at:])
    return room


async def _receive(stream: ShmStream) -> list[memoryview]:
    count, total = HEAD.unpack(await _fill(stream, memoryview(bytearray(HEAD.size))))
    if count > MOST_FRAMES:
        raise EOFError("a message that no Dask writes")
    in_one, sizes_end = _in_one(count, total), 8 * count
    room = await _fill(stream, host_array(sizes_end + total if in_one else sizes_end))
    sizes = struct.unpack_from(f"<{count}Q", room)
    if sum(sizes) != total:
        raise EOFError("a message that no Dask writes")
    if not in_one:
        return [await _fill(stream, host_array(size)) for size in sizes]
    ends = accumulate(sizes, initial=sizes_end)
    return [room[at:end] for at, end in pairwise(ends)]


def _address(name: str, port: int) -> str:
    return f"shm://{name}:{port}"


def _dangling(stream: ShmStream, node: Node, what: str) -> None:
    """Close the stream of a comm that was dropped: the collector may run on any thread."""
    if not node.closed:
        log.warning("Closing dangling stream in %s", what)
        node.call(stream.close)


class Shm(Comm):
    """A communication through shared memory."""

    def __init__(self, stream: ShmStream, deserialize: bool = True, allow_offload: bool = True) -> None:
        self._stream, self._closed = stream, False
        self._unsent: deque[Any] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._local_addr = _address(*stream.extra(SocketAttribute.local_address))
        self._peer_addr = _address(*stream.extra(SocketAttribute.remote_address))
        super().__init__(deserialize=deserialize)
        self.allow_offload = allow_offload
        node = stream.extra(ShmAttribute.node)
        self._finalizer = weakref.finalize(self, _dangling, stream, node, repr(self))
        self._finalizer.atexit = False

    @property
    def local_address(self) -> str:
        return self._local_addr

    @property
    def peer_address(self) -> str:
        return self._peer_addr

    @property
    def same_host(self) -> bool:
        """Say yes: nothing is gained by compressing."""
        return True

    def _open(self) -> ShmStream:
        if self._closed:
            raise CommClosedError(f"in {self}: it is closed")
        return self._stream

    def _broke(self, error: Exception) -> CommClosedError:
        self.abort()
        ended = isinstance(error, EndOfStream)
        return CommClosedError(f"in {self}: {'the peer closed it' if ended else error or 'it was closed'}")

    async def read(self, deserializers: Any = None) -> Any:
        stream = self._open()
        try:
            frames = await _receive(stream)
        except (EndOfStream, BrokenResourceError, ClosedResourceError, EOFError) as error:
            raise self._broke(error) from error
        except BaseException:  # what of a message was read is not known
            self.abort()
            raise
        try:
            return await from_frames(
                frames,
                deserialize=self.deserialize,
                deserializers=deserializers,
                allow_offload=self.allow_offload,
            )
        except EOFError as error:
            raise self._broke(error) from error

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> int:
        """Write a message. As over TCP, what has no room yet is sent later: it must stay as it is."""
        self._open()
        frames = await to_frames(
            msg,
            allow_offload=self.allow_offload,
            serializers=serializers,
            on_error=on_error,
            context={"sender": self.local_info, "recipient": self.remote_info, **self.handshake_options},
            frame_split_size=sys.maxsize,
        )
        stream = self._open()
        if stream.ended:
            raise CommClosedError(f"in {self}: the peer is gone")
        pieces, size = _pieces(frames)
        if self._sending is None and len(pieces) == 1 and (taken := stream.send_nowait(pieces[0])):
            pieces = [memoryview(pieces[0])[taken:]] if taken < size else []
        self._unsent += pieces
        if self._sending is None and self._unsent:
            sending = asyncio.create_task(self._send())
            if not sending.done():  # as an eager one may be
                self._sending = sending
        return size

    async def _send(self) -> None:
        """Send what had no room in the ring."""
        try:
            while self._unsent:
                await self._stream.send(self._unsent.popleft())
        except (BrokenResourceError, ClosedResourceError) as error:
            log.debug("%s is closed, as not all that was written could be sent: %s", self, error)
            self.abort()
        except BaseException:
            self.abort()
            raise
        finally:
            self._sending = None
            if self._closed:
                self.abort()

    async def close(self) -> None:
        self._closed = True
        if self._sending is not None:
            await asyncio.wait([self._sending])  # what was written arrives
        self.abort()

    def abort(self) -> None:
        self._closed = True
        self._unsent.clear()
        if self._finalizer.detach():
            self._stream.close()

    def closed(self) -> bool:
        return self._closed or self._stream.ended


def _refuse_encryption(scheme: str, connection_args: dict[str, Any]) -> None:
    if connection_args.get("require_encryption"):
        raise RuntimeError(
            f"Dask's configuration requires encryption, and {scheme} has none, as everybody who maps the "
            "region can read all of it: use tls://"
        )


def _peer(loc: str) -> tuple[str, int]:
    host, port = parse_host_port(loc)
    return (host if is_any(host) or is_local(host) else normalize_name(host)), port


async def _connect(node: Node, host: str, port: int, *, impatient: bool = False) -> ShmStream:
    """Connect through the region, whatever SHMSOCK_HOSTS says."""
    return ShmStream(node, await node.connect(host, port, impatient=impatient))


class ShmConnector(Connector):
    """Connects to NAME:PORT."""

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> Comm:
        _refuse_encryption("shm://", connection_args)
        host, port = _peer(address)

        def connect(node: Node) -> Awaitable[ShmStream]:
            return _connect(node, host, port)

        try:
            return Shm(await on_current_node(None, None, None, connect), deserialize)
        except RegionError as error:  # trying again does not help
            raise FatalCommClosedError(str(error)) from error


def _listening_host(host: str) -> str | None:
    """Return what to listen on for what Dask calls a host: an address of this machine's means all peers, but
    for a loopback's."""
    if is_any(host) or is_local(host):
        return "localhost" if is_local(host) else None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return None


class ShmPortListener(BaseListener):
    """Listens at a port of shared memory. (NAME may be left out.)"""

    prefix = "shm://"  # workers look for it

    def __init__(
        self,
        loc: str,
        handler: Handler,
        deserialize: bool = True,
        allow_offload: bool = True,
        default_port: int = 0,
        **connection_args: Any,
    ) -> None:
        super().__init__()
        _refuse_encryption("shm://", connection_args)
        self._host, self._port = parse_host_port(loc, default_port)
        self._handler, self._how = handler, (deserialize, allow_offload)
        self._listener: ShmListener | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self.start_on(await current_node(listening=True))

    async def start_on(self, node: Node) -> None:
        """Listen as this node."""
        self.node = node
        host = _listening_host(self._host)
        self._listener = await create_shm_listener(local_host=host, local_port=self._port, node=node)
        self._start(self._accept(self._listener))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    async def _accept(self, listener: ShmListener) -> None:
        try:
            while True:
                self._start(self._handle(await listener.accept()))
        except ClosedResourceError:
            pass

    async def _handle(self, stream: ShmStream) -> None:
        if self._listener is None:  # stopped meanwhile: nobody would end a handshake any more
            stream.close()
            return
        comm = Shm(stream, *self._how)
        try:
            await self.on_connection(comm)
        except CommClosedError as error:
            log.info("a connection ended in its handshake: %s", error)
            return
        await self._handler(comm)

    @property
    def place(self) -> str:
        """NAME:PORT. Raises ValueError unless it listens."""
        if self._listener is None:
            raise ValueError("this listener was not started, or is stopped")
        return "{}:{}".format(*self._listener.extra(SocketAttribute.local_address))

    @property
    def listen_address(self) -> str:
        return self.prefix + self.place

    contact_address = listen_address


class ShmBackend(Backend):
    """shm://"""

    def get_connector(self) -> Connector:
        return ShmConnector()

    def get_listener(self, loc: str, handle_comm: Handler, deserialize: bool, **args: Any) -> BaseListener:
        return ShmPortListener(loc, handle_comm, deserialize, **args)

    def get_address_host(self, loc: str) -> str:
        return self.get_address_host_port(loc)[0]

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        return _peer(loc)

    def resolve_address(self, loc: str) -> str:
        host, port = _peer(loc)
        return f"{host}:{port}"

    def get_local_address_for(self, loc: str) -> str:
        return default_name()


# -- tcp+shm://


async def _listening_node() -> Node | None:
    """Return this loop's node; None: it can have none."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):  # the default region is made
        await asyncio.wait_for(current_node(listening=True), ATTACH_S)
    return await node_if_any()


def _region(node: Node) -> str:
    """Return what tells the node's region from others, in which a peer may have the same name and port."""
    return f"{node.engine.home.layout.region_id:x}"


def _parts(loc: str) -> tuple[str, str, str]:
    """Split HOST:PORT/NAME:PORT@REGION."""
    tcp, _, shm = loc.partition("/")
    place, _, region = shm.partition("@")
    return tcp, place, region


class TcpShmConnector(Connector):
    """Connects through shared memory where both ends have it, else over TCP."""

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> Comm:
        _refuse_encryption("tcp+shm://", connection_args)
        tcp, place, region = _parts(address)
        node = await node_if_any() if place else None
        if node is not None and region in ("", _region(node)):
            try:
                return Shm(await _connect(node, *_peer(place), impatient=True), deserialize)
            except OSError as error:
                log.debug("%s is tried over TCP: %s", address, error)
        return await get_backend("tcp").get_connector().connect(tcp, deserialize, **connection_args)


class TcpShmListener(BaseListener):
    """Listens at a port of TCP and at one of shared memory, which has the same number unless 0 was asked
    for."""

    prefix = "tcp+shm://"

    def __init__(self, loc: str, handler: Handler, deserialize: bool = True, **args: Any) -> None:
        super().__init__()
        _refuse_encryption("tcp+shm://", args)
        tcp = _parts(loc)[0]
        host, port = parse_host_port(tcp, args.get("default_port", 0))
        shm = unparse_host_port("localhost" if is_local(host) else "", port)
        self._tcp = get_backend("tcp").get_listener(tcp, handler, deserialize, **args)
        self._shm = ShmPortListener(shm, handler, deserialize, **args)
        self._suffix = ""

    async def start(self) -> None:
        await self._tcp.start()
        try:
            if (node := await _listening_node()) is not None:
                await self._shm.start_on(node)
                self._suffix = f"/{self._shm.place}@{_region(node)}"
        except BaseException:
            self._tcp.stop()
            raise

    def stop(self) -> None:
        self._tcp.stop()
        self._shm.stop()

    def abort_handshaking_comms(self) -> None:
        self._tcp.abort_handshaking_comms()
        self._shm.abort_handshaking_comms()

    @property
    def listen_address(self) -> str:
        return self._both(self._tcp.listen_address)

    @property
    def contact_address(self) -> str:
        return self._both(self._tcp.contact_address)

    def _both(self, tcp: str) -> str:
        return self.prefix + tcp.removeprefix("tcp://") + self._suffix


class TcpShmBackend(Backend):
    """tcp+shm://"""

    def get_connector(self) -> Connector:
        return TcpShmConnector()

    def get_listener(self, loc: str, handle_comm: Handler, deserialize: bool, **args: Any) -> BaseListener:
        return TcpShmListener(loc, handle_comm, deserialize, **args)

    def get_address_host(self, loc: str) -> str:
        return self.get_address_host_port(loc)[0]

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        host, port = parse_host_port(_parts(loc)[0])
        return host, port

    def resolve_address(self, loc: str) -> str:
        tcp, slash, shm = loc.partition("/")
        return f"{get_backend('tcp').resolve_address(tcp)}{slash}{shm}"

    def get_local_address_for(self, loc: str) -> str:
        return str(get_backend("tcp").get_local_address_for(_parts(loc)[0]))
