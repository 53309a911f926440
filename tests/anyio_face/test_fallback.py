"""connect_shm() falls back to TCP, on every backend."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import trustme
from anyio.streams.tls import TLSListener

import shmsock.anyio as shm
from tests.aio.networks import Change, network_of_its_own
from tests.anyio_face.conftest import Run

ADDRESS = "10.77.0.5"


@pytest.fixture
def network(region: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Change]:
    monkeypatch.setenv("SHMSOCK_REGION", region)
    with network_of_its_own() as change:
        change("add", f"{ADDRESS}/32")
        yield change


async def answer(stream: anyio.abc.ByteStream) -> None:
    async with stream:
        await stream.send(await stream.receive())


async def echo(stream: anyio.abc.ByteStream) -> object:
    """An echo; returns the section of the peer, None over TCP."""
    async with stream:
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        return stream.extra(shm.ShmAttribute.peer, None)


def test_when_the_peer_is_not_there(
    run: Run, region: str, network: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"10.77.0.6 c\n{ADDRESS} c\n")
    monkeypatch.setenv("SHMSOCK_HOSTS", str(hosts))

    async def main() -> None:
        async with (
            shm.attach(region, name="b") as b,
            await shm.create_shm_listener(local_port=7000, node=b) as memory,
            await anyio.create_tcp_listener(local_host=ADDRESS, local_port=7000) as tcp,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(memory.serve, answer)
            tasks.start_soon(tcp.serve, answer)
            assert await echo(await shm.connect_shm("b", 7000, fallback=ADDRESS)) == b.section
            assert await echo(await shm.connect_shm("nobody", 7000, fallback=(ADDRESS, 7000))) is None
            assert await echo(await shm.connect_shm("c", 7000)) is None
            with pytest.raises(ConnectionRefusedError, match="nobody there listens"):
                await shm.connect_shm("b", 7001, fallback=ADDRESS)
            tasks.cancel_scope.cancel()

    run(main)


def test_without_a_region(
    run: Run,
    network: Change,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", str(tmp_path / "region"))
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("b").configure_cert(server)
    authority.configure_trust(client)

    async def main() -> None:
        async with (
            TLSListener(await anyio.create_tcp_listener(local_host=ADDRESS, local_port=7000), server) as tcp,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(tcp.serve, answer)
            for _ in range(2):
                stream = await shm.connect_shm("b", 7000, ssl_context=client, fallback=ADDRESS)
                assert await echo(stream) is None
            tasks.cancel_scope.cancel()
        assert not (tmp_path / "region").exists()

    run(main)
    assert caplog.text.count("TCP is used") == 1
