"""TLS on top, both ways and on both backends."""

from __future__ import annotations

import ssl

import anyio
import pytest
import trustme
from anyio.streams.tls import TLSAttribute, TLSListener, TLSStream

import shmsock.anyio as shm
from tests.anyio_face.conftest import Run, World, receive_pattern, send_pattern

SIZE = 3 << 20


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("a", "b").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def send(stream: TLSStream, seed: int) -> None:
    await send_pattern(stream, seed, SIZE)


async def receive(stream: TLSStream, seed: int) -> None:
    assert await receive_pattern(stream, seed, SIZE) == SIZE


def test_both_ways_at_once(
    run: Run, world: World, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def main() -> None:
        async with world.nodes() as (a, b), anyio.create_task_group() as tg:
            below = await shm.create_shm_listener(local_port=7000, node=b)
            listener = TLSListener(below, server_context)

            async def serve(stream: TLSStream) -> None:
                async with stream, anyio.create_task_group() as both:
                    both.start_soon(send, stream, 1)
                    both.start_soon(receive, stream, 2)

            tg.start_soon(listener.serve, serve)
            client = await shm.connect_shm(b.name, 7000, ssl_context=client_context, node=a)
            assert isinstance(client, TLSStream)
            assert client.extra(TLSAttribute.tls_version) == "TLSv1.3"
            assert client.extra(shm.ShmAttribute.node) is a
            async with anyio.create_task_group() as both:
                both.start_soon(send, client, 2)
                both.start_soon(receive, client, 1)
            with pytest.raises(anyio.EndOfStream):
                await client.receive()
            await client.aclose()
            tg.cancel_scope.cancel()
            await listener.aclose()

    run(main)


def test_wrap(run: Run, world: World, server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            wrapped: list[TLSStream] = []

            async def wrap(stream: shm.ShmStream, context: ssl.SSLContext, server: bool) -> None:
                wrapped.append(
                    await TLSStream.wrap(
                        stream, server_side=server, hostname=None if server else "a", ssl_context=context
                    )
                )

            async with anyio.create_task_group() as tg:
                tg.start_soon(wrap, c, client_context, False)
                tg.start_soon(wrap, s, server_context, True)
            one, other = wrapped
            await one.send(b"secret")
            assert await other.receive() == b"secret"
            async with anyio.create_task_group() as tg:
                tg.start_soon(one.aclose)
                with pytest.raises(anyio.EndOfStream):
                    await other.receive()
                await other.aclose()

    run(main)


@pytest.mark.parametrize("tls", [{"tls": True}, {"tls_hostname": "elsewhere"}])
def test_a_certificate_that_is_not_trusted(
    run: Run,
    world: World,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    tls: dict[str, object],
) -> None:
    """Nothing is left of the connection."""

    async def main() -> None:
        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
        ):

            async def serve() -> None:
                async with await listener.accept() as stream:
                    with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
                        await TLSStream.wrap(stream, server_side=True, ssl_context=server_context)

            context = {"ssl_context": client_context} if "tls_hostname" in tls else {}
            async with anyio.create_task_group() as tg:
                tg.start_soon(serve)
                with pytest.raises(ssl.SSLCertVerificationError):
                    await shm.connect_shm(b.name, 7000, node=a, **tls, **context)  # type: ignore[call-overload]

    run(main)


def test_a_handshake_that_is_cancelled(run: Run, world: World) -> None:
    async def main() -> None:
        async with (
            world.nodes() as (a, b),
            await shm.create_shm_listener(local_port=7000, node=b) as listener,
        ):
            with anyio.move_on_after(0.05) as scope:
                await shm.connect_shm(b.name, 7000, tls=True, node=a)
            assert scope.cancelled_caught
            async with await listener.accept() as stream:
                assert await stream.receive()
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()

    run(main)
