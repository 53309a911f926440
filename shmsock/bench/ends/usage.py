"""The use of a process: CPU time, sleeps, and the counters of a node of shmsock."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Usages", "usage", "used"]


def usage(writer: asyncio.StreamWriter) -> dict[str, Any]:
    """Read what the kernel has counted for this process, all of its threads; and shmsock for its node."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    node = writer.get_extra_info("shmsock_node")
    counters = node.statistics() if node is not None else {}
    return {
        "at": time.monotonic(),
        "user": used.ru_utime,
        "system": used.ru_stime,
        "sleeps": used.ru_nvcsw,
        "counters": {name: value for name, value in counters.items() if type(value) is int},
    }


def used(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Between two usages: percent of one CPU, how much of it in the kernel, and how often a thread slept."""
    took = after["at"] - before["at"]
    system = (after["system"] - before["system"]) / took * 100
    counts = {name: after["counters"].get(name, value) - value for name, value in before["counters"].items()}
    return {
        "cpu": system + (after["user"] - before["user"]) / took * 100,
        "system": system,
        "sleeps_s": (after["sleeps"] - before["sleeps"]) / took,
        "counters": {name: count for name, count in counts.items() if count},
    }


class Usages:
    """Connections on which the server says what it used."""

    def __init__(self, held: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self.held = held

    async def ask(self, number: int = 0) -> dict[str, Any]:
        reader, writer = self.held[number]
        writer.write(b"?")
        said: dict[str, Any] = json.loads(await reader.readline())
        return said

    async def during(self, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Do the work, and return what it gives and what both processes used for it."""
        _, writer = self.held[0]
        theirs = await self.ask()
        ours = usage(writer)
        found = await work()
        ours = used(ours, usage(writer))
        theirs = used(theirs, await self.ask())
        return {**found, "client": ours, "server": theirs, "cpu": ours["cpu"] + theirs["cpu"]}
