"""What a node counts from attach on, by the names that statistics() gives."""

from __future__ import annotations

__all__ = ["OF_CORE", "OF_ENGINE"]

OF_CORE = (  # in the order of enum sh_counter
    "pumps",
    "reads",
    "writes",
    "bytes_in",
    "bytes_out",
    "notifies",
    "notifies_pending",
    "spin_hits",
    "spin_misses",
    "wakeups",
    "healed",
    "notifications",
    "datagrams_in",
    "datagrams_out",
    "kicks",
    "suppressed",
    "received",
    "spurious",
    "rate_limited",
)
OF_ENGINE = (
    "accepted",
    "connected",
    "refused",
    "violations",
    "adoptions",
    "peers_lost",
    "datagrams_unreachable",
    "datagrams_dropped_full",
    "datagrams_dropped_unsent",
    "datagrams_lost_unread",
)
