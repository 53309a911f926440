"""Does a process run all the time? A spin looks for time that went by without it. And what it runs on."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from .networks import Network

__all__ = ["CLIENTS", "here", "machine", "spin"]

GAP_NS = 100_000
"""Between two looks at the clock: no step of Python takes so long, whoever emulates it."""
SPIN_MS = 100
HEADER_BYTES = 4096
"""Of a region: all that everybody may read."""


def spin(seconds: float) -> dict[str, float]:
    """Tell how much of the time this process stood still, in percent, and for how long at most."""
    clock = time.perf_counter_ns
    begin = last = clock()
    end, lost, longest = begin + int(seconds * 1e9), 0, 0
    while last < end:
        now = clock()
        if now - last > GAP_NS:
            lost += now - last
            longest = max(longest, now - last)
        last = now
    return {"lost": lost / max(1, last - begin) * 100, "longest_us": longest / 1000}


def machine() -> dict[str, Any]:
    """What this end runs on, as far as it can see."""
    found = {"cpu": platform.processor() or platform.machine(), "hypervisor": ""}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                found["cpu"] = value.strip()
                break
    with contextlib.suppress(OSError):
        names = ("sys_vendor", "product_version")
        found["hypervisor"] = " ".join(Path("/sys/class/dmi/id", name).read_text().strip() for name in names)
    return {
        "machine": platform.machine(),
        **found,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def here(writer: asyncio.StreamWriter) -> dict[str, Any]:
    """This end's machine and, where it has one, its region: as what kind of memory it is mapped."""
    node = writer.get_extra_info("shmsock_node")
    if node is None:
        return {"machine": machine()}
    region, memory = node.region, importlib.import_module("shmsock.doctor.memory")
    found = memory.judge(region.url, region.mmap, 0, HEADER_BYTES, write=False)
    return {"machine": machine(), "region": region.url, "memory": found.seen}


async def probe(network: Network, options: argparse.Namespace, _: list[int]) -> dict[str, Any]:
    """Both ends spin at the same time, as they do when they wait for one another."""
    reader, writer = await network.open_connection()
    writer.write(b"p" + SPIN_MS.to_bytes(2, "big"))
    await writer.drain()
    ours = {**spin(SPIN_MS / 1000), **here(writer)}
    theirs = json.loads(await reader.readline())
    writer.close()
    await writer.wait_closed()
    return {"client": ours, "server": theirs}


CLIENTS = {"probe": probe}
