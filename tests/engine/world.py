"""Several engines in one process, without a thread, an event loop or a clock of their own.

Each node runs on a fake CPU of its own, whose stores others see late (native/fake.c); the clock moves only
in `advance`; beats and locks are the world's. So all that happens follows from the seed, and a failure can
be repeated.

A World is *eager* (stores are seen at once), *lazy* (the scheduler drains some stores of some CPUs between
any two calls) or *nested* (lazy, and after some number of memory accesses, in the middle of a call, another
node is pumped).
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from shmsock.engine import layout as lay
from shmsock.engine.attach import Claim, claim_section
from shmsock.engine.connection import STALE, Connection, Link
from shmsock.engine.datagram_links import Incoming, Outgoing
from shmsock.engine.datagrams import Endpoint
from shmsock.engine.engine import Engine
from shmsock.engine.features import OWN, Terms
from shmsock.engine.layout import Identity, Layout, format_region
from shmsock.engine.listeners import Listener
from shmsock.engine.memory import Core, Memory
from shmsock.engine.peers import Peer
from shmsock.engine.settings import Settings
from shmsock.native.build import FAKE_MEMORY, build_variant
from shmsock.region.doorbell import Doorbell, Reach

T = TypeVar("T")

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "native"
FILE = (11, 22)
KERNEL, MACHINE = b"kernel-of-host-A", b"machine-number-A"
MS = 1_000_000
SECOND = 1_000 * MS
BEAT = 100 * MS
SETTINGS = Settings(ring_bytes=16384)


@functools.cache
def fake_core(*defines: str) -> Core:
    """The core over lazy memory, compiled once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    variant = zlib.crc32(repr((sys.version, defines, os.environ.get("CFLAGS"))).encode())
    with open(CACHE / f"lock-{variant}", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # by one of the processes that run tests side by side
        return Core(*build_variant("_core_fake", [FAKE_MEMORY, *defines], CACHE))


class Event(NamedTuple):
    """What an engine would have told a driver: `kind` of `target`."""

    kind: str
    target: Any
    arg: Any = None


class FakeLocks:
    """Section locks of one process, in the table of its kernel."""

    identity = FILE
    lock_fd = -1
    can_lock = True

    def __init__(self, table: dict[int, FakeLocks]) -> None:
        self.table = table

    def lock_section(self, index: int) -> bool:
        return self.table.setdefault(index, self) is self

    def unlock_section(self, index: int) -> None:
        if self.table.get(index) is self:
            del self.table[index]

    def section_locked(self, index: int) -> bool:
        return self.table.get(index, self) is not self

    def die(self) -> None:
        for index in [i for i, holder in self.table.items() if holder is self]:
            del self.table[index]


class FakeDoorbell(Doorbell):
    """All of them hang on one board. `swallow`: others' rings never arrive."""

    vectors = 1

    def __init__(self, board: dict[int, FakeDoorbell], number: int, *, swallow: bool = False) -> None:
        self.board, self.id, self.fd = board, number, os.eventfd(0, os.EFD_NONBLOCK)
        self.nowhere = os.eventfd(0, os.EFD_NONBLOCK) if swallow else -1
        board[number] = self

    def reach(self, peer: int) -> Reach | None:
        other = self.board.get(peer)
        if other is None or other is self:
            return None
        return Reach("eventfd", other.fd if other.nowhere < 0 else other.nowhere)

    def close(self) -> None:
        for fd in (self.fd, self.nowhere):
            if fd >= 0:
                os.close(fd)

    __del__ = close


class Node:
    """An engine, and what a process has besides: a CPU, a kernel, locks, a heartbeat. Calls go through
    World.run."""

    engine: Engine

    def __init__(self, world: World, cpu: int, who: Identity, locks: FakeLocks) -> None:
        self.world, self.cpu, self.who, self.locks = world, cpu, who, locks
        self.events: list[Event] = []
        self.state = "attaching"  # running, stopped, left or dead
        self.watched: set[int] = set()
        self.doorbell: Doorbell | None = None

    def __repr__(self) -> str:
        return f"<Node {self.who.name} {self.state} cpu {self.cpu}>"

    @property
    def section(self) -> int:
        return self.engine.section

    @property
    def connections(self) -> list[Connection]:
        return list(self.engine.connections.values())

    def peer(self, other: Node) -> Peer:
        return self.engine.peers[other.section]

    def link(self, other: Node) -> Link:
        return self.engine.links[other.section]

    def call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return self.world.run(self, fn, *args, **kwargs)

    def pump(self) -> list[Event]:
        events = self.call(self._pump)
        self.events += events
        return events

    def pump_on(self) -> list[Event]:
        """Once more in the same turn."""
        engine = self.engine

        def more() -> list[Event]:
            words = self.world.ffi.new("uint64_t[64]")
            n = engine.lib.sh_pump_more(engine.nd, words, 64, engine.home.now(), 50_000)
            return self._attended(None if n == STALE else words[0:n])

        events = self.call(more)
        self.events += events
        return events

    def _pump(self) -> list[Event]:
        unlocked = sum(1 << s for s in self.watched if s not in self.locks.table)
        if self.world.lib.sh_fake_any_notified(self.engine.nd):
            self.world.lib.sh_received(self.engine.nd, 0)  # as the heartbeat tells of strangers
        return self._attended(self.engine.poll(), unlocked)

    def _attended(self, words: list[int] | None, unlocked: int = 0) -> list[Event]:
        """What is the test's. What belongs to datagrams is done as a driver does it."""
        self.engine.attend(words, self.world.now, unlocked)
        events, found = self.engine.events, []
        for _ in range(len(events)):
            call, arg = events.popleft()
            event = Event(call.__name__, getattr(call, "__self__", None), arg)
            datagrams = isinstance(getattr(event.target, "handler", None), (Incoming, Outgoing))
            if datagrams or isinstance(event.target, Endpoint):
                call(arg)
            else:
                found.append(event)
        return found

    def watch(self, peer: Peer, on: bool) -> None:
        who = peer.who
        here = who and who.flags & lay.FLAG_LOCKED and who.boot_id == self.who.boot_id and who.file == FILE
        if on and here and peer.section != self.section:
            self.watched.add(peer.section)
        else:
            self.watched.discard(peer.section)

    def take(self, kind: str, target: Any = None) -> list[Event]:
        """Remove the events of that kind (about `target`), and return them."""
        found = [e for e in self.events if e.kind == kind and (target is None or e.target is target)]
        self.events = [e for e in self.events if e not in found]
        return found

    def failed(self, conn: Connection) -> OSError:
        (event,) = self.take("failed", conn)
        assert isinstance(event.arg, OSError)
        return event.arg

    def accepted(self, listener: Listener | None = None) -> Connection:
        """The oldest connection that nobody has taken over yet."""
        event = next(e for e in self.events if e.kind == "accepted" and listener in (None, e.target))
        self.events.remove(event)
        event.target.taken()
        assert isinstance(event.arg, Connection)
        return event.arg

    def listen(self, port: int = 7000, **how: Any) -> Listener:
        return self.call(self.engine.listen, port, **how)

    def connect(self, to: Node | int, port: int = 7000) -> Connection:
        section, name = (to, "nobody") if isinstance(to, int) else (to.section, to.who.name)
        return self.call(self.engine.connect, section, port, local=(self.who.name, 40000), remote=name)

    def write(self, conn: Connection, data: bytes) -> int:
        return self.call(conn.write, data, len(data))

    def read(self, conn: Connection, want: int = 1 << 20) -> bytes | int:
        return self.call(conn.read, want)

    def read_or_arm(self, conn: Connection, want: int, least: int = 1, how: int = 0) -> bytes | int:
        """As a stream reads: the question that the extension asks the core. EMPTY: armed."""
        room, bytes_of = self.engine.home.room
        n: int = self.call(self.world.lib.sh_read_wait, conn.ep, room, want, least, how)
        return bytes(bytes_of[:n]) if n > 0 else n

    def read_all(self, conn: Connection) -> tuple[bytes, int]:
        """Everything that is there, and the status behind it."""
        found = b""
        while isinstance(data := self.read(conn), bytes):
            found += data
        return found, data

    def finish(self, conn: Connection) -> None:
        self.call(conn.finish)

    def close(self, conn: Connection) -> None:
        self.call(conn.close)

    def abort(self, conn: Connection) -> None:
        self.call(conn.abort)

    def statistic(self, name: str) -> int:
        return self.engine.statistics()[name]

    def asks(self, section: int) -> tuple[int, int, int]:
        """CONNECTs and answers that wait to be sent there, and CONNECTs that have no answer yet."""
        lib, nd = self.world.lib, self.engine.nd
        return (
            lib.sh_fake_asks(nd, section, 0),
            lib.sh_fake_asks(nd, section, 1),
            lib.sh_fake_asks(nd, section, 2),
        )

    def held_by(self, section: int) -> tuple[int, int]:
        """Slots and bytes of rings that the connections hold which that section's owner has opened."""
        lib, nd = self.world.lib, self.engine.nd
        return lib.sh_fake_share(nd, section, 0), lib.sh_fake_share(nd, section, 1)

    def take_memory(self, size: int) -> tuple[int, int] | None:
        """A block of ring memory, of that size or the largest smaller one."""
        got = self.world.ffi.new("uint32_t *", size)
        at = self.world.lib.sh_arena_take(self.world.lib.sh_arena_of(self.engine.nd), got)
        return (at, got[0]) if at else None

    def give_memory(self, block: tuple[int, int]) -> None:
        self.world.lib.sh_arena_give(self.world.lib.sh_arena_of(self.engine.nd), *block)


class World:
    """See the module's docstring. `size` bytes for `peers` sections; the rest is random, from `seed`."""

    def __init__(self, how: str = "eager", seed: int = 0, *, peers: int = 4, size: int = 4 << 20) -> None:
        self.how, self.seed, self.rng = how, seed, random.Random(f"{how} {seed}")
        self.core = fake_core()
        self.ffi, self.lib = self.core
        self.lib.sh_fake_reset()
        self.map = mmap.mmap(-1, size)
        self.memory = Memory(self.core, self.map)
        self.layout: Layout = format_region(self.memory, peers=peers, rng=self.rng)
        self.now = 0
        self.nodes: list[Node] = []
        self.kernels: dict[bytes, dict[int, FakeLocks]] = {}
        self.busy: list[Node] = []
        self.trouble: BaseException | None = None
        self.hook = self.ffi.callback("void(void)", self._interrupt)
        self.cut: Node | None = None
        self.drains = self.rng.choice((0.05, 0.2, 0.5))  # how eagerly
        self.meanwhile: Callable[[Node], object] = Node.pump
        self._free_cpus = list(range(71, 0, -1))
        self.advance(1.0)
        self.drain()

    def __repr__(self) -> str:
        return f"World({self.how!r}, seed={self.seed})"

    # -- memory

    def word(self, offset: int) -> int:
        """What is in memory, whatever the CPUs have in their store buffers."""
        value: int = struct.unpack_from("<Q", self.map, offset)[0]
        return value

    def poke(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self.map, offset, value & 0xFFFFFFFFFFFFFFFF)

    def drain(self) -> None:
        for cpu in range(72):
            self.lib.sh_fake_drain(cpu, -1)

    def jitter(self) -> None:
        """Let some stores become visible: all in an eager world, some of some CPUs in a lazy one."""
        if self.how == "eager":
            self.drain()
            return
        for cpu in [0, *(n.cpu for n in self.nodes)]:
            if self.rng.random() < self.drains:
                self.lib.sh_fake_drain(cpu, self.rng.choice((1, 2, 3, 5, 8, 20, 100)))

    # -- running a node

    def run(self, node: Node, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `fn` on the node's CPU. In a nested world others are pumped in the middle of it."""
        assert node not in self.busy, f"{node} re-entered"
        assert node.state in ("running", "attaching"), node
        outermost, before = not self.busy, self.busy[-1].cpu if self.busy else 0
        self.jitter()
        self.busy.append(node)
        self.lib.sh_fake_cpu(node.cpu)
        if outermost and self.how == "nested":
            self.lib.sh_fake_hook(self.hook, self.rng.randrange(1, 60))
        try:
            return fn(*args, **kwargs)
        finally:
            if outermost and self.how == "nested":
                self.lib.sh_fake_hook(self.ffi.NULL, 0)
            self.busy.pop()
            self.lib.sh_fake_cpu(before)
            self.jitter()
            if self.trouble is not None and not self.busy:
                trouble, self.trouble = self.trouble, None
                raise trouble

    def _interrupt(self) -> None:
        try:
            if self.cut is not None:
                self.lib.sh_fake_cut(self.cut.cpu)
                self.cut = None
                return
            others = [n for n in self.nodes if n.state == "running" and n not in self.busy]
            if others:
                self.meanwhile(self.rng.choice(others))
            self.jitter()
            self.lib.sh_fake_hook(self.hook, self.rng.randrange(1, 60))
        except BaseException as error:
            self.trouble = error

    def run_and_die(self, node: Node, steps: int, fn: Callable[[], object]) -> bool:
        """Call `fn`, and kill the process after so many memory accesses. False: it was over before that."""
        assert not self.busy
        assert self.how != "nested"
        self.cut = node
        self.lib.sh_fake_hook(self.hook, steps)
        try:
            fn()
        finally:
            died, self.cut = self.cut is None, None
            self.lib.sh_fake_hook(self.ffi.NULL, 0)
        if died:
            self.lib.sh_fake_bury(node.cpu)
            node.locks.die()
            if node.state == "running":
                self._end(node, "dead")
        return died

    def running(self) -> list[Node]:
        return [n for n in self.nodes if n.state == "running"]

    def pump_all(self) -> bool:
        """Pump each once, in random order. Does anybody want more?"""
        nodes = self.running()
        self.rng.shuffle(nodes)
        more = False
        for node in nodes:
            more |= bool(node.pump()) or not node.engine.quiet
        return more

    def quiet(self, limit: int = 2000) -> None:
        """Pump until all is said and seen, at one moment of the clock."""
        for _ in range(limit):
            more = self.pump_all()
            if not more:
                self.drain()
                awake = (
                    self.lib.sh_fake_any_notified(n.engine.nd) or not n.engine.quiet
                    for n in self.running()
                    if n.engine.alive
                )
                if not any(awake):
                    return
        raise AssertionError(f"{self!r} is not quiet after {limit} rounds")

    def advance(self, seconds: float) -> None:
        """Let time pass: keepers beat ten times a second, whoever runs is pumped each time. No store stays
        in a buffer for so long."""
        end = self.now + round(seconds * SECOND)
        while self.now < end:
            self.now += min(BEAT, end - self.now)
            self.lib.sh_fake_time(self.now)
            self.drain()
            for node in self.nodes:
                if node.state == "running":
                    self._beat(node)
            self.pump_all()
            self.jitter()

    def _beat(self, node: Node) -> None:
        """What heartbeat.c does, on a CPU of its own."""
        at = self.layout.section(node.section)
        if (
            self.word(at + lay.CLAIM) != node.engine.claim.word
            or self.word(lay.H_ID) != self.layout.region_id
        ):
            self.lib.sh_node_inert(node.engine.nd)
        elif node.engine.alive:
            self.poke(at + lay.BEAT, self.word(at + lay.BEAT) + 1)

    # -- life and death of processes

    def attach(
        self,
        name: str,
        *,
        kernel: bytes = KERNEL,
        machine: bytes = MACHINE,
        locked: bool = True,
        settings: Settings = SETTINGS,
        doorbell: Doorbell | None = None,
        terms: Terms = OWN,
    ) -> Node:
        node = self.process(name, kernel=kernel, machine=machine, locked=locked, terms=terms)
        node.doorbell = doorbell
        self.start(node, settings)
        return node

    def process(
        self,
        name: str,
        *,
        kernel: bytes = KERNEL,
        machine: bytes = MACHINE,
        locked: bool = True,
        terms: Terms = OWN,
    ) -> Node:
        """One that has not attached yet."""
        cpu = next(c for c in reversed(self._free_cpus) if not self.lib.sh_fake_pending(c))
        self._free_cpus.remove(cpu)
        who = Identity(name, kernel, machine, 4242, lay.FLAG_LOCKED if locked else 0, FILE, terms=terms)
        return Node(self, cpu, who, FakeLocks(self.kernels.setdefault(kernel, {})))

    def start(self, node: Node, settings: Settings = SETTINGS, claim: Claim | None = None) -> None:
        claim = claim or self.claim(node)
        node.engine = self.run(
            node,
            Engine,
            self.layout,
            claim,
            node.who,
            settings=settings,
            rng=self.rng,
            watch=node.watch,
            locks=node.locks,
            doorbell=node.doorbell,
            now_ns=self.now,
        )
        self.nodes.append(node)
        node.state = "running"

    def claim(self, node: Node) -> Claim:
        who = node.who
        steps: Generator[float, None, Claim] = claim_section(
            self.layout, node.locks, who.boot_id, who.machine_id, self.rng, path="region"
        )
        while True:
            try:
                wait = self.run(node, next, steps)
            except RuntimeError as error:  # pragma: no cover - a generator's StopIteration never comes out so
                raise AssertionError from error
            except StopIteration as done:
                claim: Claim = done.value
                return claim
            self.drain()
            self.advance(wait)

    def stop(self, node: Node) -> None:
        """SIGSTOP, or a paused VM: it neither runs nor beats, but keeps its locks."""
        node.state = "stopped"

    def resume(self, node: Node) -> None:
        node.state = "running"

    def kill(self, node: Node) -> None:
        """Its locks fall, its stores still become visible, and that is all."""
        node.locks.die()
        self._end(node, "dead")

    def freeze(self, node: Node) -> None:
        """Dead, but nobody of another kernel can know."""
        self._end(node, "dead")

    def leave(self, node: Node) -> None:
        node.call(node.engine.leave)
        node.locks.die()
        self._end(node, "left")

    def _end(self, node: Node, state: str) -> None:
        node.state = state
        self.nodes.remove(node)
        self._free_cpus.insert(0, node.cpu)

    # -- shorthands

    def pair(self, a: str = "a", b: str = "b", **how: Any) -> tuple[Node, Node]:
        made = self.attach(a, **how), self.attach(b, **how)
        self.quiet()
        return made

    def open(self, a: Node, b: Node, port: int = 7000) -> tuple[Connection, Connection]:
        """A connection from a to b, both ends."""
        listener = next(iter(b.engine.listeners.mine.get(port, ())), None) or b.listen(port)
        conn = a.connect(b, port)
        self.quiet()
        assert a.take("connected", conn), a.events
        return conn, b.accepted(listener)

    def users(self, of: Node, towards: int) -> int:
        """Connections of `of` that may still read that section's rings."""
        self.drain()
        return self.word(self.layout.pair(of.section, towards) + lay.USERS) & 0xFFFFFFFF

    def check(self) -> None:
        """The end of every test: when all is closed nothing has leaked, and no wakeup was lost."""
        self.drain()
        self.quiet()
        for node in self.running():
            if node.engine.alive:
                for conn in node.connections:
                    node.abort(conn)
                for listener in list(node.engine.listeners):
                    node.call(listener.close)
        self.quiet()
        if any(n.connections for n in self.running()):  # of peers that are gone, or not known to be
            self.advance(5.0)
            self.quiet()
        for node in self.running():
            if node.engine.alive:
                self._check_clean(node)

    def _check_clean(self, node: Node) -> None:
        engine, layout = node.engine, self.layout
        assert node.connections == [], f"{node} still has connections"
        assert engine.slots.free_slots == layout.slots, f"{node} leaked slots"
        assert engine.slots.free_bytes == layout.arena_bytes, f"{node} leaked ring memory"
        for peer in engine.peers.all:
            waiting, kept, asked = node.asks(peer.section)
            assert (waiting, kept) == (0, 0), f"{node} has something to be sent to {peer.name}"
            assert node.held_by(peer.section) == (0, 0), f"{node}: quota of {peer.name}"
            assert asked == 0, f"{node}: credits towards {peer.name}"
            assert self.users(node, peer.section) == 0, f"{node}: users word of {peer.name}"
        assert not engine.slots.orphans
        for slot in range(layout.slots):
            word = self.word(layout.section(node.section) + int(layout.geometry.slot_off) + 192 * slot)
            assert word == 0, f"{node}: slot {slot} says {word:#x}"
        assert node.statistic("healed") == 0, f"{node}: a wakeup was lost, {self!r}"


def send(world: World, node: Node, conn: Connection, data: bytes, to: Node, end: Connection) -> bytes:
    """Write all of it while the other side reads; what arrived."""
    got, at = b"", 0
    for _ in range(10000):
        if at < len(data):
            taken = node.write(conn, data[at:])
            assert taken >= 0, taken
            at += taken
        to.pump()
        found, _status = to.read_all(end)
        got += found
        if len(got) == len(data):
            return got
        node.pump()
    raise AssertionError(f"{world!r}: {len(got)} of {len(data)} bytes arrived, {at} were written")
