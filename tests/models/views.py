"""F1, R1, NOTIFY, LOG, F2 and R2 on a memory weaker than x86's: release and acquire as C11 has them.

Without load buffering, which is how arm64 behaves for these programs. Exhaustive, for one slot: for two
publishes, and for one and then two messages. The log has two lanes, of which one entry is whole; it says of a
count whether it is about the slot. That of a message is not: it has no toggle, and no F1 before it. Who kicks
has F2 between two notifications; who has no way to kick has not, and the heartbeat finds what it notifies.

Each word has one writer, so it has a history that only grows, in its writer's order. A thread's view says how
far into each history it has seen; a load may return anything from there on, also what is old. A release store
passes its thread's view on, an acquire load takes it over, and full fences share one view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

P, T, NOTIFY_SEQ, A, SLEEP_SEQ, LOG = range(6)  # LOG is its first lane
LANES = 2
WORDS = LOG + LANES
View = tuple[int, ...]
ZERO: View = (0,) * WORDS
History = tuple[tuple[int, View], ...]

RELAXED, ACQUIRE, RELEASE, FULL, NOTHING = "relaxed", "acquire", "release", "full", "nothing"
DOORBELL, POLLED = "doorbell", "polled"

# As in the C: what each store, load and fence is.
BUILT = {
    "P store": RELEASE,
    "F1": FULL,
    "A load": ACQUIRE,
    "T store": RELAXED,
    "log store": RELEASE,
    "notify_seq store": RELEASE,
    "F2": FULL,
    "sleep_seq load": ACQUIRE,
    "notify_seq load": ACQUIRE,
    "log load": ACQUIRE,
    "second notify_seq load": RELAXED,
    "T load": ACQUIRE,
    "A store": RELAXED,
    "R1": FULL,
    "P load": ACQUIRE,
    "sleep_seq store": RELEASE,
    "R2": FULL,
    "kick": DOORBELL,
}

# What is needed, and what is not: (change, is a wakeup lost?)
CHANGES: list[tuple[dict[str, str], bool]] = [
    ({}, False),
    ({"F1": NOTHING}, True),
    ({"F2": NOTHING}, True),
    ({"R1": NOTHING}, True),
    ({"R2": NOTHING}, True),
    ({"F1": RELEASE}, True),
    ({"R1": ACQUIRE}, True),
    ({"notify_seq store": RELAXED}, True),
    ({"notify_seq load": RELAXED}, True),
    ({"P store": RELAXED, "A load": RELAXED, "T load": RELAXED, "P load": RELAXED}, False),
    ({"sleep_seq store": RELAXED, "sleep_seq load": RELAXED}, False),
    ({"second notify_seq load": NOTHING}, True),
    ({"log load": RELAXED}, True),
    ({"log store": RELAXED}, False),
    ({"kick": POLLED}, False),
    ({"kick": POLLED, "log store": RELAXED}, True),
]


def join(a: View, b: View) -> View:
    return tuple(map(max, a, b))


class Thread(NamedTuple):
    at: str
    seen: int  # producer: publishes; loop: the notify_seq whose toggles it has looked at
    toggle: int  # producer: T; loop: A
    value: int  # producer: notify_seq; loop: P as it was seen last
    extra: int = 0  # producer: messages; loop: the notify_seq that it looks at
    about: int = 0  # of a notification, or as the log says: 1: the slot; 0: a message
    now: View = ZERO  # what its loads may not go behind
    loaded: View = ZERO  # and may not after an acquire fence
    stored: View = ZERO  # what its relaxed stores pass on


class State(NamedTuple):
    memory: tuple[History, ...]
    full: View  # the view that full fences share
    doorbell: View | None  # a kick that was not received yet: the view of who kicked
    producer: Thread
    loop: Thread


def fence(kind: str, full: View, t: Thread) -> tuple[View, Thread]:
    now = join(t.now, t.loaded)
    if kind == FULL:
        full = join(full, now)
        return full, t._replace(now=full, loaded=full, stored=full)
    if kind == ACQUIRE:
        return full, t._replace(now=now, loaded=now)
    if kind == RELEASE:
        return full, t._replace(stored=t.now)
    return full, t


def store(
    memory: tuple[History, ...], t: Thread, word: int, value: int, kind: str
) -> tuple[tuple[History, ...], Thread]:
    stamp = len(memory[word])
    own = tuple(stamp if i == word else 0 for i in range(WORDS))
    now = join(t.now, own)
    history = (*memory[word], (value, join(now if kind == RELEASE else t.stored, own)))
    return (*memory[:word], history, *memory[word + 1 :]), t._replace(now=now, loaded=join(t.loaded, now))


def load(memory: tuple[History, ...], t: Thread, word: int, kind: str) -> Iterator[tuple[int, Thread]]:
    for stamp in range(t.now[word], len(memory[word])):
        value, view = memory[word][stamp]
        now = (*t.now[:word], stamp, *t.now[word + 1 :])
        if kind == ACQUIRE:
            now = join(now, view)
        yield value, t._replace(now=now, loaded=join(join(t.loaded, view), now))


def producer_steps(s: State, rules: dict[str, str], publishes: int, messages: int) -> Iterator[State]:
    t, memory = s.producer, s.memory
    if t.at == "publish":
        if t.seen < publishes:
            stored, after = store(memory, t, P, t.seen + 1, rules["P store"])
            yield s._replace(memory=stored, producer=after._replace(at="F1", seen=t.seen + 1))
        elif t.extra < messages:
            yield s._replace(producer=t._replace(at="log", extra=t.extra + 1, about=0))
    elif t.at in ("F1", "F2"):
        full, t = fence(rules[t.at], s.full, t)
        yield s._replace(full=full, producer=t._replace(at="A" if t.at == "F1" else "sleep_seq"))
    elif t.at == "A":
        for value, seen in load(memory, t, A, rules["A load"]):
            yield s._replace(producer=seen._replace(at="toggle" if value == t.toggle else "publish"))
    elif t.at == "toggle":
        memory, t = store(memory, t, T, 1 - t.toggle, rules["T store"])
        yield s._replace(memory=memory, producer=t._replace(at="log", toggle=1 - t.toggle, about=1))
    elif t.at == "log":
        memory, t = store(memory, t, LOG + (t.value + 1) % LANES, t.about, rules["log store"])
        yield s._replace(memory=memory, producer=t._replace(at="notify_seq", about=0))
    elif t.at == "notify_seq":
        memory, t = store(memory, t, NOTIFY_SEQ, t.value + 1, rules["notify_seq store"])
        after = t._replace(at="publish" if rules["kick"] == POLLED else "F2", value=t.value + 1)
        yield s._replace(memory=memory, producer=after)
    elif t.at == "sleep_seq":
        for value, seen in load(memory, t, SLEEP_SEQ, rules["sleep_seq load"]):
            kicked = join(s.doorbell or ZERO, seen.now) if value & 1 else s.doorbell
            yield s._replace(doorbell=kicked, producer=seen._replace(at="publish"))


def loop_steps(s: State, rules: dict[str, str]) -> Iterator[State]:
    t, memory = s.loop, s.memory
    if t.at == "pump":
        for value, seen in load(memory, t, NOTIFY_SEQ, rules["notify_seq load"]):
            at = "sleep" if value == t.seen else "log" if value - t.seen < LANES else "T"
            yield s._replace(loop=seen._replace(at=at, extra=value))
    elif t.at == "again":
        for value, seen in load(memory, t, NOTIFY_SEQ, rules["notify_seq load"]):
            yield s._replace(loop=seen._replace(at="wait" if value == t.seen else "wake"))
    elif t.at == "log":
        for value, seen in load(memory, t, LOG + t.extra % LANES, rules["log load"]):
            yield s._replace(loop=seen._replace(at="second", about=value))
    elif t.at == "second":
        by_log = t._replace(at="T" if t.about else "pump", about=0)
        if rules["second notify_seq load"] == NOTHING:
            yield s._replace(loop=by_log._replace(seen=t.extra))
            return
        for value, seen in load(memory, by_log, NOTIFY_SEQ, rules["second notify_seq load"]):
            at = by_log.at if value - t.seen < LANES else "T"
            yield s._replace(loop=seen._replace(at=at, seen=t.extra))
    elif t.at == "T":
        for value, seen in load(memory, t, T, rules["T load"]):
            at = "acknowledge" if value != t.toggle else "pump"
            yield s._replace(loop=seen._replace(at=at, seen=t.extra))
    elif t.at == "acknowledge":
        memory, t = store(memory, t, A, 1 - t.toggle, rules["A store"])
        yield s._replace(memory=memory, loop=t._replace(at="R1", toggle=1 - t.toggle))
    elif t.at in ("R1", "R2"):
        full, t = fence(rules[t.at], s.full, t)
        yield s._replace(full=full, loop=t._replace(at="poll" if t.at == "R1" else "again"))
    elif t.at == "poll":
        for value, seen in load(memory, t, P, rules["P load"]):
            yield s._replace(loop=seen._replace(at="pump", value=value))
    elif t.at in ("sleep", "wake"):
        memory, t = store(memory, t, SLEEP_SEQ, int(t.at == "sleep"), rules["sleep_seq store"])
        yield s._replace(memory=memory, loop=t._replace(at="R2" if t.at == "sleep" else "pump"))
    elif t.at == "wait" and rules["kick"] == POLLED:  # in the end the heartbeat sees the last store
        for value, seen in load(memory, t, NOTIFY_SEQ, RELAXED):
            if value != t.seen:
                yield s._replace(loop=seen._replace(at="wake"))
    elif t.at == "wait" and s.doorbell is not None:  # a system call at both ends: what the kicker saw is seen
        now = join(t.now, s.doorbell)
        yield s._replace(doorbell=None, loop=t._replace(at="wake", now=now, loaded=join(t.loaded, now)))


def loses(change: dict[str, str]) -> tuple[bool, int]:
    """Can the loop sleep for ever with something unread? And how many states there are."""
    rules = {**BUILT, **change}
    lost, states = search(rules, 2, 0)
    if not lost:
        lost, more = search(rules, 1, 2)
        states += more
    return lost, states


def search(rules: dict[str, str], publishes: int, messages: int) -> tuple[bool, int]:
    history: History = ((0, ZERO),)
    first = State((history,) * WORDS, ZERO, None, Thread("publish", 0, 0, 0), Thread("pump", 0, 0, 0))
    seen, todo = {first}, [first]
    while todo:
        s = todo.pop()
        after = list(producer_steps(s, rules, publishes, messages))
        if s.loop.value < publishes:
            after += loop_steps(s, rules)
        if not after and s.loop.at == "wait" and s.loop.value < publishes:
            return True, len(seen)
        for state in after:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return False, len(seen)


def main() -> None:
    for change, lost in CHANGES:
        found, states = loses(change)
        what = ", ".join(f"{name} {kind}" for name, kind in change.items()) or "as built"
        verdict = "a wakeup is lost" if found else "right"
        print(f"{what}: {verdict}, {states} states{'' if found is lost else '  UNEXPECTED'}")


if __name__ == "__main__":
    main()
