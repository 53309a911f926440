"""The trace of a node's events: lines of the logger "shmsock.engine", when SHMSOCK_DEBUG is set.

Without it a part of the engine asks whether there is a trace, when a connection or a peer comes or goes;
nothing is asked when a message does.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

__all__ = ["NOTABLE", "Trace", "trace_of"]

log = logging.getLogger("shmsock.engine")
Trace = Callable[..., None]

#: Counters of which each second's gain is told, as nothing else tells of what they count.
NOTABLE = ("healed", "rate_limited", "spurious", "refused", "datagrams_dropped_full", "datagrams_lost_unread")


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    """To stderr, as long as the program does not log anywhere itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


@functools.cache
def _set_up() -> None:
    lines = _Lines()
    lines.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(process)d %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("shmsock")
    ours.addHandler(lines)
    ours.setLevel(logging.DEBUG)


def trace_of(name: str, section: int) -> Trace | None:
    """Return what writes the trace of the node in that section: called with a format and its arguments. None:
    nobody asked for one."""
    if os.environ.get("SHMSOCK_DEBUG", "0") in ("", "0"):
        return None
    _set_up()
    who = f"{name} (section {section}): ".replace("%", "%%")

    def trace(text: str, *arguments: object) -> None:
        log.debug(who + text, *arguments)

    return trace
