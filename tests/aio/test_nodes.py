"""Nodes: whose they are, how long they live, what is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import shmsock
from tests.aio.conftest import Run, World, held, keepers, until
from tests.aio.processes import PATIENCE, Child, Lines, runner
from tests.aio.roles import echo, receive
from tests.forked import ROOT


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes = b"hello\n") -> None:
    writer.write(text)
    await writer.drain()
    assert await reader.readexactly(len(text)) == text


def drive(coro: Any) -> None:
    """As a loop would, for a while."""
    try:
        for _ in range(5):
            coro.send(None)
    except StopIteration:
        pass
    finally:
        coro.close()


def drain_often(writer: asyncio.StreamWriter) -> None:
    for _ in range(8):  # not each call looks at the clock
        drive(writer.drain())


@pytest.fixture
def implicit(region: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The region that module-level functions use."""
    monkeypatch.setenv("SHMSOCK_REGION", region)
    monkeypatch.setenv("SHMSOCK_NAME", "here")
    return region


async def client_and_server() -> None:
    server = await shmsock.start_server(echo, "localhost", 7000)
    for host in (None, "localhost", "127.0.0.1", "here", "HERE.shm", "here.", server._node.section):
        reader, writer = await shmsock.open_connection(host, 7000)
        assert writer.get_extra_info("peername") == ("here", 7000)
        await talk(reader, writer)
        writer.close()
        await writer.wait_closed()
    server.close()


def test_client_and_server_in_one_loop(run: Run, implicit: str) -> None:
    run(client_and_server())


def test_run_again_and_again(run: Run, implicit: str) -> None:
    """As many loops as there are sections, and more: each gives its section back."""
    for _ in range(20):
        run(client_and_server())
        assert keepers() == 0


def test_a_loop_that_ends_with_an_exception_detaches(run: Run, implicit: str) -> None:
    async def main() -> None:
        await shmsock.start_server(echo, None, 7000)
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            run(main())
        assert keepers() == 0


def test_connections_left_open_are_closed_with_the_loop(run: Run, implicit: str) -> None:
    async def main() -> None:
        async with Child("serve", implicit, "server") as child:
            await child.says("ready")
            streams.append(await shmsock.open_connection("server", 7000))
            streams[0][1].write(b"x")

    streams: list[Any] = []
    run(main())
    assert keepers() == 0
    _, writer = streams.pop()
    assert writer.is_closing()
    del writer


def test_one_node_per_loop_and_region(run: Run, implicit: str) -> None:
    async def main() -> None:
        servers = await asyncio.gather(*(shmsock.start_server(echo, None, 7000 + i) for i in range(5)))
        assert len({id(s._node) for s in servers}) == 1
        await until(lambda: keepers() == 1)

    run(main())


def test_a_name_that_is_not_the_nodes(run: Run, implicit: str) -> None:
    async def main() -> None:
        both = await asyncio.gather(
            shmsock.start_server(echo, None, 7000, name="one"),
            shmsock.start_server(echo, None, 7001, name="two"),
            return_exceptions=True,
        )
        assert [type(x).__name__ for x in both] == ["Server", "ValueError"]
        assert "'one', not 'two'" in str(both[1])
        _, writer = await shmsock.open_connection("ONE", 7000, name="one")
        writer.close()
        with pytest.raises(ValueError, match="attach"):
            await shmsock.open_connection("one", 7000, name="three")

    run(main())


def test_bare_loops_that_are_just_closed(loop_name: str, implicit: str) -> None:
    """No shutdown_asyncgens(): the section comes back all the same, with the next attach or collection."""
    for _ in range(20):
        if loop_name == "uvloop":
            import uvloop

            loop: Any = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()

        async def main() -> None:
            await shmsock.start_server(echo, None, 7000)

        loop.run_until_complete(main())
        loop.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del loop
            gc.collect()
    assert keepers() == 0


def test_a_node_that_nobody_closes_warns_and_is_closed(run: Run, region: str) -> None:
    async def main() -> None:
        node = await shmsock.attach(region)
        assert repr(node).startswith("<shmsock.Node")

    async def another() -> None:
        async with shmsock.attach(region):
            pass

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(main())
        if run.loop == "uvloop":  # lets go of its callbacks late; the next attach() does not wait for that
            run(another())
        gc.collect()
    assert run.loop == "uvloop" or any("unclosed node" in str(w.message) for w in seen)
    assert keepers() == 0


