"""The calls that are done in C keep the rules of coroutines."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shmsock import attach, open_connection, start_server
from shmsock.aio.pump import extension
from shmsock.aio.streams import ShmStreamReader
from tests.aio.conftest import Run, World, until
from tests.aio.processes import Child

KINDS = ("read", "readexactly", "readline")


def ask(reader: Any, kind: str) -> Any:
    return reader.readline() if kind == "readline" else getattr(reader, kind)(4)


async def wait_in(op: Any) -> Any:
    """Drive it by hand until it waits for a future."""
    for _ in range(10_000):
        if (future := op.send(None)) is not None:
            return future
        await asyncio.sleep(0)
    raise AssertionError("it does not wait")


@pytest.mark.parametrize("kind", KINDS)
def test_used_once(run: Run, world: World, kind: str) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            op = ask(c.reader, kind)
            with pytest.raises(TypeError, match="just-started"):
                op.send(1)
            s.writer.write(b"abc\n")
            assert await op == b"abc\n"
            with pytest.raises(RuntimeError, match="already awaited"):
                await op
            with pytest.raises(RuntimeError, match="already awaited"):
                op.throw(KeyError)
            op.close()
            unused = ask(c.reader, kind)
            with pytest.warns(RuntimeWarning, match="never awaited"):
                del unused

    run(main())


@pytest.mark.parametrize("waits", [False, True], ids=["before", "waiting"])
@pytest.mark.parametrize(
    "thrown",
    [(ValueError,), (ValueError("x"),), (ValueError, "x"), (ValueError, ValueError("x")), (GeneratorExit,)],
    ids=["type", "instance", "value", "both", "exit"],
)
@pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature:DeprecationWarning")
def test_throw(run: Run, world: World, thrown: Any, waits: bool) -> None:
    async def main() -> None:
        async with world.pair() as (c, s):
            op = c.reader.read(4)
            if waits:
                await wait_in(op)
            with pytest.raises((ValueError, GeneratorExit)) as caught:
                op.throw(*thrown)
            assert str(caught.value) == ("" if len(thrown) == 1 and isinstance(thrown[0], type) else "x")
            assert c.reader._waiter is None  # type: ignore[attr-defined]
            s.writer.write(b"next")
            assert await c.reader.read(4) == b"next"

    run(main())


def test_stop_iteration_is_no_answer(run: Run, world: World) -> None:
    """PEP 479: who awaits would take it for one."""

    async def main() -> None:
        async with world.pair() as (c, _):
            with pytest.raises(RuntimeError, match="StopIteration"):
                c.reader.read(4).throw(StopIteration(3))

    run(main())


@pytest.mark.parametrize("how", ["send", "throw", "close"])
def test_from_inside(run: Run, world: World, how: str) -> None:
    """A coroutine that runs for it comes back to it: that is refused, and it goes on."""
    ops: list[Any] = []
    sends: list[Callable[[], object]] = []

    class Reader(ShmStreamReader):
        async def _wait_for_data(self, func_name: str) -> None:
            while ops:
                op = ops.pop()
                with pytest.raises(ValueError, match="already executing"):
                    op.close() if how == "close" else op.send(None) if how == "send" else op.throw(KeyError)
                del op
                gc.collect()
            while sends:
                sends.pop(0)()
            await super()._wait_for_data(func_name)

    async def main() -> None:
        async with world.pair() as (c, s):
            c.reader.__class__ = Reader
            c.reader._fast_path.can_read = False  # type: ignore[attr-defined]  # its coroutines wait, not C
            ops.append(c.reader.read(-1))
            sends.extend([partial(s.writer.write, b"abc"), s.writer.write_eof])
            assert await ops[0] == b"abc"
            assert ops == sends == []

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_eof_fed_by_hand(run: Run, world: World, kind: str) -> None:
    """Nothing is waited for behind it."""

    async def main() -> None:
        async with world.pair() as (c, _):
            c.reader.feed_eof()
            short = pytest.raises(asyncio.IncompleteReadError) if kind == "readexactly" else nullcontext()
            with short:
                assert await asyncio.wait_for(ask(c.reader, kind), 5) == b""

    run(main())


def test_one_that_cannot_be_told_keeps_nobody_else_waiting(region: str) -> None:
    """Ctrl-C while the pump wakes readers: the others of that pass are woken all the same."""

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        ends: list[Any] = []
        told: list[Any] = []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        async with attach(region, name="a") as a:
            server = await start_server(lambda *end: ends.append(end), None, 7000, node=a)
            clients = [await open_connection("a", 7000, node=a) for _ in range(3)]
            await until(lambda: len(ends) == 3)
            tasks = [asyncio.create_task(reader.readexactly(1)) for reader, _ in ends]
            await until(lambda: all(reader._waiter for reader, _ in ends))
            first = ends[0][0]._waiter
            real = loop.call_soon
            failures: list[Any] = []

            def call_soon(callback: Any, *args: Any, **kwargs: Any) -> Any:
                if args == (first,) and not failures:
                    failures.append(callback)
                    raise ArithmeticError("not now")
                return real(callback, *args, **kwargs)

            loop.call_soon = call_soon
            for _, writer in clients:
                writer.write(b"x")
            await asyncio.wait(tasks[1:], timeout=5)
            del loop.call_soon
            assert [t.done() for t in tasks] == [False, True, True]
            real(failures[0], first)
            assert await tasks[0] == b"x"
            assert [type(x) for x in told] == [ArithmeticError]
            for _, writer in [*clients, *ends]:
                writer.transport.abort()
            server.close()
            await server.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("asked", ["read", "write"])
def test_a_pump_that_could_not_be_called_is_called_later(region: str, asked: str) -> None:
    """An exception of a signal handler, in the middle of call_soon()."""

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        real, fails = loop.call_soon, False

        def call_soon(*args: Any, **kwargs: Any) -> Any:
            if fails:
                raise ArithmeticError("not now")
            return real(*args, **kwargs)

        loop.call_soon = call_soon  # before there is a node
        async with World("self", region).pair() as (c, s):
            await until(lambda: not c.node.pump.scheduled, "asleep")
            fails = True
            with pytest.raises(ArithmeticError):
                s.writer.write(b"x") if asked == "write" else c.reader.read(1).send(None)
            fails = False
            assert not c.node.pump.scheduled
            s.writer.write(b"y")
            assert await c.reader.readexactly(1) in b"xy"

    asyncio.run(main())


def test_made_by_hand() -> None:
    """Half-made ones do no harm."""
    with pytest.raises(TypeError):
        extension.Op()
    with pytest.raises(TypeError):
        extension.FastPath.__new__(extension.FastPath)
    turn = extension.Pump.__new__(extension.Pump)
    assert turn.closed
    turn._pump()
    turn._wake()
    turn.runs()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="cffi: CPython 3.12 and up with a GIL"
)
def test_subinterpreters_come_and_go(region: str) -> None:
    """Each has what the extension keeps for itself, and leaves nothing behind."""
    rounds = "20" if os.environ.get("SHMSOCK_LONG") else "3"
    argv = [sys.executable, "-W", "error", "-m", "tests.aio.interpreters", region, rounds]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=110, check=False, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- bytes


async def play(region: str, seed: int) -> int:
    """A random conversation, the reader's calls cancelled here and there. Returns how many bytes came."""
    rnd = random.Random(seed)

    async with World("self", region).pair(limit=3000) as (c, s):
        sent = b"".join(rnd.randbytes(rnd.randrange(200)).replace(b"\n", b"") + b"\n" for _ in range(400))
        got = 0

        async def write() -> None:
            at, own = 0, random.Random(seed)
            while at < len(sent):
                n = own.choice([1, 7, 300, 9000])
                s.writer.write(sent[at : at + n])
                at += n
                await (s.writer.drain() if own.random() < 0.7 else asyncio.sleep(0))
            s.writer.write_eof()

        writing = asyncio.create_task(write())
        while True:
            kind, n = rnd.choice(KINDS), rnd.choice([1, 2, 50, 3000, True])
            task = asyncio.ensure_future(
                c.reader.readline() if kind == "readline" else getattr(c.reader, kind)(n)
            )
            for _ in range(rnd.choice([0, 0, 0, 1, 2])):
                await asyncio.sleep(0)
            if rnd.random() < 0.2:
                task.cancel()
            try:
                data = await task
            except asyncio.CancelledError:
                continue
            except asyncio.IncompleteReadError as short:
                data = short.partial
                assert got + len(data) == len(sent)
            assert data == sent[got : got + len(data)], (kind, n, got)
            got += len(data)
            if kind == "readline" and got < len(sent):
                assert data.endswith(b"\n")
                assert data.count(b"\n") == 1
            assert kind != "readexactly" or len(data) == n or got == len(sent)
            if not data:
                break
        await writing
        assert got == len(sent)
    return got


@pytest.mark.parametrize("seed", range(3))
def test_no_byte_is_lost_or_changed(run: Run, region: str, seed: int) -> None:
    """Random calls, some cancelled before they begin, while they wait, and when they are woken."""
    run(play(region, seed))


@pytest.mark.parametrize("kind", ["streams", "protocol"])
def test_pieces_that_are_kept_for_a_while_take_no_page_faults(run: Run, region: str, kind: str) -> None:
    """malloc does not give their memory back to the kernel each time."""
    size = 1 << 22
    data = bytes(size)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            writer.write(data)
        writer.close()

    async def main() -> None:
        async with (
            attach(region, name="test") as node,
            await start_server(handle, None, 7000, node=node),
            Child("gather", region, kind, size) as child,
        ):
            faults = int(await child.line())
            assert faults < 5 * size // 4096 // 4
            assert await child.ended() == 0

    run(main())
