"""Child processes that run a role (tests/aio/roles.py) and talk with their test in lines."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

from tests.forked import Forked

PATIENCE = 60.0
"""Seconds that anything may take on a busy machine."""

Main = Callable[[Coroutine[Any, Any, Any]], Any]


def runner(loop: str) -> Main:
    """asyncio.run or uvloop.run."""
    if loop == "uvloop":
        import uvloop

        return uvloop.run
    return asyncio.run


async def readable(fd: int) -> None:
    """Until `fd` is readable."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def set_result() -> None:
        if not waiter.done():
            waiter.set_result(None)

    loop.add_reader(fd, set_result)
    try:
        await waiter
    finally:
        loop.remove_reader(fd)


class Lines:
    """Lines out of a pipe, in a coroutine of any loop."""

    def __init__(self, fd: int) -> None:
        self._fd, self._buffer = fd, b""

    async def next(self) -> str:
        """One line; "" at the end."""
        while b"\n" not in self._buffer:
            await readable(self._fd)
            more = os.read(self._fd, 65536)
            if not more:
                return ""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


class Child:
    """A process that runs a role: `async with Child("echo", region) as child`. It ends with its block."""

    def __init__(
        self, role: str, *args: Any, loop: str = "asyncio", env: dict[str, str] | None = None
    ) -> None:
        self.process = Forked(["tests.aio.roles", loop, role, json.dumps(args)], env)
        self._lines = Lines(self.process.stdout.fileno())

    @property
    def pid(self) -> int:
        return self.process.pid

    async def line(self) -> str:
        return await asyncio.wait_for(self._lines.next(), PATIENCE)

    async def says(self, expected: str) -> None:
        line = await self.line()
        assert line == expected, (
            f"child said {line!r}, expected {expected!r}; exit code {self.process.poll()}"
        )

    def tell(self, line: str = "go") -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it all away."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def ended(self) -> int:
        """Its exit code."""
        fd = os.pidfd_open(self.pid)
        try:
            await asyncio.wait_for(readable(fd), PATIENCE)
        finally:
            os.close(fd)
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.stdout.close()

    async def __aenter__(self) -> Child:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


def reset(transport: Any) -> None:
    """Abort with a reset, as TCP programs ask for one."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


_PERIOD = 65521  # a prime: no buffer size is a multiple of it
_WHEEL = random.Random(1).randbytes(_PERIOD)


def pattern(seed: int, at: int, size: int) -> bytes:
    """`size` bytes of an endless sequence, from position `at`: a byte lost, doubled or moved shows."""
    first = (seed * 7919 + at) % _PERIOD
    return (_WHEEL * ((first + size) // _PERIOD + 1))[first : first + size]
