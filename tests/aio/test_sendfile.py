"""loop.sendfile() on loops that know .shm hosts: regular files go straight into the ring."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

import shmsock
from tests.aio.conftest import until
from tests.aio.processes import pattern

SIZE = 5_000_000
"""More than any ring has."""


class Far(asyncio.Protocol):
    """Notes what comes."""

    when_told: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.data, self.made, self.lost = bytearray(), loop.create_future(), loop.create_future()
        self.came = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.made.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.came.set()
        self.when_told()

    def eof_received(self) -> None:
        self.when_told()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set_result(exc)
        self.came.set()

    async def got(self, size: int) -> bytes:
        while len(self.data) < size:
            assert not self.lost.done()
            self.came.clear()
            await self.came.wait()
        return bytes(self.data[:size])


@pytest.fixture(params=[asyncio.SelectorEventLoop, uvloop.Loop])
def loop(
    request: pytest.FixtureRequest, shm_region: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[asyncio.AbstractEventLoop]:
    """On which nothing is run in a thread: the kernel puts the file into the ring."""
    monkeypatch.setenv("SHMSOCK_NAME", "me")
    made = shmsock.loop_factory(request.param)()

    def run_in_executor(*args: Any) -> Any:
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr(type(made), "run_in_executor", run_in_executor)
    yield made
    made.run_until_complete(made.shutdown_asyncgens())
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(pattern(1, 0, SIZE))
    return tmp_path / "file"


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Far, Far]]:
    loop, far = asyncio.get_running_loop(), Far()
    async with await loop.create_server(lambda: far, "me.shm", 7000):
        _, near = await loop.create_connection(Far, "me.shm", 7000)
        await far.made
        yield near, far
        near.transport.abort()
        far.transport.abort()


def test_all_of_it_behind_what_was_written(loop: Any, path: Path) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            near.transport.write(pattern(2, 0, SIZE))
            with path.open("rb") as file:
                assert await loop.sendfile(near.transport, file) == SIZE
                near.transport.write(b"between")
                assert await loop.sendfile(near.transport, file, SIZE - 10, fallback=False) == 10
            near.transport.write_eof()
            expected = pattern(2, 0, SIZE) + pattern(1, 0, SIZE) + b"between" + pattern(1, 0, SIZE)[-10:]
            assert await far.got(len(expected)) == expected

    loop.run_until_complete(main())


def test_what_is_written_meanwhile_follows(loop: Any, path: Path) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            far.transport.pause_reading()
            with path.open("rb") as file:
                sending = asyncio.ensure_future(loop.sendfile(near.transport, file, 0, SIZE))
                await until(lambda: not near.transport.is_reading())
                near.transport.write(b"after")
                assert near.transport.get_write_buffer_size() == 5
                near.transport.close()
                far.transport.resume_reading()
                assert await sending == SIZE
            assert await far.got(SIZE + 5) == pattern(1, 0, SIZE) + b"after"
            assert await far.lost is None

    loop.run_until_complete(main())


def test_the_protocol_is_told_nothing_meanwhile(loop: Any, path: Path) -> None:
    told: list[bool] = []

    async def main() -> None:
        async with pair() as (near, far):
            with path.open("rb") as file:
                far.transport.pause_reading()
                sending = asyncio.ensure_future(loop.sendfile(near.transport, file))
                await until(lambda: not near.transport.is_reading())
                near.when_told = lambda: told.append(sending.done())
                far.transport.write(b"hello")
                far.transport.write_eof()
                far.transport.resume_reading()
                assert await sending == SIZE
            assert await near.lost is None  # as it has read the end
            assert near.data == b"hello"
            assert told == [True, True]

    loop.run_until_complete(main())


def test_cancelling_leaves_the_connection_usable(loop: Any, path: Path) -> None:
    """And says, by the file's position, what was sent."""

    async def main() -> None:
        async with pair() as (near, far):
            far.transport.pause_reading()
            with path.open("rb") as file:
                sending = asyncio.ensure_future(loop.sendfile(near.transport, file, 1000))
                await until(lambda: not near.transport.is_reading())
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
                sent = file.tell() - 1000
            assert 0 < sent < SIZE - 1000
            assert near.transport.is_reading()
            near.transport.write(b"after")
            far.transport.resume_reading()
            near.transport.close()
            assert await far.lost is None
            assert far.data == pattern(1, 0, SIZE)[1000 : 1000 + sent] + b"after"

    loop.run_until_complete(main())


def test_a_file_that_cannot_be_read(loop: Any, path: Path) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            fd = os.open(path, os.O_WRONLY)
            with os.fdopen(fd, "wb") as file, pytest.raises(OSError, match="Bad file descriptor"):
                await loop.sendfile(near.transport, file)
            near.transport.write(b"all the same")
            assert await far.got(12) == b"all the same"

    loop.run_until_complete(main())


@pytest.mark.parametrize("size", [0, 1, 4096, 4097])
def test_a_file_that_ends_early(loop: Any, path: Path, size: int) -> None:
    """More was asked for than it has."""
    path.write_bytes(pattern(1, 0, size))

    async def main() -> None:
        async with pair() as (near, far):
            with path.open("rb") as file:
                assert await loop.sendfile(near.transport, file, 0, SIZE) == size
                assert file.tell() == size
            assert await far.got(size) == pattern(1, 0, size)

    loop.run_until_complete(main())


def test_what_is_kept_in_the_file_s_buffer_is_sent_too(loop: Any, path: Path) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            with path.open("r+b") as file:
                file.write(b"changed")
                assert await loop.sendfile(near.transport, file, 0, 10) == 10
            assert await far.got(10) == b"changed" + pattern(1, 0, 10)[7:]

    loop.run_until_complete(main())


def test_a_peer_that_goes_away(loop: Any, path: Path) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            far.transport.pause_reading()
            with path.open("rb") as file:
                sending = asyncio.ensure_future(loop.sendfile(near.transport, file))
                await until(lambda: not near.transport.is_reading())
                far.transport.abort()
                with pytest.raises(ConnectionError):
                    await sending
                assert 0 < file.tell() < SIZE
            with path.open("rb") as file, pytest.raises((ConnectionError, RuntimeError)):
                await loop.sendfile(near.transport, file)
            await near.lost

    loop.run_until_complete(main())


@pytest.mark.parametrize(("offset", "count"), [(-1, None), (0, 0), (0, -1)])
def test_what_makes_no_sense(loop: Any, path: Path, offset: int, count: int | None) -> None:
    async def main() -> None:
        async with pair() as (near, _):
            with path.open("rb") as file, pytest.raises(ValueError, match="negative"):
                await loop.sendfile(near.transport, file, offset, count)
            with path.open() as text, pytest.raises(ValueError, match="binary"):
                await loop.sendfile(near.transport, text)

    loop.run_until_complete(main())
