"""Peers by the internet addresses that they publish: what leads a connection to such an address through
memory, as SMC does with TCP.

A peer says under which addresses its machine is known (publisher.py). Whoever maps the region can say so of
any address: the ranges in which this is believed are the caller's, and they are his trust.
"""

from __future__ import annotations

import logging
import weakref

from shmsock.address import Address, packed, parsed_address
from shmsock.aio.node import Node

__all__ = ["peer_of", "published_by"]

log = logging.getLogger("shmsock")
_told: weakref.WeakKeyDictionary[Node, set[Address]] = weakref.WeakKeyDictionary()


def peer_of(node: Node, ip: str, port: int) -> Address | None:
    """Return what leads a connection of that node to the peer that publishes the address `ip` and offers
    `port` now: the `host` for create_connection(), whose turns and further tries are those for a name.

    None: nobody does, or `ip` is no address, or several machines claim it, which is warned of once. Peers
    that are dead, or whose beat stands still, are nobody. Raises as Node.find() does when the node is over.
    """
    address = parsed_address(ip)
    if address is None:
        return None
    try:
        node.find(address, port, (), takes_turn=False)
    except ConnectionRefusedError:
        _warn_of_dispute(node, address)
        return None
    return address


def published_by(node: Node, section: int) -> list[Address]:
    """List the addresses that the peer in a section publishes, without those that another machine claims."""
    peers, now = node.engine.peers, node.engine.home.now()
    mine = peers.addresses_of(peers[section])
    return [a for a in sorted(mine, key=packed) if peers.of_one_machine(peers.claiming(a, now))]


def _warn_of_dispute(node: Node, address: Address) -> None:
    peers = node.engine.peers
    claiming = peers.claiming(address, node.engine.home.now())
    told = _told.setdefault(node, set())
    if address in told or len(told) >= 1024 or peers.of_one_machine(claiming):
        return
    told.add(address)
    log.warning(
        "%s: several machines publish %s, so connections to it go over TCP: %s",
        node.region.url,
        address,
        ", ".join(f"{p.name!r} (section {p.section})" for p in claiming),
    )
