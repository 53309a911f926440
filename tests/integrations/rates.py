"""Requests per second of libraries, through memory and over TCP: make apps

Client and server are processes of their own, on uvloop. docs/porting.md has the table. Servers that are no
asyncio programs stand behind `shmsock forward` for memory, and are connected to directly for TCP.
"""

from __future__ import annotations

import json
import os
import sys
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from shmsock.testing import make_region
from tests.integrations.services import SERVER_OF, service

ROUNDS = 3
SECONDS = "1"


def measure(library: str, way: str) -> list[tuple[float, float]]:
    """Rates and median times with one request at a time, and with 50."""
    found = []
    with service(library, way, "uvloop") as serving:
        for at_once in ("1", "50"):
            client = serving.client("rate", SECONDS, at_once)
            try:
                said: dict[str, Any] = json.loads(client.wait_for("said ").removeprefix("said "))
                assert client.ends() == 0, client.lines
            finally:
                client.close()
            found.append((said["rate"], said["us"]))
    return found


def main(libraries: list[str]) -> None:
    table = Table("library", "us, one at a time: TCP", "memory", "k/s, 50 at once: TCP", "memory")
    os.environ["SHMSOCK_REGION"] = region = make_region()
    try:
        for library in libraries or SERVER_OF:
            rounds = [[measure(library, way) for way in ("tcp", "shm")] for _ in range(ROUNDS)]
            row = [median(r[way][0][1] for r in rounds) for way in (0, 1)]
            many = [median(r[way][1][0] for r in rounds) / 1000 for way in (0, 1)]
            table.add_row(library, *(f"{us:.0f}" for us in row), *(f"{k:.2f}" for k in many))
            Console(stderr=True).print(library, row, many)
    finally:
        os.unlink(region)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
