"""Libraries and servers as they are, through memory: an exchange, 10 MB, 50 tasks at once, connections that
are kept, a server that is restarted, a clean end. SHMSOCK_LONG=1: on both loops, and over TCP, a control."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.forward.processes import LONG
from tests.integrations.services import SERVER_OF, Service, service
from tests.run.programs import Program

BAD = ("Traceback", "Warning", "never retrieved", "unclosed", "shmsock run:")
WAYS = [("shm", "asyncio"), ("shm", "uvloop"), ("tcp", "")]


def cases(libraries: Iterable[str]) -> list[Any]:
    """Each on one of the loops, or all."""
    found = []
    for number, library in enumerate(libraries):
        for way in WAYS if LONG else WAYS[number % 2 :][:1]:
            found.append(pytest.param(library, *way, id=f"{library}-{'-'.join(way)}"))
    return found


def ended_well(service: Service, client: Program) -> dict[str, Any]:
    """Wait for the end of both, and return what the client has to say."""
    said: dict[str, Any] = json.loads(client.wait_for("said ").removeprefix("said "))
    assert client.ends() == 0, client.lines
    assert service.end() in (0, -signal.SIGTERM), service.program.lines
    for lines in (client.lines, service.program.lines):
        assert not [line for line in lines if any(bad in line for bad in BAD)], lines
    return said


@pytest.mark.parametrize(("library", "way", "loop"), cases(SERVER_OF))
def test_a_library_as_it_is(library: str, way: str, loop: str, shm_region: Path) -> None:
    with service(library, way, loop) as serving, closing(serving.client("check")) as client:
        client.wait_for("restart")
        serving.restart()
        client.tell()
        said = ended_well(serving, client)
        print(library, said)
        if way == "shm" and library != "psycopg_sql":
            assert 1 <= said["opened"] <= 51  # of 303 requests


@pytest.mark.parametrize(("library", "way", "loop"), cases(["asyncpg_sql", "psycopg_sql", "asyncssh_run"]))
def test_what_else_a_library_does(library: str, way: str, loop: str, shm_region: Path) -> None:
    """TLS, a query that is cancelled, COPY, SFTP."""
    with service(library, way, loop) as serving, closing(serving.client("more")) as client:
        said = ended_well(serving, client)
        if way == "shm" and library != "psycopg_sql":
            assert said["opened"] >= 1
