"""aiohttp over shared memory, on any loop: a connector for its client, a site for its server.

    aiohttp.ClientSession(connector=ShmConnector())            # http://vm-b:8000, ws://vm-b:8000
    await ShmSite(runner, port=8000).start()                   # beside a TCPSite, if there is one

On a loop of shmsock.loop_factory(), or under `shmsock run`, aiohttp needs neither: there, hosts that end in
`.shm` are peers.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

from aiohttp import TCPConnector, web
from aiohttp.client_exceptions import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientConnectorSSLError,
)
from aiohttp.helpers import ceil_timeout

from shmsock.aio.endpoints import create_connection, create_server
from shmsock.aio.node import Node

__all__ = ["ShmConnector", "ShmSite"]


class ShmConnector(TCPConnector):
    """Connects to peers of the region alone, whatever the host looks like: `http://vm-b:8000` and
    `http://vm-b.shm:8000` are one peer, "localhost" is this machine. Over TCP it goes only where
    SHMSOCK_HOSTS says so. Raises ClientConnectorDNSError (nobody has the name), ClientConnectorError, and
    what else a TCPConnector does, for the same reasons.

    `region`, `name`, `node`: as for shmsock.open_connection(). Other parameters are TCPConnector's; those
    that are about addresses mean nothing.
    """

    def __init__(
        self, *, region: str | None = None, name: str | None = None, node: Node | None = None, **kwds: Any
    ) -> None:
        super().__init__(**kwds)
        self._where: dict[str, Any] = {"region": region, "name": name, "node": node}

    async def _resolve_host(self, host: str, port: int, traces: Any = None) -> list[Any]:
        """Leave the name to what connects: who has it may change at any time."""
        kind = {"family": socket.AF_UNSPEC, "proto": 0, "flags": 0}
        return [{"hostname": host, "host": host, "port": port, **kind}]

    async def _wrap_create_connection(
        self,
        *args: Any,
        addr_infos: list[Any],
        req: Any,
        timeout: Any,
        client_error: type[Exception] = ClientConnectorError,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        (factory,) = args
        host, port = addr_infos[0][4][:2]
        try:
            async with ceil_timeout(timeout.sock_connect, ceil_threshold=timeout.ceil_threshold):
                made = await create_connection(factory, host, port, **kwargs, **self._where)
        except ssl.CertificateError as error:
            raise ClientConnectorCertificateError(req.connection_key, error) from error
        except ssl.SSLError as error:
            raise ClientConnectorSSLError(req.connection_key, error) from error
        except socket.gaierror as error:
            raise ClientConnectorDNSError(req.connection_key, error) from error
        except OSError as error:
            if error.errno is None and isinstance(error, asyncio.TimeoutError):
                raise
            raise client_error(req.connection_key, error) from error
        # Where the fingerprint is a wrong one, aiohttp takes this address off the list.
        addr_infos[0] = (*addr_infos[0][:4], made[0].get_extra_info("peername"))
        return made


class ShmSite(web.BaseSite):
    """Serves an application to all peers of the region, or to those of this machine if `host` is "localhost",
    as a TCPSite does on TCP. `port`: 0: one is chosen; None: 8080, or 8443 with `ssl_context`. start() raises
    what shmsock.start_server() does."""

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str | None = None,
        port: int | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        reuse_port: bool | None = None,
        region: str | None = None,
        name: str | None = None,
        node: Node | None = None,
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context)
        self.port: int = (8443 if ssl_context else 8080) if port is None else port
        self._address = host
        self._more: dict[str, Any] = {"reuse_port": reuse_port, "region": region, "name": name, "node": node}

    @property
    def name(self) -> str:
        """The URL that leads to it."""
        return f"{'https' if self._ssl_context else 'http'}://{self._address or '*'}.shm:{self.port}"

    async def start(self) -> None:
        """Begin to accept connections. Raises what create_server() does. Cancelling leaves nothing behind."""
        await super().start()
        assert self._runner.server is not None
        self._server = server = await create_server(
            self._runner.server, self._address, self.port, ssl=self._ssl_context, **self._more
        )
        self._address, self.port = server.sockets[0].getsockname()[:2]
