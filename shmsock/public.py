"""The names of the package `shmsock`, which imports this when it is asked for one of them."""

from __future__ import annotations

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
