"""What a node counts from attach on, by the names that statistics() gives."""

from __future__ import annotations

from shmsock.native._core import ffi, lib

__all__ = ["OF_CORE", "OF_ENGINE"]

_elements = ffi.typeof("enum sh_counter").elements
#: In the order of the enum: sh_node_counter() takes an index of this.
OF_CORE = tuple(_elements[i].removeprefix("SH_N_").lower() for i in range(lib.SH_N_COUNTERS))
OF_ENGINE = (
    "accepted",
    "connected",
    "violations",
    "adoptions",
    "peers_lost",
    "datagrams_unreachable",
    "datagrams_dropped_full",
    "datagrams_dropped_unsent",
    "datagrams_lost_unread",
)
