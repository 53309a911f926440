"""The command line of an end."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from . import probe, protocols, quiet, streams
from .networks import MODULES, Network
from .timing import encoded
from .usage import Usages

__all__ = ["main"]

CLIENTS = {**streams.CLIENTS, **protocols.CLIENTS, **quiet.CLIENTS, **probe.CLIENTS}
LOOPLESS = ("zmq", "pipe", "iceoryx2")


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def finish(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print what a client has to say, and whether it was a fair one."""
    foreign = sorted(name for name in sys.modules if name.partition(".")[0] == "shmsock")
    say({**found, "shmsock_modules": len(foreign)})


def figures(options: argparse.Namespace, found: dict[str, Any], times: list[int]) -> dict[str, Any]:
    return {**found, "hdr": encoded(times)} if options.histogram and times else found


async def serve(options: argparse.Namespace) -> None:
    """Until standard input ends."""
    network, loop = Network(options), asyncio.get_running_loop()
    start = protocols.SERVERS.get(options.measure.partition(",")[0])
    server = await (start(network) if start else network.start_server(streams.handle))
    over = asyncio.Event()
    loop.add_reader(0, lambda: None if os.read(0, 1) else over.set())
    say(network.address(server))
    await over.wait()
    loop.remove_reader(0)
    server.close()
    network.over()


async def measure(options: argparse.Namespace) -> None:
    """All that --measure names, one after another."""
    network, found = Network(options), {}
    for name in options.measure.split(","):
        times: list[int] = []
        work = partial(CLIENTS[name], network, options, times)
        if options.usage:
            usages = Usages([await streams.connect(network, b"u")])
            taken = await usages.during(work)
            await streams.let_go(usages.held)
        else:
            taken = await work()
        found[name] = figures(options, taken, times)
    finish(options, found)


def runner(loop: str, shm: bool) -> Callable[[Any], Any]:
    """asyncio.run or uvloop.run, or the same on a loop that knows `.shm` hosts."""
    module = importlib.import_module(loop)
    if not shm:
        run: Callable[[Any], Any] = module.run
        return run

    def run_on(main: Any) -> None:
        made = importlib.import_module("shmsock").loop_factory(module.new_event_loop)()
        try:
            made.run_until_complete(main)
            made.run_until_complete(made.shutdown_asyncgens())
        finally:
            made.close()

    return run_on


def with_anyio(options: argparse.Namespace) -> None:
    import anyio

    from . import anyio_streams

    if options.role == "server":
        anyio.run(anyio_streams.serve, options, say, backend=options.loop)
    else:
        times: list[int] = []
        found = anyio.run(anyio_streams.client, options, times, backend=options.loop)
        finish(options, {options.measure: figures(options, found, times)})


def without_loop(options: argparse.Namespace) -> None:
    from . import others

    if options.role == "server":
        others.serve(options, say)
    else:
        times: list[int] = []
        found = others.client(options, times)
        finish(options, {options.measure: figures(options, found, times)})


def main() -> None:
    parser = argparse.ArgumentParser()
    modules = (*MODULES, "anyio", "shmsock.anyio", *LOOPLESS)
    parser.add_argument("--module", choices=modules, required=True)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio", "none"), required=True)
    parser.add_argument("--shm-loop", action="store_true")
    parser.add_argument("--role", choices=("server", "client"), required=True)
    parser.add_argument("--host", default=None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--measure", default="echo,write")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--echo", type=int, default=64)
    parser.add_argument("--block", type=int, default=streams.BLOCK)
    parser.add_argument("--think", type=int, default=0, help="microseconds")
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--histogram", action="store_true", help="HDR histograms too")
    parser.add_argument("--usage", action="store_true", help="the CPU time of both ends, too: of streams")
    parser.add_argument(
        "--wait", action="store_true", help="say that it is there, begin with a line of input"
    )
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.wait:
        say({"ready": True})
        sys.stdin.readline()
    try:
        if options.module in LOOPLESS:
            without_loop(options)
        elif "anyio" in options.module:
            with_anyio(options)
        else:
            run = runner(options.loop, options.shm_loop)
            run(serve(options) if options.role == "server" else measure(options))
    except (OSError, ValueError) as error:
        told = (error.strerror if isinstance(error, OSError) else "") or str(error)
        say({"error": told, "errno": getattr(error, "errno", None)})
        sys.exit(1)
