"""Processes in containers, as namespaces make them: a region that they share is all that they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to make namespaces")

#: What docker and podman make: processes, mounts, network, host name and System V's objects of its own.
CONTAINER = [
    *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net", "--uts", "--ipc"),
    *("sh", "-c", 'hostname "$0" && exec "$@"'),
]
#: Without rights on the host: root in there is nobody special outside.
ROOTLESS = [CONTAINER[0], "--user", "--map-root-user", *CONTAINER[1:]]

SERVER = """
import asyncio, os, sys, shmsock
async def handle(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def main():
    server = await shmsock.start_server(handle, host=sys.argv[1] or None, port=7000)
    print("listening as", server.sockets[0].getsockname()[0], os.getpid(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""
CLIENT = """
import asyncio, sys, shmsock
async def main():
    reader, writer = await shmsock.open_connection(sys.argv[1], 7000)
    writer.write(b"hello")
    print(await reader.readexactly(5))
    print(writer.get_extra_info("shmsock_node").statistics()["woken_by"], flush=True)
    try:
        print("then", await reader.read())
    except ConnectionResetError:
        print("reset")
asyncio.run(main())
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(shm_region: Path) -> Iterator[Start]:
    """Starts a program in a container of that host name."""
    started = []

    def begin(container: list[str], name: str, script: str, *words: str) -> subprocess.Popen[str]:
        argv = [*container, name, sys.executable, "-c", script, *words]
        env = {key: value for key, value in os.environ.items() if key != "SHMSOCK_NAME"}
        env["SHMSOCK_REGION"] = str(shm_region)
        pipe = subprocess.PIPE
        process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=env)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()  # unshare, and so all that is in there
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", [CONTAINER, ROOTLESS], ids=["root", "rootless"])
def test_two_containers_of_one_host(kind: list[str], start: Start) -> None:
    server = start(kind, "one", SERVER, "")
    assert line(server) == "listening as one 1"  # each has a process 1
    client = start(kind, "two", CLIENT, "one")
    assert line(client) == "b'hello'"
    assert "'one': 'futex'" in line(client)
    server.kill()  # a container that is killed is a dead peer, though its process ids mean nothing here
    assert line(client) in ("reset", "then b''")


def test_a_container_and_its_host(start: Start, shm_region: Path) -> None:
    server = start(CONTAINER, "one", SERVER, "")
    line(server)
    env = {**os.environ, "SHMSOCK_NAME": "host"}
    info = subprocess.check_output([sys.executable, "-m", "shmsock", "info", "--json", shm_region], env=env)
    (section,) = [s for s in json.loads(info)["regions"][0]["content"]["sections"] if s["state"] != "free"]
    assert (section["name"], section["state"], section["pid"], section["here"]) == ("one", "live", 1, True)


def test_localhost_is_the_kernel_and_so_are_its_containers(start: Start) -> None:
    server = start(CONTAINER, "one", SERVER, "localhost")
    assert line(server).startswith("listening as ")
    client = start(CONTAINER, "two", CLIENT, "localhost")
    assert line(client) == "b'hello'"
