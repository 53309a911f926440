"""Endpoints of a rule as text: tcp:HOST:PORT, unix:PATH, shm:NAME:PORT, shm:PORT, udp:HOST:PORT, socks5."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shmsock.address import check_port, is_local, normalize_name

__all__ = ["SHM", "SOCKS5", "TCP", "UDP", "UNIX", "Endpoint", "check_host", "parse"]

TCP, UNIX, SHM, UDP, SOCKS5 = KINDS = "tcp", "unix", "shm", "udp", "socks5"
_FORMS = "tcp:HOST:PORT, unix:PATH, udp:HOST:PORT, shm:NAME:PORT or, to listen, shm:PORT"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Endpoint:
    """One side of a rule. `host` of SHM: a peer's name, or "" for all peers, to listen; of UNIX: the path."""

    kind: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.kind == SOCKS5:
            return SOCKS5
        if self.kind == UNIX:
            return f"{UNIX}:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}:{host}:{self.port}" if host else f"{self.kind}:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


def parse(text: str, *, listens: bool) -> Endpoint:
    """Read an endpoint. `listens`: of the side that is listened on; else the target. Raises ValueError: it
    says which part is wrong, and what was expected."""
    kind, colon, rest = text.partition(":")
    if kind == SOCKS5 and not listens and rest == "":
        return Endpoint(SOCKS5)
    if kind not in KINDS[:4] or not colon:
        raise ValueError(f"{text!r} is no endpoint; expected {_FORMS}")
    if kind == UNIX:
        if not rest or "\0" in rest or len(os.fsencode(rest)) > 107:
            raise ValueError(f"{text!r}: a path of 1 to 107 bytes was expected behind unix:")
        return Endpoint(UNIX, rest)
    host, colon, digits = rest.rpartition(":")
    port = _port(text, digits, least=0 if listens else 1)
    if kind == SHM:
        return Endpoint(SHM, _peer(text, host, listens), port)
    if host[:1] == "[" and host[-1:] == "]":
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: host {host!r}: an IPv6 address is written in brackets, [{host}]")
    if not host and colon:
        raise ValueError(f"{text!r}: the host is missing; * stands for all addresses to listen on")
    if host == "*" and not listens:
        raise ValueError(f"{text!r}: host '*' is for listening; a target has one address")
    try:
        check_host(host)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return Endpoint(kind, host or LOOPBACK, port)


def check_host(host: str) -> None:
    """Raise ValueError for what no resolver is asked for: getaddrinfo() raises UnicodeError then."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(
            f"host {host!r} is no host name: a part of it is empty, too long, or no text"
        ) from None


def _port(text: str, digits: str, least: int) -> int:
    try:
        port = check_port(int(digits)) if digits.isdecimal() else -1
    except (OverflowError, ValueError):
        port = -1
    if port < least:
        raise ValueError(f"{text!r}: port {digits!r}: a number from {least} to 65535 was expected")
    return port


def _peer(text: str, host: str, listens: bool) -> str:
    if listens:
        if host and not is_local(host):
            raise ValueError(
                f"{text!r}: host {host!r}: shm:PORT listens for all peers, shm:localhost:PORT for those "
                "of this machine; the own name is set by SHMSOCK_NAME or --name"
            )
        return "localhost" if host else ""
    if not host:
        raise ValueError(f"{text!r}: the peer's name is missing: shm:NAME:PORT")
    try:
        return "localhost" if is_local(host) else normalize_name(host)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
