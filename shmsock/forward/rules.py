"""Rules: what is listened on and where it leads, from the command line or from a TOML file."""

from __future__ import annotations

import difflib
import ipaddress
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from shmsock.address import default_name, node_name
from shmsock.forward.endpoints import SHM, SOCKS5, TCP, UDP, UNIX, Endpoint, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "Rule", "RuleError", "check", "read"]

PROXY_PROTOCOLS = ("v1", "v2")


class RuleError(ValueError):
    """A rule that cannot be: the message says where and why, in one line. `key`: what is wrong with it;
    `number`: which of several it is."""

    def __init__(self, message: str, key: str = "listen", number: int = 0) -> None:
        super().__init__(message)
        self.key, self.number = key, number


@dataclass(frozen=True)
class Rule:
    """Where connections, or datagrams, come from and where they lead.

    `proxy_protocol`: "v1" or "v2": tell the target by a PROXY header who connects. `source_per_peer`: connect
    to the target from 127.83.0.SECTION, so that it can tell peers apart. `only_shm`, of SOCKS5: no host but
    peers. `connect_timeout`: seconds until a target that does not answer counts as unreachable.
    `idle_timeout`: seconds after which a client of datagrams is forgotten. `mode`: permissions of a UNIX
    socket that is listened on, "0660".

    Raises RuleError when made of what does not go together.
    """

    listen: Endpoint
    target: Endpoint
    proxy_protocol: str = ""
    source_per_peer: bool = False
    only_shm: bool = False
    connect_timeout: float = 10.0
    idle_timeout: float = 60.0
    mode: str = ""

    def __str__(self) -> str:
        return f"{self.listen} -> {self.target}"

    @property
    def datagrams(self) -> bool:
        return UDP in (self.listen.kind, self.target.kind)

    @property
    def key(self) -> tuple[Endpoint, bool]:
        """What it listens on. (Ports of streams and of datagrams are not the same.)"""
        return self.listen, self.datagrams

    def __post_init__(self) -> None:
        listen, target, datagrams = self.listen.kind, self.target.kind, self.datagrams
        if SHM not in (listen, target) and target != SOCKS5:
            raise RuleError(f"{self}: neither side is shm:, so nothing goes through shared memory")
        if datagrams and {listen, target} != {UDP, SHM}:
            raise RuleError(f"{self}: udp: goes with shm: on the other side")
        if target == SOCKS5 and listen not in (TCP, UNIX):
            raise RuleError(f"{self}: socks5 is listened for on tcp: or unix:")
        if self.proxy_protocol and (datagrams or target == SOCKS5):
            raise RuleError(
                f"{self}: proxy_protocol is for streams to a target of one's own", "proxy_protocol"
            )
        if self.source_per_peer and not (listen == SHM and target == TCP and _is_loopback(self.target.host)):
            raise RuleError(
                f"{self}: source_per_peer needs listen = 'shm:...', target = 'tcp:127...:PORT'",
                "source_per_peer",
            )
        if self.mode and listen != UNIX:
            raise RuleError(f"{self}: mode is for listen = 'unix:...'", "mode")


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.version == 4 and address.is_loopback


@dataclass(frozen=True)
class Config:
    """The content of a file."""

    rules: tuple[Rule, ...]
    region: str | None = None
    name: str | None = None


# -- rules that lead in a circle


def check(rules: Iterable[Rule], name: str | None = None) -> None:
    """Raise RuleError when a rule listens where one before it does, or leads by others back to itself.
    `name`: what this node is called."""
    places: dict[Any, list[Rule]] = {}  # rules by where they listen, but for the host
    own = name or default_name()
    for number, rule in enumerate(rules):
        chosen = rule.listen.kind != UNIX and not rule.listen.port  # by the kernel: others than these
        there = places.setdefault(_place(rule.listen, rule.datagrams), [])
        for other in there:
            if other.key == rule.key or (not chosen and _meets(other, rule.listen, own)):
                raise RuleError(f"{rule}: listens where {other} does", number=number)
        there.append(rule)
        way = [rule]
        while way:
            target, datagrams = way[-1].target, way[-1].datagrams
            after = next(
                (r for r in places.get(_place(target, datagrams), ()) if _meets(r, target, own)), None
            )
            if after is rule:
                raise RuleError(f"rules lead in a circle: {'; '.join(map(str, way))}", number=number)
            way = [*way, after] if after is not None else []


