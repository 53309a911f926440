"""The C core, as cffi wraps it; its functions are those of core.h."""

from typing import Any

ffi: Any
lib: Any
