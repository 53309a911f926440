"""UDP on one side, datagrams in shared memory on the other. Each client gets an endpoint of its own towards
the target, so that answers find back; it is forgotten when nothing came or went for a while."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from shmsock.aio.datagram import ShmDatagramTransport, create_datagram_endpoint
from shmsock.aio.node import Node
from shmsock.forward.endpoints import SHM, UDP, Endpoint
from shmsock.forward.rules import Rule

__all__ = ["DatagramListener"]

log = logging.getLogger("shmsock.forward")

MOST_CLIENTS = 256
"""Clients of a rule at a time: each takes a port, of which a peer has 448. The one that was silent the
longest makes room."""
MOST_EARLY = 1 << 17
"""Bytes of a client that may wait for its endpoint."""
PAUSE_S = 0.5
"""After an endpoint could not be opened: for so long the client's datagrams are dropped, nothing is looked up
or logged for it again."""
MOST_WAITING = 1 << 20
"""Bytes that may wait in a socket: what comes then is dropped, as a full socket would."""


def send(transport: Any, data: bytes, to: Any) -> bool:
    """Send a datagram, `to` None: where the endpoint is connected to. False: too much waits already."""
    if transport.get_write_buffer_size() > MOST_WAITING:
        return False
    if data or isinstance(transport, ShmDatagramTransport):
        transport.sendto(data, to)
        return True
    # Loops leave an empty one out.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
        try:
            sock.sendto(data, to) if to else sock.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            pass  # of one before, as a rule: nobody has the port
    return True


class Flow(asyncio.DatagramProtocol):
    """The endpoint of one client towards the target."""

    transport: Any = None

    def __init__(self, listener: DatagramListener, client: Any) -> None:
        self._listener, self._client = listener, client
        self._early: list[bytes] = []
        self._room = MOST_EARLY
        self.used = 0.0
        self.opening: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        for data in self._early:
            self.send(data)
        self._early.clear()

    def send(self, data: bytes) -> None:
        if self.transport is None and len(data) < self._room:
            self._room -= len(data) + 1
            self._early.append(data)
        elif self.transport is None or not send(self.transport, data, None):
            self._listener.dropped += 1

    def datagram_received(self, data: bytes, _: Any) -> None:
        self._listener.answer(self, data, self._client)

    def error_received(self, _: Exception) -> None:
        self._listener.errors += 1  # nobody there has the port, as a rule: the next one may arrive

    def connection_lost(self, _: Exception | None) -> None:
        self._listener.lost(self, self._client)

    def failed(self) -> None:
        """Drop what came, and what comes."""
        self._listener.dropped += len(self._early)
        self._early.clear()
        self._room = 0

    def close(self) -> None:
        if self.opening is not None:
            self.opening.cancel()
        if self.transport is not None:
            self.transport.close()


class DatagramListener(asyncio.DatagramProtocol):
    """What a rule for datagrams listens on, and its clients. `node` gives the node to use."""

    def __init__(self, rule: Rule, node: Callable[[], Awaitable[Node]]) -> None:
        self.rule, self._node = rule, node
        self._flows: OrderedDict[Any, Flow] = OrderedDict()
        self._transport: Any = None
        self._loop = asyncio.get_running_loop()
        self._sweeping: asyncio.TimerHandle | None = None
        self.clients = self.there = self.back = self.dropped = self.errors = 0

    def __str__(self) -> str:
        return (
            f"{self.clients} clients, {len(self._flows)} open, {self.errors} errors, {self.dropped} dropped; "
            f"{self.there} datagrams there, {self.back} back"
        )

    async def open(self, node: Node | None = None) -> Endpoint:
        """Listen, on that node if it is shared memory. Returns the endpoint, with the port that was chosen if
        it was 0. Raises OSError."""
        listen = self.rule.listen
        if listen.kind == SHM:
            on = node or await self._node()
            local = (listen.host or None, listen.port)
            self._transport, _ = await create_datagram_endpoint(lambda: self, local, node=on)
        else:
            address = ("0.0.0.0" if listen.host == "*" else listen.host, listen.port)
            found = await self._loop.getaddrinfo(*address, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
            sock = socket.socket(found[0][0], socket.SOCK_DGRAM)
            try:
                sock.setblocking(False)
                sock.bind(found[0][4])  # uvloop's own error would not say which it is
                self._transport, _ = await self._loop.create_datagram_endpoint(lambda: self, sock=sock)
            except BaseException:
                sock.close()
                raise
        self._sweep()
        return Endpoint(listen.kind, listen.host, self._transport.get_extra_info("sockname")[1])

    def change(self, rule: Rule) -> None:
        """Go on by another rule, which listens on the same."""
        self.rule = rule
        self._forget(list(self._flows))

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._forget(list(self._flows))
        if self._transport is not None:
            self._transport.close()

    # -- datagrams

    def datagram_received(self, data: bytes, client: Any) -> None:
        flow = self._flows.get(client)
        if flow is None:
            if len(self._flows) >= MOST_CLIENTS:
                self._forget([next(iter(self._flows))])
            flow = self._flows[client] = Flow(self, client)
            flow.opening = self._loop.create_task(self._open_flow(flow, client))
            self.clients += 1
        self.there += 1
        self._touch(flow, client)
        flow.send(data)

    def answer(self, flow: Flow, data: bytes, client: Any) -> None:
        """Send what the target says back to the client."""
        if self._flows.get(client) is flow:
            self._touch(flow, client)
            self.back += 1
            self.dropped += not send(self._transport, data, client)

    def lost(self, flow: Flow, client: Any) -> None:
        """Forget a flow whose endpoint has ended, with its node say: the next datagram opens another."""
        if self._flows.get(client) is flow:
            self._forget([client])

    def error_received(self, _: Exception) -> None:
        self.errors += 1  # a client that has gone

    def _touch(self, flow: Flow, client: Any) -> None:
        flow.used = self._loop.time()
        self._flows.move_to_end(client)

    async def _open_flow(self, flow: Flow, client: Any) -> None:
        host, port = self.rule.target.address
        try:
            if self.rule.target.kind == UDP:
                await self._loop.create_datagram_endpoint(lambda: flow, remote_addr=(host, port))
            else:
                node = await self._node()
                await create_datagram_endpoint(lambda: flow, remote_addr=(host, port), node=node)
        except OSError as error:
            self.errors += 1
            log.info("%s: %s: %s", self.rule, _shown(client), error.strerror or error)
            flow.failed()
            self._loop.call_later(PAUSE_S, self.lost, flow, client)
        finally:
            flow.opening = None

    def _sweep(self) -> None:
        """Forget clients that were silent for idle_timeout."""
        limit = self._loop.time() - self.rule.idle_timeout
        self._forget([client for client, flow in self._flows.items() if flow.used < limit])
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._sweeping = self._loop.call_later(self.rule.idle_timeout / 2, self._sweep)

    def _forget(self, clients: list[Any]) -> None:
        for client in clients:
            if (flow := self._flows.pop(client, None)) is not None:
                flow.close()


def _shown(client: Any) -> str:
    return f"{client[0]}:{client[1]}"
