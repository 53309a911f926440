"""What `shmsock run` was asked for, as it reaches the program and its children: in environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shmsock.address import Address, Ranges, check_ranges, is_local, normalize_name, parsed_address

__all__ = ["LOOPS", "Rules"]

LOOPS = ("asyncio", "uvloop")


@dataclass(frozen=True)
class Rules:
    """The rules of a program. `loop`: which loops it gets, "asyncio" or "uvloop"; "": as it asks for.
    `listen`: ports that are offered on shared memory too. `map`: peers by (address, port), port 0: any.
    `auto`: ranges in which peers may publish addresses."""

    loop: str = ""
    listen: frozenset[int] = frozenset()
    map: Mapping[tuple[Address, int], str] = field(default_factory=dict)
    auto: Ranges = ()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Rules:
        """Read SHMSOCK_LOOP, SHMSOCK_LISTEN ("8000,9000"), SHMSOCK_MAP ("10.0.0.5=vm-b,10.0.0.6:5432=vm-c")
        and SHMSOCK_AUTO ("10.0.0.0/24"). Raises ValueError that names variable and value."""
        environ = os.environ if environ is None else environ
        loop = environ.get("SHMSOCK_LOOP", "").strip()
        if loop and loop not in LOOPS:
            raise ValueError(f"SHMSOCK_LOOP is {loop!r}, expected {' or '.join(LOOPS)}")
        table: dict[tuple[Address, int], str] = {}
        for part in _parts(environ, "SHMSOCK_MAP"):
            key, peer = _mapped(part)
            if table.setdefault(key, peer) != peer:
                raise ValueError(f"SHMSOCK_MAP: {part!r} leads to {peer}, and before to {table[key]}")
        return cls(
            loop,
            frozenset(_port("SHMSOCK_LISTEN", part, part) for part in _parts(environ, "SHMSOCK_LISTEN")),
            table,
            check_ranges(environ.get("SHMSOCK_AUTO", ""), "SHMSOCK_AUTO"),
        )

    def peer(self, address: Address, port: int) -> str | None:
        """Return the peer that an address is mapped to."""
        found = self.map.get((address, port)) if self.map else None
        return self.map.get((address, 0)) if found is None and self.map else found

    def trusts(self, address: Address) -> bool:
        """Is an address in one of the ranges of `auto`?"""
        return any(address in network for network in self.auto)


def _parts(environ: Mapping[str, str], variable: str) -> Iterator[str]:
    return (part.strip() for part in environ.get(variable, "").split(",") if part.strip())


def _port(variable: str, text: str, part: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
        raise ValueError(f"{variable}: {part!r} has no port from 1 to 65535")
    return int(text)


def _mapped(part: str) -> tuple[tuple[Address, int], str]:
    host, equals, peer = (word.strip() for word in part.partition("="))
    address, port = parsed_address(host.strip("[]")), 0
    if address is None:
        host, _, number = host.rpartition(":")
        address = parsed_address(host.strip("[]"))
        if address is not None:
            port = _port("SHMSOCK_MAP", number, part)
    if not equals or address is None:
        raise ValueError(
            f"SHMSOCK_MAP: {part!r} is not ADDRESS=PEER or ADDRESS:PORT=PEER, as in 10.0.0.5=vm-b (for a "
            "name, map the address that it resolves to, or have the program connect to PEER.shm)"
        )
    try:
        return (address, port), peer if is_local(peer) else normalize_name(peer)
    except ValueError as error:
        raise ValueError(f"SHMSOCK_MAP: {error}") from None
