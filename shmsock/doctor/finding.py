"""What a check has found: what was seen, why that matters, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "Level", "count", "errors_of"]

Level = Literal["ok", "note", "warning", "error"]
"""Healthy; worth knowing; something will not go well; something does not go at all."""


@dataclass(frozen=True)
class Finding:
    """What one check says of one thing."""

    name: str
    """What was looked at, or what is wrong: a word for programs."""
    level: Level
    seen: str
    why: str = ""
    """Why that matters; for what is not healthy."""
    mend: str = ""
    """What to do; lines that begin with blanks are to be copied as they are."""
    region: str = ""
    """The URL of the region that it is about; "": the machine."""
    data: dict[str, Any] = field(default_factory=dict)
    """Figures, for programs."""


def count(findings: Iterable[Finding], level: Level) -> int:
    return sum(finding.level == level for finding in findings)


# Where errors (region/, errors.py) go over from what was seen to what is to be done.
_TURNS = (
    ": run as root, or", "; run as its owner", ": make it with", "; reserve more",
    ": give its memory-backend", "; use a smaller size", ": use it as", "; give it back first",
    ": in a guest, start", "; name the one", ": boot the guest", "; boot the guest", ": stop that one",
    ": bind it", ": start QEMU", ". Start QEMU", ": give the ivshmem device", "; mount it read-write",
    "; make it anew", ": make it anew", ": name it", ": name the file", ": start the server",
    "; restart", ": restart them", ": make that first", ": truncated, or", ": name another", ": as root,",
    ": give the guest one", ": upgrade it", "; or make it",
)  # fmt: skip


def errors_of(message: str, default: str) -> tuple[str, str]:
    """Divide an error's message into what was seen and what is to be done; `default`: if it does not say."""
    found = [(at, turn) for turn in _TURNS if (at := message.find(turn)) > 0]
    if not found:
        return message, default
    at, _ = min(found)
    return message[:at], message[at + 2 :]
