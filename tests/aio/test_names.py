"""Addresses that stand for names."""

from __future__ import annotations

import errno
import ipaddress
from typing import Any

import pytest

from shmsock.aio import names
from shmsock.aio.names import Names


def spellings(address: str) -> list[Any]:
    """Of one address, as programs and libraries write it."""
    long = ipaddress.IPv6Address(address).exploded
    packed = ipaddress.IPv6Address(address).packed
    texts = [address, address.upper(), long, long.upper(), f"{address}%{names.SCOPE}", f"{address}%lo"]
    texts.append(f"{':'.join(long.split(':')[:6])}:{'.'.join(map(str, packed[12:]))}")
    return [kind for text in texts for kind in (text, text.encode(), bytearray(text.encode()))]


def test_an_address_stands_for_a_name() -> None:
    table = Names()
    one, other = table.address("file:/a", "vm-b"), table.address("file:/b", "vm-b")
    assert one != other
    assert table.address("file:/a", "vm-b") == one
    assert (table.meant(one), table.meant(other)) == (("file:/a", "vm-b"), ("file:/b", "vm-b"))
    assert str(ipaddress.ip_address(one)) == one
    assert ipaddress.ip_address(one) in ipaddress.ip_network("ff01::/16")
    for text in spellings(one):
        assert names.is_address(text)
        assert names.is_shm(text)
        assert table.canonical(text) == one


@pytest.mark.parametrize(
    "host",
    ["198.18.0.1", "198.18.0.63", "127.0.0.1", "ff01::1", "ff01::fb", "ff02::1", "::", "ff01:5348", "", "*"],
)
def test_what_is_others(host: str) -> None:
    assert not names.is_address(host)
    assert not names.is_shm(host)
    assert not names.is_shm(host.encode())


@pytest.mark.parametrize("host", [None, 5, ("ff01:5348::1", 5), object()])
def test_what_is_no_host(host: Any) -> None:
    assert not names.is_shm(host)
    assert not names.is_any_shm(host)


def test_another_loops_address_is_refused() -> None:
    mine, others = Names(), Names()
    address = others.address("file:/a", "vm-b")
    mine.address("file:/a", "vm-b")
    assert names.is_shm(address)  # so that no kernel gets it
    for unknown in (address, mine.address("file:/a", "x")[:-1] + "f", "ff01:5348::1"):
        with pytest.raises(OSError, match="look the name up again") as info:
            mine.meant(unknown)
        assert info.value.errno == errno.EADDRNOTAVAIL


def test_names_without_end() -> None:
    """A peer may call itself something else each time: what is remembered is bounded, what is in use stays,
    and no number is given twice."""
    table = Names()
    kept, dropped = table.address("file:/a", "kept"), table.address("file:/a", "dropped")
    seen = {kept, dropped}
    for i in range(3 * 4096):
        seen.add(table.address("file:/a", f"n{i}"))
        assert table.meant(kept) == ("file:/a", "kept")
    assert len(seen) == 3 * 4096 + 2
    assert len(table._names) == len(table._known) == 4096
    with pytest.raises(OSError, match="look the name up again"):
        table.meant(dropped)
    assert table.address("file:/a", "dropped") not in seen
