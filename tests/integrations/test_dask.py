"""Dask over shm:// and tcp+shm://: comms in one process, and clusters of real processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmsock

pytest.importorskip("distributed")

import cloudpickle
import distributed
import numpy as np
from distributed.comm import CommClosedError, connect, get_address_host, listen, resolve_address
from distributed.comm.addressing import get_address_host_port, get_local_address_for
from distributed.comm.core import FatalCommClosedError
from distributed.protocol import to_serialize

from shmsock.integrations.dask import Shm

pytestmark = pytest.mark.filterwarnings("default")  # of distributed
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

SCHEMES = ["shm://localhost", "tcp+shm://127.0.0.1"]
SECONDS = 60


def run(main: Callable[..., Awaitable[None]], *args: Any) -> None:
    async def guarded() -> None:
        await asyncio.wait_for(main(*args), SECONDS)

    asyncio.run(guarded())


async def until(condition: Callable[[], bool]) -> None:
    """Poll, as there is no event for it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def comms(scheme: str) -> AsyncIterator[tuple[Any, Any, str]]:
    """A connection's two ends, and the address that it was made to."""
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    async with listen(scheme, accepted.put) as listener:
        one = await connect(listener.contact_address)
        other = await accepted.get()
        try:
            yield one, other, listener.contact_address
        finally:
            await one.close()
            await other.close()


async def closed(comm: Any) -> None:
    with pytest.raises(CommClosedError):
        await comm.read()
    assert comm.closed()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_messages(shm_region: Path, scheme: str) -> None:
    async def main() -> None:
        async with comms(scheme) as (a, b, _):
            assert type(a) is type(b) is Shm
            assert (a.local_address, a.peer_address) == (b.peer_address, b.local_address)
            fragments = [to_serialize(np.full(1000, n)) for n in range(500)]
            several = [to_serialize(np.arange(n)) for n in (9_000_000, 0, 1, 200_000)]
            for message in ("", {"op": "x"}, b"y" * 3_000_000, fragments, several):
                for here, there in ((a, b), (b, a)):
                    size, got = await asyncio.gather(here.write(message), there.read())
                    if isinstance(message, list):
                        assert all(np.array_equal(x, y.data) for x, y in zip(got, message, strict=True))
                        assert all(x.flags.writeable for x in got)
                        assert size > sum(y.data.nbytes for y in message)
                    else:
                        assert got == message

    run(main)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_writers_and_a_reader(shm_region: Path, scheme: str) -> None:
    """Messages stay whole."""

    async def main() -> None:
        async with comms(scheme) as (a, b, _):
            sent = [np.full(300_000, n) for n in range(8)]
            writes = asyncio.gather(*(a.write(to_serialize(x)) for x in sent))
            got = [await b.read() for _ in sent]
            await writes
            assert sorted(x[0] for x in got) == list(range(8))
            assert all((x == x[0]).all() for x in got)

    run(main)


@pytest.mark.parametrize("how", ["close", "abort", "drop"])
def test_the_end(shm_region: Path, how: str) -> None:
    async def main() -> None:
        async with comms("shm://") as (a, b, address):
            await a.write("last")
            if how == "close":
                await a.close()
            elif how == "abort":
                a.abort()
            else:
                dropped = await connect(address)
                assert not dropped.closed()
                del dropped
                gc.collect()
                a.abort()
            assert await b.read() == "last"
            await closed(b)
            for call in (a.read, lambda: a.write(1), b.read, lambda: b.write(1)):
                with pytest.raises(CommClosedError):
                    await call()
            assert a.closed()

    run(main)


def test_an_end_that_nobody_reads_is_seen(shm_region: Path) -> None:
    """Pools ask closed() before they use a connection again."""

    async def main() -> None:
        async with comms("shm://") as (a, b, _):
            await a.close()
            await until(b.closed)

    run(main)


def test_writes_do_not_wait_for_their_reader(shm_region: Path) -> None:
    """As over TCP: both ends write before they read, one of them closes at once, and all of it arrives."""

    async def main() -> None:
        async with comms("shm://") as (a, b, _):
            large = np.arange(3_000_000)
            for comm in (a, b):
                await comm.write(to_serialize(large))
                await comm.write("small")
            got = await b.read()
            assert np.array_equal(got, large)
            assert await b.read() == "small"
            closing = asyncio.create_task(b.close())
            await until(b.closed)
            with pytest.raises(CommClosedError):
                await b.write("too late")
            got = await a.read()
            assert np.array_equal(got, large)
            assert await a.read() == "small"
            await closing
            await closed(a)

    run(main)


