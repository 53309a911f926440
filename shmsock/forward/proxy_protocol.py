"""Who connects, told to the target: PROXY headers of version 1 and 2, and a source address per peer."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any

__all__ = ["peer_address", "proxy_header"]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PEER_NAME = 0xE0
"""The type of the field of version 2 in which the peer's name stands: the first of those for everybody's own
use."""
NETWORK = "127.83.0"
"""Where the addresses of peers are: all of 127.0.0.0/8 is this machine, and nothing else uses this part."""


def peer_address(section: int) -> str:
    """Return the IPv4 address that stands for the peer of that section."""
    return f"{NETWORK}.{section}"


def proxy_header(version: str, source: Any, destination: Any, name: str = "") -> bytes:
    """Build the header. `source`, `destination`: addresses as sockets tell them, (host, port, ...); anything
    else (of a UNIX socket) is told as unknown. `name`: a peer's, which version 2 tells as well."""
    try:
        ends = [ipaddress.ip_address(host.partition("%")[0]) for host, *_ in (source, destination)]
        ports = source[1], destination[1]
        if ends[0].version != ends[1].version:
            ends = [_wide(end) for end in ends]
        ipv6 = ends[0].version == 6
    except (AttributeError, ValueError, TypeError, IndexError):
        ends, ports, ipv6 = [], (0, 0), False
    if version == "v1":
        if not ends:
            return b"PROXY UNKNOWN\r\n"
        return f"PROXY {'TCP6' if ipv6 else 'TCP4'} {ends[0]} {ends[1]} {ports[0]} {ports[1]}\r\n".encode()
    body = b"".join(end.packed for end in ends) + (struct.pack("!2H", *ports) if ends else b"")
    if name:
        body += struct.pack("!BH", PEER_NAME, len(name)) + name.encode()
    family = 0x00 if not ends else 0x21 if ipv6 else 0x11
    return SIGNATURE + struct.pack("!BBH", 0x21, family, len(body)) + body


def _wide(address: Any) -> Any:
    if address.version == 6:
        return address
    return ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + socket.inet_aton(str(address)))
