"""What a node counts from attach on, by the names that statistics() gives."""

from __future__ import annotations

from shmsock.native._core import ffi, lib

__all__ = ["OF_CORE", "OF_ENGINE", "SHOWN"]

_elements = ffi.typeof("enum sh_counter").elements
#: In the order of the enum: sh_node_counter() takes an index of this.
OF_CORE = tuple(_elements[i].removeprefix("SH_N_").lower() for i in range(lib.SH_N_COUNTERS))
#: Those that a section shows to everybody, modulo 2**32, behind the bytes received and sent.
SHOWN = tuple(OF_CORE[lib.sh_shown(i)] for i in range(2 * lib.SH_COUNTS - 4))
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
