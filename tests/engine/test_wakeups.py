"""No wakeup is lost: two nodes that sleep as a driver does, until a bell differs from what their pump last
saw.

The clock stands still, so no safety look ever helps out. Stores become visible late, in random order
between the two, and in half of the runs the other side is run in the middle of a call, after a random
number of accesses to shared memory. Leaving out any of the fences is found out (test_each_fence_is_needed),
so the others mean something.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator
from typing import Any

import pytest

from shmsock.engine.connection import EMPTY, EOF, RESET, YIELD, Connection, State
from shmsock.engine.settings import Settings
from tests.engine.test_naps import by_futexes
from tests.engine.world import FakeDoorbell, Node, World

SMALL = Settings(ring_bytes=4096, busy_poll_us=100)
Task = Generator[None, None, None]


class Hung(AssertionError):
    pass


class Sleeper:
    """One process: tasks that run when their connection is ready, a pump, and sleep when there is nothing to
    do."""

    def __init__(self, world: World, node: Node) -> None:
        self.world, self.node = world, node
        self.tasks: list[tuple[Connection, Task]] = []
        self.wake_pending: set[Connection] = set()
        self.asleep = False
        self.hot = False  # its pump goes on in the same turn, while it has nothing else to do

    def start(self, conn: Connection, task: Task) -> None:
        self.tasks.append((conn, task))
        self.wake_pending.add(conn)

    def step(self) -> bool:
        """One turn of the loop. False: asleep, and nothing rang."""
        node = self.node
        if self.asleep and not self.rung():
            return False
        self.asleep = False
        node.pump()
        ready = self.take_ready()
        for conn, task in list(self.tasks):
            if conn in ready:
                try:
                    next(task)
                except StopIteration:
                    self.tasks.remove((conn, task))
        if self.hot and not (self.wake_pending or self.world.busy) and node.pump_on():
            return True
        if node.engine.quiet and not node.events and not self.wake_pending:
            self.asleep = node.doorbell is None or bool(node.call(self.world.lib.sh_sleep, node.engine.nd))
        return True

    def rung(self) -> bool:
        """As the heartbeat finds out, or by a doorbell alone, without anybody who looks at bells."""
        lib, node = self.world.lib, self.node
        if node.doorbell is None:
            return bool(lib.sh_fake_any_notified(node.engine.nd))
        if times := node.doorbell.drain():
            node.call(lib.sh_received, node.engine.nd, times)
        return times > 0

    def take_ready(self) -> set[Connection]:
        ready = self.wake_pending | {event.target for event in self.node.take("ready")}
        self.wake_pending = set()
        return ready


def writer(
    side: Sleeper, conn: Connection, data: bytes, rng: random.Random, may_start: Callable[[], bool]
) -> Task:
    """Waits for space as drain() does; each yield sleeps until the connection is ready."""
    world, node = side.world, side.node
    lib, at, lull = world.lib, 0, rng.choice((0, 0.5, 0.9))
    pieces = rng.choice(((1, 7, 60, 300), (300, 3000, 5000)))
    while not may_start():
        yield
    while at < len(data):
        piece = data[at : at + rng.choice(pieces)]
        taken = node.write(conn, piece)
        assert taken >= 0
        at += taken
        while taken < len(piece):
            space = node.call(lib.sh_wait_space, conn.ep, 0)
            assert space >= 0
            if space:
                break
            yield
        if rng.random() < 0.1:
            node.pump()
        while rng.random() < lull:  # others run meanwhile
            side.wake_pending.add(conn)
            yield
    node.finish(conn)


def patient_reader(world: World, node: Node, conn: Connection, got: bytearray, rng: random.Random) -> Task:
    """As a protocol's transport: reads only when told, and then all there is."""
    while True:
        data = node.read(conn, rng.choice((1, 100, 4096)))
        if isinstance(data, bytes):
            got += data
        elif data == EMPTY:
            yield
        else:
            return


def touching_reader(spin: int, leave: bool = False) -> Callable[..., Task]:
    """As a stream: the fast read, then arm, then sleep. Its toggle stays unacknowledged between reads.
    `leave`: it leaves it to the next pass to arm."""

    def reader(world: World, node: Node, conn: Connection, got: bytearray, rng: random.Random) -> Task:
        lib = world.lib
        while True:
            how = lib.SH_MAY_SPIN if spin and not world.busy else lib.SH_PASS_FOLLOWS if leave else 0
            data = node.read_or_arm(conn, rng.choice((1, 100, 4096)), how=how)
            if isinstance(data, bytes):
                got += data
                if rng.random() < 0.1:
                    node.pump()
            elif data == EMPTY:
                yield
            elif data == YIELD:
                node.call(lib.sh_turn, node.engine.nd)
            else:
                return

    return reader


