"""Pairs of processes that talk over one thing or another, and how they are started."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shmsock.aio.attach import prepare_region
from shmsock.bench.child import Child, have_uvloop, python
from shmsock.errors import region_error
from shmsock.region import create_file

__all__ = [
    "DAX",
    "DOORBELLS",
    "FLOOR",
    "OURS",
    "STOCK",
    "TCP",
    "UDP",
    "UNIX",
    "Variant",
    "all_streams",
    "datagrams",
    "installed",
    "of_anyio",
    "of_files",
    "peers",
    "private_region",
    "short",
    "streams",
    "variants",
    "with_unix",
]

HANDLERS = Path(__file__).with_name("handlers.py")
LABELS = {
    "asyncio": "{loop} TCP",
    "unix": "{loop} UNIX",
    "shmsock": "shmsock, {loop}",
    "anyio": "anyio TCP, {loop}",
    "shmsock.anyio": "shmsock.anyio, {loop}",
    "zmq": "pyzmq",
    "pipe": "multiprocessing.Pipe",
    "iceoryx2": "iceoryx2",
    "floor": "C loop over the ring",
}
ADDRESSES = {
    "asyncio": "127.0.0.1",
    "anyio": "127.0.0.1",
    "shmsock": "localhost",
    "shmsock.anyio": "localhost",
}
DOORBELLS, DAX = "doorbells", "dax"
"""Notes: how regions of guests are told apart."""
OURS, TCP, UNIX, UDP = "shmsock, uvloop", "uvloop TCP", "uvloop UNIX", "uvloop UDP"
STOCK = "stock asyncio on shmsock's uvloop loop"
FLOOR = LABELS["floor"]


@dataclass(frozen=True)
class Variant:
    """One thing that is measured."""

    module: str
    loop: str = "none"
    stock: bool = False
    """asyncio's own functions, on a loop that knows `.shm` hosts."""
    region: str = ""
    """Which, where there are several; `note` tells them apart."""
    note: str = ""
    udp: bool = False

    @property
    def is_tcp(self) -> bool:
        return self.module in ("asyncio", "anyio") and not self.stock

    @property
    def is_shmsock(self) -> bool:
        return self.stock or self.module.startswith("shmsock")

    @property
    def label(self) -> str:
        if self.stock:
            return f"stock asyncio on shmsock's {self.loop} loop"
        label = LABELS[self.module].format(loop=self.loop)
        if self.udp:
            label = label.replace("TCP", "UDP")
        return f"{label}, {self.note}" if self.note else label

    @property
    def environment(self) -> dict[str, str]:
        return {"SHMSOCK_REGION": self.region} if self.region else {}

    def role(self, role: str, *more: object) -> list[str]:
        stock = ("--shm-loop",) if self.stock else ()
        return python(HANDLERS, "--module", self.module, "--loop", self.loop, *stock, "--role", role, *more)

    def address(self, path: str = "") -> list[str]:
        """The address of a server of this host; what has no hosts has a path, which the server made."""
        host = "localhost.shm" if self.stock else ADDRESSES.get(self.module, path)
        return ["--host", host] if host else []


def loops() -> list[str]:
    return ["uvloop", "asyncio"] if have_uvloop() else ["asyncio"]


def variants() -> list[Variant]:
    """TCP and all that is shmsock, over streams."""
    kinds = (("asyncio", False), ("shmsock", False), ("asyncio", True))
    return [Variant(module, loop, stock) for loop in loops() for module, stock in kinds]


def streams() -> list[Variant]:
    """TCP and shmsock; asyncio's own streams on shmsock's loop are shmsock."""
    return [variant for variant in variants() if not variant.stock]


def of_files() -> list[Variant]:
    """TCP, and loops of shmsock: the loop it is that sends a file."""
    return [variant for variant in variants() if variant.module == "asyncio"]


def with_unix() -> list[Variant]:
    return [*streams(), *(Variant("unix", loop) for loop in loops())]


def short() -> list[Variant]:
    """The fastest of each kind."""
    return [Variant(module, loops()[0]) for module in ("asyncio", "shmsock")]


def all_streams() -> list[Variant]:
    """Whatever carries a message to another process and back."""
    return [*variants(), *(Variant("unix", loop) for loop in loops()), *installed()]


def installed() -> list[Variant]:
    """List what other packages offer."""
    needs = {"pipe": "multiprocessing", "zmq": "zmq", "iceoryx2": "iceoryx2"}
    return [Variant(module) for module, package in needs.items() if importlib.util.find_spec(package)]


def datagrams() -> list[Variant]:
    return [Variant(v.module, v.loop, udp=v.is_tcp) for v in streams()]


def of_anyio() -> list[Variant]:
    """trio where it is installed."""
    backends = ["asyncio", "trio"] if importlib.util.find_spec("trio") else ["asyncio"]
    return [Variant(module, loop) for loop in backends for module in ("anyio", "shmsock.anyio")]


@contextlib.contextmanager
def private_region(prefix: str, size: int = 64 << 20, peers: int = 8) -> Iterator[str]:
    """A region in a directory of its own, removed at the end; smaller where /dev/shm is."""
    prefix = f"shmsock-{prefix}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/dev/shm") as directory:
        room = os.statvfs(directory)
        while size > 8 << 20 and size * 2 > room.f_bavail * room.f_frsize:
            size //= 2
        path = os.path.join(directory, "region")
        create_file(path, size, prepare=partial(prepare_region, peers=peers))
        yield path


def peers(
    variant: Variant,
    region: str,
    seconds: float,
    cpus: tuple[int | None, int | None],
    *more: object,
    clients: int = 1,
) -> list[dict[str, Any]]:
    """Run one server and its clients, and return what each measured, as `more` says. `cpus`:
    of the server and of its clients; None: wherever the kernel likes."""
    env = {"SHMSOCK_REGION": region, "SHMSOCK_NAME": "bench", **variant.environment}
    pins = [("--cpu", cpu) if cpu is not None else () for cpu in cpus]
    with contextlib.ExitStack() as stack:
        argv = variant.role("server", *variant.address(), *pins[0], *more)
        listening = stack.enter_context(Child(argv, env)).line()
        at = (*variant.address(listening["host"]), "--port", listening["port"])
        argv = variant.role("client", *at, *pins[1], "--seconds", seconds, "--wait", *more)
        started = [stack.enter_context(Child(argv, env)) for _ in range(clients)]
        for client in started:
            client.line()  # it is there
        for client in started:
            client.tell("go")
        return [checked(variant, client.line()) for client in started]


def checked(variant: Variant, found: dict[str, Any]) -> dict[str, Any]:
    """Refuse a TCP that was measured with shmsock in the process: it must be what everybody has."""
    if bool(found["shmsock_modules"]) != variant.is_shmsock:
        count = found["shmsock_modules"]
        raise region_error(
            22, f"{variant.label} was measured with {count} modules of shmsock in its process: report this"
        )
    return found
