"""Attaching: a region, a section of it, a node. Explicitly with attach(), or at first use, once per loop and
region."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import logging
import operator
import os
import random
import sys
import threading
import time
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from shmsock import address, region
from shmsock.aio.driver import Loop, slowness
from shmsock.aio.node import Node
from shmsock.aio.publisher import Publisher, own_addresses
from shmsock.engine import features
from shmsock.engine import layout as lay
from shmsock.engine.attach import PATIENCE_S, claim_section, name_taken, release_claim
from shmsock.engine.engine import Engine
from shmsock.engine.layout import Identity, Layout, format_region, has_magic, is_blank, read_layout
from shmsock.engine.memory import Memory, native_core
from shmsock.engine.peers import Peer
from shmsock.engine.settings import Settings
from shmsock.engine.slots import Storage
from shmsock.errors import region_error
from shmsock.region import storage
from shmsock.region.base import Region
from shmsock.region.dax import DaxRegion
from shmsock.region.file import FileRegion
from shmsock.wakeup import Heartbeat

if TYPE_CHECKING:
    from shmsock.aio.trio_loop import TrioFuture

__all__ = [
    "attach",
    "close_nodes",
    "current_node",
    "environ",
    "node_if_any",
    "on_current_node",
    "prepare_region",
]

T = TypeVar("T")
log = logging.getLogger("shmsock")
# A task while the node is being made, then a weak reference: the loop itself keeps its node alive.
_Mine = dict[str | bytes, "asyncio.Task[Node] | TrioFuture | weakref.ref[Node]"]
_implicit: weakref.WeakKeyDictionary[Loop, _Mine] = weakref.WeakKeyDictionary()
# When it may be tried again to attach for who can do without; 0: at any time, as there was no region.
_tries: weakref.WeakKeyDictionary[Loop, dict[str | bytes, float]] = weakref.WeakKeyDictionary()
ATTACH_S, RETRY_S = 2.0, 10.0
# Loops in several threads share it. A WeakSet cannot be iterated by one thread while another adds to it; a
# plain set can be copied by list(), which holds the GIL, or locks the set.
_nodes: set[weakref.ref[Node]] = set()


def _all_nodes() -> list[Node]:
    return [node for known in list(_nodes) if (node := known()) is not None]


def close_nodes(loop: Any) -> None:
    """Close the nodes of a loop that is about to be closed, whatever its program has left undone."""
    for node in _all_nodes():
        if node.loop is loop and not loop.is_running():
            _close(node)


def _close(node: Node) -> None:
    """Close a node whose loop runs no more, and end its guard: else the collector asks the loop to."""
    node.close()
    guard, node.guard = node.guard, None
    if guard is not None:
        with contextlib.suppress(StopIteration, RuntimeError):  # RuntimeError: the loop was stopped inside it
            guard.aclose().send(None)


def _running_loop() -> Any:
    """asyncio's running loop, or what stands for one in a task of trio. Raises RuntimeError when there is
    neither."""
    if "trio" in sys.modules:
        from shmsock.aio.trio_loop import current_loop

        try:
            return current_loop()
        except RuntimeError:
            pass  # not in a task of trio
    return asyncio.get_running_loop()


def prepare_region(made: Region, peers: int = 16) -> None:
    """Format a new region and give storage to its fixed part. Raises RegionFormatError, OSError (ENOSPC)."""
    made.ensure(0, lay.HEADER)
    memory = Memory(native_core(), made.mmap, write_combining=made.write_combining)
    try:
        _back_fixed_part(made, format_region(memory, peers=peers))
    finally:
        memory.release()


def _back_fixed_part(made: Region, layout: Layout) -> None:
    """Give storage to all that is neither slot nor arena, other sections included: on a sparse file even
    reading a hole takes a page, and a full disk would be a SIGBUS. (Slots get theirs when first used.)"""
    if made.sparse:
        for section in range(layout.peers):
            made.ensure(layout.section(section), layout.slot_off)


def _blank(opened: Region, memory: Memory) -> bool:
    """May the memory be formatted where it lies? Memory that QEMU, or truncate, made and nobody has used yet.
    A file may be anything, and must be zero to its end."""
    if opened.kind == "file" and isinstance(opened, FileRegion):
        return not any(opened.peek(8)) and opened.is_zero(lay.HEADER)
    if isinstance(opened, DaxRegion) and not opened.device.ours:
        return False  # it may be somebody's data, far from its beginning
    return is_blank(memory)


def _holds_a_region(device: region.PciDevice) -> bool:
    with region.open(device.url, writable=False) as candidate:
        memory = Memory(native_core(), candidate.mmap, write_combining=candidate.write_combining)
        try:
            return has_magic(memory)
        finally:
            memory.release()


async def _follow(loop: Loop, steps: Generator[float, None, T]) -> T:
    """Run a generator that opens or claims: sleep for the seconds that it yields, and return its result."""
    sleep = getattr(loop, "sleep", asyncio.sleep)
    try:
        while True:
            await sleep(next(steps))
    except StopIteration as end:
        value: T = end.value
        return value
    finally:
        steps.close()


async def _make(
    url: str | None, name: str | None, settings: Settings | None, section: int | None = None
) -> Node:
    """Open, format if it is blank, claim, start. Everything is undone when a step fails or is
    cancelled."""
    explicit = name is not None or bool(os.environ.get("SHMSOCK_NAME"))
    own = address.node_name(name) if name is not None else address.default_name()
    us = settings or Settings.from_environ()
    if us.pin is None:
        us = replace(us, pin=address.default_pin())
    section = address.default_section() if section is None else operator.index(section)
    ranges = address.default_publish()
    loop, rng = _running_loop(), random.SystemRandom()
    for old in _all_nodes():
        if old.loop.is_closed():
            old.close()  # without shutdown_asyncgens(), and something still holds it
    opened = await _follow(
        loop, region.opening(url, create_default=True, prepare=prepare_region, probe=_holds_a_region)
    )
    if opened.kind == "file" and isinstance(opened, FileRegion):
        storage.warn_of_disk(opened.path, opened.filesystem)
    memory = None
    claim = layout = None
    try:
        opened.share()
        memory = Memory(native_core(), opened.mmap, write_combining=opened.write_combining)
        try:
            if blank := _blank(opened, memory):
                opened.ensure(0, lay.HEADER)
            layout = format_region(memory) if blank else read_layout(memory)
        except OSError as error:
            error.filename = opened.path
            error.strerror = f"{opened.url}: {error.strerror}"
            raise
        _back_fixed_part(opened, layout)
        if section is not None and not 0 <= section < layout.peers:
            raise ValueError(f"section {section} was asked for, and {opened.url} has 0 to {layout.peers - 1}")
        boot, machine = address.boot_id(), address.machine_id()
        other = await _follow(loop, name_taken(layout, opened, boot, own))
        if other is not None and explicit:
            raise region_error(
                98,
                f"the name {own!r} is taken by another machine on this region (process {other.pid} there): "
                "set SHMSOCK_NAME or "
                "name= to one of your own; was this VM cloned?",
            )
        claim = await _follow(
            loop,
            claim_section(
                layout,
                opened,
                boot,
                machine,
                rng,
                path=opened.path,
                url=opened.url,
                only=section,
                device=opened.kind != "file",
                waits=lambda held: log.warning(
                    "%s: all sections are taken, or still read: waiting until what was left in %s is read "
                    "(%d s at most; `shmsock create --peers` makes more)",
                    opened.url,
                    ", ".join(held),
                    PATIENCE_S,
                ),
            ),
        )
        if other is not None:
            own, was = f"{own[:56]}-{claim.section}", own
            warnings.warn(
                f"the name {was!r} is taken by another machine: this node is {own!r}",
                RuntimeWarning,
                stacklevel=2,
            )
        slow = slowness(memory.core.lib.sh_clock)
        # Not on memory of a device, before Linux 5.16, or where a container forbids it.
        word = layout.pair(claim.section, claim.section) + lay.NOTIFY_SEQ
        futex = us.doorbells and memory.has_futex(word)
        flags = lay.FLAG_COUNTS
        flags |= (lay.FLAG_LOCKED if opened.can_lock else 0) | (lay.FLAG_FUTEX if futex else 0)
        identity = Identity(own, boot, machine, os.getpid(), flags, opened.identity, terms=features.OWN)
        keepers: list[Heartbeat] = []

        def watch(peer: Peer, on: bool) -> None:
            if keepers and peer.section != claim.section:
                here = peer.who is not None and peer.who.lock_tells(boot, opened.identity)
                keepers[0].watch(peer.section, on and here)

        engine = Engine(
            layout,
            claim,
            identity,
            settings=us,
            rng=rng,
            storage=Storage(*opened.holes, opened.ensure) if opened.holes else None,
            watch=watch,
            locks=opened,
            doorbell=opened.doorbell if us.doorbells else None,
            futex=futex,
            addresses=own_addresses(ranges) if ranges else (),
            now_ns=memory.core.lib.sh_clock(),
        )
        try:
            keepers.append(
                Heartbeat(
                    memory.core,
                    engine.nd,
                    lock_fd=opened.lock_fd,
                    look_cap_us=us.look_cap_us * slow,
                    futex=futex,
                )
            )
            node = Node(opened, engine, keepers[0], loop, slow)
            if ranges:
                node.publisher = Publisher(engine, loop, node.context, ranges)
        except BaseException:
            for heartbeat in keepers:
                heartbeat.stop()
            engine.leave()
            raise
    except BaseException:
        if claim is not None and layout is not None:
            release_claim(layout, opened, claim)
        if memory is not None:
            memory.release()
        opened.close()
        raise
    _nodes.add(weakref.ref(node, _nodes.discard))
    return node


class attach:
    """Attach the running loop to a region, as a node of its own: `async with shmsock.attach("pci:auto",
    name="vm-a") as node: ...`, or `node = await shmsock.attach()` and `await node.aclose()` later.

    `region`: a URL or a path; None: SHMSOCK_REGION, else the one ivshmem device there is, else this user's
    own file in /dev/shm, which is made if need be. `name`: what others call this node; None: SHMSOCK_NAME,
    else the host's name. `settings`: see Settings. `section`: the number of the part to take, as others may
    have pinned it; None: SHMSOCK_SECTION, else any that is free.

    Returns a Node. Raises RegionError (its subclasses say what is wrong with the region), OSError: ENOSPC
    when no section is free or somebody has the one that was asked for, EADDRINUSE when a name that was given
    is another machine's; ValueError when the region has no such section.

    Cancelling leaves nothing behind. Leaving the `async with` is Node.aclose().
    """

    def __init__(
        self,
        region: str | None = None,
        *,
        name: str | None = None,
        settings: Settings | None = None,
        section: int | None = None,
    ) -> None:
        self._args = (None if region is None else os.fspath(region), name, settings, section)
        self._node: Node | None = None

    def __await__(self) -> Generator[Any, None, Node]:
        return _make(*self._args).__await__()

    async def __aenter__(self) -> Node:
        self._node = await _make(*self._args)
        return self._node

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._node is not None
        await self._node.aclose()


async def _until_the_loop_ends(node: Node) -> AsyncGenerator[None, None]:
    """Close the node when its loop ends. Primed once, this generator is known to the loop, whose
    shutdown_asyncgens() ends it: under asyncio.run and uvloop.run that is before the loop closes, also after
    an exception. Trio does the same with its own, when its system tasks are over; it knows them weakly, but
    its loop holds the node and the node this."""
    try:
        yield
    finally:
        if not node.watch.retired:
            _implicit.pop(node.loop, None)
        await node.aclose()


async def _make_implicit(url: str | None, name: str | None, former: Node | None) -> Node:
    if former is not None and name is None:
        name = former.watch.name
    node = await _make(url, name, None)
    node.watch.name = name
    node.watch.former = None if former is None else weakref.ref(former)
    guard = _until_the_loop_ends(node)
    await guard.__anext__()
    node.guard = guard
    return node


#: What os.environ looks into: bytes, in a tenth of the time.
environ: Mapping[Any, Any] = getattr(os.environ, "_data", os.environb)


def _key(url: str | None) -> str | bytes:
    """Return what an implicit node is kept by: its region, as it was asked for."""
    return url if url is not None else environ.get(b"SHMSOCK_REGION", b"")


def known_node(url: str | None, name: str | None) -> Node | None:
    """Return what current_node() does where that is plain, as it is for all but the first connection."""
    mine = None if name is not None else _implicit.get(_running_loop())
    found = None if mine is None else mine.get(_key(url))
    node = found() if type(found) is weakref.ref else None
    return None if node is None or not node.pump.fit() or node.watch.lost == "replaced" else node


async def current_node(url: str | None = None, name: str | None = None, *, listening: bool = False) -> Node:
    """The implicit node of the running loop for that region, attached at first use, and again when another
    file has taken the place of the region's. `listening`: it is needed to listen. Raises what attach() does.
    Cancelling one of several calls that wait stops no other."""
    loop = _running_loop()
    shield: Callable[[Any], Awaitable[Node]] = getattr(loop, "shield", asyncio.shield)
    if url is not None:
        url = os.fspath(url)
    mine = _implicit.setdefault(loop, {})
    key = _key(url)
    node: Node | None = None
    found = mine.get(key)
    if found is None and url is None:
        found = mine.get(region.default_url())
    if isinstance(found, weakref.ref):
        node = found()
    elif found is not None and not (found.done() and (found.cancelled() or found.exception())):
        node = await shield(found)  # also one that has just been made, before _made() was called
    if node is not None and (node.closed or not node.engine.alive):
        node = None
    if node is None or node.watch.is_over(listening):
        former = node
        task = loop.create_task(_make_implicit(url, name, former))
        mine[key] = task
        task.add_done_callback(lambda task: _made(task, mine, key, former))
        node = await shield(task)
    if name is not None and address.node_name(name) != node.name:
        raise ValueError(
            f"this loop is attached as {node.name!r}, not {name!r}: use shmsock.attach(region, name=...) for "
            "another"
        )
    return node


async def node_if_any(
    url: str | None = None, name: str | None = None, *, warn: Callable[[str], object] = log.warning
) -> Node | None:
    """Return the implicit node of the running loop, for those who can do without. None, and one warning, when
    there is no region (none is made), no section free, or any other reason that it cannot be attached: later
    calls try again, and only the first waits for it, up to ATTACH_S. (On trio each that tries waits.)"""
    node = known_node(url, name)
    if node is not None:
        return node
    loop = _running_loop()
    tries, key = _tries.setdefault(loop, {}), _key(url)
    if time.monotonic() < tries.get(key, 0):
        return None
    again = 0.0
    try:
        if region.is_missing(url):
            raise region_error(errno.ENOENT, "there is none yet")
        again = time.monotonic() + RETRY_S
        node = await _soon(loop, current_node(url, name), 0 if tries.get(key) else ATTACH_S)
    except OSError as error:
        if key not in tries:
            warn(f"region {url or region.default_url()}: {error}; TCP is used")
        tries[key] = again
        return None
    tries.pop(key, None)
    return node


async def _soon(loop: Any, making: Coroutine[Any, Any, T], seconds: float) -> T:
    """Wait so long, and go on in the background. Raises TimeoutError."""
    if not isinstance(loop, asyncio.AbstractEventLoop):
        return await making
    task = asyncio.ensure_future(making)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
        raise TimeoutError("attaching takes long, and goes on")
    return task.result()


def on_current_node(
    given: Node | None, url: str | None, name: str | None, use: Callable[[Node], Awaitable[T]]
) -> Awaitable[T]:
    """`use` the given node, or current_node(). Where that fails, and the region's file turns out to be
    another one by now: once more on that one; or on the one before, as long as this loop still uses it.
    (Not to listen, which is to be done where newcomers come.)"""
    return use(given) if given is not None else _on_current_node(url, name, use)


async def _on_current_node(url: str | None, name: str | None, use: Callable[[Node], Awaitable[T]]) -> T:
    node = known_node(url, name) or await current_node(url, name)
    try:
        return await use(node)
    except OSError:
        node.watch.look()
        if not node.watch.is_over():
            if (before := node.watch.before()) is None:
                raise
            with contextlib.suppress(OSError):
                return await use(before)
            raise
    return await use(await current_node(url, name))


def _made(task: asyncio.Task[Node] | TrioFuture, mine: _Mine, key: str | bytes, former: Node | None) -> None:
    if (
        task.cancelled() or task.exception() is not None
    ):  # read here, as nobody else does when all callers were cancelled
        if mine.get(key) is task:
            del mine[key]
            if former is not None:
                mine[key] = weakref.ref(former)
    elif mine.get(key) is task:
        node = task.result()
        if former is not None:
            former.watch.retired = True
            for alias, known in list(mine.items()):
                if isinstance(known, weakref.ref) and known() is former:
                    del mine[alias]
        mine[key] = weakref.ref(node)
        for alias in (node.region.url, node.region.path):  # the same region by other names
            other = mine.get(alias)
            if other is None or (isinstance(other, weakref.ref) and other() is None):
                mine[alias] = weakref.ref(node)


def _at_exit() -> None:
    for node in _all_nodes():
        # A daemon thread may be inside C at this moment, using the node's memory: its node is not closed, and
        # ends as a killed process's does.
        if not node.loop.is_running():
            _close(node)
        elif node.ident == threading.get_ident():
            node.close()


def _after_fork() -> None:
    for node in _all_nodes():
        node.inherited()
    _nodes.clear()
    _implicit.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
