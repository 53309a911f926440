"""A region whose file is made anew under a live process, on each backend: what it opens next, it opens in the
new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import shmsock.anyio as shm
from shmsock.aio.attach import current_node
from shmsock.testing import make_region
from tests.aio.conftest import keepers
from tests.anyio_face.conftest import Run, until
from tests.anyio_face.processes import Child


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="shmsock-test-", dir="/dev/shm"))
    made = directory / "region"
    make_anew(made)
    monkeypatch.setenv("SHMSOCK_REGION", str(made))
    monkeypatch.setenv("SHMSOCK_NAME", "here")
    yield made
    shutil.rmtree(directory)


def make_anew(path: Path) -> None:
    os.rename(make_region(path.parent, size=8 << 20), path)


@asynccontextmanager
async def serving(backend: str, path: Path) -> AsyncIterator[None]:
    async with Child(backend, "serve", path) as child:
        await child.says("ready")
        yield


async def ask(host: str = "server", port: int = 7000) -> None:
    async with await shm.connect_shm(host, port) as stream:
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"


def old_mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{path} (deleted)")


def test_a_client_finds_the_server_of_the_new_file(run: Run, backend: str, path: Path) -> None:
    async def main() -> None:
        for _ in range(2):
            async with serving(backend, path):
                await ask()
            make_anew(path)
        async with serving(backend, path):
            await ask()
            assert (await current_node()).region.identity[1] == path.stat().st_ino
            await until(lambda: keepers() == 1 and not old_mappings(path), "the old node ends")

    run(main)


def test_streams_live_on_and_listeners_come_to_the_new_file(run: Run, backend: str, path: Path) -> None:
    async def main() -> None:
        async with serving(backend, path):
            async with await shm.connect_shm("server", 7000) as stream:
                make_anew(path)
                async with (
                    await shm.create_shm_listener(local_port=7001) as listener,
                    await shm.create_shm_datagram_socket(local_port=9000) as socket,
                    shm.attach(str(path), name="newcomer") as newcomer,
                    await shm.connect_shm("here", 7001, node=newcomer),
                    await listener.accept(),
                ):
                    await stream.send(b"hello")
                    assert await stream.receive() == b"hello"
                    assert socket.extra(shm.ShmAttribute.node) is await current_node()
                    assert keepers() == 3
            await until(lambda: keepers() == 1 and not old_mappings(path), "the old node ends")

    run(main)
