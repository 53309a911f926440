"""Attaching for a moment: the memory's type, and round trips to all live peers, warm and from idle."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import statistics
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict, dataclass

from shmsock.aio.attach import attach
from shmsock.aio.node import Node
from shmsock.aio.round_trip import round_trip
from shmsock.doctor import memory
from shmsock.doctor.finding import Finding, errors_of
from shmsock.engine.features import OWN
from shmsock.engine.peers import Peer
from shmsock.errors import RegionError, command, region_error

__all__ = ["Answers", "ask", "attached", "try_all"]

IDLE_S = 1.2
"""A peer that has heard nothing for a second polls less often."""
PATIENCE_S = 3.0
ATTACH_S = 10.0
_NOT_OURS = ("SHMSOCK_SECTION", "SHMSOCK_PUBLISH", "SHMSOCK_NAME")  # they are meant for a program that stays


@dataclass(frozen=True)
class Answers:
    """What a peer answered, in microseconds. `warm_us` is empty, or `idle_us` None, where no answer came."""

    name: str
    section: int
    pid: int | None
    here: bool
    """Does it run under this kernel?"""
    woken_by: str
    """How it wakes us: doorbell, futex or polling."""
    wakes: str
    """How we wake it: doorbell, futex or nothing."""
    first_us: float | None
    warm_us: list[float]
    idle_us: float | None

    @property
    def answered(self) -> bool:
        return self.idle_us is not None or bool(self.warm_us)

    def ways(self) -> str:
        how = {"polling": "it does not wake us, we poll", "nothing": "we do not wake it, it polls"}
        return (
            f"{how.get(self.woken_by, f'it wakes us by {self.woken_by}')}; "
            f"{how.get(self.wakes, f'we wake it by {self.wakes}')}"
        )

    def times(self) -> str:
        parts = [f"warm {duration(statistics.median(self.warm_us))}"] if self.warm_us else []
        parts += [f"from idle {duration(self.idle_us)}"] if self.idle_us is not None else []
        return ", ".join(parts)


def duration(us: float) -> str:
    """Write microseconds as people do: "14.2 us", "5.1 ms"."""
    return f"{us:.3g} us" if us < 1000 else f"{us / 1000:.3g} ms"


@contextlib.asynccontextmanager
async def attached(url: str | None, what: str) -> AsyncIterator[Node]:
    """Be a peer for a while, by a name that says `what` it is."""
    kept = {key: os.environ.pop(key) for key in _NOT_OURS if key in os.environ}
    try:
        coming = attach(url, name=f"{what}-{os.urandom(3).hex()}")
        node = await asyncio.wait_for(coming, ATTACH_S)
        try:
            yield node
        finally:
            await node.aclose()
    except asyncio.TimeoutError:
        why = f"no section could be had within {ATTACH_S:g} s, as what their last owners left is still read"
        raise region_error(errno.ETIMEDOUT, f"{why}: {command('info', url or '')} shows by whom") from None
    finally:
        os.environ.update(kept)


async def ask(
    node: Node, peers: list[Peer], count: int = 10, idle_s: float = IDLE_S, patience_s: float = PATIENCE_S
) -> list[Answers]:
    """Ask each peer `count` times in a row; all are left alone for `idle_s` seconds, and asked once more."""
    answers = await asyncio.gather(*(_asked(node, peer, patience_s) for peer in peers))
    first = {peer.section: answer for peer, answer in zip(peers, answers, strict=True)}
    warm: dict[int, list[float]] = {peer.section: [] for peer in peers}
    for peer in peers:
        times = warm[peer.section]
        while first[peer.section] is not None and len(times) < count:
            took = await _asked(node, peer, patience_s)
            if took is None:
                break
            times.append(took)
    await asyncio.sleep(idle_s)
    found = []
    for peer in peers:
        idle = await _asked(node, peer, patience_s) if first[peer.section] is not None else None
        who, wakes = peer.who, node.engine.wakes
        found.append(
            Answers(
                peer.name,
                peer.section,
                who.pid if who else None,
                node.engine.peers.same_kernel(peer),
                wakes.way(peer),
                wakes.way_out(peer),
                first[peer.section],
                warm[peer.section],
                idle,
            )
        )
    return found


async def _asked(node: Node, peer: Peer, patience_s: float) -> float | None:
    try:
        took = await round_trip(node, peer, patience_s)
    except ConnectionError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            raise
        return None  # it left, or was killed, just now
    return None if took is None else took * 1e6


def try_all(url: str, live: Collection[int], count: int = 10) -> list[Finding]:
    """Attach, measure the memory, and ask the owners of these sections, which are known to beat."""
    try:
        return asyncio.run(_try_all(url, live, count))
    except OSError as error:
        text = str(error) if isinstance(error, RegionError) else error.strerror or str(error)
        seen, mend = errors_of(text, command("info", url))
        return [Finding("attach", "error", f"cannot attach: {seen}", "no program can, either", mend, url)]


async def _try_all(url: str, live: Collection[int], count: int) -> list[Finding]:
    async with attached(url, "doctor") as node:
        found = [_measure(node)]
        others = [p for p in node.engine.peers.there() if p.section in live and p.section != node.section]
        others = [p for p in others if p.who and not OWN.refuses(p.who.terms, "")]
        return found + [_judge(url, answers) for answers in await ask(node, others, count)]


def _measure(node: Node) -> Finding:
    """Measure the memory in the own arena, which nobody else has yet."""
    engine, region = node.engine, node.region
    lib, arena = engine.lib, engine.lib.sh_arena_of(engine.nd)
    got = engine.ffi.new("uint32_t *", memory.SPAN)
    while not (at := lib.sh_arena_take(arena, got)):
        got[0] //= 2
    try:
        offset = engine.layout.section(node.section) + at
        region.ensure(offset, got[0])
        return memory.judge(region.url, region.mmap, offset, got[0], write=True)
    finally:
        lib.sh_arena_give(arena, at, got[0])


def _judge(url: str, answers: Answers) -> Finding:
    who = f"{answers.name} (section {answers.section}, process {answers.pid})"
    if answers.answered:
        seen = f"{who} answers: {answers.times()}; {answers.ways()}"
        return Finding("round-trip", "ok", seen, region=url, data=asdict(answers))
    return Finding(
        "peer-stalled",
        "error",
        f"{who} is there, and does not answer",
        "its heartbeat is a thread and beats, but its event loop does not turn: who connects to it waits",
        f"see what it does: py-spy dump --pid {answers.pid} (on its machine); a call that blocks belongs "
        "into asyncio.to_thread()",
        url,
        asdict(answers),
    )
