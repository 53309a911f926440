"""grpclib, with messages that are bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import CodecBase
from grpclib.server import Server

METHOD = "/test.Echo/Echo"


class Plain(CodecBase):
    __content_subtype__ = "bytes"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        return data


class Echo:
    async def echo(self, stream: Any) -> None:
        await stream.send_message(await stream.recv_message())

    def __mapping__(self) -> dict[str, Handler]:
        return {METHOD: Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes)}


@asynccontextmanager
async def server(port: int) -> AsyncIterator[None]:
    serving = Server([Echo()], codec=Plain())
    await serving.start("127.0.0.1", port)
    yield
    serving.close()
    await serving.wait_closed()


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    async with Channel(host, port, codec=Plain()) as channel:
        yield UnaryUnaryMethod(channel, METHOD, bytes, bytes)
