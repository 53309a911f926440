"""For all tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

# A test run that was started in the background may have been told to ignore SIGINT, and children inherit
# that: those that a test sends one must get it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _collecting_is_cheap() -> Iterator[None]:
    """Many tests collect: only what they made themselves is looked at then."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
