"""Child processes for both backends: tests.aio.processes.Child, spoken with through anyio; and what they run,
`python -m tests.anyio_face.processes BACKEND ROLE [ARGUMENTS]`."""

from __future__ import annotations

import os
import sys
from typing import Any

import anyio

import shmsock.anyio as shm
from tests.aio.processes import PATIENCE
from tests.anyio_face.conftest import receive_pattern, run_on, send_pattern
from tests.forked import Forked


class Child:
    """A process that runs a role, or with `module` one of tests.aio.roles. It ends with its block."""

    def __init__(self, *args: object, module: str = "tests.anyio_face.processes") -> None:
        self.process = Forked([module, *map(str, args)])

    async def says(self, expected: str) -> None:
        fd, line = self.process.stdout.fileno(), b""
        with anyio.fail_after(PATIENCE):
            while not line.endswith(b"\n"):
                await anyio.wait_readable(fd)
                data = os.read(fd, 1)
                assert data, f"the child ended after {line!r}"
                line += data
        assert line == expected.encode() + b"\n"

    async def ended(self) -> int:
        fd = os.pidfd_open(self.process.pid)
        try:
            with anyio.fail_after(PATIENCE):
                await anyio.wait_readable(fd)
        finally:
            os.close(fd)
        return self.process.wait()

    async def __aenter__(self) -> Child:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()


def say(*words: object) -> None:
    print(*words, flush=True)


async def echo(stream: Any) -> None:
    async with stream:
        try:
            async for data in stream:
                await stream.send(data)
        except anyio.BrokenResourceError:
            pass


async def serve(region: str) -> None:
    """Echoes until it is killed."""
    async with await shm.create_shm_listener(local_port=7000, region=region, name="server") as listener:
        say("ready")
        await listener.serve(echo)


async def converse(region: str, seed: str, size: str) -> None:
    """Sends a pattern to an echo server, and expects it back."""
    async with await shm.connect_shm("server", 7000, region=region, name="client") as stream:

        async def send() -> None:
            await send_pattern(stream, int(seed), int(size))
            await stream.send_eof()

        async with anyio.create_task_group() as tg:
            tg.start_soon(send)
            assert await receive_pattern(stream, int(seed)) == int(size)
    say("done")


async def leave_open(region: str, how: str) -> None:
    """Sends, and ends its run with all of it open."""
    stream = await shm.connect_shm("test", 7000, region=region, name="leaver")
    await send_pattern(stream, 1, 100_000)
    if how == "exception":
        raise SystemExit(3)
    _kept.append(stream)


_kept: list[Any] = []


if __name__ == "__main__":
    backend, role, *args = sys.argv[1:]
    run_on(backend, globals()[role], *args)
