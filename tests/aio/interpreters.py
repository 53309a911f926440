"""A server in one subinterpreter and its client in another, each in a thread of its own, again and again.
Before CPython 3.12 both are in one, and no thread: asyncio takes the loops of two interpreters for one there.

    python -m tests.aio.interpreters REGION ROUNDS
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

SIZE = 1 << 18
PORT, DATAGRAMS = 7000, 7001
ROLE = """
import os, sys
sys.path[:0] = {path!r}
os.environ["SHMSOCK_REGION"] = {region!r}
from tests.aio import interpreters
interpreters.play({role!r}, {told})
"""


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class Collect(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.got: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.put_nowait(data)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve(ready: Callable[[], object]) -> None:
    """Serve until a client of streams has come, said something, and gone. Calls ready() when it may come."""
    import shmsock

    gone = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await echo(reader, writer)
        gone.set()

    await shmsock.create_datagram_endpoint(Echo, (None, DATAGRAMS))
    async with await shmsock.start_server(handle, None, PORT):
        ready()
        await gone.wait()


async def ask() -> None:
    import shmsock

    transport, collect = await shmsock.create_datagram_endpoint(Collect, remote_addr=("localhost", DATAGRAMS))
    for n in range(10):
        transport.sendto(bytes([n]))
        assert await collect.got.get() == bytes([n])
    reader, writer = await shmsock.open_connection("localhost", PORT)
    for line in (b"a line\n", b"\n", b"x" * 5000 + b"\n"):
        writer.write(line)
        assert await reader.readline() == line
    data = bytes(range(256)) * (SIZE // 256)
    writing = asyncio.create_task(write(writer, data))
    assert await reader.readexactly(SIZE) == data
    assert await reader.read() == b""
    await writing
    writer.close()
    await writer.wait_closed()


async def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    for at in range(0, len(data), 10_000):
        writer.write(data[at : at + 10_000])
        await writer.drain()
    writer.write_eof()


async def both() -> None:
    ready = asyncio.Event()
    serving = asyncio.create_task(serve(ready.set))
    await ready.wait()
    await ask()
    await serving


def play(role: str, told: int) -> None:
    """Called in a subinterpreter."""
    does = {"serve": lambda: serve(lambda: os.write(told, b"!")), "ask": ask, "both": both}[role]
    asyncio.run(asyncio.wait_for(does(), 60))


def _module() -> Any:
    try:
        import _interpreters as module  # type: ignore[import-not-found]
    except ImportError:
        import _xxsubinterpreters as module  # type: ignore[import-not-found]
    return module


def _create() -> Any:
    """Make an interpreter that shares the GIL: cffi's module loads in no other."""
    try:
        return _module().create("legacy")
    except TypeError:
        return _module().create(isolated=False)


def _run(interpreter: Any, code: str, told: int, failed: list[object]) -> None:
    try:
        what = _module().run_string(interpreter, code)
    except Exception as error:
        what = error
    if what:
        failed.append(what)
        os.write(told, b"?")  # nobody need wait for it to be ready
    _module().destroy(interpreter)  # CPython 3.12 has its threads end in the one that imported threading


def held(region: str) -> tuple[int, int, int]:
    """How many descriptors, threads, and mappings of the region this process has."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = sum(region in line for line in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mapped


def once(region: str) -> None:
    """Have a server and its client in interpreters, and end those."""
    failed: list[object] = []
    ready, told = os.pipe()
    running = []
    for role in ("both",) if sys.version_info < (3, 12) else ("serve", "ask"):
        interpreter = _create()
        code = ROLE.format(path=sys.path, region=region, role=role, told=told)
        thread = threading.Thread(target=_run, args=(interpreter, code, told, failed), daemon=True)
        running.append(thread)
        if role == "both":
            thread.run()
            continue
        thread.start()
        if role == "serve":
            os.read(ready, 1)
        assert not failed, failed
    for thread in running:
        if thread.ident is not None:
            thread.join()  # returns before the kernel's thread has gone, and that is counted
            while os.path.exists(f"/proc/self/task/{thread.native_id}"):
                os.sched_yield()
    os.close(ready)
    os.close(told)
    assert not failed, failed


def main() -> None:
    region, rounds = sys.argv[1], int(sys.argv[2])
    import shmsock  # the main interpreter uses it as well

    once(region)
    before = held(region)
    for _ in range(rounds - 1):
        once(region)
        assert held(region) == before, (held(region), before)

    async def alone() -> None:
        async with await shmsock.start_server(echo, None, PORT):
            reader, writer = await shmsock.open_connection("localhost", PORT)
            writer.write(b"still here")
            assert await reader.readexactly(10) == b"still here"
            writer.close()

    os.environ["SHMSOCK_REGION"] = region
    asyncio.run(alone())


if __name__ == "__main__":
    main()
