"""SOCKS5 (RFC 1928) for clients that have no other way: CONNECT, with names, IPv4 and IPv6, no password.

siosocks, the one library for servers that leaves input and output to its user, answers every failure with the
same code; here a name that nobody has and a port that nobody listens on are told apart.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from typing import Any

from shmsock.address import SUFFIX
from shmsock.forward.endpoints import SHM, TCP, Endpoint, check_host, parse

__all__ = ["Socks5Error", "reply", "request"]

VERSION, CONNECT, NO_PASSWORD, NONE_FITS = 5, 1, 0, 0xFF
IPV4, DOMAIN, IPV6 = 1, 3, 4
GRANTED, FAILED, NOT_ALLOWED, NET_UNREACHABLE, UNREACHABLE, REFUSED = range(6)
TIMED_OUT, NO_SUCH_COMMAND, NO_SUCH_ADDRESS = 6, 7, 8
PATIENCE_S = 10.0
"""How long a client may take for its request."""


class Socks5Error(OSError):
    """A client that does not speak SOCKS5, or asks for what is not offered. `code`: what it was answered."""


async def request(sock: socket.socket, only_shm: bool) -> Endpoint:
    """Read what the client asks for. `only_shm`: a host that is no peer is not allowed. Raises Socks5Error:
    then the client has had its answer. Nothing behind the request is read."""
    try:
        return await asyncio.wait_for(_request(sock, only_shm), PATIENCE_S)
    except asyncio.TimeoutError:
        raise Socks5Error(errno.ETIMEDOUT, f"no SOCKS5 request within {PATIENCE_S:g} s") from None


async def _request(sock: socket.socket, only_shm: bool) -> Endpoint:
    loop = asyncio.get_running_loop()
    version, methods = await _exactly(sock, 2)
    if version != VERSION:
        raise Socks5Error(errno.EPROTO, f"no SOCKS5: it began with byte {version}")
    if NO_PASSWORD not in await _exactly(sock, methods):
        await loop.sock_sendall(sock, bytes([VERSION, NONE_FITS]))
        raise Socks5Error(errno.EPROTO, "the client wants a password, or the like: there is none here")
    await loop.sock_sendall(sock, bytes([VERSION, NO_PASSWORD]))
    version, command, _, kind = await _exactly(sock, 4)
    if version != VERSION:
        raise Socks5Error(errno.EPROTO, f"no SOCKS5: its request began with byte {version}")
    if kind in (IPV4, IPV6):
        host = str(ipaddress.ip_address(await _exactly(sock, 4 if kind == IPV4 else 16)))
    elif kind == DOMAIN:
        host = (await _exactly(sock, (await _exactly(sock, 1))[0])).decode("ascii", "replace")
    else:
        await _deny(sock, NO_SUCH_ADDRESS, f"an address of kind {kind}")
    port = int.from_bytes(await _exactly(sock, 2), "big")
    if command != CONNECT:
        await _deny(sock, NO_SUCH_COMMAND, f"command {command}, where CONNECT (1) alone is known")
    if not host.isprintable() or not host:
        await _deny(sock, FAILED, f"host {host!r}")
    try:
        if host.lower().removesuffix(".").endswith(SUFFIX):
            return parse(f"{SHM}:{host}:{port}", listens=False)
        check_host(host)
    except ValueError as error:
        await _deny(sock, UNREACHABLE, str(error))
    if only_shm:
        await _deny(sock, NOT_ALLOWED, f"{host!r}, which is no peer (they end in {SUFFIX})")
    return Endpoint(TCP, host, port)


async def _deny(sock: socket.socket, code: int, why: str) -> Any:
    await reply(sock, code)
    raise Socks5Error(errno.EPROTO, f"the client asked for {why}")


async def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
        if not more:
            raise Socks5Error(errno.ECONNRESET, "the client left before it had asked for anything")
        data += more
    return data


async def reply(sock: socket.socket, code: int) -> None:
    """Answer the request. Raises OSError when the client is gone."""
    await asyncio.get_running_loop().sock_sendall(sock, bytes([VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0]))


def code_of(error: BaseException) -> int:
    """Return the code that tells a client why its host could not be reached."""
    if isinstance(error, socket.gaierror):
        return UNREACHABLE
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return TIMED_OUT
    known = {errno.EHOSTUNREACH: UNREACHABLE, errno.ENETUNREACH: NET_UNREACHABLE, errno.EPERM: NOT_ALLOWED}
    return known.get(getattr(error, "errno", 0) or 0, FAILED)
