"""Attaching from several threads at once, and to what lets itself be waited for."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import shmsock
from shmsock.aio import attach
from shmsock.errors import RegionFormatError
from tests.aio.conftest import Run, open_files, shmsock_files
from tests.aio.processes import PATIENCE
from tests.aio.roles import echo
from tests.anyio_face.conftest import run_on
from tests.region.fake_ivshmem import FakeServer

THREADS = 4


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], object]) -> None:
    failed: list[BaseException] = []
    together = threading.Barrier(THREADS)

    def run(number: int) -> None:
        together.wait(PATIENCE)
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failed == []


def test_nodes_of_many_threads_are_gone_through(often: None) -> None:
    """Who attaches looks for nodes of loops that are closed, while others add theirs."""

    class Node:
        pass

    def work(number: int) -> None:
        known: Any = attach._nodes
        made = []
        for _ in range(300):
            made.append(Node())
            known.add(weakref.ref(made[-1], known.discard))
            attach._all_nodes()

    before = len(attach._all_nodes())
    in_threads(work)
    gc.collect()
    assert len(attach._all_nodes()) == before


# -- an ivshmem server that takes its time


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    made = FakeServer(str(tmp_path / "s"), 16 << 20)
    yield made
    made.close()


BACKENDS = ["asyncio", "uvloop", "trio"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_server_that_is_silent_does_not_stop_the_loop(backend: str, fake: FakeServer) -> None:
    """Nobody answers: others run meanwhile, and who is cancelled leaves nothing behind."""

    async def main() -> None:
        before, turns, ended = {*shmsock_files(), *open_sockets()}, 0, False

        async def attaching() -> None:
            nonlocal ended
            try:
                await shmsock.attach(f"ivshmem:{fake.path}")
            finally:
                ended = True

        async with anyio.create_task_group() as group:
            group.start_soon(attaching)
            while turns < 50:
                await anyio.sleep(0.001)
                assert not ended
                turns += 1
            group.cancel_scope.cancel()
        assert ended
        gc.collect()
        assert {*shmsock_files(), *open_sockets()} <= before

    run_on(backend, main)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_server_that_answers_late(backend: str, fake: FakeServer) -> None:
    async def main() -> None:
        answer = threading.Thread(target=fake.accept)

        async def later() -> None:
            await anyio.sleep(0.02)
            answer.start()

        async with anyio.create_task_group() as group:
            group.start_soon(later)
            node = await shmsock.attach(f"ivshmem:{fake.path}", name="late")
        answer.join()
        assert node.statistics()["doorbell"] == 0
        await node.aclose()

    run_on(backend, main)


def open_sockets() -> set[str]:
    return {f"{fd} {what}" for fd, what in open_files().items() if what.startswith("socket:")}


# -- a file that is too small


@pytest.mark.parametrize("size", [4096, 5000, 20_000])
def test_a_file_that_is_too_small_is_told_so(run: Run, tmp_path: Path, size: int) -> None:
    path = tmp_path / "region"
    path.write_bytes(bytes(size))

    async def main() -> None:
        with pytest.raises(RegionFormatError, match=r"are too few .* make it 2 MiB or more"):
            await shmsock.attach(str(path))
        os.truncate(path, 2097152)  # as it was told
        async with shmsock.attach(str(path)):
            pass

    run(main())


# -- whoever comes while the node of the loop is made


def test_a_loop_has_one_node_whenever_it_is_asked_for(run: Run, region: str) -> None:
    """At any moment: also in the turn of the loop in which the node is ready, and nobody was told yet."""

    async def main() -> None:
        asked = [asyncio.ensure_future(attach.current_node(region))]
        while not any(task.done() for task in asked):
            await asyncio.sleep(0)
            asked.append(asyncio.ensure_future(attach.current_node(region)))
        assert len(set(await asyncio.gather(*asked))) == 1

    run(main())


# -- a descriptor that another thread asks for


@pytest.mark.parametrize("kind", ["streams", "protocol", "anyio"])
def test_a_descriptor_asked_for_by_another_thread(run: Run, region: str, kind: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            got: asyncio.Queue[bytes] = asyncio.Queue()
            read: Any
            write: Any
            close: Any
            server = await shmsock.start_server(serve, None, 7000, node=a)
            if kind == "streams":
                reader, writer = await shmsock.open_connection("a", 7000, node=a)
                sock, read = writer.get_extra_info("socket"), lambda: reader.readexactly(3)
                write, close = writer.write, writer.close
            elif kind == "protocol":

                class Protocol(asyncio.Protocol):
                    def data_received(self, data: bytes) -> None:
                        got.put_nowait(data)

                transport, _ = await shmsock.create_connection(Protocol, "a", 7000, node=a)
                sock, read = transport.get_extra_info("socket"), got.get
                write, close = transport.write, transport.close
            else:
                stream = await shmsock.anyio.connect_shm("a", 7000, node=a)
                sock, read = stream.extra(anyio.abc.SocketAttribute.raw_socket), stream.receive
                write, close = stream.send, stream.aclose
            for mine in (False, True):  # before and after the loop's own thread has it
                if mine:
                    assert sock.fileno() >= 0
                with pytest.raises(shmsock.WrongThreadError, match="another thread"):
                    await asyncio.to_thread(sock.fileno)
                if (sending := write(b"abc")) is not None:
                    await sending
                assert await read() == b"abc"
            if (closing := close()) is not None:
                await closing
            server.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    run(main())


def test_loops_of_a_process_share_the_mapping(region: str) -> None:
    together, seen = threading.Barrier(THREADS), list[int]()

    async def main(number: int) -> None:
        async with shmsock.attach(region, name=f"n{number}") as node:
            await asyncio.to_thread(together.wait, PATIENCE)
            seen.append(Path("/proc/self/maps").read_text().count(region))
            await asyncio.to_thread(together.wait, PATIENCE)
            reader, writer = await shmsock.open_connection(node.name, await _listen(node), node=node)
            writer.write(b"x")
            assert await reader.read(1) == b"x"

    in_threads(lambda number: asyncio.run(main(number)))
    assert seen == [1] * THREADS
    assert region not in Path("/proc/self/maps").read_text()


async def _listen(node: shmsock.Node) -> int:
    server = await shmsock.start_server(echo, None, 0, node=node)
    port: int = server.sockets[0].getsockname()[1]
    return port
