"""Every way in which programs get an event loop is reached: each is a process that connects to a mapped
address and prints what its transport says."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmsock
from shmsock.testing import make_region
from tests.run.programs import program, result

PEER = "10.255.255.5"  # nobody's
CALL = f"""
import asyncio
async def main():
    reader, writer = await asyncio.open_connection("{PEER}", 7000)
    writer.write(b"over memory")
    writer.write_eof()
    print((await reader.read()).decode(), writer.get_extra_info("peername"))
    writer.close()
"""
WAYS = {
    "run": """
asyncio.run(main())
""",
    "runner": """
with asyncio.Runner() as runner: runner.run(main())
""",
    "runner_factory": """
with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as r: r.run(main())
""",
    "new_event_loop": """
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
""",
    "get_event_loop": """
asyncio.set_event_loop(asyncio.new_event_loop())
asyncio.get_event_loop().run_until_complete(main())
""",
    "selector_loop": """
loop = asyncio.SelectorEventLoop()
loop.run_until_complete(main())
loop.close()
""",
    "private_name": """
from asyncio.unix_events import _UnixSelectorEventLoop as L
loop = L()
loop.run_until_complete(main())
loop.close()
""",
    "run_forever": """
loop = asyncio.new_event_loop()
loop.create_task(main()).add_done_callback(lambda t: loop.stop())
loop.run_forever()
""",
    "policy": """
asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
asyncio.run(main())
""",
    "policy_subclass": """
class Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self):
        return super().new_event_loop()
asyncio.set_event_loop_policy(Policy())
asyncio.run(main())
""",
    "own_subclass": """
class Loop(asyncio.SelectorEventLoop):
    async def create_connection(self, *args, **kwds):
        return await super().create_connection(*args, **kwds)
loop = Loop()
loop.run_until_complete(main())
""",
    "thread": """
import threading
t = threading.Thread(target=asyncio.run, args=(main(),))
t.start()
t.join()
""",
    "to_thread": """
asyncio.run(asyncio.to_thread(asyncio.run, main()))
""",
    "imported_before": """
import asyncio.base_events, asyncio.events
asyncio.run(main())
""",
    "anyio": """
import anyio
anyio.run(main)
""",
    "anyio_uvloop": """
import anyio
anyio.run(main, backend_options={'use_uvloop': True})
""",
    "uvloop_run": """
import uvloop
uvloop.run(main())
""",
    "uvloop_install": """
import uvloop
uvloop.install()
asyncio.run(main())
""",
    "uvloop_loop": """
import uvloop
uvloop.Loop().run_until_complete(main())
""",
    "uvloop_factory": """
import uvloop
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as r: r.run(main())
""",
    "uvloop_policy": """
import uvloop
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
""",
    "nest_asyncio": """
import nest_asyncio
nest_asyncio.apply()
async def f(): asyncio.run(main())
asyncio.run(f())
""",
    "fork": """
import os
pid = os.fork()
if not pid: asyncio.run(main())
os._exit(0)
os.waitpid(pid, 0)
""",
    "child": """
import subprocess, sys
if not sys.argv[1:]: subprocess.run([sys.executable, __file__, 'child'])
else: asyncio.run(main())
""",
    "spawn": """