def test_two_loops_in_two_threads(loop_name: str, implicit: str) -> None:
    """Each with a node of its own, and they talk to each other."""
    ready, over = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    async def server() -> None:
        await shmsock.start_server(echo, None, 7000)
        ready.set()
        await asyncio.to_thread(over.wait, PATIENCE)

    async def client() -> None:
        async def one(i: int) -> None:
            reader, writer = await shmsock.open_connection("here", 7000)
            for _ in range(100):
                await talk(reader, writer, b"%d\n" % i)
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(one(i) for i in range(20)))

    def thread(main: Callable[[], Any]) -> None:
        try:
            runner(loop_name)(asyncio.wait_for(main(), PATIENCE) if loop_name == "asyncio" else main())
        except BaseException as error:
            failures.append(error)

    a = threading.Thread(target=thread, args=(server,))
    a.start()
    assert ready.wait(PATIENCE)
    b = threading.Thread(target=thread, args=(client,))
    b.start()
    b.join(PATIENCE)
    assert not b.is_alive()
    over.set()
    a.join(PATIENCE)
    assert not a.is_alive()
    assert failures == []


def test_another_thread_is_turned_away(run: Run, world: World) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"mine")
            await s.reader.readexactly(2)
            calls: list[Callable[[], Any]] = [
                lambda: c.writer.write(b"x"),
                lambda: c.writer.write(bytearray(b"x")),
                lambda: c.writer.writelines([b"x"]),
                c.writer.write_eof,
                c.writer.close,
                c.transport.abort,
                c.node.close,
                lambda: drive(c.reader.read(1)),
                lambda: drive(c.reader.readexactly(1)),
                lambda: drive(c.reader.readline()),
                lambda: drain_often(c.writer),
                lambda: drive(shmsock.open_connection("a", 7000, node=c.node)),
                lambda: drive(shmsock.start_server(echo, None, 7001, node=c.node)),
            ]

            def elsewhere() -> None:
                for i, call in enumerate(calls):
                    try:
                        call()
                    except BaseException as error:
                        seen.append((i, type(error)))
                    else:
                        seen.append((i, None))

            seen: list[tuple[int, Any]] = []
            thread = threading.Thread(target=elsewhere)
            await asyncio.sleep(0.05)  # the pump is asleep: nothing hides behind one that is scheduled
            thread.start()
            await until(lambda: not thread.is_alive())
            thread.join()
            assert seen == [(i, shmsock.WrongThreadError) for i in range(len(calls))]
            assert await s.reader.readexactly(2) == b"ne"
            s.writer.write(b"fine")
            assert await c.reader.readexactly(4) == b"fine"

    run(main())


def test_after_close(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as a, shmsock.attach(region, name="b") as b:
            await shmsock.start_server(echo, None, 7000, node=b)
            reader, writer = await shmsock.open_connection("b", 7000, node=a)
        for node in (a, b):
            assert "closed" in repr(node)
            assert node.statistics()["state"] == "closed"
            with pytest.raises(shmsock.NodeClosedError, match="attach again"):
                await shmsock.open_connection("a", 7000, node=node)
            with pytest.raises(shmsock.NodeClosedError):
                await shmsock.start_server(echo, node=node)
            await node.aclose()
            node.close()
        assert await reader.read() == b""
        assert writer.is_closing()
        writer.write(b"x")
        with pytest.raises(ConnectionError):
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    run(main())


def test_after_the_loop(run: Run, region: str) -> None:
    async def main() -> None:
        node = await shmsock.attach(region, name="a")
        server = await shmsock.start_server(echo, None, 7000, node=node)
        reader, writer = await shmsock.open_connection("a", 7000, node=node)
        await node.aclose()
        left.extend([node, server, reader, writer])

    async def later() -> None:
        node, server, reader, writer = left
        with pytest.raises(shmsock.NodeClosedError):
            await shmsock.open_connection("a", 7000, node=node)
        assert await reader.read() == b""
        writer.write(b"x")
        writer.close()
        server.close()
        assert not server.is_serving()

    left: list[Any] = []
    run(main())
    run(later())


def test_several_nodes_on_several_regions(run: Run, make: Callable[..., str]) -> None:
    async def main() -> None:
        one, two = make(), make(peers=2, size=8 << 20)
        async with (
            shmsock.attach(one, name="a") as a1,
            shmsock.attach(one, name="b") as b1,
            shmsock.attach(two, name="a") as a2,
            shmsock.attach(two, name="b") as b2,
        ):

            def says(text: bytes) -> Callable[[Any, Any], None]:
                def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    writer.write(text)
                    writer.close()

                return handler

            for node, text in ((b1, b"one"), (b2, b"two")):
                await shmsock.start_server(says(text), None, 7000, node=node)
            for node, text in ((a1, b"one"), (a2, b"two")):
                reader, writer = await shmsock.open_connection("b", 7000, node=node)
                assert await reader.read() == text
                writer.close()
        assert keepers() == 0

    run(main())


def test_attach_is_a_coroutine_too(run: Run, region: str) -> None:
    async def main() -> None:
        node = await shmsock.attach(region, name="Some.Name.shm.")
        assert node.name == "some.name"
        await node.aclose()

    run(main())


def test_writers_that_were_closed_get_time_to_flush(run: Run, region: str) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="b") as b:
            accepted = asyncio.get_running_loop().create_future()
            await shmsock.start_server(lambda r, w: accepted.set_result((r, w)), None, 7000, node=b)
            async with shmsock.attach(region, name="a") as a:
                _, writer = await shmsock.open_connection("b", 7000, node=a)
                writer.write(bytes(5 << 20))
                writer.close()
                reader, other = await accepted
                reading = asyncio.create_task(reader.read())
            assert len(await reading) == 5 << 20
            other.close()

    run(main())


