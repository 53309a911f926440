"""Format, claim, reuse, reap: the little that several processes may do to one word at a time."""

from __future__ import annotations

import errno
import mmap
import random
from collections.abc import Generator
from typing import Any

import pytest

from shmsock.engine import attach
from shmsock.engine import layout as lay
from shmsock.engine.attach import (
    LOOK_S,
    PATIENCE_S,
    STILL_S,
    Claim,
    Seen,
    _is_read,
    claim_section,
    reap,
    release_claim,
    survey,
)
from shmsock.engine.connection import EOF, VIOLATIONS, Connection
from shmsock.engine.layout import default_slots, format_region, is_blank, read_layout
from shmsock.engine.listeners import Listener
from shmsock.engine.memory import Memory
from shmsock.errors import RegionError, RegionFormatError
from shmsock.region.sizes import parse_size
from tests.engine.world import KERNEL, MS, Node, World, fake_core, send

OTHER = b"kernel-of-host-B"


def blank(size: int = 1 << 20) -> Memory:
    core = fake_core()
    core.lib.sh_fake_reset()
    return Memory(core, mmap.mmap(-1, size))


# -- format


def test_format_then_read() -> None:
    memory = blank()
    assert is_blank(memory)
    made = format_region(memory, peers=5)
    found = read_layout(memory)
    assert not is_blank(memory)
    assert (found.region_id, found.peers, found.slots) == (made.region_id, 5, made.slots)
    assert format_region(memory, peers=9).region_id == made.region_id


@pytest.mark.parametrize("seen", ["at once", "late"])
def test_two_that_format_at_once_write_the_same(seen: str) -> None:
    """Interleaved at every access, on CPUs of their own, even with other wishes: one geometry comes out."""
    core = fake_core()
    for steps in range(1, 100):
        memory = blank()
        other: list[int] = []

        def meanwhile(memory: Memory = memory, other: list[int] = other) -> None:
            core.lib.sh_fake_cpu(2)
            other.append(format_region(memory, peers=3).region_id)
            if seen == "at once":
                core.lib.sh_fake_drain(2, -1)
            core.lib.sh_fake_cpu(1)

        hook = core.ffi.callback("void(void)", meanwhile)
        core.lib.sh_fake_cpu(1)
        core.lib.sh_fake_hook(hook, steps)
        mine = format_region(memory, peers=4).region_id
        core.lib.sh_fake_hook(core.ffi.NULL, 0)
        if not other:
            break
        core.lib.sh_fake_drain(1, -1)
        core.lib.sh_fake_drain(2, -1)
        core.lib.sh_fake_cpu(0)
        assert other == [mine] == [read_layout(memory).region_id]
    assert steps > 7


def test_half_a_format_is_finished_by_the_next() -> None:
    memory = blank()
    memory.cas(lay.H_ID, 0, 5 << 24 | 1 << 63 | 4 << 8 | 3)
    assert is_blank(memory)
    with pytest.raises(RegionFormatError, match="not formatted"):
        read_layout(memory)
    assert format_region(memory, peers=9).peers == 3


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (lay.H_MAGIC, 0, "not formatted, or zeroed"),
        (lay.H_MAGIC, 0x1234, "it holds something else"),
        (lay.H_VERSION, 1, "version 1, this shmsock knows 5: .* `shmsock create --force`"),
        (lay.H_VERSION, 1 << 63, "version"),
        (lay.H_BYTES, 1 << 21, "truncated"),
        (lay.H_BYTES, 1 << 63, "truncated"),
        (lay.H_BYTES, 0, "do not go together"),
        (lay.H_BYTES, 8192, "do not go together"),
        (lay.H_ID, 0, "do not go together"),
        (lay.H_ID, (1 << 64) - 1, "do not go together"),
        (lay.H_ID, 5 << 24 | 4 << 8 | 65, "do not go together"),
        (lay.H_ID, 5 << 24 | 12 << 8 | 4, "do not go together"),
        (lay.H_ID, 5 << 24 | 1 << 16 | 4 << 8 | 4, "do not go together"),
    ],
)
def test_wrong_headers_are_told_apart(offset: int, value: int, says: str) -> None:
    memory = blank()
    format_region(memory, peers=4)
    memory.store(offset, value)
    with pytest.raises(RegionFormatError, match=says) as info:
        read_layout(memory)
    assert info.value.errno == errno.EINVAL


