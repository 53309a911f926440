"""What kernel sockets make of addresses that stand for names, in a network namespace of its own: run by
test_no_packets.py as `unshare --net python -m tests.aio.capture LOOP ROUTES`.

Everything that leaves by an interface is seen (AF_PACKET). ROUTES "routed": there is one with default routes
of IPv4 and IPv6; "alone": there is the loopback and nothing else. Says a line of JSON for each attempt, and
at the end the packets that carried its bytes or were for such an address.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import uvloop

import shmsock
from shmsock.aio import names

SECRET = b"a password"
CONTROL = b"a packet that leaves"
SETUP = [
    "link set lo up",
    "link add veth-a type veth peer name veth-b",
    "addr add 192.0.2.1/24 dev veth-a",
    "-6 addr add 2001:db8::1/64 dev veth-a nodad",
    "link set veth-a up",
    "link set veth-b up",
    "route add default via 192.0.2.2",
    "-6 route add default via 2001:db8::2",
    "neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev veth-a",  # as if there were routers
    "-6 neigh add 2001:db8::2 lladdr 02:00:00:00:00:02 dev veth-a",
]


def attempts(address: Any) -> dict[str, Callable[[], object]]:
    """By all that programs and libraries do with an address that the loop gave them."""
    host, port = address[:2]
    found: dict[str, Callable[[], object]] = {
        "socket.create_connection": lambda: socket.create_connection((host, port), timeout=5),
    }

    def by(family: int, kind: int, act: Callable[[socket.socket], object]) -> Callable[[], object]:
        def attempt() -> object:
            with socket.socket(family, kind) as sock:
                sock.settimeout(5)
                return act(sock)

        return attempt

    wide = [(host, port, 0, names.SCOPE), (host, port, 0, 0), (host, port), (f"{host}%{names.SCOPE}", port)]
    for family, given in [(socket.AF_INET6, to) for to in wide] + [(socket.AF_INET, (host, port))]:
        which = f"{family.name} {given[1:]}"
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            found[f"connect {kind.name} {which} {len(found)}"] = by(
                family,
                kind,
                lambda sock, to=given: (sock.connect(to), sock.send(SECRET)),  # type: ignore[misc]
            )
        found[f"sendto {which} {len(found)}"] = by(
            family,
            socket.SOCK_DGRAM,
            lambda sock, to=given: sock.sendto(SECRET, to),  # type: ignore[misc]
        )
    return found


def report(what: str, attempt: Callable[[], object]) -> None:
    begin = time.monotonic()
    try:
        attempt()
        said = "no error"
    except OSError as error:
        said = type(error).__name__
    print(json.dumps([what, said, time.monotonic() - begin < 1]), flush=True)


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with await asyncio.start_server(asyncio.Protocol, "*.shm", 7000):  # type: ignore[arg-type]
        for family in (0, socket.AF_INET, socket.AF_INET6):
            found = await loop.getaddrinfo("localhost.shm", 7000, family=family, type=socket.SOCK_STREAM)
            assert len(found) == 1
            own, kind, _, _, address = found[0]
            with socket.socket(own, kind) as sock:
                sock.settimeout(5)
                report(f"as getaddrinfo told it, {family!r}", lambda: sock.connect(address))  # noqa: B023
            with socket.socket(own, socket.SOCK_DGRAM) as sock:
                report(f"as getaddrinfo told it, {family!r}, UDP", lambda: sock.sendto(SECRET, address))  # noqa: B023
        for what, attempt in attempts(address).items():
            report(what, attempt)


def seen(capture: socket.socket, routed: bool) -> list[str]:
    """What left, up to the control, which proves that it would have been seen."""
    for family, router in ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8:1::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(
                CONTROL, (router if routed else "127.0.0.1" if family == socket.AF_INET else "::1", 9)
            )
    controls, bad = 0, []
    while controls < 2:
        assert select.select([capture], [], [], 10)[0], "the control was not seen"
        packet, (interface, _, kind, *_) = capture.recvfrom(65536)
        if kind != socket.PACKET_OUTGOING:
            continue
        controls += CONTROL in packet
        if SECRET in packet or bytes.fromhex("ff015348") in packet:
            bad.append(f"{interface}: {packet.hex()}")
    return bad


if __name__ == "__main__":
    routed = sys.argv[2] == "routed"
    for line in SETUP if routed else SETUP[:1]:
        subprocess.run(["ip", *line.split()], check=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as capture:  # ETH_P_ALL
        made = shmsock.loop_factory(uvloop.Loop if sys.argv[1] == "uvloop" else None)()
        made.run_until_complete(main())
        made.run_until_complete(made.shutdown_asyncgens())
        made.close()
        print(json.dumps(seen(capture, routed)), flush=True)
