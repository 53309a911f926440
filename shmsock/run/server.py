"""A server in two places: the one that a program asked for, and one in shared memory that comes and goes with
it."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from shmsock.aio.server import Server
from shmsock.run.notices import warn

__all__ = ["PATIENCE_S", "RETRY_S", "JointServer"]

PATIENCE_S = 2.0
"""How long a program is kept waiting for shared memory. It goes on over TCP then."""
RETRY_S = 10.0
"""How often a region is looked for that could not be used, or was lost."""


class JointServer(asyncio.AbstractServer):
    """The face of the program's own server, with another one behind it. `sockets` are those of its own."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        own: Any,
        port: int,
        serving: bool,
        offer: Callable[[Server | None, bool], Awaitable[Server]],
    ) -> None:
        """`offer(before, serving)` returns a server in shared memory: the one there was, if that is good
        still."""
        self._loop, self._own, self._port, self._offer, self._serving = loop, own, port, offer, serving
        self._behind: Server | None = None
        self._trying: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<JointServer {self._own!r} and {self._behind!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    async def begin(self) -> None:
        """Offer the port, and wait a little for it. Later it is looked after from time to time: not by a
        task, as programs wait for all of them."""
        self._try()
        try:
            if self._trying is not None:
                await asyncio.wait({self._trying}, timeout=PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def _try(self) -> None:
        self._trying = self._loop.create_task(self._attempt())

    async def _attempt(self) -> None:
        try:
            self._behind = await self._offer(self._behind, self._serving)
            if self._serving:  # since a moment ago, it may be
                await self._behind.start_serving()
        except Exception as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            kind = f"port-{self._port}" if taken else "region"
            warn(
                kind, f"port {self._port} is offered over TCP alone: {error} (tried again from time to time)"
            )
        self._trying = None
        if self._closed:
            self._close_behind()
        else:
            self._timer = self._loop.call_later(RETRY_S, self._try)

    def _close_behind(self) -> None:
        if self._behind is not None:
            self._behind.close()

    # -- asyncio.Server

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def is_serving(self) -> bool:
        serving: bool = self._own.is_serving()
        return serving

    async def start_serving(self) -> None:
        """Accept connections from now on, in both places."""
        self._serving = True
        await self._own.start_serving()
        if self._behind is not None:
            await self._behind.start_serving()

    async def serve_forever(self) -> None:
        """Serve as the program's own does, and close both with it."""
        self._serving = True
        if self._behind is not None:
            await self._behind.start_serving()
        try:
            await self._own.serve_forever()
        except asyncio.CancelledError:
            try:
                self.close()
                if sys.version_info >= (3, 14):
                    self.close_clients()
                await self.wait_closed()
            finally:
                raise

    def close(self) -> None:
        """Stop listening in both places; harmless when repeated."""
        self._own.close()
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._trying is not None:
            self._trying.cancel()
        self._close_behind()

    async def wait_closed(self) -> None:
        """Wait as the wait_closed() of each does."""
        await self._own.wait_closed()
        if self._behind is not None:
            await self._behind.wait_closed()

    def close_clients(self) -> None:
        """Close all connections (asyncio.Server has this from 3.13 on)."""
        self._own.close_clients()
        if self._behind is not None:
            self._behind.close_clients()

    def abort_clients(self) -> None:
        """Reset all connections (asyncio.Server has this from 3.13 on)."""
        self._own.abort_clients()
        if self._behind is not None:
            self._behind.abort_clients()

    async def __aenter__(self) -> JointServer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await self.wait_closed()
