"""httpx over shared memory, on asyncio and trio.

    httpx.AsyncClient(transport=AsyncShmTransport())                       # http://vm-b:8000
    httpx.AsyncClient(mounts={"all://*.shm": AsyncShmTransport()})         # other hosts over TCP

On a loop of shmsock.loop_factory(), or under `shmsock run`, httpx needs none of it: there, hosts that end in
`.shm` are peers.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any

import anyio
import httpcore
import httpx
from httpcore._backends.anyio import AnyIOStream

from shmsock.aio.node import Node
from shmsock.anyio import connect_shm

__all__ = ["AsyncShmTransport", "ShmBackend"]


class AsyncShmTransport(httpx.AsyncHTTPTransport):
    """Connects to peers of the region alone, whatever the host looks like: `http://vm-b:8000` and
    `http://vm-b.shm:8000` are one peer, "localhost" is this machine. Over TCP it goes only where
    SHMSOCK_HOSTS says so. Raises httpx.ConnectError, and what else AsyncHTTPTransport does, for the same
    reasons.

    `region`, `name`, `node`: as for shmsock.open_connection(). Other parameters are AsyncHTTPTransport's.
    """

    def __init__(
        self,
        verify: ssl.SSLContext | bool = True,
        *,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits | None = None,
        retries: int = 0,
        region: str | None = None,
        name: str | None = None,
        node: Node | None = None,
    ) -> None:
        limits = limits or httpx.Limits(max_connections=100, max_keepalive_connections=20)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(verify=verify),
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            http1=http1,
            http2=http2,
            retries=retries,
            network_backend=ShmBackend(region=region, name=name, node=node),
        )


class ShmBackend(httpcore.AnyIOBackend):
    """What httpcore's pools take as `network_backend`: streams of shmsock.anyio."""

    def __init__(
        self, *, region: str | None = None, name: str | None = None, node: Node | None = None
    ) -> None:
        self._where: dict[str, Any] = {"region": region, "name": name, "node": node}

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a peer. Raises httpcore.ConnectError and ConnectTimeout."""
        try:
            with anyio.fail_after(timeout):
                return AnyIOStream(await connect_shm(host, port, **self._where))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(error) from error
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError(error) from error
