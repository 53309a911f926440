"""Ports: what this node listens on, and who listens on what elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EADDRINUSE
from typing import TYPE_CHECKING, Any

from shmsock.errors import no_buffers, port_taken
from shmsock.fabric import layout as lay

if TYPE_CHECKING:
    from shmsock.fabric.node import Engine
    from shmsock.fabric.peers import Peer

__all__ = ["Listener", "Listeners"]

USED, REUSE, LOCAL, TENTATIVE = 1, 2, 4, 8
EPHEMERAL = 32768
PATIENCE = 20000


class Listener:
    """A port that is listened on. `handler` belongs to the driver, which lowers `pending` when it took a
    connection over."""

    def __init__(self, owner: Listeners, index: int, port: int, backlog: int, flags: int) -> None:
        self.owner, self.index, self.port, self.backlog, self.flags = (
            owner,
            index,
            port,
            max(backlog, 1),
            flags,
        )
        self.pending = 0
        self.handler: Any = None
        self.closed = False
        self.serving = True  # False: the port is taken, and who connects is refused

    @property
    def full(self) -> bool:
        return self.pending >= self.backlog

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.owner.remove(self)


class Listeners:
    """The listener table of the own section, and the rules of who may have a port.

    A port belongs to a name, and processes of one host share their name, each with its own section. To take
    one: publish the entry as tentative, fence, scan the others of that name. Somebody who listens wins over
    who is tentative; of two tentative ones the lower section wins, and the other one withdraws.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.mine: dict[int, list[Listener]] = {}
        self._free = list(range(lay.LISTENERS - 1, -1, -1))
        slice_size = (65536 - EPHEMERAL) // engine.layout.peers
        first = EPHEMERAL + engine.section * slice_size
        self._slice = range(first, first + slice_size)
        self._count = 0
        self._next = 0
        self._turn = 0

    def __iter__(self) -> Iterator[Listener]:
        return (listener for group in list(self.mine.values()) for listener in group)

    def ephemeral(self) -> int:
        """A port of this section's own slice, not listened on and, as long as there are others, not used by a
        connection."""
        used = (
            {c.local[1] for c in self.engine.connections.values()}
            if len(self.engine.connections) < len(self._slice)
            else set()
        )
        for _ in self._slice:
            self._next = (self._next + 1) % len(self._slice)
            port = self._slice[self._next]
            if port not in self.mine and port not in used:
                return port
        return self._slice[self._next]

    def open(self, port: int, backlog: int, reuse: bool, local: bool) -> Listener:
        if port == 0:
            return self._open_any(backlog, reuse, local)
        flags = USED | (REUSE if reuse else 0) | (LOCAL if local else 0)
        if any(not (reuse and other.flags & REUSE) for other in self.mine.get(port, ())):
            raise port_taken(self.engine.name, port)
        if not self._free:
            raise no_buffers(f"listener entries (there are {lay.LISTENERS})")
        index = self._free.pop()
        self._store(index, port | (flags | TENTATIVE) << 16)
        self.engine.memory.fence()
        if not self._settle(port, reuse):
            self._store(index, 0)
            self._free.append(index)
            raise port_taken(self.engine.name, port)
        self._store(index, port | flags << 16)
        listener = Listener(self, index, port, backlog, flags)
        self.mine.setdefault(port, []).append(listener)
        return listener

    def _open_any(self, backlog: int, reuse: bool, local: bool) -> Listener:
        for _ in range(len(self._slice)):
            try:
                return self.open(self.ephemeral(), backlog, reuse, local)
            except OSError as error:
                if error.errno != EADDRINUSE:  # a namesake asked for that very port
                    raise
        raise port_taken(self.engine.name, 0)

    def _settle(self, port: int, reuse: bool) -> bool:
        for _ in range(PATIENCE):
            undecided = False
            for peer in self._namesakes():
                flags = self.flags(peer, port)
                if not flags or (reuse and flags & REUSE):
                    continue
                if not flags & TENTATIVE or peer.section < self.engine.section:
                    return False
                undecided = True  # it is about to see our entry, or did not see it and is about to listen
            if not undecided:
                return True
        return False

    def _namesakes(self) -> list[Peer]:
        peers = self.engine.peers
        peers.refresh_all(self.engine.lib.sh_clock())
        return [p for p in peers.named(self.engine.name, local=True) if p.section != self.engine.section]

    def flags(self, peer: Peer, port: int) -> int:
        """What a peer's table says of a port; 0: it does not listen there."""
        memory = self.engine.memory
        found: int = memory.core.lib.sh_listen_find(
            memory.base, self.engine.layout.geometry, peer.section, port, memory.wc
        )
        return found

    def remove(self, listener: Listener) -> None:
        group = self.mine[listener.port]
        group.remove(listener)
        if not group:
            del self.mine[listener.port]
        self._store(listener.index, 0)
        self._free.append(listener.index)

    def _store(self, index: int, entry: int) -> None:
        memory, at = self.engine.memory, self.engine.layout.section(self.engine.section)
        if self.engine.lib.sh_node_is_inert(self.engine.nd):
            return  # the section may be another's by now
        memory.store(at + lay.LISTENER + 8 * index, entry)
        if index >= self._count:
            self._count = index + 1
            memory.store(at + lay.N_LISTENERS, self._count)

    def accepting(self, port: int, peer: Peer) -> Listener | None:
        """Who of this node answers a CONNECT to `port` from that peer; several (reuse_port) take turns."""
        group = [
            x
            for x in self.mine.get(port, ())
            if x.serving and (not x.flags & LOCAL or self.engine.peers.same_kernel(peer))
        ]
        if not group:
            return None
        self._turn += 1
        return group[self._turn % len(group)]

    def elsewhere(
        self, name: str | None, port: int, *, exclude: tuple[int, ...] = ()
    ) -> tuple[list[Peer], bool]:
        """Peers of that name (None: of this machine) that listen on `port`; and whether anybody has the name
        at all."""
        engine = self.engine
        engine.peers.refresh_all(engine.lib.sh_clock())
        named = engine.peers.named(name)
        found = []
        for peer in named:
            flags = self.flags(peer, port)
            if flags and not flags & TENTATIVE and not (flags & LOCAL and not engine.peers.same_kernel(peer)):
                found.append(peer)
        # whose beat moved last comes first: a dead namesake, until it is known to be dead, is tried last
        return sorted((p for p in found if p.section not in exclude), key=lambda p: min(p.samples, 3)), bool(
            named
        )
