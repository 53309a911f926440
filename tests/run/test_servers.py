"""Servers as they are: their port is offered on shared memory as well, by each process of theirs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

import shmsock
from shmsock.run import server as joint
from shmsock.testing import make_region
from tests.run.programs import PATIENCE, free_port, program

T = TypeVar("T")
NAME = ["--name", "server"]
APP = """
import os
VERSION = 1
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = f"{VERSION} {os.getpid()}".encode()
    size = b"%d" % len(body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]})
    await send({"type": "http.response.body", "body": body})
"""
INHERIT = """
import os, socket, sys
sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.set_inheritable(sock.fileno(), True)
os.execvp("uvicorn", ["uvicorn", "app:app", "--fd", str(sock.fileno())])
"""
SERVERS = {
    "uvicorn": "uvicorn app:app --host 127.0.0.1 --port {port}",
    "uvicorn_workers": "uvicorn app:app --host 127.0.0.1 --port {port} --workers 2",
    "uvicorn_asyncio": "uvicorn app:app --host 127.0.0.1 --port {port} --loop asyncio --http h11",
    "uvicorn_fd": "python inherit.py {port}",
    "gunicorn": "gunicorn app:app -k uvicorn_worker.UvicornWorker -w 2 -b 127.0.0.1:{port}",
    "hypercorn": "hypercorn app:app -b 127.0.0.1:{port}",
    "hypercorn_workers": "hypercorn app:app -b 127.0.0.1:{port} --workers 2 --worker-class uvloop",
    "module": "-m uvicorn app:app --host 127.0.0.1 --port {port}",
}
PROCESSES = {"uvicorn_workers": 2, "gunicorn": 2, "hypercorn_workers": 2}


class Greeting(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.write(b"hello")
        transport.close()


def run(main: Coroutine[None, None, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    if not answer:
        raise ConnectionResetError("the server is being stopped")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200" in head.splitlines()[0], answer
    return body.decode()


async def over_memory(port: int) -> str:
    """Ask over shared memory, as soon as somebody has the port there."""
    while True:
        try:
            return await ask(*await shmsock.open_connection("server", port))
        except OSError:
            await asyncio.sleep(0.02)


async def over_tcp(port: int) -> str:
    while True:
        try:
            return await ask(*await asyncio.open_connection("127.0.0.1", port))
        except OSError:
            await asyncio.sleep(0.02)


async def answers_of(count: int, ask: Callable[[int], Coroutine[None, None, str]], port: int) -> set[str]:
    """Ask until so many processes have answered."""
    seen: set[str] = set()
    while len(seen) < count:
        seen.add(await ask(port))
    return seen


async def until(right: Callable[[str], bool], port: int) -> None:
    """Ask until the answer is right."""
    while not right(await over_memory(port)):
        pass


async def offered(name: str = "server") -> bool:
    """Is there a peer of that name?"""
    async with shmsock.attach(name="looker") as node:
        return name in node.statistics()["names"]


@pytest.fixture
def app(tmp_path: Path, shm_region: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "inherit.py").write_text(INHERIT)
    return tmp_path


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_is_offered_in_both_places(server: str, app: Path) -> None:
    port = free_port()
    with program(
        [*NAME, "--listen", str(port)], *SERVERS[server].format(port=port).split(), cwd=app
    ) as running:
        there = run(answers_of(PROCESSES.get(server, 1), over_memory, port))
        assert run(over_tcp(port)) in there
        assert running.stop() in (0, -signal.SIGTERM)  # uvicorn raises it once more
        assert not any("shmsock run:" in line or "Traceback" in line for line in running.lines), running.lines
    assert not run(offered())


def test_a_server_that_reloads_leaves_nothing(app: Path) -> None:
    port = free_port()
    line = f"uvicorn app:app --host 127.0.0.1 --port {port} --reload --reload-delay 0.05"
    with program([*NAME, "--listen", str(port)], *line.split(), cwd=app) as running:
        assert run(over_memory(port)).startswith("1 ")
        for version in (2, 3):
            # Of another length: in the second in which it was compiled, Python takes it for unchanged.
            text = APP.replace("VERSION = 1", f"VERSION = {version}") + "#" * version
            (app / "app.py").write_text(text)

            start = f"{version} "
            run(until(lambda text, start=start: text.startswith(start), port))  # type: ignore[misc]
        running.stop()
    assert not run(offered())


def test_a_worker_that_is_killed_is_replaced_in_both_places(app: Path) -> None:
    port = free_port()
    line = SERVERS["uvicorn_workers"].format(port=port)
    with program([*NAME, "--listen", str(port)], *line.split(), cwd=app) as running:
        before = run(answers_of(2, over_memory, port))
        os.kill(int(min(before).split()[1]), signal.SIGKILL)
        run(until(lambda text: text not in before, port))
        running.stop()


SMALL = """
import asyncio, sys
async def serve(reader, writer):
    writer.write(await reader.read())
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    print("serving", flush=True)
    writer.close()
    async with server:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print("closed", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
asyncio.run(main())
"""


async def echo(port: int) -> bytes:
    reader, writer = await shmsock.open_connection("server", port)
    writer.write(b"x")
    writer.write_eof()
    said = await reader.read()
    writer.close()
    return said


def test_a_server_that_is_closed_is_not_offered_any_more(shm_region: Path) -> None:
    port = free_port()
    with program([*NAME, "--listen", f"1,{port}"], "-c", SMALL, str(port)) as running:
        running.wait_for("serving")
        assert run(echo(port)) == b"x"
        running.tell()
        running.wait_for("closed")
        with pytest.raises(ConnectionRefusedError):
            run(echo(port))
        running.tell()
        assert running.ends() == 0


def test_other_ports_are_not_offered(shm_region: Path) -> None:
    port = free_port()
    with program([*NAME, "--listen", str(port + 1)], "-c", SMALL, str(port)) as running:
        running.wait_for("serving")
        assert not run(offered())


def test_workers_of_a_full_region_serve_tcp_and_come_in_later(app: Path) -> None:
    path, port = make_region(peers=3), free_port()
    line = SERVERS["uvicorn_workers"].format(port=port)

    async def main() -> None:
        others = [await shmsock.attach(path, name=name) for name in ("a", "b", "c")]
        with program([*NAME, "--listen", str(port), "--region", path], *line.split(), cwd=app) as running:
            try:
                await answers_of(2, over_tcp, port)
                await asyncio.to_thread(running.wait_for, "offered over TCP alone")
                for node in others[1:]:
                    await node.aclose()
                while True:
                    try:
                        _, writer = await shmsock.open_connection("server", port, node=others[0])
                    except OSError:
                        await asyncio.sleep(0.1)
                    else:
                        writer.close()
                        break
            finally:
                await others[0].aclose()
            await asyncio.to_thread(running.stop)
            assert sum("shmsock run:" in line for line in running.lines) == 1, running.lines

    try:
        run(main())
    finally:
        os.unlink(path)


@pytest.mark.parametrize("why", ["absent", "other_version", "no_region"])
def test_a_region_that_cannot_be_used_means_tcp_and_one_warning(why: str, tmp_path: Path) -> None:
    path, port = tmp_path / "region", free_port()
    if why == "other_version":
        made = Path(make_region(tmp_path))
        content = bytearray(made.read_bytes()[:4096])
        content[8:12] = (99).to_bytes(4, "little")
        with open(made, "r+b") as file:
            file.write(content)
        made.rename(path)
    if why == "no_region":
        path.write_bytes(os.urandom(1 << 20))
    options = [*NAME, "--listen", str(port), "--map", "127.0.0.1=server", "--region", str(path)]
    with program(options, "-c", SMALL, str(port)) as running:
        running.wait_for("serving")
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"tcp")
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(10) == b"tcp"
        running.tell()
        running.tell()
        assert running.ends() == 0
        assert sum("shmsock run:" in line for line in running.lines) == 1, running.lines


def test_serving_begins_in_both_places_when_memory_comes_late(
    shm_region: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "PATIENCE_S", 0)

    async def main() -> bytes:
        comes, loop = asyncio.Event(), asyncio.get_running_loop()

        async def offer(before: object, serving: bool) -> shmsock.Server:
            await comes.wait()
            return await shmsock.create_server(Greeting, None, 7000, start_serving=serving)

        own = await loop.create_server(Greeting, "127.0.0.1", 0, start_serving=False)
        server = joint.JointServer(loop, own, 7000, False, offer)
        await server.begin()
        async with server:
            await server.start_serving()
            comes.set()
            while True:
                try:
                    reader, writer = await shmsock.open_connection("localhost", 7000)
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)
            try:
                return await reader.read()
            finally:
                writer.close()

    assert run(main()) == b"hello"


@pytest.mark.parametrize("before", ["absent", "another"])
def test_a_region_that_is_made_later_is_served_too(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, port = tmp_path / "region", free_port()
    monkeypatch.setenv("SHMSOCK_REGION", str(path))
    often = "import shmsock.run.server as joint; joint.RETRY_S = 0.05\n"
    if before == "another":
        Path(make_region(tmp_path)).rename(path)
    with program([*NAME, "--listen", str(port)], "-c", often + SMALL, str(port)) as running:
        running.wait_for("serving")
        if before == "another":
            assert run(echo(port)) == b"x"
        Path(make_region(tmp_path)).rename(path)

        async def main() -> bytes:
            while True:
                try:
                    return await echo(port)
                except OSError:
                    await asyncio.sleep(0.02)

        assert run(main()) == b"x"
        running.tell()
        running.tell()
        assert running.ends() == 0
