"""The pump: the pass over what peers said, and the short cuts of reads and writes around it.

Both are types of native/extension. The pump is a callback of the loop, never a task: after a pass it comes
again by `call_soon` as long as bytes move, or lets the heartbeat watch and the loop sleep.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import importlib.machinery
import importlib.util
from typing import Any

__all__ = ["DatagramOut", "FastPath", "Pump", "extension", "ready_queue", "selector"]


def _load() -> Any:
    """Load the extension, which is in the same shared object as the core."""
    from shmsock.native import _core

    name = "shmsock.native._extension"
    loader = importlib.machinery.ExtensionFileLoader(name, _core.__file__)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


extension = _load()


def ready_queue(loop: Any) -> Any:
    """Find the loop's queue of ready callbacks, so that its length can be asked for; None where it cannot be
    found. asyncio's loops have it as _ready; uvloop hides it, but it is the one deque that has just grown by
    a handle."""
    if hasattr(loop, "_ready") or not isinstance(loop, asyncio.AbstractEventLoop):
        return getattr(loop, "_ready", None)
    handle = loop.call_soon(int)
    handle.cancel()
    deques = (d for d in gc.get_referents(loop) if type(d) is collections.deque and d and d[-1] is handle)
    return next(deques, None)


def selector(loop: Any) -> int:
    """Find the descriptor by which the loop waits for all others: readable when one of them is ready. -1
    where it cannot be found."""
    if hasattr(loop, "_get_backend_id"):  # uvloop
        return int(loop._get_backend_id())
    fileno = getattr(getattr(loop, "_selector", None), "fileno", None)
    return -1 if fileno is None else int(fileno())


Pump: Any = extension.Pump
FastPath: Any = extension.FastPath
DatagramOut: Any = extension.DatagramOut