def _place(end: Endpoint, datagrams: bool) -> tuple[object, ...]:
    return end.kind, end.host if end.kind == UNIX else end.port, datagrams


def _meets(rule: Rule, other: Endpoint, own: str) -> bool:
    """Does what goes to `other` (or listens there) come to the rule, whose place is the same?"""
    if other.kind == UNIX:
        return True
    if other.kind == SHM:
        return other.host in ("", "localhost", own)
    a, b = _host(rule.listen.host), _host(other.host)
    return a == b or "*" in (a, b)


def _host(host: str) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host.lower() == "localhost" else host)
    except ValueError:
        return host.lower()
    return "*" if address.is_unspecified else "127.0.0.1" if str(address) == "::1" else str(address)


# -- TOML


def read(text: str) -> Config:
    """Read rules from the text of a TOML file: `[[rule]]` tables with the fields of Rule, and ahead of them
    `region` and `name`. Raises RuleError: it says line and key."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RuleError(f"not TOML: {error}") from None
    tables = data.pop("rule", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise RuleError(f"line {_line(text, 'rule') or 1}, rule: [[rule]] tables were expected, at least one")
    top = _checked(text, -1, data, {"region": "str", "name": "str"})
    if "name" in top:
        try:
            node_name(top["name"])
        except ValueError as error:
            raise RuleError(f"line {_line(text, 'name')}, name: {error}") from None
    rules = []
    types = {field.name: str(field.type) for field in fields(Rule)}
    for number, table in enumerate(tables):
        rules.append(_rule(text, number, table, types))
    try:
        check(rules, top.get("name"))
    except RuleError as error:
        raise RuleError(f"line {_line(text, 'listen', error.number)}, listen: {error}") from None
    return Config(tuple(rules), **top)


def _rule(text: str, number: int, table: Mapping[str, Any], types: Mapping[str, str]) -> Rule:
    values = _checked(text, number, table, types)
    for key in ("listen", "target"):
        if key not in values:
            raise RuleError(f"line {_line(text, '', number)}, {key}: missing in this [[rule]]")
        try:
            values[key] = parse(values[key], listens=key == "listen")
        except ValueError as error:
            raise RuleError(f"line {_line(text, key, number)}, {key}: {error}") from None
    if values.get("proxy_protocol", "v1") not in PROXY_PROTOCOLS:
        seen = values["proxy_protocol"]
        where = f"line {_line(text, 'proxy_protocol', number)}, proxy_protocol"
        raise RuleError(f"{where}: {seen!r}: 'v1' or 'v2' was expected")
    if not re.fullmatch("0?[0-7]{3}|", values.get("mode", "")):
        where = f"line {_line(text, 'mode', number)}, mode"
        raise RuleError(f"{where}: {values['mode']!r}: octal digits such as '0660' were expected")
    try:
        return Rule(**values)
    except RuleError as error:
        raise RuleError(f"line {_line(text, error.key, number)}, {error.key}: {error}") from None


def _checked(text: str, number: int, table: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Check keys and the types of their values."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        fits = False
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(types)}"
            problem = f"no such key; {hint}"
        elif types[key] == "bool":
            fits, problem = isinstance(value, bool), f"{value!r}: true or false expected"
        elif types[key] == "float":
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6
            problem = f"{value!r}: seconds, more than 0, expected"
        else:
            fits, problem = isinstance(value, str), f"{value!r}: a string expected"
        if not fits:
            raise RuleError(f"line {_line(text, key, number)}, {key}: {problem}")
        values[key] = value
    return values


def _line(text: str, key: str, number: int = -1) -> int:
    """Find the line of `key` in the [[rule]] table of that number (-1: ahead of them), "": its header. TOML's
    parser does not tell."""
    table, header = -1, 0
    for count, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[\[\s*rule\s*\]\]", line):
            table, header = table + 1, count
            if table == number and not key:
                return count
        elif table == number and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return count
        if table == number:
            found = header
        elif table < number:
            found = count
    return found if text else 1
