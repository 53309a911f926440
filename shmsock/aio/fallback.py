"""Falling back to TCP, for a peer that may be in the region or not: fallback= says where else it is, or a
hosts file, SHMSOCK_HOSTS, whose lines are those of /etc/hosts.

    there is no region, or it cannot be attached to          TCP
    it is full: no section, no slot, no memory               TCP
    nobody has the name, or who has it is silent, or goes    TCP
    away before it answers
    it runs another version, and one has to be upgraded      TCP
    the peer is there, and nobody listens at the port        refused, as TCP would be: that is an answer

What fails after that (TLS, say) fails.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import sys
from collections.abc import Callable
from errno import EPROTONOSUPPORT
from typing import Any

from shmsock.address import SUFFIX, is_any, is_local, normalize_name
from shmsock.aio.attach import environ
from shmsock.aio.node import Node
from shmsock.errors import NodeClosedError

__all__ = [
    "Fallback",
    "TcpStreamWriter",
    "check_hosts",
    "is_answer",
    "over_tcp",
    "targets",
    "tell",
    "uses_hosts",
]

Fallback = str | tuple[str, int] | None
_OF_SEVERAL = {"happy_eyeballs_delay", "interleave", "all_errors"}  # uvloop tries one after the other
_NOT_YET = {
    name
    for name, since in (("ssl_shutdown_timeout", (3, 11)), ("all_errors", (3, 12)))
    if sys.version_info < since
}
log = logging.getLogger("shmsock")
# The content of each hosts file that made sense last, and what was told of it since.
_good: dict[str, tuple[dict[str, list[str]], str]] = {}


class TcpStreamWriter(asyncio.StreamWriter):
    """asyncio's, which knows that it is not in shared memory. (uvloop's transports have no room for that.)"""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return "tcp" if name == "shmsock_path" else super().get_extra_info(name, default)


def uses_hosts() -> bool:
    """Is there a hosts file?"""
    return bool(environ.get(b"SHMSOCK_HOSTS"))


@functools.lru_cache(maxsize=8)
def _addresses(path: str, stamp: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.partition("#")[0].split()
            try:
                if words and not words[1:]:
                    raise ValueError(f"{words[0]!r} stands alone: expected an address, and names")
                for name in words[1:]:
                    known = found.setdefault(normalize_name(name), [])
                    if (address := str(ipaddress.ip_address(words[0]))) not in known:
                        known.append(address)
            except ValueError as error:
                raise ValueError(f"SHMSOCK_HOSTS: {path}, line {number}: {error}") from None
    return found


def check_hosts() -> None:
    """Read the hosts file, if there is one. Raises ValueError that names it when it makes no sense."""
    if uses_hosts():
        _hosts()


def _in_hosts(host: object) -> list[str]:
    if not uses_hosts() or not isinstance(host, str) or is_any(host) or is_local(host):
        return []
    try:
        name = normalize_name(host)
    except ValueError:
        return []  # no name at all: who looks it up says so
    return _hosts().get(name, [])


def _hosts() -> dict[str, list[str]]:
    path = os.environ["SHMSOCK_HOSTS"]
    try:
        try:
            seen = os.stat(path)
            found = _addresses(path, (seen.st_mtime_ns, seen.st_size, seen.st_ino))
        except OSError as error:
            raise ValueError(f"SHMSOCK_HOSTS: {path}: {error.strerror}") from None
        _good[path] = found, ""
    except ValueError as error:
        if path not in _good:
            raise
        found, told = _good[path]  # it is being written, maybe: who runs goes on
        if told != str(error):
            log.warning("%s; what was in it before is used", error)
            _good[path] = found, str(error)
    return found


def targets(host: object, port: int, given: Fallback) -> list[tuple[str, int]]:
    """Return where else to connect for `port` of `host`, the first that answers: as `fallback` was given, a
    host (None: those of the hosts file) or (host, port). Raises TypeError and ValueError for what is no such
    thing, and ValueError that names the line of a hosts file that makes no sense."""
    if given is None:
        return [(address, port) for address in _in_hosts(host)]
    pair: Any = (given, port) if isinstance(given, str) else given
    if not isinstance(pair, tuple) or [type(part) for part in pair] != [str, int]:
        raise TypeError(f"fallback is {given!r}, expected a host or (host, port)")
    if pair[0].lower().removesuffix(".").endswith(SUFFIX):
        raise ValueError(f"fallback is {given!r}, expected a host that TCP leads to")
    return [pair]


def is_answer(error: OSError, node: Node | None, host: Any) -> bool:
    """Did the peer itself say no, or is the given node over? Then there is nothing to fall back from. (There
    is, where one of both has to be upgraded.)"""
    if isinstance(error, NodeClosedError):
        return True
    refused = isinstance(error, ConnectionRefusedError) and error.errno != EPROTONOSUPPORT
    if not refused or node is None or not node.engine.alive:
        return False
    peers = node.engine.peers
    if isinstance(host, int):
        return host < len(peers.all) and peers[host].live
    return bool(peers.named(None if is_any(host) or is_local(host) else normalize_name(host)))


def tell(host: Any, address: str, port: int, why: OSError | None) -> None:
    """Log that it is TCP, and why."""
    log.info("%r goes over TCP, to %s port %d: %s", host, address, port, why or "there is no region")


async def over_tcp(
    factory: Callable[[], Any],
    host: Any,
    where: list[tuple[str, int]],
    given: dict[str, Any],
    why: OSError | None,
) -> tuple[Any, Any]:
    """Connect to the first of `where` that answers, on the running loop, as its create_connection() does with
    those arguments. `why` it is not the peer named `host`. Raises what the last attempt did."""
    loop: Any = asyncio.get_running_loop()
    connect = getattr(loop, "kernel_connection", loop.create_connection)
    unknown = set() if isinstance(loop, asyncio.BaseEventLoop) else _OF_SEVERAL
    kwds = {key: value for key, value in given.items() if value and key not in _NOT_YET | unknown}
    local = kwds.get("local_addr")
    for number, (address, port) in enumerate(where, 1):
        tell(host, address, port, why)
        if local and (not local[0] or local[0].lower().removesuffix(".").endswith(SUFFIX)):
            kwds["local_addr"] = ("::" if ":" in address else "0.0.0.0", local[1])
        try:
            transport, protocol = await connect(factory, address, port, **kwds)
        except OSError as error:
            if number == len(where):
                raise error from why
            continue
        for holder in (transport, getattr(transport, "_ssl_protocol", None)):
            if isinstance(extra := getattr(holder, "_extra", None), dict):
                extra["shmsock_path"] = "tcp"
        return transport, protocol
    raise ValueError("there is no address to connect to")
