"""TCP, UNIX sockets and shared memory: how each of them connects and listens."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import tempfile
from typing import Any

__all__ = ["MODULES", "Network"]

MODULES = ("asyncio", "unix", "shmsock")


class Network:
    """asyncio's functions by their own names. Of `unix` a host is a path, and a port nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.kind, self.host, self.port = options.module, options.host, options.port
        loop = asyncio.get_running_loop()
        if self.kind == "shmsock":
            self.streams: Any = importlib.import_module("shmsock")
            self.protocols: Any = self.streams
        else:
            self.streams, self.protocols = asyncio, loop
        self.unix = "unix_" if self.kind == "unix" else ""
        self.at: tuple[Any, ...] = (self.host,) if self.unix else (self.host, self.port)

    async def open_connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made: tuple[Any, Any] = await getattr(self.streams, f"open_{self.unix}connection")(*self.at)
        return made

    async def create_connection(self, factory: Any) -> tuple[Any, Any]:
        made: tuple[Any, Any] = await getattr(self.protocols, f"create_{self.unix}connection")(
            factory, *self.at
        )
        return made

    async def start_server(self, handler: Any) -> Any:
        self._make_path()
        return await getattr(self.streams, f"start_{self.unix}server")(handler, *self.at, **self._backlog())

    async def create_server(self, factory: Any) -> Any:
        self._make_path()
        return await getattr(self.protocols, f"create_{self.unix}server")(
            factory, *self.at, **self._backlog()
        )

    async def create_datagram_endpoint(self, factory: Any, **addresses: Any) -> tuple[Any, Any]:
        made: tuple[Any, Any] = await self.protocols.create_datagram_endpoint(factory, **addresses)
        return made

    def address(self, server: Any) -> dict[str, Any]:
        """Tell the address of a server, or of a datagram transport, for clients."""
        listening = getattr(server, "sockets", None)
        name = listening[0].getsockname() if listening else server.get_extra_info("sockname")
        return {"host": name, "port": 0} if self.unix else {"host": name[0], "port": name[1]}

    def over(self) -> None:
        """asyncio removes the path of a server from Python 3.13 on."""
        if self.unix and os.path.exists(self.host):
            os.unlink(self.host)
        if self.unix and self.host.startswith(tempfile.gettempdir()):
            os.rmdir(os.path.dirname(self.host))

    def _make_path(self) -> None:
        if self.unix and not self.host:
            self.host = os.path.join(tempfile.mkdtemp(prefix="shmsock-bench-"), "socket")
            self.at = (self.host,)

    def _backlog(self) -> dict[str, int]:
        """For many connections at once."""
        return {"backlog": 1024}
