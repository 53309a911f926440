"""All rules of a process: what listens, the connections of each rule, counters, and changes of the rules."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator
from functools import partial
from typing import Any

from shmsock.aio.attach import current_node
from shmsock.aio.endpoints import create_connection, create_server
from shmsock.aio.node import Node
from shmsock.forward import clients, socks5
from shmsock.forward.datagrams import DatagramListener
from shmsock.forward.endpoints import SHM, SOCKS5, TCP, UDP, UNIX, Endpoint
from shmsock.forward.listening import SocketListener, taken
from shmsock.forward.proxy_protocol import peer_address, proxy_header
from shmsock.forward.relay import Relay, ShmSide, Side, SocketSide, reset
from shmsock.forward.rules import Rule, check
from shmsock.forward.transport import SocketTransport, connected

__all__ = ["Forwarder"]

log = logging.getLogger("shmsock.forward")

HOLD_S = 0.02, 1.0
"""The first and the longest pause between two attempts, while there is no memory for a connection."""
FULL = errno.ENOBUFS, errno.ENOSPC
"""No slot or no memory for a connection; no section, or no storage for it."""
LOOK_S = 1.0
"""How often is looked whether the node that a server listens on is still attached."""


if sys.version_info >= (3, 11):

    async def within(seconds: float, what: Coroutine[Any, Any, None]) -> None:
        """Wait for it, as wait_for() does, but without a task of its own. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            await what
else:

    async def within(seconds: float, what: Coroutine[Any, Any, None]) -> None:
        """Wait for it. Raises asyncio.TimeoutError."""
        await asyncio.wait_for(what, seconds)


