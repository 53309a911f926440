"""`shmsock bench serve` and `shmsock bench connect`: the two ends on machines of their own."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from rich.console import Console

from shmsock.bench.child import Child, ChildError, have_uvloop
from shmsock.bench.measures import MEASURES, SPORADIC, Measure, with_cost
from shmsock.bench.pairs import Variant, checked
from shmsock.bench.runner import Take, bench
from shmsock.errors import region_error

__all__ = ["REMOTE", "Remote", "bench_remote", "serve"]

REMOTE = ("echo", "readline", "bulk", "drain", "connect", "many", *(m.name for m in SPORADIC[:5]), "idle")
"""The measures that the server for streams can serve."""
ALWAYS = ("think-1ms", "think-10ms", "idle")
"""In every comparison: what shared memory is slow at, and what it costs."""

Address = tuple[str | None, int]


def environment(region: str | None, name: str | None) -> dict[str, str]:
    chosen = {"SHMSOCK_REGION": region, "SHMSOCK_NAME": name}
    return {key: value for key, value in chosen.items() if value}


def ends(tcp: Address | None) -> list[Variant]:
    loop = "uvloop" if have_uvloop() else "asyncio"
    modules = ("asyncio", "shmsock") if tcp else ("shmsock",)
    return [Variant(module, loop) for module in modules]


def pinned(cpu: int | None) -> tuple[object, ...]:
    return ("--cpu", cpu) if cpu is not None else ()


def serve(
    console: Console, port: int, tcp: Address | None, region: str | None, name: str | None, cpu: int | None
) -> None:
    """Until standard input ends, or Ctrl-C. Raises OSError: a server did not start, and said why."""
    env = environment(region, name)
    with ExitStack() as stack:
        try:
            for variant in ends(tcp):
                host, own = tcp if tcp and variant.is_tcp else (None, port)
                to = ("--port", own, *(("--host", host) if host else ()), *pinned(cpu))
                try:
                    said = stack.enter_context(Child(variant.role("server", *to), env)).line()
                except ChildError as error:
                    if variant.is_tcp and error.errno == errno.EADDRINUSE:
                        what = f"--tcp: TCP port {own} is in use here; choose another, or 0 for a free one"
                        raise region_error(errno.EADDRINUSE, what) from error
                    raise
                console.print(f"{variant.label}: {said['host']} port {said['port']}", soft_wrap=True)
            while os.read(0, 4096):
                pass
        except KeyboardInterrupt:
            pass  # that is how it is ended


class Remote:
    """The other end is there already, and not ours."""

    name = "vm"

    def __init__(
        self, at: Address, tcp: Address | None, region: str | None, name: str | None, cpu: int | None
    ) -> None:
        self.at, self.tcp, self.cpu = at, tcp, cpu
        self.env = environment(region, name)

    def variants(self, measure: Measure) -> list[Variant]:
        return ends(self.tcp)

    def where(self, measure: Measure) -> str:
        beside = f", TCP to {self.tcp[0]}" if self.tcp else ""
        return f"to {self.at[0]}{beside}"

    def cache_line_ns(self) -> None:
        """Nothing: only their host knows which CPUs those are."""

    @contextmanager
    def open(self, measure: Measure) -> Iterator[Take]:
        yield partial(self._take, measure)

    def probe(self) -> dict[str, Any]:
        """Do both ends run all the time?"""
        found: dict[str, Any] = self._client(ends(None)[0], 1, "--measure", "probe")["probe"]
        return found

    def _take(self, measure: Measure, variant: Variant, seconds: float) -> dict[str, Any]:
        return measure.figures(self._client(variant, seconds, *measure.ends))

    def _client(self, variant: Variant, seconds: float, *more: object) -> dict[str, Any]:
        host, port = self.tcp if self.tcp and variant.is_tcp else self.at
        to = ("--host", host, "--port", port, *pinned(self.cpu), "--seconds", seconds)
        try:
            with Child(variant.role("client", *to, *more), self.env) as client:
                return checked(variant, client.line())
        except ChildError as error:
            what = f"{variant.label} to {host} port {port}: {error.strerror}"
            if not _nobody(variant, error):
                raise region_error(max(0, error.errno or 0) or errno.EIO, what) from error
            there = f"shmsock bench serve --{'tcp' if variant.is_tcp else 'listen'} {port}"
            raise region_error(errno.ECONNREFUSED, f"{what}; does `{there}` run there?") from error


def _nobody(variant: Variant, error: ChildError) -> bool:
    """Does nobody listen, or is there no such peer? Of several addresses only the text tells."""
    if error.errno == socket.EAI_NONAME:
        return variant.is_shmsock
    return error.errno == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in str(error.strerror)


def bench_remote(
    console: Console, place: Remote, rounds: int, seconds: float, measures: Sequence[Measure]
) -> dict[str, Any]:
    """Beside TCP it is a comparison: with what it costs, and whether it can be trusted."""
    more: dict[str, Any] = {"host": place.at[0], "port": place.at[1]}
    if place.tcp is None:
        return bench(console, place, rounds, seconds, measures, more=more)
    always = [MEASURES[name] for name in ALWAYS if MEASURES[name] not in measures]
    costing = [with_cost(measure) for measure in (*measures, *always)]
    more["tcp"] = place.tcp
    return bench(console, place, rounds, seconds, costing, more=more, probe=place.probe)
