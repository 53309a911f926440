"""Other ways to talk, without an event loop: pyzmq, a Pipe, iceoryx2's Python binding.

A message says what the client wants: b"e" echoes, b"s" a sink that counts; one of a single byte ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from .streams import rates
from .timing import batches, percentiles, same, trips

__all__ = ["MODULES", "client", "serve"]

MAX_BYTES = 1 << 20
END = b"."
AHEAD = 16
"""Messages that iceoryx2 may have on their way: 1 MiB of blocks, as a ring of shmsock has."""


class Wire:
    """A way to send a message, and to receive the next."""

    send: Callable[[bytes], Any]
    receive: Callable[[], bytes]

    def __init__(self, path: str, server: bool) -> None:
        raise NotImplementedError

    def accept(self) -> None:
        """The client is there."""

    def one_way(self, sends: bool) -> None:
        """From now on only one end sends, until it wants the answer: of 8 bytes."""

    def close(self) -> None:
        raise NotImplementedError


class Zmq(Wire):
    """A PAIR of sockets over ipc."""

    def __init__(self, path: str, server: bool) -> None:
        import zmq

        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        (self.socket.bind if server else self.socket.connect)(f"ipc://{path}")
        self.send, self.receive = self.socket.send, self.socket.recv

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class Pipe(Wire):
    """The Connection of a multiprocessing.Pipe(), whose ends are in two processes that are not related."""

    connection: Any = None

    def __init__(self, path: str, server: bool) -> None:
        self.listener = connection.Listener(path, "AF_UNIX") if server else None
        if not server:
            self._use(connection.Client(path, "AF_UNIX"))

    def accept(self) -> None:
        assert self.listener is not None
        self._use(self.listener.accept())

    def _use(self, made: Any) -> None:
        self.connection = made
        self.send, self.receive = made.send_bytes, made.recv_bytes

    def close(self) -> None:
        self.connection.close()
        if self.listener is not None:
            self.listener.close()


class Iceoryx(Wire):
    """Publish and subscribe, a service for each direction, both ends in busy loops.

    A publisher that finds the queue full loses samples, whatever its strategy (0.10.0, seen): so one way the
    receiver tells the sender how far it is, and no queue ever fills.
    """

    ahead = 0

    def __init__(self, path: str, server: bool) -> None:
        import iceoryx2

        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        kind, byte = iceoryx2.ServiceType.Ipc, iceoryx2.Slice[ctypes.c_uint8]
        self.node = iceoryx2.NodeBuilder.new().create(kind)
        name = path.replace("/", "-")
        services = [
            self.node.service_builder(iceoryx2.ServiceName.new(f"{way}{name}"))
            .publish_subscribe(byte)
            .enable_safe_overflow(False)
            .subscriber_max_buffer_size(2 * AHEAD)
            .open_or_create()
            for way in (("to", "from") if server else ("from", "to"))
        ]
        self.subscriber = services[0].subscriber_builder().create()
        self.publisher = (
            services[1]
            .publisher_builder()
            .initial_max_slice_len(MAX_BYTES)
            .backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        self.send, self.receive = self._send, self._receive

    def _send(self, data: bytes) -> None:
        sample = self.publisher.loan_slice_uninit(len(data))
        ctypes.memmove(sample.payload_ptr, data, len(data))
        sample.assume_init().send()

    def _receive(self) -> bytes:
        take = self.subscriber.receive
        while (sample := take()) is None:
            pass
        payload = sample.payload()
        data = ctypes.string_at(payload.as_ptr(), payload.len())
        sample.delete()
        return data

    def one_way(self, sends: bool) -> None:
        if sends:
            self.send = self._send_on_credit
        else:
            self.receive = self._receive_and_tell

    def _send_on_credit(self, data: bytes) -> None:
        if self.ahead == AHEAD:
            self._receive()
            self.ahead -= AHEAD // 2
        self.ahead += 1
        self._send(data)

    def _receive_and_tell(self) -> bytes:
        data = self._receive()
        self.ahead += 1
        if self.ahead % (AHEAD // 2) == 0:
            self._send(END)
        return data

    def close(self) -> None:
        for made in (self.publisher, self.subscriber):
            made.delete()


MODULES: dict[str, type[Wire]] = {"zmq": Zmq, "pipe": Pipe, "iceoryx2": Iceoryx}


def serve(options: argparse.Namespace, announce: Any) -> None:
    """One client, then until standard input ends."""
    with tempfile.TemporaryDirectory(prefix="shmsock-bench-") as directory:
        path = os.path.join(directory, "socket")
        wire = MODULES[options.module](path, True)
        announce({"host": path, "port": 0})
        wire.accept()
        if wire.receive() == b"e":
            send, receive = wire.send, wire.receive
            while len(data := receive()) > 1:
                send(data)
        else:
            wire.one_way(sends=False)
            receive, count = wire.receive, 0
            while len(data := receive()) > 1:
                count += len(data)
            wire.send(count.to_bytes(8, "big"))
        while os.read(0, 1):
            pass
        wire.close()


def client(options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    wire = MODULES[options.module](options.host, False)
    found = (_echo if options.measure == "echo" else _write)(wire, options, times)
    wire.close()
    return found


def _echo(wire: Wire, options: argparse.Namespace, times: list[int]) -> dict[str, Any]:
    send, receive = wire.send, wire.receive
    data = os.urandom(options.echo)
    send(b"e")
    for _ in trips(times, options.seconds):
        send(data)
        back = receive()
    same(data, back)
    send(END)
    return percentiles(times)


def _write(wire: Wire, options: argparse.Namespace, _: list[int]) -> dict[str, Any]:
    wire.send(b"s")
    wire.one_way(sends=True)
    send, size, count = wire.send, options.block, 0
    data = os.urandom(size)
    start = time.perf_counter()
    for count in batches(options.seconds):  # noqa: B007 (the last one counts)
        send(data)
    send(END)
    while len(answer := wire.receive()) < 8:
        pass
    received = int.from_bytes(answer, "big")
    return rates(count, size, received, time.perf_counter() - start)
