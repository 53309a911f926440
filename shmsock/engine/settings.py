"""Settings of a node. The defaults are right for most programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shmsock.address import check_pin

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What attach(settings=) takes: immutable, and each field has a default. Units are in the names: us for
    microseconds, s for seconds, bytes. Making one raises ValueError for a value out of bounds, and TypeError
    for a section in `pin` that is no integer. (docs/tuning.md shows the text below: `make docs` writes it
    there.)

    `busy_poll_us`: Longest busy-poll of a read or a drain that finds nothing. Windows adapt below it; 0:
    never spin. On a machine that runs code slowly (an emulated guest) up to ten times as long, as
    measured at attach; so are hot_us and look_cap_us.
    `hot_us`: How long the pump re-schedules itself after bytes moved, before it lets the loop sleep.
    `hold_us`: Longest time that reads and drains that need not wait may hold one turn of the loop. On
    asyncio's and uvloop's a turn ends within 50 us when another descriptor is ready; beside a processor
    hog, within 4 ms.
    `look_cap_us`: The heartbeat's longest sleep between two polls, while the loop sleeps and there is a peer
    that can kick this node neither by a doorbell nor by a futex: the worst wakeup, and its CPU cost.
    Four times that after a second in which nothing came.
    `doorbells`: False: neither kick nor be kicked, by doorbells or futexes. Then all peers are polled.
    `dead_after_s`: A peer whose beat stands still so long, over at least ten polls of ours, is dead. One that
    was never seen to beat, as it was gone before this node attached, after a second.
    `linger_s`: How long the unread bytes of a dead peer are kept for a reader that does not come. (Above 60
    its section may be reused before, when no other is free.)
    `flush_s`: How long a node that is detached waits for closed writers to get rid of what they hold.
    `reap_after_s`: A section silent so long is freed for reuse; None: never (by hand: `shmsock reap`).
    `ring_bytes`: Largest ring of one direction of a connection, a power of two from 512 to 2**30;
    smaller ones when memory is scarce. (Datagrams have rings of their own, of at most 256 KiB.)
    `first_ring_bytes`: What each direction begins with, a power of two from 512 to 2**30, but at most
    ring_bytes: as large as that, it never grows. Else it does when a write finds no room.
    `datagram_queue_bytes`: What an endpoint for datagrams keeps at most, of those that wait to be sent
    and of those that wait while it is paused; each counts 64 bytes more than it has. At least 2**18: more
    than pause_writing lets come up.
    `max_connects`: CONNECTs per peer without an answer, 1 to 128; more wait here. Never more than half of the
    messages that a pair has room for: 64 of them, and more from 16,384 slots on, up to 256.
    `pin`: Names that are believed of one section only, {"vm-b": 3}: a peer elsewhere that says this is its
    name goes by "section-N" here. A program asks for its section with attach(section=). None: SHMSOCK_PIN
    ("vm-b=3,vm-c=5"), else none.
    """

    busy_poll_us: int = 200
    hot_us: int = 300
    hold_us: int = 500
    look_cap_us: int = 1000
    doorbells: bool = True
    dead_after_s: float = 3.0
    linger_s: float = 60.0
    flush_s: float = 2.0
    reap_after_s: float | None = 600.0
    ring_bytes: int = 1 << 20
    first_ring_bytes: int = 512
    datagram_queue_bytes: int = 4 << 20
    max_connects: int = 128
    pin: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.pin is not None:
            object.__setattr__(self, "pin", check_pin(self.pin))
        for name in ("ring_bytes", "first_ring_bytes"):
            size = getattr(self, name)
            if size < 512 or size > 1 << 30 or size & (size - 1):
                raise ValueError(f"{name} is {size}, expected a power of two from 512 to {1 << 30}")
        if self.datagram_queue_bytes < 1 << 18:
            raise ValueError(
                f"datagram_queue_bytes is {self.datagram_queue_bytes}, expected {1 << 18} or more"
            )
        if not 1 <= self.max_connects <= 128:
            raise ValueError(f"max_connects is {self.max_connects}, expected 1 to 128")
        for name, least in (("busy_poll_us", 0), ("hot_us", 0), ("look_cap_us", 0), ("hold_us", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if self.dead_after_s <= 0:
            raise ValueError(f"dead_after_s is {self.dead_after_s}, expected more than 0")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read SHMSOCK_SETTINGS, "busy_poll_us=50,doorbells=false", for nodes that are made without settings.
        Raises ValueError that names the field."""
        kinds = {field.name: str(field.type) for field in fields(cls) if field.name != "pin"}
        found: dict[str, Any] = {}
        for part in (os.environ if environ is None else environ).get("SHMSOCK_SETTINGS", "").split(","):
            name, equals, text = (word.strip() for word in part.partition("="))
            if not part.strip():
                continue
            if name not in kinds or not equals:
                raise ValueError(f"SHMSOCK_SETTINGS: {part.strip()!r} is not FIELD=VALUE with a field of "
                                 f"{', '.join(kinds)}")  # fmt: skip
            try:
                found[name] = _value(text, kinds[name])
            except ValueError:
                raise ValueError(f"SHMSOCK_SETTINGS: {name} is {text!r}, expected {kinds[name]}") from None
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"SHMSOCK_SETTINGS: {error}") from None


_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _value(text: str, kind: str) -> Any:
    if kind == "bool":
        if text.lower() not in _WORDS:
            raise ValueError(text)
        return _WORDS[text.lower()]
    if kind.endswith("None") and text.lower() == "none":
        return None
    return int(text) if kind == "int" else float(text)