def greedy_reader(world: World, node: Node, conn: Connection, got: bytearray, rng: random.Random) -> Task:
    """As readexactly: waits for more than there is, and so takes what is there before it sleeps."""
    while True:
        data = node.read_or_arm(conn, 4096, rng.choice((2, 50, 4096)))
        if data == world.lib.SH_SLOW:
            data = node.read(conn)
        if isinstance(data, bytes):
            got += data
        elif data == EMPTY:
            yield
        else:
            return


READERS = {
    "patient": patient_reader,
    "touching": touching_reader(0),
    "leaving": touching_reader(0, leave=True),
    "spinning": touching_reader(1),
    "greedy": greedy_reader,
    "hot": patient_reader,
    "napping": touching_reader(1),
    "hot, napping": patient_reader,
}

NAPS = ("napping", "hot, napping")  # each yield takes long
SPINS = ("spinning", "hot", *NAPS)  # only where the clock goes on meanwhile


def until_done(
    world: World, sides: dict[Node, Sleeper], rng: random.Random, state: Callable[[], str]
) -> None:
    """Pump by turn in random order. Raises Hung when everybody sleeps and nobody rings."""
    order = list(sides.values())
    world.meanwhile = lambda node: sides[node].step()
    for _ in range(20000):
        if not any(side.tasks for side in order):
            break
        if not rng.choice(order).step() and not any(side.step() for side in order):
            world.drain()  # what is on its way arrives, sooner or later
            if not any(side.step() for side in order):
                raise Hung(f"{world!r}: asleep with {state()}")
    else:
        raise Hung(f"{world!r}: no end with {state()}")
    world.meanwhile = Node.pump


def play(world: World, a: Node, b: Node, kind: str, rng: random.Random, conns: int = 1) -> None:
    """Bytes both ways over some connections, until all is read."""
    sides = {a: Sleeper(world, a), b: Sleeper(world, b)}
    reader = READERS[kind]
    for side in sides.values():
        side.hot = kind.startswith("hot")
    jobs: list[tuple[bytes, bytearray]] = []
    ends: list[tuple[Node, Connection]] = []
    for _ in range(conns):
        c, s = world.open(a, b)
        ends += [(a, c), (b, s)]
        answers = rng.random() < 0.5  # the second direction begins when the first has ended
        request: tuple[bytes, bytearray] = (b"", bytearray())
        for src, out, dst, end in ((a, c, b, s), (b, s, a, c)):
            data, got = rng.randbytes(rng.choice((10, 1000, 9000))), bytearray()
            jobs.append((data, got))
            # two tasks of one connection share its ready events, as a transport and its protocol do
            may_start = functools.partial(lambda sent, arrived: len(sent) == len(arrived), *request)
            sides[dst].start(end, reader(world, dst, end, got, rng))
            sides[src].start(out, writer(sides[src], out, data, rng, may_start))
            if answers:
                request = data, got
    until_done(
        world, sides, rng, lambda: f"{[len(got) for _, got in jobs]} of {[len(d) for d, _ in jobs]} bytes"
    )
    for data, got in jobs:
        assert bytes(got) == data, world
    for node, conn in ends:
        node.close(conn)
    world.quiet()
    if a.connections or b.connections:
        raise Hung(f"{world!r}: ends that were not seen, of {a.connections} and {b.connections}")


def one_read(node: Node, conn: Connection, arms: bool) -> bytes | int:
    """As a protocol's transport, or as a stream does."""
    if not arms:
        return node.read(conn)
    data = node.read_or_arm(conn, 4096)
    return EMPTY if data == YIELD else node.read(conn) if data in (EOF, RESET) else data


def ping(side: Sleeper, conn: Connection, rng: random.Random, arms: bool) -> Task:
    """Questions in several pieces; the next only when the answer is there, so every wakeup counts."""
    for _ in range(12):
        left = 0
        for _ in range(rng.choice((1, 2, 3))):
            left += side.node.write(conn, b"?" * rng.choice((1, 50)))
            while rng.random() < 0.5:
                side.wake_pending.add(conn)
                yield
        side.node.write(conn, b"!")
        while left >= 0:
            data = one_read(side.node, conn, arms)
            if isinstance(data, bytes):
                left -= len(data)
            else:
                assert data == EMPTY
                yield
    side.node.finish(conn)


