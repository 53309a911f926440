"""The internet addresses of this machine, as the kernel tells them, published in the own section.

They come and go (DHCP may be later than the program), so the kernel is asked to tell of changes: by netlink,
which libraries that list addresses do not offer. The list is asked for the same way: 20 lines, and no
dependency for everybody.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from shmsock.address import Address, Ranges, may_be_published
from shmsock.engine.engine import Engine
from shmsock.engine.layout import ADDRESSES

__all__ = ["Publisher", "own_addresses"]

log = logging.getLogger("shmsock")
# <linux/netlink.h>, <linux/rtnetlink.h>, <linux/if_addr.h>
_MESSAGE = struct.Struct("=IHHII")  # length, kind, flags, sequence, port
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix, flags, scope, interface
_ATTRIBUTE = struct.Struct("=HH")  # length, kind
_DONE, _ERROR, _NEWADDR, _GETADDR = 3, 2, 20, 22
_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NOT_OURS_YET = 0x48  # tentative, or another machine has it
_GROUPS = 0x10 | 0x100  # addresses of IPv4, and of IPv6


def _netlink(groups: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, groups))
    except BaseException:
        sock.close()
        raise
    return sock


def _parts(data: bytes, header: struct.Struct) -> Iterator[tuple[tuple[Any, ...], bytes]]:
    """Split what begins with its length, each padded to 4 bytes: its header, and what follows that."""
    while len(data) >= header.size:
        head = header.unpack_from(data)
        if head[0] < header.size:
            return
        yield head, data[header.size : head[0]]
        data = data[head[0] + 3 & ~3 :]


def _machines_addresses() -> Iterator[Address]:
    with _netlink() as sock:
        sock.settimeout(5)
        size = _MESSAGE.size + _ADDRESS.size
        sock.send(_MESSAGE.pack(size, _GETADDR, _REQUEST_DUMP, 1, 0) + bytes(_ADDRESS.size))
        while True:
            for (_, kind, *_), body in _parts(sock.recv(1 << 16), _MESSAGE):
                if kind in (_DONE, _ERROR):
                    return
                if kind != _NEWADDR or _ADDRESS.unpack_from(body)[2] & _NOT_OURS_YET:
                    continue
                found = {kind: raw for (_, kind), raw in _parts(body[_ADDRESS.size :], _ATTRIBUTE)}
                raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b""))
                if len(raw) in (4, 16):
                    yield ip_address(raw)


def own_addresses(ranges: Ranges) -> list[Address]:
    """List the addresses of this machine (of this process's network namespace) in these ranges; none, and a
    warning, when the kernel does not tell."""
    try:
        every = dict.fromkeys(filter(may_be_published, _machines_addresses()))
    except OSError as error:
        log.warning("SHMSOCK_PUBLISH: the kernel does not tell the addresses of this machine: %s", error)
        return []
    return [address for address in every if any(address in some for some in ranges)]


class Publisher:
    """Keeps what a node publishes up to date."""

    def __init__(self, engine: Engine, loop: Any, context: Any, ranges: Ranges) -> None:
        self._engine, self._loop, self._ranges = engine, loop, ranges
        self._sock: socket.socket | None = None
        self._told = False  # that there are too many
        try:
            self._sock = _netlink(_GROUPS)
        except OSError:
            return  # own_addresses() has told
        self._sock.setblocking(False)
        context.run(loop.add_reader, self._sock.fileno(), self._changed)
        self._publish()  # it may have changed since the engine was made

    def _changed(self) -> None:
        try:
            while self._sock is not None:
                self._sock.recv(1 << 16)
        except OSError:
            pass  # there is no more; or there was more than the socket's buffer holds: it has changed, too
        self._publish()

    def _publish(self) -> None:
        found = own_addresses(self._ranges)
        some = found[:ADDRESSES]
        if len(found) > len(some) and not self._told:
            self._told = True
            log.warning(
                "SHMSOCK_PUBLISH: %d addresses of this machine lie in its ranges, and %d can be published: "
                "%s are; name narrower ranges",
                len(found),
                ADDRESSES,
                ", ".join(map(str, some)),
            )
        if some != list(self._engine.published):
            self._engine.publish(some)

    def inherited(self) -> None:
        """Close the socket in a forked child; the loop is the parent's."""
        if self._sock is not None:
            self._sock.close()

    def close(self) -> None:
        """Let go of the socket; called again, do nothing."""
        sock, self._sock = self._sock, None
        if sock is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(sock.fileno())
            sock.close()
