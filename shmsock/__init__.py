"""Sockets for asyncio over QEMU ivshmem shared memory: two virtual machines of one host talk through BAR2.

reader, writer = await shmsock.open_connection("vm-b", 7000)
server = await shmsock.start_server(handler, port=7000)
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import shmsock.native as _native  # noqa: F401  (first: it says when nothing was built)

if _TYPE_CHECKING:
    from shmsock.public import *  # noqa: F403

__version__ = "0.2.0"

_ROOMS = ("address", "aio", "anyio", "engine", "errors", "region", "testing", "wakeup")


def __getattr__(name: str) -> _Any:
    """Import what is asked for: all public names at once, or a room such as `shmsock.anyio`."""
    if name in _ROOMS:
        return _importlib.import_module(f"shmsock.{name}")
    if name == "__all__" or not name.startswith("_"):
        public = _importlib.import_module("shmsock.public")
        if name == "__all__" or name in public.__all__:
            globals().setdefault("__all__", public.__all__)
            for one in public.__all__:  # what somebody has set before (a test's stand-in, say) stays
                globals().setdefault(one, getattr(public, one))
            return globals()[name]
    raise AttributeError(f"module 'shmsock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), *_ROOMS})