def pong(side: Sleeper, conn: Connection, rng: random.Random, arms: bool) -> Task:
    question = b""
    while (data := one_read(side.node, conn, arms)) != EOF:
        if isinstance(data, bytes):
            question += data
            if question.endswith(b"!"):
                side.node.write(conn, question)
                question = b""
        else:
            assert data == EMPTY
            yield


def echo(world: World, a: Node, b: Node, arms: bool, rng: random.Random, conns: int) -> None:
    sides = {a: Sleeper(world, a), b: Sleeper(world, b)}
    for _ in range(conns):
        c, s = world.open(a, b)
        sides[a].start(c, ping(sides[a], c, rng, arms))
        sides[b].start(s, pong(sides[b], s, rng, arms))
    until_done(world, sides, rng, lambda: "an echo")
    for conn in a.connections:
        a.close(conn)
    for conn in b.connections:
        b.close(conn)
    world.quiet()


def tick(world: World) -> None:
    """In spins the clock must go on, or they never end: a bit with every interruption."""
    interrupt = world._interrupt

    def later() -> None:
        world.now += 20_000
        world.lib.sh_fake_time(world.now)
        interrupt()

    world.hook = world.ffi.callback("void(void)", later)


def rounds(how: str, kind: str, seed: int, count: int, omit: str = "", rung: bool = False) -> World:
    world = World(how, seed, peers=2, size=2 << 20)
    world.lib.sh_fake_omit(omit.encode())
    if kind in SPINS:
        tick(world)
    world.lib.sh_fake_yields(200_000 if kind in NAPS else 0)
    board: dict[int, FakeDoorbell] = {}
    bells = [FakeDoorbell(board, number) if rung else None for number in (0, 7)]
    a, b = (world.attach(n, settings=SMALL, doorbell=d) for n, d in zip("ab", bells, strict=True))
    world.quiet()
    b.listen(backlog=1000)
    if kind in NAPS and not rung:
        by_futexes(world, a, b)
    for i in range(count):
        rng = random.Random(f"{how} {kind} {seed} {i}")
        if kind.startswith("echo"):
            echo(world, a, b, kind == "echo-arming", rng, 1 + i % 3)
        else:
            play(world, a, b, kind, rng, 1 + i % 3)
    for node in (a, b):
        assert node.statistic("healed") == 0
    return world


KINDS = [*READERS, "echo", "echo-arming"]
CASES = [(how, kind) for how in ("lazy", "nested") for kind in KINDS if how == "nested" or kind not in SPINS]


@pytest.mark.parametrize(("how", "kind"), CASES)
def test_nobody_sleeps_forever(how: str, kind: str) -> None:
    for seed in range(10):
        world = rounds(how, kind, seed, 12)
        world.check()
        assert sum(node.statistic("naps") for node in world.nodes) > 0 or kind not in NAPS


@pytest.mark.parametrize(("how", "kind"), CASES)
def test_nobody_sleeps_forever_who_is_woken_by_doorbells_alone(how: str, kind: str) -> None:
    for seed in range(10):
        world = rounds(how, kind, seed, 8, rung=True)
        world.check()
        for node in world.nodes:
            counts = node.engine.statistics()
            assert 0 < counts["kicks"] < counts["notifications"]
            assert counts["kicks"] + counts["suppressed"] <= counts["notifications"] + world.layout.peers


KICKING = ["kick", "sh_sleep"]


@pytest.mark.parametrize(
    "function", ["sh_notify_slot", "collect", "want_space", "sh_arm", "sh_rearm_touched", *KICKING]
)
def test_each_fence_is_needed(function: str) -> None:
    """Without the fences of that function somebody sleeps forever: so the tests above would notice."""
    for seed in range(40):
        for how, kind in CASES:
            try:
                rounds(how, kind, seed, 4, omit=function, rung=function in KICKING)
            except Hung:
                return
    raise AssertionError(f"the fence in {function} was never missed")


def test_arming_at_the_end_of_file_keeps_the_word_of_space() -> None:
    """One toggle spoke of space and of FIN, and the reader that arms acknowledges it."""
    world = World()
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, bytes(1 << 20))
    world.quiet()
    assert a.call(world.lib.sh_wait_space, c.ep, 0) == 0
    b.read_all(s)
    b.finish(s)
    assert a.call(world.lib.sh_arm, c.ep) == 1
    assert a.read(c) == EOF
    a.take("ready")
    world.quiet()
    assert c in [e.target for e in a.take("ready")]
    world.check()


