"""For all tests."""

from __future__ import annotations

import signal

# A test run that was started in the background may have been told to ignore SIGINT, and children inherit
# that: those that a test sends one must get it.
signal.signal(signal.SIGINT, signal.default_int_handler)
