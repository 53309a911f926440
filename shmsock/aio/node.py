"""The node of one event loop: what connects, listens and closes. An engine does the work, which a driver
runs."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from shmsock.address import is_any, is_local, normalize_name
from shmsock.aio.doorbells import DoorbellListener
from shmsock.aio.driver import Driver, Loop, Opening
from shmsock.aio.publisher import Publisher
from shmsock.aio.watch import Watch
from shmsock.engine import layout as lay
from shmsock.engine.connection import Connection, State
from shmsock.engine.datagrams import Endpoint
from shmsock.engine.engine import Engine
from shmsock.engine.listeners import Listener
from shmsock.engine.peers import Peer
from shmsock.errors import NodeClosedError, address_unavailable, forked, wrong_thread
from shmsock.region.base import Region
from shmsock.wakeup import Heartbeat

__all__ = ["Node"]


class Node:
    """This process's side of a region, for one event loop: what connections, servers and datagram endpoints
    of this loop belong to.

    attach() makes one, and so does the first use of the module's functions on a loop. Pass it as `node=` to
    open_connection(), start_server() and their like. Of its attributes `name` is what others call it,
    `section` the number of its part of the region, `loop` the event loop, `closed` whether it is detached.

    Like asyncio's objects it is not thread-safe: on another thread its methods raise WrongThreadError, in a
    forked child ForkedError, after the end NodeClosedError.
    """

    engine: Engine
    heartbeat: Heartbeat
    region: Region
    lib: Any
    nd: Any
    name: str
    section: int
    ident: int
    pid: int

    def __init__(
        self, region: Region, engine: Engine, heartbeat: Heartbeat, loop: Loop, slow: int = 1
    ) -> None:
        self.region, self.engine, self.heartbeat = region, engine, heartbeat
        self.loop: Any = loop  # a Loop to the node; asyncio's transports know it as theirs
        self.lib, self.nd = engine.lib, engine.nd
        self.name, self.section = engine.name, engine.section
        engine.home.url = region.url
        self.ident, self.pid = threading.get_ident(), os.getpid()
        self.transports: set[Any] = set()
        self.servers: set[Any] = set()
        self._flushed: asyncio.Future[None] | None = None
        self.guard: Any = None  # what detaches an implicit node when its loop ends
        self.publisher: Publisher | None = None
        bell = region.doorbell if engine.settings.doorbells else None
        self._driver = Driver(engine, heartbeat, loop, bell, slow, self, self.flushed)
        self.pump: Any = self._driver.pump
        self.context: contextvars.Context = self.pump.context
        self.doorbell_listener: DoorbellListener = self._driver.doorbells
        self.watch: Watch = Watch(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"section {self.section}"
        return f"<shmsock.Node {self.name!r} {self.region.url} {state}>"

    @property
    def closed(self) -> bool:
        """Whether the node is detached."""
        closed: bool = self.pump.closed
        return closed

    def check(self) -> None:
        """Raise ForkedError, WrongThreadError or NodeClosedError if the node may not be used here; asked
        before anything in C is touched."""
        if not self.pump.fit():
            self._driver.check()

    # -- names

    def find(self, host: Any, port: int, tried: tuple[int, ...], *, takes_turn: bool = True) -> Peer:
        """Find the peer to ask for (host, port); sections in `tried` were asked already. `takes_turn`: see
        Listeners.find(). Raises socket.gaierror (nobody has that name), ConnectionRefusedError (nobody
        listens there), NodeClosedError."""
        self.check()
        return self.engine.listeners.find(host, port, exclude=tried, takes_turn=takes_turn)

    def peer_name(self, host: str) -> str:
        """Return the canonical spelling of a peer's name. Raises socket.gaierror for what cannot be a
        name."""
        return self.engine.listeners.peer_name(host)

    async def connect(
        self,
        host: Any,
        port: int,
        local_port: int = 0,
        meanwhile: Callable[[Node, Connection], object] = lambda node, conn: None,
        *,
        impatient: bool = False,
        asked: Connection | None = None,
    ) -> Connection:
        """Connect to `port` of `host`: a peer's name, a section number, a published address, or None or
        "localhost" for this machine.

        `local_port`: the own port; 0: one is chosen. `meanwhile` is called with this node and each connection
        that was asked for, before its answer. `impatient`: a peer whose beat stands still for half a second
        is not waited for. `asked`: what ask_again() has returned. Returns an open connection of the
        engine. Raises what find() does, OSError (ENOBUFS) when there is no slot or no memory for a ring,
        ConnectionResetError when the peer goes away.

        Cancelling takes the request back; nothing is left.
        """
        tried: tuple[int, ...] = ()
        refused: OSError | None = None
        conn = asked or (None if local_port else self.ask_again(host, port, meanwhile))
        while True:
            if conn is None:
                try:
                    peer = self.find(host, port, tried)
                except OSError as error:
                    if refused is None or isinstance(error, NodeClosedError):
                        raise
                    raise refused from None  # the last one there was
                local = (self.name, local_port or self.engine.listeners.ephemeral())
                try:
                    conn = self.engine.connect(peer.section, port, local=local, remote=peer.name)
                except ConnectionRefusedError as error:  # one of other version, say
                    tried, refused = (*tried, peer.section), error
                    continue
                self._meet(conn, meanwhile)
            elif conn.state is State.OPENING and self.engine.peers.killed(self.engine.peers[conn.peer]):
                self.engine.listeners.forget(host, port)
                self._take_back(conn)
                conn = None
                continue
            try:
                if conn.state is not State.OPEN:
                    self.check()  # closed by a signal handler, say: then nobody answers
                    conn.handler.by_name = impatient or not isinstance(host, int)
                    if impatient:
                        self.engine.hasten(conn)
                    await conn.handler.answered(self.loop)
                    self.engine.check()  # closed just now?
                return conn
            except (ConnectionRefusedError, ConnectionResetError) as error:
                tried, refused = (*tried, conn.peer), error  # another of that name may accept
                self._take_back(conn)  # it waits for a peer that was silent
            except BaseException:
                self._take_back(conn)  # the peer that has accepted it sees an end
                raise
            finally:
                if impatient:
                    self.engine.impatient.discard(conn)
            conn = None

    def ask_again(
        self, host: Any, port: int, meanwhile: Callable[[Node, Connection], object]
    ) -> Connection | None:
        """Ask the peer that was found for (host, port) before: the beginning of connect() that needs no turn
        of the loop, and mostly is all of it. Returns a connection that is open, or is to be given to
        connect(); None: nobody was asked."""
        conn = self.engine.connect_again(host, port)
        if conn is not None:
            self._meet(conn, meanwhile)
        return conn

    def _meet(self, conn: Connection, meanwhile: Callable[[Node, Connection], object]) -> None:
        """Do what is to be done meanwhile, and see whether the connection is open by then, or after a spin: a
        peer whose loop is awake answers before ours has turned. (What else its messages ask for is an event,
        and left to the next pass.)"""
        conn.handler = Opening()
        engine = self.engine
        try:
            meanwhile(self, conn)
            while conn.state is State.OPENING and (words := self.pump.spin_for_answer(conn.peer, conn.slot)):
                if words is True:
                    engine.handshake.opened(conn)
                    return
                engine.attend(words, engine.home.now())
                if conn.state is State.OPEN:  # type: ignore[comparison-overlap]  # attend() changed it
                    engine.events.remove((conn.connected, None))  # the handler is us
        except BaseException:
            self._take_back(conn)
            raise

    def _take_back(self, conn: Connection) -> None:
        """Close a connection that nobody has yet."""
        conn.handler = None
        if self.engine.alive:
            conn.close()

    def listen(self, hosts: list[Any], port: int, *, backlog: int, reuse_port: bool) -> Listener:
        """Listen at `port` (0: one is chosen) for all peers, or for those of this machine when every one of
        `hosts` is a loopback.

        `backlog`: how many connections may be accepted before Listener.taken() is called for one; 0: they are
        taken at once. `reuse_port`: several processes may share the port. Raises OSError: EADDRNOTAVAIL for a
        host that is not this node, EADDRINUSE.
        """
        self.check()
        local_only = self._local_only(hosts)
        return self.engine.listen(port, backlog=backlog, reuse_port=reuse_port, local_only=local_only)

    def bind_datagram(
        self, host: Any, port: int, *, reuse_port: bool = False, remote: tuple[Any, int] | None = None
    ) -> Endpoint:
        """Take `port` (0: one is chosen) for datagrams, under the rules of listen(). `remote`, (host, port):
        send there alone, and take only what comes from there. Raises what listen() does, and socket.gaierror
        when nobody has the remote name."""
        self.check()
        return self.engine.datagrams.bind(
            port, reuse_port=reuse_port, local_only=self._local_only([host]), remote=remote
        )

    def _local_only(self, hosts: list[Any]) -> bool:
        """Is every host a loopback? Raises OSError (EADDRNOTAVAIL) for one that is not this node's."""
        for host in hosts:
            if not is_local(host) and not is_any(host) and not self._own(host):
                raise address_unavailable(host, [self.name])
        return all(is_local(host) for host in hosts)

    def _own(self, host: Any) -> bool:
        try:
            return host == self.section if isinstance(host, int) else normalize_name(host) == self.name
        except ValueError:
            return False

    # -- the end

    def flushed(self) -> None:
        """Have aclose() look again: a transport got rid of what it held, or time went by."""
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    async def aclose(self) -> None:
        """Detach, and give the section back; harmless when repeated.

        Writers that were closed get up to Settings.flush_s seconds to hand over what they still hold;
        everything else is closed as the end of the process would. Cancelling detaches at once.
        """
        if self.closed or os.getpid() != self.pid:
            return
        end = time.monotonic() + self.engine.settings.flush_s
        try:
            while self.engine.alive and time.monotonic() < end and any(t.flushing for t in self.transports):
                self._flushed, self.pump.hurry = self.loop.create_future(), True
                await self._flushed  # each beat of the heartbeat ends it
        finally:
            self.close()

    def close(self) -> None:
        """Detach at once; harmless when repeated. Raises WrongThreadError on another thread while the loop
        runs."""
        if self.closed:
            return
        if threading.get_ident() != self.ident and self.loop.is_running():
            raise wrong_thread(repr(self))
        self.pump.closed = True
        if os.getpid() != self.pid:
            return
        self.lib.sh_node_own(self.nd)  # at exit, the thread of the loop may be gone
        # From the last to the first, whatever one of them raises (Ctrl-C, say): nobody may look for memory
        # that is not there any more.
        with contextlib.ExitStack() as steps:
            steps.callback(self.region.close)
            steps.callback(lambda: self.engine.memory.release(self.engine.failure()))
            steps.callback(self.heartbeat.stop)
            steps.callback(self._leave)
            steps.callback(self._end_transports)
            if not self.loop.is_closed():
                steps.callback(self._driver.stop)
            if self.publisher is not None:
                steps.callback(self.publisher.close)

    def _end_transports(self) -> None:
        for transport in list(self.transports):
            transport.node_closed()

    def _leave(self) -> None:
        opening = [c.handler for c in self.engine.connections.values() if isinstance(c.handler, Opening)]
        self.engine.leave()
        if not self.loop.is_closed():
            for server in list(self.servers):
                server.close()
            for waiting in opening:
                waiting.failed(self.engine.failure())

    def inherited(self) -> None:
        """Make everything of the parent's inert, in a forked child."""
        self.pump.closed = True
        self.engine.abandon(OSError(9, str(forked(repr(self)))))
        for transport in self.transports:
            transport.freed()  # so that all calls take the slow way, where they find out
        self.heartbeat.forget()
        if self.publisher is not None:
            self.publisher.inherited()
        self.region.drop_inherited()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # The loop holds its node, so that loop is over, and nobody can be inside C with this node.
        if not getattr(self, "closed", True):
            try:
                _warn(f"unclosed node {self!r}", ResourceWarning, source=self)
            finally:
                self.close()

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Run something of this node from __del__, possibly on another thread: later, in the loop."""
        if not self.closed and not self.loop.is_closed():
            try:
                self.loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                pass  # the loop was closed just now

    def statistics(self) -> dict[str, Any]:
        """Counters since attach, and what is so now, by name.

        Of waking, by doorbells and futexes alike: `kicks` counts peers that were woken, `suppressed` those
        that were not, as they were awake or had been woken already; `received` and `spurious` count what woke
        this node, and what did for nothing; `healed` what was lost or forgotten, and found by the safety
        poll.
        `woken_by` says how each peer wakes this node ("doorbell", "futex" or "polling"), `wakes` how this
        node wakes each peer ("doorbell", "futex" or "nothing"), `doorbell` the own id on the ivshmem server
        or None, `doorbell_lost` why there is none any more.

        `names` are those of the peers that are there, `peers` their number, this one included; `alone`:
        nobody else was ever seen. `published`: the own addresses that others may connect to.
        `region_replaced` says what became of the file or device when a process that attaches now gets
        another one or none, else "". `state` is "attached", "down" or "closed".
        """
        counts: dict[str, Any] = dict(self.engine.statistics())
        counts["name"], counts["section"], counts["region"] = self.name, self.section, self.region.url
        counts["names"] = sorted(self.engine.peers.names()) if self.engine.alive else []
        counts["alone"] = self.engine.peers.alone
        counts["published"] = [str(address) for address in self.engine.published]
        self.watch.look()
        counts["region_replaced"] = str(self.watch)
        counts["state"] = "closed" if self.closed else "attached" if self.engine.alive else "down"
        counts["format"] = lay.VERSION
        bell = self.region.doorbell
        counts["doorbell"] = (
            self.doorbell_listener.bell.id if self.doorbell_listener.bell is not None else None
        )
        counts["doorbell_lost"] = bell.lost if bell is not None else ""
        wakes = self.engine.wakes
        counts["woken_by"], counts["wakes"] = wakes.of_all(wakes.way), wakes.of_all(wakes.way_out)
        return counts
