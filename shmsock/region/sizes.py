"""Sizes as people write them: "2G", "64M", "1GiB"."""

from __future__ import annotations

import re

__all__ = ["format_size", "human", "parse_size", "round_up", "short_size"]

_UNITS = "KMGT"
_SIZE = re.compile(r"\s*([0-9]{1,19})\s*(?:([kmgt])i?)?b?\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """Parse `text` into bytes. Units are powers of 1024 however spelled: 64M, 64MB and 64MiB are one size.

    Raises ValueError unless it is a positive whole number of some unit.
    """
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text)
        if not match:
            raise ValueError(
                f"{text!r} is no size: expected a whole number and a unit, such as 64M, 2G or 1GiB"
            )
        size = int(match[1]) << 10 * (1 + _UNITS.index(match[2].upper()) if match[2] else 0)
    if not 0 < size < 1 << 63:
        raise ValueError(f"{text!r} is no size: expected more than 0 and less than 2**63 bytes")
    return size


def format_size(size: int) -> str:
    """Write `size` bytes in the largest unit that divides it: "256 MiB", "1000 bytes"."""
    unit = 0
    while unit < len(_UNITS) and size and size % 1024 == 0:
        size //= 1024
        unit += 1
    return f"{size} {_UNITS[unit - 1]}iB" if unit else f"{size} bytes"


def human(size: int) -> str:
    """Write `size` bytes, rounded, in the unit that suits it: "61.4 MiB"."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{size} bytes" if units[0] == "bytes" else f"{value:.4g} {units[0]}"


def short_size(size: int) -> str:
    """Write `size` bytes as options take them: "256M", "1000"."""
    return format_size(size).removesuffix(" bytes").removesuffix("iB").replace(" ", "")


def round_up(size: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit
