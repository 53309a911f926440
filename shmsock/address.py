"""Names, ports, and who this machine is.

A peer is addressed as (name, port). A name is at most 63 bytes of `[a-z0-9._-]`; upper case, one trailing dot
and the suffix `.shm` are taken off first. A name of digits alone is refused, since a number means a section.
"""

from __future__ import annotations

import functools
import ipaddress
import operator
import os
import re
import socket
from collections.abc import Mapping
from typing import SupportsIndex, cast

__all__ = [
    "NAME_BYTES",
    "SUFFIX",
    "Address",
    "Ranges",
    "boot_id",
    "check_pin",
    "check_port",
    "check_ranges",
    "default_name",
    "default_pin",
    "default_publish",
    "default_region",
    "default_section",
    "is_any",
    "is_local",
    "machine_id",
    "may_be_published",
    "node_name",
    "normalize_name",
    "packed",
    "parsed_address",
    "port_number",
    "unpacked",
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Ranges = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
NAME_BYTES = 63
"""The longest name, in bytes (they are ASCII, so in characters as well)."""
SUFFIX = ".shm"
MAX_SECTIONS = 64
"""Of a region, at most."""

_ANY = frozenset(("", "0.0.0.0", "::"))
_LOCAL = frozenset(("localhost", "localhost.shm", "127.0.0.1", "::1"))
_NAME = re.compile(r"[A-Za-z0-9._-]*")
_RULE = f"expected 1 to {NAME_BYTES} characters of [a-z0-9._-], not digits alone"
_ZERO = bytes(16)


def normalize_name(name: str) -> str:
    """The one spelling of a peer's name: lower-case, without a trailing dot, without `.shm`.

    Raises TypeError unless `name` is a str, ValueError with what was seen when it is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"a peer's name is a str, not {type(name).__name__}")
    # Before lower(): that turns some letters outside ASCII (the Kelvin sign) into ones inside.
    if not _NAME.fullmatch(name):
        raise ValueError(f"{_shown(name)} is no peer name: {_RULE}")
    plain = name.lower().removesuffix(".").removesuffix(SUFFIX)
    if not plain:
        raise ValueError(f"{_shown(name)} is no peer name: it is empty; {_RULE}")
    if len(plain) > NAME_BYTES:
        raise ValueError(f"{_shown(name)} is no peer name: it has {len(plain)} characters; {_RULE}")
    if plain.endswith((".", SUFFIX)):  # else a name normalized twice would be another name
        raise ValueError(f"{_shown(name)} is no peer name: one trailing dot and one {SUFFIX!r} at most")
    if plain.isdigit():
        raise ValueError(
            f"{_shown(name)} is no peer name: digits alone; pass int({plain}) to mean section {plain}"
        )
    return plain


def node_name(name: str) -> str:
    """`normalize_name`, for the name that a node gives itself.

    Raises TypeError and ValueError, the latter also for what connect() takes for 'this machine'.
    """
    plain = normalize_name(name)
    if is_any(plain) or is_local(plain):
        raise ValueError(
            f"a node cannot be named {plain!r}: that means 'this machine' to everyone; choose another name"
        )
    return plain


def _shown(name: str) -> str:
    """repr(), bounded."""
    return repr(name) if len(name) <= 80 else f"{name[:77]!r}..."


def check_port(port: SupportsIndex, call: str = "") -> int:
    """`port` as an int in 0..65535. `call` ("bind", "connect") starts the message, as it does in socket's.

    Raises what socket raises: TypeError when it is no integer, OverflowError when it is out of range.
    """
    number = operator.index(port)
    if not 0 <= number <= 65535:
        raise OverflowError(f"{call}(): port must be 0-65535." if call else "port must be 0-65535.")
    return number


def port_number(port: object) -> int:
    """A port as getaddrinfo takes it: a number, its digits, the name of a service, or None for 0.

    Raises TypeError and OverflowError as check_port() does, socket.gaierror for a name that is no service's.
    """
    if type(port) is int and 0 <= port <= 65535:
        return port
    if isinstance(port, (bytes, bytearray)):
        port = port.decode("ascii", "replace")
    if isinstance(port, str):
        port = port.strip() or "0"
        try:
            return check_port(int(port)) if port.isdecimal() else socket.getservbyname(port)
        except OSError:
            raise socket.gaierror(
                socket.EAI_SERVICE, f"port {port!r}: expected a number or the name of a service"
            ) from None
    if port is None:
        return 0
    if not hasattr(type(port), "__index__"):  # what isinstance() of SupportsIndex says, in 20 us less
        raise TypeError(f"a port is a number or the name of a service, not {type(port).__name__!r}")
    return check_port(cast(SupportsIndex, port))


def is_any(host: object) -> bool:
    """Does `host`, given to listen on, mean all peers?"""
    return host is None or (isinstance(host, str) and host in _ANY)


def is_local(host: object) -> bool:
    """Does `host` mean this machine? (`localhost` is a name: case and a trailing dot do not matter.)"""
    return isinstance(host, str) and (host in _LOCAL or host.lower().removesuffix(".") in _LOCAL)


def default_region() -> str:
    """The path of the region that is used when none is named: this user's own, in shared memory."""
    return f"/dev/shm/shmsock-{os.geteuid()}"


def default_name(environ: Mapping[str, str] | None = None, hostname: str | None = None) -> str:
    """SHMSOCK_NAME, else the host's name made to fit.

    Arguments stand in for os.environ and gethostname(). Raises ValueError when SHMSOCK_NAME is no name; a
    host name always gives one.
    """
    chosen = (os.environ if environ is None else environ).get("SHMSOCK_NAME", "")
    if chosen:
        try:
            return node_name(chosen)
        except ValueError as error:
            raise ValueError(f"SHMSOCK_NAME: {error}") from None
    host = socket.gethostname() if hostname is None else hostname
    plain = _trimmed(re.sub(r"[^A-Za-z0-9._-]", "-", host).lower())
    # "localhost" is what unconfigured images call themselves; as a peer's name nobody could ever reach it.
    if plain.isdigit() or is_any(plain) or is_local(plain):
        plain = _trimmed(f"host-{plain}") if plain else "host"
    return plain


def check_pin(pin: Mapping[str, int]) -> dict[str, int]:
    """Return sections by name, each name in its canonical spelling. Raises TypeError or ValueError for a
    section or a name that is none."""
    found: dict[str, int] = {}
    for name, section in pin.items():
        plain, number = normalize_name(name), operator.index(section)
        if not 0 <= number < MAX_SECTIONS:
            raise ValueError(f"{name!r} is pinned to section {number}, expected 0 to {MAX_SECTIONS - 1}")
        if found.setdefault(plain, number) != number:
            raise ValueError(f"{name!r} is pinned to section {number}, and to {found[plain]} as well")
    return found


def default_pin(environ: Mapping[str, str] | None = None) -> dict[str, int]:
    """Read SHMSOCK_PIN: "vm-b=3,vm-c=5". Raises ValueError when that is no such list."""
    found: dict[str, int] = {}
    for part in (os.environ if environ is None else environ).get("SHMSOCK_PIN", "").split(","):
        name, equals, section = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not equals or not (section.isascii() and section.isdecimal()):
            raise ValueError(f"SHMSOCK_PIN: {part.strip()!r} is not NAME=SECTION, as in vm-b=3,vm-c=5")
        if found.setdefault(name, int(section)) != int(section):
            raise ValueError(f"SHMSOCK_PIN: {name!r} is pinned to two sections")
    try:
        return check_pin(found)
    except ValueError as error:
        raise ValueError(f"SHMSOCK_PIN: {error}") from None


def default_section(environ: Mapping[str, str] | None = None) -> int | None:
    """Read SHMSOCK_SECTION; None: any. Raises ValueError when that is no number."""
    chosen = (os.environ if environ is None else environ).get("SHMSOCK_SECTION", "").strip()
    if chosen and not (chosen.isascii() and chosen.isdecimal()):
        raise ValueError(f"SHMSOCK_SECTION is {chosen!r}, expected the number of a section")
    return int(chosen) if chosen else None


def check_ranges(text: str, what: str) -> Ranges:
    """Read ranges of internet addresses: "10.0.0.0/24,fd00::/64". Raises ValueError that begins with `what`,
    and names the part that is no range."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ipaddress.ip_network(part))
        except ValueError as error:
            why = str(error).removeprefix(repr(part)).strip()
            raise ValueError(
                f"{what}: {_shown(part)} {why}: expected a range, as in 10.0.0.0/24 or fd00::/64"
            ) from None
    return tuple(found)


def default_publish(environ: Mapping[str, str] | None = None) -> Ranges:
    """Read SHMSOCK_PUBLISH: the ranges in which own addresses are published; none: nothing is. Raises
    ValueError when that is no list of ranges."""
    return check_ranges(
        (os.environ if environ is None else environ).get("SHMSOCK_PUBLISH", ""), "SHMSOCK_PUBLISH"
    )


def may_be_published(address: Address) -> bool:
    """Can this be an address by which other machines know one?"""
    return not (
        address.is_loopback
        or address.is_unspecified
        or address.is_multicast
        or address.is_link_local
        or address == _BROADCAST
    )


_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


def packed(address: Address) -> bytes:
    """Return an address as 16 bytes, one of IPv4 as ::ffff:a.b.c.d."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def unpacked(raw: bytes) -> Address:
    """Undo packed()."""
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


@functools.lru_cache(maxsize=1024)
def parsed_address(host: str) -> Address | None:
    """Return the address that a host is; None for a name. One with a scope (fe80::1%eth0) is nobody else's,
    and none."""
    try:
        return unpacked(packed(ipaddress.ip_address(host))) if "%" not in host else None
    except ValueError:
        return None


def _trimmed(name: str) -> str:
    """Cut to length, and without any tail that normalize_name() would take off or refuse."""
    name = name[:NAME_BYTES]
    while name.endswith((".", SUFFIX)):
        name = name.removesuffix(".").removesuffix(SUFFIX)
    return name


def boot_id(path: str = "/proc/sys/kernel/random/boot_id") -> bytes:
    """16 bytes that name this boot of this kernel; all zero when unknown (and then equal to nobody's)."""
    return _uuid(path) or _ZERO


def machine_id(
    product_uuid: str = "/sys/class/dmi/id/product_uuid", machine_id_file: str = "/etc/machine-id"
) -> bytes:
    """16 bytes that name this machine over its boots; all zero when unknown (and then equal to nobody's).

    The firmware's UUID where it can be read (root only) and is one, else /etc/machine-id. Cloned disks share
    the latter, so equality is a hint and no proof.
    """
    return _uuid(product_uuid) or _uuid(machine_id_file) or _ZERO


def _uuid(path: str) -> bytes | None:
    """The UUID written in `path`; None: unreadable, not one, or a placeholder (all 0, all f)."""
    try:
        with open(path, "rb") as file:
            value = bytes.fromhex(file.read(64).decode("ascii").strip().replace("-", ""))
    except (OSError, ValueError):
        return None
    return value if len(value) == 16 and value not in (_ZERO, b"\xff" * 16) else None
