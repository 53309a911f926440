"""Names and addresses. A peer is addressed as (name, port); programs that must have an internet address get
one that stands for a name, on the loop that gave it out and nowhere else:

    ff01:5348:RRRR:RRRR:RRRR:RRRR:NNNN:NNNN     R: 64 random bits of the loop; N: which name

A connection or a datagram to it goes to the peer that has the name at that moment, as by the name. ff01::/16
is interface-local multicast (RFC 4291, 2.7): no host has such an address, TCP cannot connect to one
(ENETUNREACH), UDP neither, and what UDP sends there the kernel lets out of no interface, whatever its routes.
With SCOPE, as getaddrinfo tells it, sending fails as well (ENETUNREACH). IPv4 has no range of that kind: its
reserved ones leave by the default route.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import weakref
from typing import TYPE_CHECKING, Any

from shmsock.address import SUFFIX, is_local

if TYPE_CHECKING:
    from shmsock.aio.node import Node

__all__ = [
    "ANY",
    "SCOPE",
    "Names",
    "address_of",
    "as_kernel_tells",
    "host_of",
    "is_address",
    "is_any_shm",
    "is_shm",
    "known",
    "names_of",
    "own_end",
    "shown",
]

ANY = "*" + SUFFIX
"""To listen on, where a name ending in `.shm` must be given: all peers."""
SCOPE = 2130706433
"""The scope id that goes with an address: that of no interface."""
_MARK = bytes.fromhex("ff015348")  # "SH": addresses of ff01::/16 that are others' stay theirs
_REMEMBERED = 4096


def _text(host: Any) -> str | None:
    if isinstance(host, (bytes, bytearray)):
        return host.decode("ascii", "replace")
    return host if isinstance(host, str) else None


def _packed(text: str) -> bytes | None:
    """Return the 16 bytes of an address of our form, in any spelling, with a scope or without; else None."""
    if text[:5].lower() != "ff01:":
        return None
    try:
        packed = socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except (OSError, ValueError):
        return None
    return packed if packed.startswith(_MARK) else None


class Names:
    """The names that addresses of one loop stand for: the last 4096 that were used. No number is given to two
    names."""

    def __init__(self) -> None:
        self._head = _MARK + os.urandom(8)
        self._known: dict[tuple[str, str], tuple[int, str]] = {}  # least recently used first
        self._names: dict[int, tuple[str, str]] = {}
        self._next = 1

    def address(self, region: str, name: str) -> str:
        """Return the address that stands for a peer's name, "localhost" or "*", in the region of that URL."""
        key = region, name
        found = self._known.pop(key, None)
        if found is None:
            number, self._next = self._next, self._next + 1
            found = number, socket.inet_ntop(socket.AF_INET6, self._head + number.to_bytes(4, "big"))
            self._names[number] = key
            if len(self._names) > _REMEMBERED:
                del self._names[self._known.pop(next(iter(self._known)))[0]]
        self._known[key] = found
        return found[1]

    def meant(self, address: Any) -> tuple[str, str]:
        """Return (region, name) for what address() gave, in any spelling, str or bytes. Raises OSError
        (EADDRNOTAVAIL) for an address of another loop, or of an earlier process, or not among the last."""
        packed = _packed(_text(address) or "")
        number = int.from_bytes(packed[12:], "big") if packed and packed.startswith(self._head) else 0
        key = self._names.get(number)
        if key is None:
            raise OSError(
                errno.EADDRNOTAVAIL,
                f"{_text(address)} was handed out by another loop, or is long out of use here: an address "
                f"stands for a name ending in {SUFFIX} on one loop only; look the name up again",
            )
        self._known[key] = self._known.pop(key)
        return key

    def canonical(self, address: Any) -> str:
        """Return the canonical spelling of an address. Raises as meant() does."""
        return self.address(*self.meant(address))


_of_loops: weakref.WeakKeyDictionary[Any, Names] = weakref.WeakKeyDictionary()


def names_of(loop: Any) -> Names:
    """Return the names of that loop."""
    found = _of_loops.get(loop)
    if found is None:
        found = _of_loops[loop] = Names()
    return found


def address_of(node: Any, name: str, port: int) -> tuple[str, int]:
    """Return the internet address that stands for a peer's name in the region of that node, and the port."""
    return names_of(node.loop).address(node.region.url, name), port


def shown(node: Any, conn: Any, how: Any) -> tuple[Any, Any]:
    """Return both ends of a connection as internet addresses. `how` True: those that stand for the names; an
    address: the one that it was asked for by, and led to the peer; else how(node, conn) tells them."""
    if how is True:
        return address_of(node, *conn.local), address_of(node, *conn.remote)
    if isinstance(how, tuple):
        return own_end(how, conn.local[1]), how
    ends: tuple[Any, Any] = how(node, conn)
    return ends


def as_kernel_tells(host: str, port: int) -> tuple[Any, ...]:
    """Return the address of a socket: in IPv6 it has four parts."""
    return (host, port, 0, 0) if ":" in host else (host, port)


def own_end(remote: Any, port: int) -> tuple[Any, ...]:
    """Return an own address, with `port`, for what is seen as a connection to a kernel's address: the one
    that the kernel would use."""
    family = socket.AF_INET6 if ":" in remote[0] else socket.AF_INET
    host = "::" if family == socket.AF_INET6 else "0.0.0.0"
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(remote)  # no packet
        host = sock.getsockname()[0]
    return as_kernel_tells(host, port)


def is_address(host: Any) -> bool:
    """Is it an address that stands for a name, on this loop or any?"""
    text = _text(host)
    return text is not None and _packed(text) is not None


def is_shm(host: Any) -> bool:
    """Does a host, as programs give it to a loop, lie in shared memory?"""
    text = _text(host)
    if text is None:
        return False
    return text.lower().removesuffix(".").endswith(SUFFIX) or _packed(text) is not None


def is_any_shm(host: Any) -> bool:
    """Is it ANY, in any spelling?"""
    text = _text(host)
    return text is not None and text.removesuffix(".").lower() == ANY


def host_of(loop: Any, host: Any) -> tuple[str | None, str | None]:
    """Return (region, host) as this package's functions take them, from a host for which is_shm() says yes.
    Region None: the default one; host None: all peers, or this machine. Raises as Names.meant() does."""
    text = _text(host) or ""
    if _packed(text) is not None:
        region, name = names_of(loop).meant(text)
        return region, None if name == "*" else name
    plain = text.lower().removesuffix(".")
    return None, {ANY: None, "localhost" + SUFFIX: "localhost"}.get(plain, text)


def known(node: Node, host: str | None) -> str:
    """Return the name that an address stands for when a host of host_of() is looked up: a peer's, "localhost"
    or "*".

    Raises socket.gaierror when nobody has it.
    """
    if host is None:
        return "*"
    if is_local(host):
        return "localhost"
    name, engine = node.peer_name(host), node.engine
    engine.peers.refresh_all(engine.lib.sh_clock())
    if not engine.peers.named(name):
        missing = engine.listeners.not_pinned(name)
        if missing is not None:
            raise socket.gaierror(socket.EAI_NONAME, missing.strerror)
        raise engine.listeners.unknown(host)
    return name