def test_what_is_to_be_sent_is_there_before_its_task(shm_region: Path) -> None:
    """An eager task, of 3.12, runs its first step within create_task()."""

    async def main() -> None:
        async with comms("shm://localhost") as (a, b, _):
            there = []

            def factory(loop: Any, coro: Any, **kwds: Any) -> Any:
                there.append(len(a._unsent))
                return asyncio.Task(coro, loop=loop, **kwds)

            asyncio.get_running_loop().set_task_factory(factory)
            try:
                await a.write({"x": to_serialize(np.zeros(3_000_000, "u1"))})
            finally:
                asyncio.get_running_loop().set_task_factory(None)
            assert len(there) == 1
            assert there[0] > 0
            await b.read()

    run(main)


def test_a_close_that_is_given_up_goes_on(shm_region: Path) -> None:
    async def main() -> None:
        async with comms("shm://") as (a, b, _):
            await a.write(bytes(3_000_000))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(a.close(), 0.001)
            assert await b.read() == bytes(3_000_000)
            await closed(b)

    run(main)


def test_a_reader_that_goes_away_ends_what_is_written(shm_region: Path) -> None:
    async def main() -> None:
        async with comms("shm://") as (a, b, _):
            await a.write(bytes(3_000_000))
            b.abort()
            await until(a.closed)
            for call in (lambda: a.write(1), a.read):
                with pytest.raises(CommClosedError):
                    await call()

    run(main)


def test_a_read_that_is_cancelled_ends_it(shm_region: Path) -> None:
    """What was read of a message is not known then."""

    async def main() -> None:
        async with comms("shm://") as (a, b, _):
            begun = asyncio.Event()

            async def work() -> None:
                begun.set()
                await a.read()

            task = asyncio.create_task(work())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert a.closed()
            await closed(b)

    run(main)


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", bytes(7), b"\1" + bytes(15) + b"\1" * 8])
def test_garbage(shm_region: Path, junk: bytes) -> None:
    async def main() -> None:
        async with comms("shm://") as (a, b, address):
            name, port = get_address_host_port(address)
            reader, writer = await shmsock.open_connection(name, port)
            writer.write(junk)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()  # its greeting, and the end
            writer.close()
            await asyncio.gather(a.write("still there"), b.read())

    run(main)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_encryption_is_refused(shm_region: Path, scheme: str) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="use tls://"):
            await listen(scheme, print, require_encryption=True)
        with pytest.raises(RuntimeError, match="use tls://"):
            await connect(f"{scheme}:1", require_encryption=True)

    run(main)


def test_a_name_nobody_has(shm_region: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="shm://nobody:8786") as caught:
            await connect("shm://nobody:8786", timeout=0.1)
        assert "no peer named 'nobody'" in str(caught.value.__cause__)

    run(main)