class Listening:
    """A rule at work: what listens, and its connections. `rule` may be replaced by another with the same
    `listen`: new connections take its way."""

    def __init__(self, forwarder: Forwarder, rule: Rule) -> None:
        self.rule, self._forwarder = rule, forwarder
        self.address = rule.listen
        self.relays: set[Relay] = set()
        self._tasks: dict[Any, asyncio.Task[None]] = {}  # by relay, or by socket before there is one
        self._server: Any = None
        self._closed = False
        self.node: Node | None = None
        self.trouble = ""  # why it cannot listen anew
        self.accepted = self.failed = self.resets = self.held = self.there = self.back = 0

    async def open(self) -> None:
        """Listen. Raises OSError: it names the endpoint."""
        listen, node = self.rule.listen, None
        if SHM in (listen.kind, self.rule.target.kind):
            node = await self._forwarder.node(listening=listen.kind == SHM)
        try:
            if UDP in (listen.kind, self.rule.target.kind):
                server: Any = DatagramListener(self.rule, self._forwarder.node)
                self.address = await server.open(node)
            elif listen.kind == SHM:
                host, port = listen.host or None, listen.port
                server = await create_server(self._from_peer, host, port, node=node)
                self.address = Endpoint(SHM, listen.host, server.sockets[0].getsockname()[1])
            else:
                server = SocketListener(listen, self.rule.mode, self._from_socket)
                self.address = await server.open()
        except OSError as error:
            raise error if listen.kind in (TCP, UNIX) else taken(listen, error) from error
        self._server, self.node = server, node
        if self._closed:
            self.close()

    def is_in_the_way(self, rule: Rule) -> bool:
        """May it be why that rule cannot listen? `*` and one address of this machine share a port."""
        own, port, wanted = self.rule, self.address.port, rule.listen
        return (own.listen.kind, port, own.datagrams) == (wanted.kind, wanted.port, rule.datagrams)

    def change(self, rule: Rule) -> None:
        """Go on by this rule: for new connections, where it is another."""
        if rule != self.rule:
            log.info("%s: now leads to %s", self.rule, rule.target)
            self.rule = rule
            if rule.datagrams:
                self._server.change(rule)
            elif rule.mode:
                self._server.permit(rule.mode)

    def close(self) -> None:
        """Listen no more; connections stay."""
        self._closed = True
        self.pause()

    def pause(self) -> None:
        """Listen no more, until open() is called again."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def abort(self) -> None:
        """Listen no more, and reset connections."""
        self.close()
        for relay in list(self.relays):
            relay.abort("stopped")
        for task in list(self._tasks.values()):
            task.cancel()

    async def look(self) -> None:
        """Listen anew where the node is not attached any more, or newcomers are on another region."""
        if self._server is None or self.rule.listen.kind != SHM:
            return
        node, former = await self._forwarder.node(listening=True), self._server
        if node is not self.node and former is not None:
            await self.open()
            former.close()
            log.info("%s: listening again, as %s", self.rule, node.name)

    def __str__(self) -> str:
        if isinstance(self._server, DatagramListener):
            return f"{self.rule}: {self._server}"
        there = self.there + sum(relay.client.received for relay in self.relays)
        back = self.back + sum(relay.target.received for relay in self.relays)
        return (
            f"{self.rule}: {self.accepted} connections, {len(self.relays)} open, {self.failed} failed, "
            f"{self.resets} reset, {self.held} waited for memory; {there} bytes there, {back} back"
        )

    # -- connections

    def _begin(self, key: Any, serving: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[key] = asyncio.get_running_loop().create_task(serving)
        task.add_done_callback(partial(self._done, key))

    def _done(self, key: Any, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a connection failed unexpectedly", self.rule, exc_info=error)

    def _relay(self, client: type[Side], target: Endpoint) -> Relay:
        relay = Relay(client, ShmSide if target.kind == SHM else SocketSide, self._over, self._peer_connected)
        self.relays.add(relay)
        return relay

    def _from_peer(self) -> Side:
        """Make the protocol of a connection that a peer has opened."""
        self.accepted += 1
        return self._relay(ShmSide, self.rule.target).client

    def _peer_connected(self, relay: Relay) -> None:
        self._begin(relay, self._serve_peer(relay))

    def _from_socket(self, sock: Any, address: Any) -> None:
        self.accepted += 1
        self._begin(sock, self._serve_socket(sock, address))

    async def _serve_peer(self, relay: Relay) -> None:
        rule, transport = self.rule, relay.client.transport
        name, port = transport.get_extra_info("peername")
        source = peer_address(transport.conn.peer)
        relay.label = f"{SHM}:{name}:{port}, section {transport.conn.peer}"
        if rule.proxy_protocol:
            own = peer_address(transport.node.section), transport.get_extra_info("sockname")[1]
            relay.header = proxy_header(rule.proxy_protocol, (source, port), own, name)
        await self._connect(relay, clients.Peer(relay), rule.target, source if rule.source_per_peer else None)

    async def _serve_socket(self, sock: Any, address: Any) -> None:
        rule, target = self.rule, self.rule.target
        label = str(Endpoint(TCP, *address[:2])) if isinstance(address, tuple) else UNIX
        try:
            if target.kind == SOCKS5:
                target = await socks5.request(sock, rule.only_shm)
            relay = self._relay(SocketSide, target)
            relay.label = f"{label} to {target}" if rule.target.kind == SOCKS5 else label
            if rule.proxy_protocol:
                relay.header = proxy_header(rule.proxy_protocol, address, sock.getsockname())
            kind = clients.Socks5 if rule.target.kind == SOCKS5 else clients.Socket
            self._tasks[relay] = self._tasks[sock]
            try:
                await self._connect(relay, kind(relay, sock), target, None)
            finally:
                del self._tasks[relay]
        except OSError as error:
            self.failed += 1
            log.info("%s: %s: %s", rule, label, error.strerror or error)
            sock.close()
        except BaseException:
            reset(sock)
            raise

    async def _connect(
        self, relay: Relay, client: clients.Client, target: Endpoint, source: str | None
    ) -> None:
        """Connect the relay's target side, and join the two. While there is no memory for a connection the
        client is held, and it is tried again."""
        pause, rule = HOLD_S[0], self.rule
        while True:
            try:
                await within(rule.connect_timeout, self._reach(relay.target, target, source))
                return await client.joins()
            except (OSError, asyncio.TimeoutError) as problem:
                error = problem
            gone = client.gone
            if gone or relay.target.transport is not None or getattr(error, "errno", 0) not in FULL:
                break
            if pause == HOLD_S[0]:
                self.held += 1
                log.info("%s: %s waits: %s", rule, relay.label, _why(error, rule))
            await asyncio.sleep(pause)
            pause = min(pause * 2, HOLD_S[1])
        self.failed += 1
        relay.how = relay.how or f"not connected: {'client gone' if gone else _why(error, rule)}"
        await client.refuse(error)
        if relay.target.transport is not None:
            relay.broke(relay.client, error)
        elif relay.client.transport is None:
            relay.finish("")

    async def _reach(self, side: Any, target: Endpoint, source: str | None) -> None:
        if target.kind == SHM:
            node = await self._forwarder.node()
            await create_connection(lambda: side, target.host, target.port, node=node)
        else:
            SocketTransport(side, await connected(target, source))

    def _over(self, relay: Relay) -> None:
        self.relays.discard(relay)
        self.there += relay.client.received
        self.back += relay.target.received
        self.resets += "reset" in relay.how
        if relay in self._tasks:
            self._tasks[relay].cancel()
        took = time.monotonic() - relay.began
        log.info(
            "%s: %s: %s; %d bytes there, %d back, %.3f s",
            *(self.rule, relay.label, relay.how, relay.client.received, relay.target.received, took),
        )


def _why(error: BaseException, rule: Rule) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"no answer within {rule.connect_timeout:g} s"
    return getattr(error, "strerror", None) or str(error)


class Forwarder:
    """Carries out rules. `region`, `name`: see attach()."""

    def __init__(self, region: str | None = None, name: str | None = None) -> None:
        self._region, self._name = region, name
        self._at_work: dict[Any, Listening] = {}  # by what is listened on
        self._looking: asyncio.Task[None] | None = None

    async def node(self, listening: bool = False) -> Node:
        """Return the node that is attached at the moment. Raises what attach() does."""
        return await current_node(self._region, self._name, listening=listening)

    async def carry_out(self, rules: Iterable[Rule]) -> None:
        """Listen by these rules, and by no others. Connections stay, those of rules that are gone too.

        Raises RuleError, and OSError when one of them cannot be listened on: then all is as before.
        """
        rules = list(rules)
        check(rules, self._name)
        wanted = {rule.key: rule for rule in rules}
        opened: dict[Any, Listening] = {}
        paused: list[Listening] = []
        try:
            for key, rule in wanted.items():
                if key in self._at_work:
                    continue
                one = Listening(self, rule)
                try:
                    await one.open()
                except OSError as error:
                    going = [o for k, o in self._at_work.items() if k not in wanted and o.is_in_the_way(rule)]
                    if error.errno != errno.EADDRINUSE or not going:
                        raise
                    for other in going:
                        other.pause()
                    paused += going
                    await asyncio.sleep(0)  # loops close some sockets only then
                    await one.open()
                opened[key] = one
        except BaseException:
            for one in opened.values():
                one.close()
            await asyncio.sleep(0)
            for one in paused:
                await one.open()
            raise
        for key in self._at_work.keys() - wanted.keys():
            self._at_work.pop(key).close()
        for key, one in self._at_work.items():
            one.change(wanted[key])
        for key, one in opened.items():
            log.info("listening on %s -> %s", one.address, one.rule.target)
            self._at_work[key] = one
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for one in list(self._at_work.values()):
                trouble = ""
                try:
                    await one.look()
                except OSError as error:
                    trouble = error.strerror or str(error)
                if trouble and trouble != one.trouble:
                    log.warning("%s: %s", one.rule, trouble)
                one.trouble = trouble

    def summary(self) -> Iterator[str]:
        """A line for each rule: what it has done."""
        return map(str, self._at_work.values())

    async def stop(self) -> None:
        """Listen no more, and reset what is open."""
        if self._looking is not None:
            self._looking.cancel()
        for one in self._at_work.values():
            one.abort()
        await asyncio.sleep(0)
