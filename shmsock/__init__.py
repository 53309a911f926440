"""Sockets for asyncio over QEMU ivshmem shared memory: two virtual machines of one host talk through BAR2.

reader, writer = await shmsock.open_connection("vm-b", 7000)
server = await shmsock.start_server(handler, port=7000)
"""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

import shmsock.native as _native  # noqa: F401  (first: it says when nothing was built)
from shmsock.aio.attach import attach
from shmsock.aio.datagram import create_datagram_endpoint
from shmsock.aio.endpoints import create_connection, create_server, open_connection, start_server
from shmsock.aio.loop import loop_factory, new_event_loop
from shmsock.aio.node import Node
from shmsock.aio.server import Server
from shmsock.engine.settings import Settings
from shmsock.errors import (
    ForkedError,
    NodeClosedError,
    ProtocolViolation,
    RegionError,
    RegionExistsError,
    RegionFormatError,
    RegionNotFoundError,
    RegionPermissionError,
    RegionUrlError,
    WrongThreadError,
)
from shmsock.region import open_region

__all__ = [
    "ForkedError",
    "Node",
    "NodeClosedError",
    "ProtocolViolation",
    "RegionError",
    "RegionExistsError",
    "RegionFormatError",
    "RegionNotFoundError",
    "RegionPermissionError",
    "RegionUrlError",
    "Server",
    "Settings",
    "WrongThreadError",
    "attach",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "loop_factory",
    "new_event_loop",
    "open_connection",
    "open_region",
    "start_server",
]


def __getattr__(name: str) -> _Any:
    """`shmsock.anyio` and `shmsock.testing` are imported when they are asked for."""
    if name in ("anyio", "testing"):
        return _importlib.import_module(f"shmsock.{name}")
    raise AttributeError(f"module 'shmsock' has no attribute {name!r}")