def test_no_region(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """shm:// fails at once, tcp+shm:// goes over TCP and says so once."""
    monkeypatch.setenv("SHMSOCK_REGION", "/nowhere")

    async def main() -> None:
        with pytest.raises(FatalCommClosedError, match="/nowhere does not exist"):
            await connect("shm://localhost:8786")
        with pytest.raises(shmsock.RegionNotFoundError):
            await listen("shm://", print)
        async with comms("tcp+shm://127.0.0.1") as (a, b, address):
            assert "/" not in address.removeprefix("tcp+shm://")
            assert a.peer_address.startswith("tcp://")
            await asyncio.gather(a.write("hello"), b.read())
            again = await connect(f"{address}/localhost:1")
            await again.close()

    with caplog.at_level(logging.WARNING, "shmsock"):
        run(main)
    said = [record.getMessage() for record in caplog.records if record.name == "shmsock"]
    assert [text.rpartition(" ")[0] for text in said if "TCP" in text] == [said[0].rpartition(" ")[0]]
    assert "/nowhere" in said[0]


def test_another_region_and_another_port(shm_region: Path) -> None:
    """A peer of the same name and port in another region is another one: TCP it is. So it is when nobody
    listens there in memory."""

    async def main() -> None:
        async with comms("tcp+shm://127.0.0.1") as (_, _, address):
            elsewhere = address[:-1] + "01"[address[-1] == "0"]
            nobody = address.replace(f":{address.rpartition(':')[2]}", ":1@" + address.rpartition("@")[2])
            for other in (elsewhere, nobody):
                comm = await connect(other)
                assert comm.peer_address.startswith("tcp://127.0.0.1:")
                await comm.close()
            anywhere = await connect(address.partition("@")[0])
            assert anywhere.peer_address.startswith("shm://")
            await anywhere.close()

    run(main)


def test_a_taken_port(shm_region: Path) -> None:
    async def main() -> None:
        async with listen("shm://:7000", print) as first:
            assert get_address_host_port(first.contact_address)[1] == 7000
            with pytest.raises(OSError, match="in use"):
                await listen("shm://:7000", print)
            with pytest.raises(OSError, match="in use"):
                await listen("tcp+shm://127.0.0.1:7000", print)
        async with listen("shm://:7000", print):
            pass

    run(main)


def test_addresses() -> None:
    assert get_address_host("shm://vm-b:8786") == "vm-b"
    assert resolve_address("shm://VM-b.shm:8786") == "shm://vm-b:8786"
    assert get_local_address_for("shm://vm-b:1") == f"shm://{shmsock.address.default_name()}"
    both = "tcp+shm://127.0.0.1:8786/vm-b:7000@1f"
    assert get_address_host_port(both) == ("127.0.0.1", 8786)
    assert resolve_address(both.replace("127.0.0.1", "localhost")) == both
    assert get_local_address_for(both) == "tcp+shm://127.0.0.1"


# -- real processes

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(shm_region: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `dask scheduler` or `dask worker`."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(what: str, *arguments: str, region: str = "") -> subprocess.Popen[bytes]:
        environ = {**os.environ, "SHMSOCK_REGION": region or str(shm_region)}
        command = [sys.executable, "-m", "dask", what, *arguments]
        with open(tmp_path / f"{what}-{len(started)}.log", "wb") as log:
            started.append(subprocess.Popen(command, stderr=log, stdout=log, env=environ, cwd=tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
    for log in sorted(tmp_path.glob("*.log")):
        print(f"-- {log.name}\n{log.read_text()}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def statistics() -> dict[str, Any]:
    return (await shmsock.aio.attach.current_node()).statistics()


def exchange(client: Any, one: str, other: str) -> None:
    """An array of 100 MB is made here, turned round there, and comes to the client."""
    made = client.submit(np.arange, 12_500_000, workers=[one], pure=False)
    turned = client.submit(np.flip, made, workers=[other], pure=False)
    assert np.array_equal(turned.result(), np.arange(12_500_000)[::-1])


def workers(client: Any, count: int) -> list[str]:
    client.wait_for_workers(count, timeout=SECONDS)
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def test_a_cluster(start: Start) -> None:
    """Scheduler, workers and client, all over memory; a worker is killed, and then the scheduler."""
    import dask.array as da

    scheduler = start("scheduler", "--protocol", "shm", "--port", "8786", "--no-dashboard")
    for _ in range(2):
        start("worker", "shm://localhost:8786", "--nthreads", "1", "--no-dashboard")
    with distributed.Client("shm://localhost:8786", timeout=SECONDS) as client:
        one, other = workers(client, 2)
        exchange(client, one, other)
        counted = client.run(statistics)
        assert counted[one]["bytes_out"] > 100_000_000
        assert counted[other]["bytes_in"] > 100_000_000
        assert counted[other]["bytes_out"] > 100_000_000
        assert not any(of["healed"] for of in counted.values())

        numbers = da.arange(12_500_000, chunks=500_000)
        expected = np.arange(12_500_000)
        sums = client.compute((numbers[::-1] * numbers).sum())
        os.kill(client.run(os.getpid, workers=[one])[one], signal.SIGKILL)  # its nanny starts another
        assert sums.result(timeout=SECONDS) == (expected[::-1] * expected).sum()

        scheduler.kill()
        with pytest.raises(Exception, match=r"shm://|closed|cancelled|lost"):
            client.submit(np.arange, 1).result(timeout=SECONDS)


def test_a_cluster_of_both_kinds(start: Start) -> None:
    """Each pair takes the best it has: a worker without the region is reached over TCP."""
    port = free_port()
    address = f"tcp+shm://127.0.0.1:{port}/localhost:{port}"
    start("scheduler", "--protocol", "tcp+shm", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    for region in ("", "", "/nowhere"):
        start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", region=region)
    with distributed.Client(address, timeout=SECONDS) as client:
        everyone = workers(client, 3)
        (tcp,) = (worker for worker in everyone if worker.count("/") == 2)
        one, other = (worker for worker in everyone if worker != tcp)
        before = client.run(statistics, workers=[one, other])
        exchange(client, one, other)
        between = client.run(statistics, workers=[one, other])
        assert between[other]["bytes_in"] - before[other]["bytes_in"] > 100_000_000
        exchange(client, one, tcp)
        exchange(client, tcp, other)
        after = client.run(statistics, workers=[one, other])
        assert after[one]["bytes_out"] - between[one]["bytes_out"] < 10_000_000
        assert after[other]["bytes_in"] - between[other]["bytes_in"] < 10_000_000
