"""The marks that this version is held to, in one table, and whether a run meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shmsock.bench.pairs import DOORBELLS, FLOOR, OURS, STOCK, TCP, UDP, UNIX

__all__ = ["MARKS", "Mark", "judged"]

ASYNCIO = "shmsock, asyncio"


@dataclass(frozen=True)
class Mark:
    """`who` beside the best of `than`, of which there has to be one; without `than` the figure itself."""

    measure: str
    key: str
    who: str = OURS
    than: tuple[str, ...] = (TCP,)
    most: float | None = None
    least: float | None = None
    than_key: str = ""
    """The figure of the others, if it is not the same."""
    place: str = "host"

    def seen(self, results: dict[str, Any]) -> float | None:
        """None: this run has not what it takes."""
        figure = results.get(self.who, {}).get(self.key)
        key = self.than_key or self.key
        others = [results[label][key] for label in self.than if key in results.get(label, {})]
        if figure is None or (self.than and not others):
            return None
        if not self.than:
            return float(figure)
        return float(figure / (min(others) if self.most is not None else max(others)))

    def met(self, seen: float) -> bool:
        return seen <= self.most if self.most is not None else seen >= (self.least or 0)


def _of_loops(measure: str, most: float, ours: str = "shmsock", theirs: str = "{} TCP") -> tuple[Mark, ...]:
    return tuple(
        Mark(measure, "p50_us", f"{ours}, {loop}", (theirs.format(loop),), most=most)
        for loop in ("uvloop", "asyncio")
    )


MARKS = (
    Mark("echo", "p50_us", most=1 / 60),
    Mark("echo", "p99_us", than=(OURS,), than_key="p50_us", most=4),
    Mark("echo", "p50_us", STOCK, (OURS,), most=1.25),
    *_of_loops("protocol", 1 / 15),
    *_of_loops("datagram", 1 / 12, theirs=UDP.replace("uvloop", "{}")),
    *(
        Mark("anyio", "p50_us", f"shmsock.anyio, {backend}", (f"anyio TCP, {backend}",), most=1 / 6)
        for backend in ("asyncio", "trio")
    ),
    Mark("bulk", "mb_s", least=15),
    Mark("bulk", "mb_s", than=(UNIX, "asyncio UNIX"), least=4),
    Mark("bulk", "mb_s", than=(FLOOR,), least=0.75),
    Mark("bulk", "mb_s", STOCK, (OURS,), least=0.8),
    Mark("protocol-bulk", "mb_s", least=8),
    *(
        Mark(measure, "mb_s", ours.format(loop), (f"{loop} TCP",), least=2)
        for loop in ("uvloop", "asyncio")
        for measure, ours in (
            ("one-write", "shmsock, {}"),
            ("buffered", "shmsock, {}"),
            ("sendfile", "stock asyncio on shmsock's {} loop"),
        )
    ),
    Mark("drain", "per_s", least=12),
    Mark("connect", "per_s", least=4),
    Mark("connect-10000", "per_s", least=1),
    Mark("beside", "p50_us", than=(OURS,), than_key="alone_p50_us", most=1.1),
    Mark("many", "per_s", least=4),
    Mark("many-1000", "per_s", least=4),
    Mark("many-1000-protocol", "per_s", least=6),
    *(Mark(f"many-1000{kind}", "slowest_of_mean", than=(), least=0.5) for kind in ("", "-protocol")),
    Mark("one-core", "p50_us", most=1),
    Mark("readline", "p50_us", most=1 / 40),
    *(Mark(f"think-{think}", key, most=1) for think in ("1ms", "10ms") for key in ("p50_us", "cpu")),
    Mark("memory", "arena_bytes", than=(), most=512),
    Mark("memory", "beyond_bytes", than=(), most=2500),
    *(
        Mark(f"hogs{end}", key, f"shmsock, {loop}", (f"{loop} TCP",), most=1)
        for end in ("", "-one-core", "-protocol", "-protocol-one-core")
        for key in ("p50_us", "p99_us")
        for loop in ("uvloop", "asyncio")
    ),
    Mark("peers", "slowest_of_mean", than=(), least=1 / 3),
    # No pause makes shmsock slower than TCP.
    *(Mark(f"think-{think}", "p50_us", most=1) for think in ("none", "100us", "100ms")),
    *(Mark(f"think-{t}-free", "p50_us", most=1) for t in ("none", "100us", "1ms", "10ms", "100ms")),
    # Percent of one CPU, for ten idle connections: futexes and doorbells cost next to nothing, polling, as
    # plain guests have to, a little.
    *(
        Mark(idle, f"{side}_cpu", who, (), most=0.5)
        for idle in ("idle", "idle-10000")
        for who in (OURS, ASYNCIO)
        for side in ("client", "server")
    ),
    Mark("echo", "p50_us", most=1 / 20, place="vm"),
    Mark("bulk", "mb_s", least=5, place="vm"),
    # Between guests it takes doorbells to wake up as fast as TCP.
    *(
        Mark(f"think-{think}", "p50_us", f"{OURS}, {DOORBELLS}", most=1, place="vm")
        for think in ("none", "100us", "1ms", "10ms", "100ms")
    ),
    *(
        Mark("idle", f"{side}_cpu", who, (), most=most, place="vm")
        for who, most in ((OURS, 2.0), (f"{OURS}, {DOORBELLS}", 0.5))
        for side in ("client", "server")
    ),
)


def judged(measures: dict[str, Any], place: str = "host") -> list[dict[str, Any]]:
    """Tell of every mark that this run says something about what was wanted, and what was seen."""
    found = []
    for mark in MARKS:
        if mark.place != place or mark.measure not in measures:
            continue
        seen = mark.seen(measures[mark.measure]["results"])
        if seen is None:
            continue
        wanted = {"at_most": mark.most} if mark.most is not None else {"at_least": mark.least}
        row = {"place": place, "measure": mark.measure, "figure": mark.key, "who": mark.who}
        than = {"than": list(mark.than), **({"than_figure": mark.than_key} if mark.than_key else {})}
        found.append({**row, **than, **wanted, "seen": seen, "met": mark.met(seen)})
    return found