def meanwhile(world: World, steps: int, act: Callable[[], object]) -> Any:
    """`act` runs after so many memory accesses of the next call. Keep what is returned until then."""
    hook = world.ffi.callback("void(void)", act)
    world.lib.sh_fake_hook(hook, steps)
    return hook


def test_a_toggle_that_a_spin_passed_over_is_not_left_behind_by_release() -> None:
    """A slot that was read keeps its toggle; a spin on another takes the bell; then the slot is used anew."""
    world = World()
    a, b = world.attach("a", settings=SMALL), world.attach("b", settings=SMALL)
    (_, s1), (c2, s2) = world.open(a, b), world.open(a, b)
    a.write(c2, b"x")
    b.pump()
    assert b.read(s2) == b"x"

    def act() -> None:
        a.abort(c2)
        a.connect(b)

    hook = meanwhile(world, 40, act)
    b.call(world.lib.sh_turn, b.engine.nd)
    assert b.read_or_arm(s1, 10, how=world.lib.SH_MAY_SPIN) == EMPTY
    assert hook
    assert c2.state is not State.OPEN
    assert b.read(s2) == RESET
    b.pump()
    t = b.accepted()
    assert t.slot == s2.slot
    world.quiet()
    (event,) = a.take("connected")
    b.take("ready")
    a.write(event.target, b"hello")
    assert world.lib.sh_fake_any_notified(b.engine.nd)
    world.quiet()
    assert b.read(t) == b"hello"
    world.check()


def test_bytes_that_a_paused_reader_leaves_are_no_lost_wakeup() -> None:
    """The ring is full, the writer said WANT, and for seconds nobody reads: nothing was lost, so nothing
    healed."""
    world = World()
    a, b = world.pair()
    c, s = world.open(a, b)
    assert a.write(c, bytes(c.ring[1])) == c.ring[1]
    world.advance(5)
    assert a.call(world.lib.sh_wait_space, c.ep, 0) == 0
    world.advance(5)
    a.take("ready")
    b.read(s, 10)
    world.quiet()
    assert [e.target for e in a.take("ready")] == [c]
    world.check()


def test_mail_that_waits_for_its_turn_is_no_lost_wakeup() -> None:
    """More CONNECTs than one pass answers, just when the safety look is due."""
    world = World()
    a, b = world.pair()
    b.listen(backlog=1000)
    world.stop(a)
    world.advance(0.85)
    world.resume(a)
    for _ in range(30):
        a.connect(b)
    world.now += 200_000_000
    world.lib.sh_fake_time(world.now)
    b.pump()
    world.stop(a)
    world.stop(b)
    world.now += 1_200_000_000
    world.lib.sh_fake_time(world.now)
    world.resume(b)
    b.pump()
    world.resume(a)
    world.quiet()
    assert len(a.connections) == 30
    world.check()


@pytest.mark.parametrize("lost", ["bell", "toggle"])
def test_the_safety_look_heals_what_a_hostile_hand_took(lost: str) -> None:
    """And counts it: so healed == 0 elsewhere says something."""
    world = World()
    a, b = world.pair()
    c, s = world.open(a, b)
    b.take("ready")
    at = world.layout.pair(a.section, b.section)
    toggles = at + int(world.layout.geometry.toggle_off)
    bell, toggle = world.word(at), world.word(toggles)
    a.write(c, b"x")
    world.poke(at, bell)
    if lost == "toggle":
        world.poke(toggles, toggle)
    b.pump()
    assert not b.take("ready")
    world.advance(1.2)
    assert s in [e.target for e in b.take("ready")]
    world.advance(1.2)
    assert b.statistic("healed") == 1


def test_bells_of_what_was_read_already_are_no_offence() -> None:
    """A pump that goes on in the same turn looks at what it read itself, and hears the bells that told of it
    afterwards: they do not make their peer one that rings for nothing, whose bells are not heard any more."""
    world = World()
    a, b = world.pair()
    c, s = world.open(a, b)
    world.quiet()

    def in_vain() -> None:  # the clock goes on, or who hears nothing would wait forever
        world.lib.sh_fake_time(world.now + 1_000_000)

    for _ in range(1100):
        b.pump()
        for _ in range(3):
            a.write(c, b"x")
            hook = meanwhile(world, 1000, in_vain)
            assert b.pump_on()
            assert hook
            assert b.read(s) == b"x"
    world.lib.sh_fake_hook(world.ffi.NULL, 0)
    world.quiet()
    b.take("ready")
    a.write(c, b"heard")
    b.pump()
    assert [e.target for e in b.take("ready")] == [s]
    assert b.read(s) == b"heard"
    world.check()
