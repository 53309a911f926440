"""asyncio's own write limits, for type checkers: asyncio knows transports that can send files by this very
class."""

from __future__ import annotations

import asyncio
from asyncio import transports as _transports
from typing import TYPE_CHECKING, Any

__all__ = ["FlowControl"]

if TYPE_CHECKING:

    class FlowControl(asyncio.BaseTransport):
        _loop: asyncio.AbstractEventLoop
        _extra: Any
        _protocol_paused: bool

        def __init__(self, extra: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None: ...
        def get_write_buffer_limits(self) -> tuple[int, int]: ...
        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
        def _maybe_pause_protocol(self) -> None: ...
        def _maybe_resume_protocol(self) -> None: ...
else:

    class FlowControl(_transports._FlowControlMixin):
        """The values that asyncio's constructors set for each transport are the class's here."""

        _extra, _protocol_paused, _high_water, _low_water = None, False, 64 << 10, 16 << 10