def test_random_headers_are_refused_or_make_sense() -> None:
    memory, rng = blank(), random.Random(7)
    for _ in range(3000):
        memory.store(lay.H_MAGIC, lay.MAGIC)
        memory.store(lay.H_VERSION, lay.VERSION)
        memory.store(lay.H_BYTES, rng.choice((memory.size, rng.getrandbits(rng.randrange(64)))))
        memory.store(
            lay.H_ID,
            rng.getrandbits(40) << 24
            | rng.choice((0, 0, 1)) << 16
            | rng.randrange(14) << 8
            | rng.randrange(70),
        )
        try:
            layout = read_layout(memory)
        except RegionFormatError:
            continue
        assert layout.section(layout.peers) <= memory.size
        assert layout.arena_off + layout.arena_bytes == layout.section_bytes


@pytest.mark.parametrize("size", [4096, 8192, 65536])
def test_too_small_a_region_says_what_would_do(size: int) -> None:
    memory = blank(size)
    with pytest.raises(RegionFormatError, match=r"make it \d+ [KM]iB or more") as info:
        format_region(memory, peers=64)
    need = parse_size(str(info.value).split("make it ")[1].split(" or more")[0])
    assert default_slots(memory, need, 64)
    assert not default_slots(memory, need // 2, 64)
    for peers in (0, 65, -1):
        with pytest.raises(RegionError) as bad:
            format_region(blank(), peers=peers)
        assert bad.value.errno == errno.EINVAL


def test_foreign_content_is_not_overwritten() -> None:
    for offset, value in ((0, 0x464C457F), (100, 1), (4088, 1)):
        memory = blank()
        memory.store(offset // 8 * 8, value)
        with pytest.raises(RegionFormatError, match="something else"):
            format_region(memory, peers=4)


# -- claim


def crowd(world: World, n: int, **how: Any) -> list[Node]:
    made = [world.attach(f"n{i}", **how) for i in range(n)]
    world.quiet()
    return made


def test_never_used_sections_come_first_and_in_order(world: World) -> None:
    nodes = crowd(world, 2)
    world.leave(nodes[0])
    world.quiet()
    assert [n.section for n in crowd(world, 2)] == [2, 3]


def test_left_sections_are_reused_the_oldest_first(world: World) -> None:
    nodes = crowd(world, 4)
    for i in (2, 0, 3):
        world.leave(nodes[i])
        world.advance(0.5)
    assert [n.section for n in crowd(world, 3)] == [2, 0, 3]


def test_left_comes_before_dead(world: World) -> None:
    nodes = crowd(world, 4)
    world.kill(nodes[0])
    world.leave(nodes[2])
    assert [n.section for n in crowd(world, 2)] == [2, 0]


def test_silent_is_not_dead(world: World) -> None:
    """No lock, or one of another kernel: a paused VM may write at any time."""
    a = world.attach("alpha", locked=False)
    b = world.attach("beta", kernel=OTHER)
    world.attach("gamma")
    world.attach("delta")
    world.freeze(a)
    world.freeze(b)
    world.advance(100)
    with pytest.raises(RegionError, match=r"0 \(alpha\), 1 \(beta\).*reap") as info:
        world.attach("e")
    assert info.value.errno == errno.ENOSPC
    assert info.value.filename == "region"


def test_a_stopped_process_is_not_to_be_reaped(world: World) -> None:
    """Its lock says that it is there, and nobody could claim its section: continue it, or kill it."""
    a = world.attach("alpha")
    crowd(world, 3)
    world.freeze(a)
    world.advance(100)
    with pytest.raises(RegionError, match=rf"stopped here are processes {a.who.pid}, by what") as info:
        world.attach("e")
    assert "reap" not in str(info.value)


def test_all_alive(world: World) -> None:
    crowd(world, 4)
    with pytest.raises(RegionError, match="all their owners are alive"):
        world.attach("e")


def test_who_is_buried_by_another_in_that_moment_leaves_a_section(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead owner's claim is freed between the look and the swap: the section can still be had."""
    nodes = crowd(world, 4)
    world.kill(nodes[2])
    take, buried = attach._take, list[bool]()

    def buried_first(layout: Any, locks: Any, boot_id: bytes, seen: Seen, *rest: Any) -> Any:
        if not buried:
            buried.append(layout.swap_claim(seen.section, seen.claim, 0))
        return take(layout, locks, boot_id, seen, *rest)

    monkeypatch.setattr(attach, "_take", buried_first)
    assert world.attach("e").section == nodes[2].section
    assert buried == [True]


@pytest.mark.parametrize("how_far", ["attached", "has claimed it", "is claiming it"])
def test_who_came_just_now_is_not_stopped(how_far: str) -> None:
    """Another was quicker when a section's reader was done: no beat of it was seen yet, and what the section
    says may be of its former owner."""
    world = World(peers=4)
    a, b = world.pair()
    crowd(world, 2)
    conn, end = world.open(a, b)
    a.write(conn, b"precious")
    a.close(conn)
    world.leave(a)
    node, steps = claiming(world, "e")
    world.advance(node.call(next, steps))
    assert b.read_all(end) == (b"precious", EOF)
    world.quiet()
    if how_far == "attached":
        assert world.attach("late").section == a.section
    else:
        late, claim = claiming(world, "late")
        world.advance(late.call(next, claim))
        if how_far == "has claimed it":
            with pytest.raises(StopIteration):
                late.call(next, claim)
        world.drain()
    with pytest.raises(RegionError, match="all their owners are alive"):
        to_the_end(world, node, steps)


def test_the_same_machine_came_back(world: World) -> None:
    """Machine id known, boot id new, beat still: its former life is over."""
    a = world.attach("alpha", kernel=OTHER, machine=b"B" * 16)
    crowd(world, 3)
    world.freeze(a)
    world.kernels[b"kernel of host B"] = {}
    again = world.attach("alpha", kernel=b"kernel-of-B-next", machine=b"B" * 16)
    assert again.section == a.section


@pytest.mark.parametrize("why", ["another machine", "no machine id", "a clone lives", "its beat moves"])
def test_the_same_machine_came_back_only_if_it_is_sure(why: str) -> None:
    world = World(peers=3)
    machine = bytes(16) if why == "no machine id" else b"B" * 16
    a = world.attach("alpha", kernel=OTHER, machine=machine)
    world.attach("beta", machine=machine if why == "a clone lives" else b"C" * 16)
    world.attach("gamma", machine=b"D" * 16)
    if why != "its beat moves":
        world.freeze(a)
    with pytest.raises(RegionError):
        world.attach(
            "alpha", kernel=b"kernel-of-B-next", machine=b"E" * 16 if why == "another machine" else machine
        )


def claiming(world: World, name: str, **how: Any) -> tuple[Node, Generator[float, None, Claim]]:
    """A process in the middle of claiming."""
    node = world.process(name)
    who = node.who
    return node, claim_section(world.layout, node.locks, who.boot_id, who.machine_id, world.rng, **how)


def to_the_end(world: World, node: Node, steps: Generator[float, None, Claim]) -> Claim:
    while True:
        try:
            wait = node.call(next, steps)
        except StopIteration as done:
            claim: Claim = done.value
            return claim
        world.drain()
        world.advance(wait)


def test_a_section_is_not_reused_while_somebody_reads_it() -> None:
    world = World(peers=2)
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"precious")
    a.close(c)
    world.leave(a)
    told: list[list[str]] = []
    node, steps = claiming(world, "c", waits=told.append)
    for _ in range(40):
        world.advance(node.call(next, steps))
    assert told == [["0 (a)"]]
    assert b.read(s) == b"precious"
    assert b.read(s) == EOF
    claim = to_the_end(world, node, steps)
    assert claim.section == a.section
    release_claim(world.layout, node.locks, claim)
    again = world.attach("c")
    world.quiet()
    x, y = world.open(again, b)
    assert send(world, again, x, b"hello", b, y) == b"hello"
    world.check()


def test_who_says_that_it_reads_delays_reuse_and_does_not_stop_it() -> None:
    """Its word may be a lie."""
    world = World(peers=3)
    liar, honest = world.attach("liar"), world.attach("honest")
    gone = world.attach("gone")
    world.quiet()
    world.leave(gone)
    world.advance(2)  # it has dropped the link, and does not touch the word any more
    tag = world.word(world.layout.pair(gone.section, liar.section) + lay.NOTIFY_SEQ) >> 32
    world.poke(world.layout.pair(liar.section, gone.section) + lay.USERS, tag << 32 | 7)
    before = world.now
    assert world.attach("next").section == gone.section
    assert PATIENCE_S <= (world.now - before) / 1e9 <= PATIENCE_S + 2
    assert honest.engine.alive


def test_nobody_reads_where_nobody_ever_lived() -> None:
    world = World(peers=3)
    liar = world.attach("liar")
    for section in (1, 2):
        world.poke(world.layout.pair(liar.section, section) + lay.NOTIFY_SEQ, 0)  # the tags there are 0, too
        world.poke(world.layout.pair(liar.section, section) + lay.INBOX, 5)
        world.poke(world.layout.pair(liar.section, section) + lay.USERS, 7)
    before = world.now
    assert world.attach("next").section == 1
    assert world.now - before < STILL_S * 1e9


@pytest.mark.parametrize("reads", ["at once", "later"])
@pytest.mark.parametrize("when", ["before the claim", "behind it"])
def test_another_life_between_the_look_and_the_claim(
    monkeypatch: pytest.MonkeyPatch, when: str, reads: str
) -> None:
    """The claim word is 0 again, as it was seen: an owner has come, written, closed and left meanwhile."""
    world = World(peers=3)
    reader = world.attach("reader")
    world.leave(world.attach("former"))
    world.attach("other")  # (never used ones come first)
    world.leave(world.attach("left"))
    node, steps = claiming(world, "slow")
    take = node.locks.lock_section
    bytes_of: list[Connection] = []

    def meanwhile(section: int) -> bool:
        if not bytes_of:
            cpu = node.cpu
            world.busy.remove(node)
            visitor = world.attach("visitor")
            assert visitor.section == section
            world.quiet()
            conn, end = world.open(visitor, reader)
            visitor.write(conn, b"precious")
            visitor.close(conn)
            bytes_of.append(end)
            if reads == "at once":
                reader.pump()
            world.leave(visitor)
            world.drain()
            world.busy.append(node)
            world.lib.sh_fake_cpu(cpu)
        return take(section)

    monkeypatch.setattr(node.locks, "lock_section", meanwhile)
    for _ in range(3 if when == "behind it" else 1):
        world.advance(node.call(next, steps))
    (end,) = bytes_of
    assert reader.read_all(end) == (b"precious", EOF)
    steps.close()


@pytest.mark.parametrize("what", ["takes the answer", "drops the link"])
def test_what_is_unread_shows_at_every_moment(what: str) -> None:
    """At every access of who takes a message and opens its slot, or finds that a peer has left."""
    for steps in range(1, 10_000):
        world = World(peers=2)
        a, b = world.pair()
        listener, conns = b.listen(), [a.connect(b) for _ in range(1 if what == "takes the answer" else 2)]
        world.drain()
        b.pump()
        for _ in conns:
            accepted = b.accepted(listener)
            b.write(accepted, b"precious")
            b.close(accepted)
        world.drain()
        if what == "drops the link":
            a.pump()
        world.leave(b)
        world.drain()
        seen: list[bool] = []

        def look(world: World = world, a: Node = a, b: Node = b, seen: list[bool] = seen) -> None:
            world.lib.sh_fake_drain(a.cpu, -1)
            world.lib.sh_fake_cpu(0)
            seen.append(_is_read(world.layout, b.section, {a.section}))
            world.lib.sh_fake_cpu(a.cpu)

        hook = world.ffi.callback("void(void)", look)
        world.now += 2_000 * MS
        world.lib.sh_fake_time(world.now)
        world.lib.sh_fake_hook(hook, steps)
        a.pump()
        for conn in conns[1:]:
            assert a.read_all(conn) == (b"precious", EOF)
        world.lib.sh_fake_hook(world.ffi.NULL, 0)
        if not seen:
            break
        assert seen == [True], steps
        assert a.read_all(conns[0]) == (b"precious", EOF)
        world.drain()
        assert not world.run(a, _is_read, world.layout, b.section, {a.section})
    assert steps > 50


def test_what_is_unread_shows_while_its_writer_is_not_listened_to() -> None:
    world = World(peers=2)
    a, b = world.pair()
    ends = []
    for _ in range(2):
        conn, end = world.open(a, b)
        a.write(conn, b"precious")
        a.close(conn)
        ends.append(end)
    world.leave(a)
    world.drain()
    for _ in range(VIOLATIONS):
        b.engine.links[a.section].offence()
    b.pump()
    for end in ends:
        world.drain()
        assert world.run(b, _is_read, world.layout, a.section, {b.section})
        assert b.read_all(end) == (b"precious", EOF)
    world.drain()
    assert not world.run(b, _is_read, world.layout, a.section, {b.section})


def test_what_a_peer_said_last_is_heard_before_its_link_is_ended() -> None:
    """It answered, wrote, closed and left between two looks at its words: at every access of the pump."""
    for steps in range(1, 10_000):
        world = World(peers=2)
        a, b = world.pair()
        listener, conn = b.listen(), a.connect(b)
        world.drain()
        gone: list[Node] = []

        def serve(
            world: World = world, b: Node = b, listener: Listener = listener, gone: list[Node] = gone
        ) -> None:
            gone.append(b)
            b.pump()
            accepted = b.accepted(listener)
            b.write(accepted, b"good-bye")
            b.close(accepted)
            world.leave(b)
            world.drain()

        hook = world.ffi.callback("void(void)", serve)
        world.now += 2_000 * MS
        world.lib.sh_fake_time(world.now)
        world.lib.sh_fake_hook(hook, steps)
        a.pump()
        world.lib.sh_fake_hook(world.ffi.NULL, 0)
        if not gone:
            break
        world.advance(1)
        assert a.take("connected", conn), (steps, a.events)
        assert a.read_all(conn) == (b"good-bye", EOF)
    assert steps > 20


def test_a_section_whose_lock_is_held_though_nobody_owns_it_is_not_waited_for(world: World) -> None:
    """It was freed by hand, and its owner is only stopped."""
    nodes = crowd(world, 4)
    world.leave(nodes[1])
    nodes[0].locks.table[1] = nodes[0].locks
    with pytest.raises(RegionError, match="stopped here are processes 4242"):
        world.attach("e")


def test_one_section_is_asked_for(world: World) -> None:
    world.attach("a")
    node, steps = claiming(world, "b", only=2)
    assert to_the_end(world, node, steps).section == 2
    node, steps = claiming(world, "c", only=0, path="region")
    with pytest.raises(RegionError, match="section 0 is taken by 'a': stop that one") as info:
        to_the_end(world, node, steps)
    assert info.value.errno == errno.ENOSPC


def test_a_section_is_not_reused_at_once_while_somebody_has_not_seen_what_it_was_answered() -> None:
    world = World(peers=2)
    a, b = world.pair()
    listener, conn = b.listen(), a.connect(b)
    world.drain()
    b.pump()
    accepted = b.accepted(listener)
    b.write(accepted, b"good-bye")
    b.close(accepted)
    world.drain()
    world.stop(a)  # its loop is busy
    world.leave(b)
    c = world.process("c")
    steps = claim_section(world.layout, c.locks, c.who.boot_id, c.who.machine_id, world.rng)
    assert c.call(next, steps) == LOOK_S
    world.resume(a)
    world.quiet()
    assert a.take("connected", conn)
    assert a.read_all(conn) == (b"good-bye", EOF)


def test_only_who_may_have_to_watch_beats_waits_for_them() -> None:
    world = World(peers=2)
    a, b = world.pair()
    c, _ = world.open(a, b)
    a.write(c, b"precious")
    world.leave(a)
    world.kill(b)  # its reader: whether that is dead is to be seen
    before = world.now
    again = world.attach("c")
    assert again.section == 0
    assert world.now - before >= 500 * MS
    world.leave(again)
    before = world.now
    assert world.attach("d").section == 0
    assert world.now - before < 100 * MS


def test_a_dead_reader_holds_nothing() -> None:
    world = World(peers=2)
    a, b = world.pair()
    c, _ = world.open(a, b)
    a.write(c, b"precious")
    world.kill(a)
    world.advance(0.5)
    world.kill(b)
    assert world.attach("c").section == 0
    assert world.attach("d").section == 1


def test_a_live_section_whose_lock_cannot_be_seen_is_not_taken() -> None:
    """Two VMs restored from one snapshot share the boot id, and their locks are in two kernels."""
    world = World(peers=1)
    a = world.attach("a")
    a.locks.die()
    with pytest.raises(RegionError):
        world.attach("a")
    assert a.engine.alive


def test_two_claim_at_once_and_get_one_each() -> None:
    world = World(peers=2)
    from shmsock.engine.attach import claim_section

    def process() -> Node:
        return world.process("p")

    runs: list[tuple[Node, Generator[float, None, Any]]] = []
    for _ in range(2):
        node = process()
        node.state = "running"
        node.locks.table = {}  # each under a kernel of its own: only memory decides
        who = node.who
        runs.append((node, claim_section(world.layout, node.locks, who.boot_id, who.machine_id, world.rng)))
    got: list[int] = []
    while runs:
        node, steps = runs.pop(0)
        try:
            world.run(node, next, steps)
            runs.append((node, steps))
        except StopIteration as done:
            got.append(done.value.section)
    assert sorted(got) == [0, 1]


def test_a_claim_that_another_kernel_overwrites_is_given_up(world: World) -> None:
    """In a guest with one emulated CPU a compare-and-swap is a load and then a store."""
    node, steps = claiming(world, "a")
    assert node.call(next, steps) == attach.SETTLE_S
    at = world.layout.section(0) + lay.CLAIM
    world.drain()
    world.layout.memory.store(at, 4711)  # it had loaded 0
    world.drain()
    assert to_the_end(world, node, steps).section == 1
    assert world.layout.claim(0) == 4711


def waited(world: World, node: Node, steps: Generator[float, None, Claim]) -> tuple[int, float]:
    """(section, seconds)"""
    begin = world.now
    return to_the_end(world, node, steps).section, (world.now - begin) / 1e9


def test_a_file_s_section_is_taken_from_the_dead_at_once() -> None:
    """Of a device's memory, a fallen lock proves nothing until the beat is seen to stand."""
    for device in (False, True):
        world = World(peers=2)
        a, b = world.pair()
        world.kill(a)
        node, steps = claiming(world, "a", device=device)
        section, seconds = waited(world, node, steps)
        assert section == a.section
        assert (seconds > 0.9 * STILL_S) if device else not seconds, seconds
        assert b.engine.alive


def test_who_has_claimed_a_fresh_section_under_another_kernel_keeps_it() -> None:
    world = World(peers=2)
    world.attach("a")
    other, claim = claiming(world, "other")
    other.locks.table = {}
    assert other.call(next, claim) == attach.SETTLE_S
    world.drain()
    node, steps = claiming(world, "me", device=False)
    assert node.call(next, steps) == LOOK_S
    world.drain()
    with pytest.raises(StopIteration) as done:
        other.call(next, claim)
    assert done.value.value.section == 1


def test_a_section_is_taken_soon_after_its_readers_are_done() -> None:
    world = World(peers=2)
    a, b = world.pair()
    c, s = world.open(a, b)
    a.write(c, b"precious")
    world.kill(a)
    node, steps = claiming(world, "a", device=False)
    assert node.call(next, steps) == LOOK_S
    world.advance(0.3)  # the heartbeat of its reader sees that the lock fell
    assert b.read_all(s)[0] == b"precious"
    b.close(s)
    world.quiet()
    section, seconds = waited(world, node, steps)
    assert section == a.section
    assert seconds < 2 * LOOK_S


def leave_one(world: World, **how: Any) -> None:
    node = world.attach("last", **how)
    world.quiet()
    world.leave(node)


@pytest.mark.parametrize(
    ("before", "waits"),
    [
        ("nobody", False),
        ("one of this kernel", False),
        ("one of this kernel that left", False),
        ("one of this kernel that was killed", False),
        ("one of another kernel", True),
        ("one of another kernel that left", True),
        ("one without a lock", True),
        ("one that claims, under this kernel", False),
        ("one that claims, under another kernel", True),
        ("a device", True),
        ("no locks", True),
        ("an identity that makes no sense", True),
    ],
)
def test_a_claim_settles_only_where_somebody_of_another_kernel_could_come(before: str, waits: bool) -> None:
    world = World(peers=4)
    kernel = OTHER if "another kernel" in before else KERNEL
    if "claims" in before:
        leave_one(world)  # the identity there is a former owner's
        other = world.process("other", kernel=kernel)
        who = other.who
        claim = claim_section(world.layout, other.locks, kernel, who.machine_id, world.rng, only=0)
        other.call(next, claim)
        world.drain()
    elif before.startswith("one"):
        one = world.attach("one", kernel=kernel, locked="without" not in before)
        world.quiet()
        if "left" in before:
            world.leave(one)
        elif "killed" in before:
            world.kill(one)
    elif "identity" in before:
        leave_one(world)
        world.layout.memory.write(world.layout.section(0) + lay.NAME, b"N" * 64)
    node, steps = claiming(world, "me", device=before == "a device")
    node.locks.can_lock = before != "no locks"
    if waits:
        assert node.call(next, steps) == attach.SETTLE_S
        to_the_end(world, node, steps)
    else:
        with pytest.raises(StopIteration):
            node.call(next, steps)


# -- reap


def run_reap(world: World, node: Node, **how: Any) -> list[int]:
    steps = reap(world.layout, node.locks, KERNEL, **how)
    try:
        while True:
            world.advance(world.run(node, next, steps))
    except StopIteration as done:
        world.drain()
        return [seen.section for seen in done.value]


def test_reap_frees_the_proven_dead_and_nobody_else(world: World) -> None:
    a, c = world.attach("n0"), world.attach("n1")
    b = world.attach("n2", kernel=OTHER)  # cannot know by itself that these are dead
    tool = world.process("tool")
    silent = world.attach("silent", kernel=OTHER)
    conn, s = world.open(a, b)
    a.write(conn, b"unread")
    world.kill(a)
    world.kill(c)
    world.freeze(silent)
    world.advance(1)
    assert run_reap(world, tool) == [a.section, c.section]
    assert b.read_all(s)[0] == b"unread"
    asked: list[Seen] = []

    def yes(seen: Seen) -> bool:
        asked.append(seen)
        return True

    assert run_reap(world, tool, force=yes) == [silent.section]
    assert [(x.section, x.who.name if x.who else "") for x in asked] == [(silent.section, "silent")]
    assert [n.section for n in crowd(world, 2)] == [0, 1]


def test_survey_tells_what_is_there(world: World) -> None:
    a, b = world.pair()
    world.kill(b)
    c = world.attach("c")
    world.leave(c)
    world.drain()
    seen = world.run(a, survey, world.layout, world.process("tool").locks, KERNEL)
    assert [x.who and x.who.name for x in seen] == ["a", "b", "c", None]
    assert [x.dead for x in seen] == [False, True, False, False]
    assert [bool(x.claim) for x in seen] == [True, True, False, False]
    assert [x.used for x in seen] == [True, True, True, False]
