"""What sockets and servers say of themselves, and take, as TCP's on the same loop do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from tests.aio.test_addresses import Run, base, run_shm

__all__ = ["base", "run_shm"]  # fixtures

OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_TYPE),
    (socket.SOL_SOCKET, socket.SO_PROTOCOL),
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
    (socket.SOL_SOCKET, socket.SO_ERROR),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
]


@pytest.mark.parametrize("how", [{}, {"reuse_address": False}, {"reuse_port": True}])
def test_options_read_as_those_of_tcp(run_shm: Run, how: dict[str, Any]) -> None:
    async def told(host: str) -> list[list[Any]]:
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_server(lambda _, w: accepted.put_nowait(w), host, 0, **how)
        (listening,) = server.sockets
        _, client = await asyncio.open_connection(host.replace("*", "me"), listening.getsockname()[1])
        connection = await accepted.get()
        socks = [listening, client.get_extra_info("socket"), connection.get_extra_info("socket")]
        found = [[sock.getsockopt(*option) for option in OPTIONS] for sock in socks]
        for writer in (client, connection):
            writer.close()
        server.close()
        return found

    async def main() -> None:
        assert await told("me.shm") == await told("127.0.0.1")

    run_shm(main())


REFUSED: dict[Any, type[Exception] | None] = {
    1.1: TypeError,
    "1": TypeError,
    b"1": TypeError,
    None: TypeError,
    1 << 40: OverflowError,
    -(1 << 40): OverflowError,
    -1: None,
    0: None,
    True: None,
}


@pytest.mark.parametrize("backlog", REFUSED)
def test_backlog_is_as_tcp_takes_it(run_shm: Run, backlog: Any) -> None:
    """(uvloop's TCP is asked too; asyncio's leaves its socket to the collector when it refuses.)"""

    async def main() -> None:
        loop, refused = asyncio.get_running_loop(), REFUSED[backlog]
        hosts = ["me.shm"] if isinstance(loop, asyncio.BaseEventLoop) and refused else ["me.shm", "127.0.0.1"]
        for host in hosts:
            how = pytest.raises(refused) if refused else contextlib.nullcontext()
            with how:
                server = await loop.create_server(asyncio.Protocol, host, 7000, backlog=backlog)
                server.close()
            async with await asyncio.start_server(lambda r, w: None, host, 7000):
                pass  # the port is free

    run_shm(main())