import multiprocessing
def work():
    asyncio.run(main())
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
""",
}
if sys.version_info < (3, 11):
    WAYS = {way: code for way, code in WAYS.items() if "asyncio.Runner" not in code}
if sys.version_info >= (3, 12):
    WAYS["run_factory"] = "asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop)"
if sys.version_info >= (3, 13):
    WAYS["EventLoop"] = "asyncio.run(main(), loop_factory=asyncio.EventLoop)"


@pytest.fixture(scope="module")
def echo() -> Iterator[dict[str, str]]:
    """What the environment of a client must have, of an echo server."""
    region = make_region()
    try:
        env = {"SHMSOCK_REGION": region}
        with program(["--name", "echo"], "-c", ECHO, env=env) as running:
            running.wait_for("listening")
            yield env
    finally:
        os.unlink(region)


ECHO = """
import asyncio
async def serve(reader, writer):
    writer.write(await reader.read())
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "*.shm", 7000)
    print("listening")
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_loop_is_reached(way: str, echo: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(CALL + WAYS[way])
    said = result(["--map", f"{PEER}=echo", "--name", "client"], "python", str(script), env=echo)
    assert said == f"over memory ('{PEER}', 7000)"


@pytest.mark.parametrize(
    ("option", "way", "kind"),
    [
        ("uvloop", "asyncio.run(main())", "uvloop"),
        ("uvloop", "asyncio.new_event_loop().run_until_complete(main())", "uvloop"),
        ("asyncio", "import uvloop; uvloop.run(main())", "asyncio.unix_events"),
        ("asyncio", "import uvloop; uvloop.install(); asyncio.run(main())", "asyncio.unix_events"),
    ],
)
def test_loop_says_which_one(option: str, way: str, kind: str, shm_region: Path) -> None:
    call = "import asyncio\nasync def main(): print(type(asyncio.get_running_loop()).__module__)\n"
    assert result(["--loop", option], "-c", call + way) == kind


def test_without_the_option_a_program_gets_what_it_asks_for(shm_region: Path) -> None:
    call = "import asyncio\nasync def main(): print(type(asyncio.get_running_loop()).__module__)\n"
    call += "asyncio.run(main())\nimport uvloop; uvloop.run(main())"
    assert result([], "-c", call).split() == ["asyncio.unix_events", "uvloop"]


def test_a_loop_that_is_not_reached_is_named(shm_region: Path) -> None:
    call = (
        "from asyncio.selector_events import BaseSelectorEventLoop\nclass Own(BaseSelectorEventLoop): pass\n"
    )
    call += "for _ in range(2): Own().close()"
    said = result([], "-c", call)
    assert said.count("shmsock run:") == 1
    assert "__main__.Own does not know shared memory" in said


def test_loop_factory_takes_a_class_that_is_reached_already(shm_region: Path) -> None:
    call = "import asyncio, shmsock\nprint(shmsock.loop_factory() is asyncio.SelectorEventLoop)\n"
    call += "asyncio.new_event_loop().close()\nimport uvloop\n"
    call += "print(shmsock.loop_factory(uvloop.Loop) is uvloop.Loop)"
    assert result([], "-c", call).split() == ["True", "True"]
    assert shmsock.loop_factory() is not asyncio.SelectorEventLoop


def test_a_loop_that_is_merely_closed_leaves_nothing(echo: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(CALL + WAYS["new_event_loop"] + "import gc\ngc.collect()\n")
    command = ["python", "-X", "dev", "-W", "error", str(script)]
    assert result(["--map", f"{PEER}=echo"], *command, env=echo) == f"over memory ('{PEER}', 7000)"


def test_sockets_of_their_own_are_told_that_a_host_is_in_shared_memory(shm_region: Path) -> None:
    code = """
import socket, urllib.request
for look_up in (lambda: socket.create_connection(("vm-b.SHM.", 80)), lambda: urllib.request.urlopen("http://x.shm")):
    try:
        look_up()
    except OSError as error:
        print(error)
print(len(socket.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)))
"""
    said = result([], "-c", code).splitlines()
    assert "'vm-b.SHM.' is in shared memory" in said[0]
    assert "'x.shm' is in shared memory" in said[1]
    assert said[2] == "1"


@pytest.mark.parametrize(
    "first", ["from shmsock import Node", "import shmsock.run.server", "import shmsock.anyio"]
)
def test_programs_that_import_shmsock_first_are_reached(
    first: str, echo: dict[str, str], tmp_path: Path
) -> None:
    """Which imports asyncio, in the middle of it."""
    script = tmp_path / "program.py"
    script.write_text(f"{first}\n{CALL}{WAYS['run']}")
    said = result(["--map", f"{PEER}=echo", "--name", "client"], "python", str(script), env=echo)
    assert said == f"over memory ('{PEER}', 7000)"
