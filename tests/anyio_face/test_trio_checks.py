"""trio.testing's own checks of streams, through an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import trio
from trio.testing import check_half_closeable_stream, check_two_way_stream

import shmsock.anyio as shm
from tests.anyio_face.conftest import SMALL, World


@contextmanager
def as_trio() -> Iterator[None]:
    """anyio's exceptions, as trio calls them."""
    try:
        yield
    except anyio.BusyResourceError as error:
        raise trio.BusyResourceError(str(error)) from error
    except anyio.ClosedResourceError as error:
        raise trio.ClosedResourceError(str(error)) from error
    except anyio.BrokenResourceError as error:
        # sending after send_eof() is that for anyio's SocketStream
        after_eof = isinstance(error, RuntimeError)
        raise (trio.ClosedResourceError if after_eof else trio.BrokenResourceError)(str(error)) from error


class Adapter(trio.abc.HalfCloseableStream):
    """Each call is a turn of the loop, as trio has it: those of ShmStream need not be."""

    def __init__(self, stream: shm.ShmStream) -> None:
        self.stream = stream

    async def send_all(self, data: Any) -> None:
        with as_trio():
            await self.stream.send(data)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        with as_trio():
            if self.stream._sending:
                raise anyio.BusyResourceError("writing to")
            self.stream._sending = True
            try:
                await self.stream._room()
            finally:
                self.stream._sending = False
            if self.stream._end.closed:
                raise anyio.ClosedResourceError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        with as_trio():
            try:
                return await self.stream.receive(65536 if max_bytes is None else max_bytes)
            except anyio.EndOfStream:
                return b""

    async def send_eof(self) -> None:
        with as_trio():
            await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


@pytest.mark.parametrize("check", [check_two_way_stream, check_half_closeable_stream])
def test_check(world: World, check: Any) -> None:
    async def main() -> None:
        async with world.nodes(settings=SMALL) as (a, b):

            async def maker() -> tuple[Adapter, Adapter]:
                async with await shm.create_shm_listener(local_port=7000, node=b) as listener:
                    client = await shm.connect_shm(b.name, 7000, node=a)
                    return Adapter(client), Adapter(await listener.accept())

            async def clogged() -> tuple[Adapter, Adapter]:
                client, server = await maker()
                for stream in (client, server):
                    with trio.move_on_after(0.02) as scope:
                        await stream.send_all(bytes(100_000))
                    assert scope.cancelled_caught
                return client, server

            await check(maker, clogged)

    trio.run(main)
