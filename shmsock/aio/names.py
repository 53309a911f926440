"""Names and numbers. A peer is addressed as (name, port); programs that must have an internet address get
198.18.R.S: S is the peer's section, R counts the regions that this process has attached to.

(198.18/15 is kept free for benchmarks, RFC 2544: no real host is there. Not 127/8: a remote peer is not
local.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmsock.address import SUFFIX, is_local
from shmsock.errors import name_unknown
from shmsock.fabric import layout as lay

if TYPE_CHECKING:
    from shmsock.aio.driver import Node

__all__ = ["ANY", "host_of", "is_any_shm", "is_shm", "name_of", "numeric", "parse_numeric", "sections"]

ANY = "*" + SUFFIX
"""To listen on, where a name ending in `.shm` must be given: all peers."""
_regions: list[str] = []  # one that comes after 256 others takes the oldest's place
_next = 0


def numeric(node: Node, section: int) -> str:
    """The internet address that stands for that section of the node's region."""
    global _next
    url = node.region.url
    if url not in _regions:
        _regions[_next : _next + 1] = [url]
        _next = (_next + 1) % 256
    return f"198.18.{_regions.index(url)}.{section}"


def parse_numeric(host: str) -> tuple[str, int] | None:
    """(region, section) of what numeric() gave; None for everything else."""
    parts = host.split(".")
    if len(parts) != 4 or parts[:2] != ["198", "18"] or not all(p.isdecimal() for p in parts[2:]):
        return None
    region, section = int(parts[2]), int(parts[3])
    return (_regions[region], section) if region < len(_regions) and section < lay.MAX_PEERS else None


def is_shm(host: Any) -> bool:
    """Does a host, as programs give it to a loop, lie in shared memory?"""
    if isinstance(host, (bytes, bytearray)):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str):
        return False
    return host.lower().removesuffix(".").endswith(SUFFIX) or parse_numeric(host) is not None


def is_any_shm(host: Any) -> bool:
    """Is it ANY, in any spelling?"""
    text = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else host
    return isinstance(text, str) and text.removesuffix(".").lower() == ANY


def host_of(host: Any) -> tuple[str | None, Any]:
    """(region, host) as this package's functions take them, from a host for which is_shm() says yes.
    None: the default region."""
    text = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else str(host)
    known = parse_numeric(text)
    if known is not None:
        return known
    plain = text.lower().removesuffix(".")
    return None, {ANY: None, "localhost" + SUFFIX: "localhost"}.get(plain, text)


def sections(node: Node, host: str | int | None, port: int) -> list[int]:
    """Whom a host means: those of that name that listen on `port`; if nobody does, all of that name.

    Raises socket.gaierror when there is nobody.
    """
    if host is None or isinstance(host, int):
        return [node.section if host is None else host]
    engine = node.engine
    name = None if is_local(host) else node.peer_name(host)
    listening, _ = engine.listeners.elsewhere(name, port)
    found = listening or engine.peers.named(name)
    if not found:
        raise name_unknown(host, list(engine.peers.names()))
    return [peer.section for peer in found]


def name_of(node: Node, section: int) -> str:
    """The name that goes with numeric(). Raises socket.gaierror when nobody is there."""
    engine = node.engine
    engine.peers.refresh_all(engine.lib.sh_clock())
    live = {peer.section: peer.name for peer in engine.peers.all if peer.live}
    if section not in live:
        raise name_unknown(section, [str(number) for number in live])
    return live[section]
