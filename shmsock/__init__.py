"""Sockets for asyncio over QEMU ivshmem shared memory: two virtual machines of one host talk through BAR2.

reader, writer = await shmsock.open_connection("vm-b", 7000)
server = await shmsock.start_server(handler, port=7000)
"""

from __future__ import annotations

from shmsock.aio.attach import attach
from shmsock.aio.driver import Node
from shmsock.aio.server import Server
from shmsock.aio.streams import open_connection, start_server
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
from shmsock.fabric.settings import Settings
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
    "open_connection",
    "open_region",
    "start_server",
]