def test_what_could_not_be_flushed_is_no_silent_end(run: Run, region: str) -> None:
    """The node goes with bytes that it still held: the reader gets what was published, and then no EOF."""

    async def main() -> None:
        async with shmsock.attach(region, name="b") as b:
            accepted = asyncio.get_running_loop().create_future()
            await shmsock.start_server(lambda r, w: accepted.set_result((r, w)), None, 7000, node=b)
            async with shmsock.attach(region, name="a", settings=shmsock.Settings(flush_s=0.05)) as a:
                _, writer = await shmsock.open_connection("b", 7000, node=a)
                writer.write(bytes(5 << 20))
                writer.close()
                reader, other = await accepted
            got, end = await receive(reader, None, random.Random(1))
            assert 0 < got < 5 << 20
            assert end == "reset"
            other.close()
            await until(lambda: held(b)["connections"] == 0)

    run(main())


# -- fork and exit


def test_fork_then_use(run: Run, world: World) -> None:
    """The child makes a node of its own; what it inherited is dead there, and well here."""

    async def main() -> None:
        async with world.pair() as (c, s):
            c.writer.write(b"before")
            server = await shmsock.start_server(echo, None, 7001, node=s.node)
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    in_child(c, s)
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    os._exit(code)
            fd = os.pidfd_open(pid)
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            loop.add_reader(fd, ended.set)
            await ended.wait()
            loop.remove_reader(fd)
            os.close(fd)
            assert os.waitpid(pid, 0)[1] == 0
            server.close()
            assert await s.reader.readexactly(6) == b"before"
            for end, other in ((c, s), (s, c)):
                end.writer.write(b"after")
                assert await other.reader.readexactly(5) == b"after"

    def in_child(c: Any, s: Any) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: c.writer.write(b"astray"),
            lambda: c.writer.write(memoryview(b"astray")),
            c.writer.write_eof,
            c.writer.close,
            c.transport.abort,
            lambda: drive(c.writer.drain()),
            lambda: drive(c.reader.read(10)),
            lambda: drive(c.reader.readexactly(10)),
            lambda: drive(c.reader.readline()),
            lambda: drive(shmsock.open_connection("b", 7000, node=c.node)),
            lambda: drive(shmsock.start_server(echo, node=s.node)),
        ]

        for i, call in enumerate(calls):
            try:
                call()
            except shmsock.ForkedError:
                continue
            raise AssertionError(f"call {i} went through")
        c.node.close()
        runner(run.loop)(fresh(s.node.name))

    async def fresh(name: str) -> None:
        async with shmsock.attach(world.region, name="child") as node:
            reader, writer = await shmsock.open_connection(name, 7001, node=node)
            await talk(reader, writer)
            writer.close()
            await writer.wait_closed()

    run(main())


