"""Watching whether others still get the same region as a node: its file may be removed, or made anew, under
the processes that use it. They go on with the old one, which nobody who comes later finds."""

from __future__ import annotations

import logging
import os
import re
import time
import weakref
from typing import Any, Protocol

from shmsock.address import default_region
from shmsock.engine.connection import State
from shmsock.engine.engine import Engine
from shmsock.engine.listeners import DATAGRAM
from shmsock.errors import command, listing, other_memory
from shmsock.region.base import Region
from shmsock.region.file import LOOK_S, MEET, owner_name
from shmsock.region.place import holders, restart

__all__ = ["Watch"]

REMEMBERED_NS = 10_000_000_000
"""For so long it is remembered what a look at other processes and regions has shown."""

log = logging.getLogger("shmsock")


class Watched(Protocol):
    """What a Watch asks of its node."""

    region: Region
    engine: Engine
    loop: Any
    context: Any
    section: int
    transports: set[Any]
    servers: set[Any]
    guard: Any
    watch: Watch

    @property
    def closed(self) -> bool: ...


async def _end(guard: Any) -> None:
    await guard.aclose()


class Watch:
    """Looks once a second, after the engine's safety poll, and when something fails. Warns once, in the log
    of "shmsock", and once more when something listens that newcomers will not reach.

    An implicit node is superseded by one on the file that took the place of its own, and ends (`retired`)
    when nothing of it is in use any more.
    """

    def __init__(self, node: Watched) -> None:
        self.node = node
        self.lost: str = ""  # what Region.displaced() said
        self.name: str | None = None  # as an implicit node was asked for
        self.former: weakref.ref[Any] | None = None  # whose place this one has taken
        self.retired = False
        self._told: frozenset[int] | None = None  # of which ports
        self._ending: Any = None
        self._elsewhere, self._elsewhere_until = "", 0
        engine = node.engine
        engine.home.hint, engine.once_a_second = self.hint, self._second

    def look(self) -> str:
        """Look at the region again, and say what became of it: see Region.displaced()."""
        if not self.node.closed:
            self.lost = self.node.region.displaced()
            self._told = self._told if self.lost else None
        return self.lost

    def is_over(self, listening: bool = False) -> bool:
        """Is there another region to attach to? To listen, a default region that was removed can be made
        anew: nobody new comes to the old one."""
        if listening:
            self.look()
        own = listening and self.node.region.path == default_region()
        return self.lost == "replaced" or (own and bool(self.lost))

    def before(self) -> Any:
        """Return the node whose place this one has taken, as long as that is in use; else None."""
        node = None if self.former is None else self.former()
        return None if node is None or node.closed or not node.watch.in_use() else node

    def in_use(self) -> bool:
        """Is there a connection, a listener, a port for datagrams, or an attempt at one?"""
        node = self.node
        opening = any(c.state is State.OPENING for c in node.engine.connections.values())
        return bool(node.transports or node.servers) or opening

    # -- once a second

    def _second(self) -> None:
        """Look, once a second. Called in the middle of a pass of the pump, so what has to be done is left to
        the loop."""
        if (self.look() and self._untold()) or self.retired:
            self.node.loop.call_soon(self._act, context=self.node.context)

    def _act(self) -> None:
        if self.node.closed:
            return
        if self.lost and self._untold():
            self._told = self._ports()
            log.warning("%s", self._warning())
        if self.retired and self._ending is None and not self.in_use():
            self._ending = self.node.loop.create_task(_end(self.node.guard))

    def _ports(self) -> frozenset[int]:
        """Return the ports of streams that are listened on. (Ports of datagrams come and go with programs
        that only send.)"""
        return frozenset(x.port for x in self.node.engine.listeners if not x.flags & DATAGRAM)

    def _untold(self) -> bool:
        return self._told is None or not self._ports() <= self._told

    # -- in words

    def __str__(self) -> str:
        """Say what happened to the region: "the file /dev/shm/x was replaced by another one", or ""."""
        region = self.node.region
        device = region.kind in ("pci", "vfio", "dax")
        lost = "removed" if device and self.lost == "moved" else self.lost
        how = {"moved": "moved away", "replaced": "replaced by another one"}.get(lost, lost)
        return f"the {f'device {region.url}' if device else f'file {region.path}'} was {how}" if lost else ""

    def _do(self) -> str:
        """Say what to do about it."""
        node = self.node
        made = self.lost == "replaced" or node.region.path == default_region()
        how = command("create", node.region.path, "--size 64M")
        new = "" if made else f"make it anew (`{how}`), and "
        others = "the processes that use the old one"
        return new + (
            f"restart {others}" if node.guard else f"attach again, as {others} must (or restart them)"
        )

    def _warning(self) -> str:
        """Say what happened, who is affected, and what to do."""
        node = self.node
        texts = [
            f"{node!r}: {self} while in use. Who was attached goes on with the old one; who comes later "
            + ("uses the new one" if self.lost == "replaced" else "does not find it")
            + ", and neither reaches the other."
        ]
        streams = sorted(self._ports())
        datagrams = sorted({x.port for x in node.engine.listeners if x.flags & DATAGRAM})
        ports = [f"ports {listing(streams)}"] if streams else []
        ports += [f"ports {listing(datagrams)} for datagrams"] if datagrams else []
        if ports:
            texts.append(f"Newcomers do not reach what listens here: {' and '.join(ports)}.")
        others = [p for p in node.engine.peers.there() if p.section != node.section]
        known = [f"{p.name!r} (process {p.who.pid}, section {p.section})" for p in others if p.who]
        if known:
            texts.append(f"On the old one with this process {os.getpid()}: {listing(known)}.")
        do = self._do()
        if node.guard is not None and not ports:
            do += "; this one opens what it opens next in the new one, by itself"
        texts.append(f"{do[0].upper()}{do[1:]}.")
        return " ".join(texts)

    def hint(self) -> str:
        """Add to the message that somebody is not found: maybe the others are on another region."""
        if self.look():
            return f"{self} while this node uses the old one: {self._do()}"
        now = time.monotonic_ns()
        if now >= self._elsewhere_until:
            self._elsewhere, self._elsewhere_until = self._look_elsewhere(), now + REMEMBERED_NS
        alone = self.node.engine.peers.alone
        return "; ".join(text for text in (self._elsewhere, other_memory() if alone else "") if text)

    def _look_elsewhere(self) -> str:
        path, hints = self.node.region.path, []
        if self.node.region.kind == "file" and (old := holders(path, LOOK_S)):
            hints.append(restart(old, path))
        if path == default_region() and (regions := _of_other_users(path)):
            hints.append(f"other users' regions exist: {listing(regions)}; to be with theirs, {MEET}")
        return "; ".join(hints)


def _of_other_users(own: str) -> list[str]:
    """List the default regions of other users, and whose they are."""
    directory, name = os.path.split(own)
    try:
        found = re.findall(r"^shmsock-(\d+)$", "\n".join(os.listdir(directory)), re.MULTILINE)
    except OSError:
        return []
    return [
        f"{directory}/shmsock-{uid} ({owner_name(int(uid))})"
        for uid in sorted(found, key=int)
        if f"shmsock-{uid}" != name
    ]