def test_a_child_that_lives_on_holds_nothing_of_its_parent(run: Run, region: str) -> None:
    """The parent dies while its forked child lives: its lock must fall all the same."""
    code = """
import asyncio, os, signal, sys, shmsock
async def main():
    node = await shmsock.attach(sys.argv[1], name="parent")
    reader, writer = await shmsock.open_connection("test", 7000, node=node)
    child = os.fork()
    if not child:
        sys.stdin.read()
        os._exit(0)
    writer.write(b"will")
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""

    async def main() -> None:
        async with shmsock.attach(region, name="test") as node:
            accepted = asyncio.get_running_loop().create_future()
            await shmsock.start_server(lambda r, w: accepted.set_result((r, w)), None, 7000, node=node)
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", code, region],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            try:
                reader, writer = await accepted
                assert process.stdout is not None
                assert await Lines(process.stdout.fileno()).next() == "ready"
                loop = asyncio.get_running_loop()
                started = loop.time()
                with pytest.raises(ConnectionResetError):
                    await reader.readexactly(100)
                assert await reader.read(100) == b"will"
                assert loop.time() - started < 2.5, "not by its lock"
                writer.close()
            finally:
                process.communicate()

    run(main())


@pytest.mark.parametrize("how", ["return", "close", "raise"])
def test_a_node_left_at_exit_is_detached(run: Run, make: Callable[..., str], how: str) -> None:
    """With one section for all of them, and none of them closes its node."""

    async def main() -> None:
        region = make(peers=2, size=8 << 20)
        async with shmsock.attach(region, name="test") as node:
            accepted: asyncio.Queue[Any] = asyncio.Queue()
            await shmsock.start_server(lambda r, w: accepted.put_nowait((r, w)), None, 7000, node=node)
            for _ in range(3):
                async with Child("unclosed", region, how) as child:
                    await child.says("ready")
                    reader, writer = await accepted.get()
                    child.tell()
                    assert await reader.read() == b"will"  # EOF: its end was an orderly one
                    writer.close()
                    assert await child.ended() == (3 if how == "raise" else 0)

    run(main())


def test_a_daemon_thread_at_exit_does_not_crash() -> None:
    """The interpreter ends while another thread's loop is busy in C."""
    code = """
import asyncio, threading, time, shmsock
from shmsock.testing import make_region
import os
region = make_region()
started = threading.Event()
async def main():
    async def source(reader, writer):
        while True:
            writer.write(bytes(65536))
            await writer.drain()
    async with shmsock.attach(region, name="a") as node:
        await shmsock.start_server(source, None, 7000, node=node)
        reader, writer = await shmsock.open_connection("a", 7000, node=node)
        n = 0
        while True:
            n += len(await reader.read(65536))
            if n > 10_000_000:
                started.set()
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
started.wait(60)
os.unlink(region)
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=PATIENCE, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_signals_stay_pythons(run: Run, world: World) -> None:
    """The heartbeat thread takes none of them."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with world.pair():
            for _ in range(20):
                got = asyncio.Event()
                loop.add_signal_handler(signal.SIGUSR1, got.set)
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.wait_for(got.wait(), PATIENCE)
            loop.remove_signal_handler(signal.SIGUSR1)

    run(main())


def test_alone(
    run: Run, region: str, loop_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that waits for others on memory that nobody else has says so, once."""
    monkeypatch.setattr("shmsock.engine.engine.ALONE_NS", 0)
    said = "saw nobody else"

    async def main() -> None:
        async with shmsock.attach(region, name="here") as node:
            assert node.statistics()["alone"]
            with pytest.raises(OSError, match=rf"is alone on file:{region}.*share=on"):
                await shmsock.open_connection("there", 7000, node=node)
            server = await shmsock.start_server(echo, None, 7000, node=node)
            await until(lambda: said in caplog.text)
            async with Child("serve", region, "there", loop=loop_name) as child:
                await child.says("ready")
                _, writer = await shmsock.open_connection("there", 7000, node=node)
                writer.close()
                assert not node.statistics()["alone"]
            with pytest.raises(OSError, match="no peer named 'nobody'") as caught:
                await shmsock.open_connection("nobody", 7000, node=node)
            assert "share=on" not in str(caught.value)
            server.close()
            assert caplog.text.count(said) == 1

    run(main())
