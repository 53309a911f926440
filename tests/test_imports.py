"""What imports cost: `import shmsock` next to nothing, `shmsock --help` no more than click.

python tests/test_imports.py    how long they take beside `import asyncio`: best of 20, CPU time
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HELP = "from click.testing import CliRunner; from shmsock.cli import cli; CliRunner().invoke(cli, {!r})"


def modules(script: str) -> set[str]:
    """All modules that a fresh interpreter has after that script."""
    argv = [sys.executable, "-c", f"{script}\nimport sys; print(*sys.modules)"]
    return {*subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()}


def packages(script: str) -> set[str]:
    return {name.partition(".")[0] for name in modules(script)}


def test_the_package_alone() -> None:
    added = modules("import shmsock") - modules("import importlib.util, typing")
    assert added == {"shmsock", "shmsock.native"}


def test_the_public_names() -> None:
    """They need nothing that asyncio does not, but for what tells kinds of regions apart."""
    added = modules("import shmsock; shmsock.attach") - modules("import asyncio")
    foreign = {name for name in added if name.partition(".")[0] not in ("shmsock", "_cffi_backend")}
    maths = {"_bisect", "_random", "_sha512", "bisect", "random"}
    later = {"_struct", "_typing", "ipaddress", "struct", "typing"}  # which asyncio imported until 3.13
    assert foreign <= {*maths, *later, "copy", "dataclasses", "gc", "mmap", "pwd"}
    kinds = {f"shmsock.region.{kind}" for kind in ("bar2", "iommu", "ivshmem", "vfio", "vfio_ioctl")}
    assert not added & {*kinds, "shmsock.anyio", "shmsock.cli", "shmsock.testing"}


@pytest.mark.parametrize("arguments", [["--help"], ["create", "--help"], ["bench", "--help"]])
def test_the_command_and_its_help(arguments: list[str]) -> None:
    heavy = {"anyio", "hdrh", "matplotlib", "multiprocessing", "rich", "trio", "uvloop", "zmq"}
    assert not packages(HELP.format(arguments)) & heavy


def test_creating_a_region(tmp_path: Path) -> None:
    """A subcommand imports what it needs, and no other one."""
    found = modules(HELP.format(["create", str(tmp_path / "region"), "--size", "16M"]))
    assert (tmp_path / "region").exists()
    commands = {name for name in found if name.startswith("shmsock.commands.")}
    assert commands == {f"shmsock.commands.{n}" for n in ("create", "group", "params")}
    assert not {name.partition(".")[0] for name in found} & {"anyio", "rich", "uvloop"}


def test_names_and_rooms() -> None:
    import shmsock

    assert {"attach", "open_connection", "RegionError"} <= {*shmsock.__all__} <= {*dir(shmsock)}
    assert all(getattr(shmsock, name) is not None for name in shmsock.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shmsock.nothing
    with pytest.raises(ImportError):
        from shmsock import nothing  # noqa: F401


def test_what_was_set_before_stays() -> None:
    """A test's stand-in is set before anything else was asked for."""
    script = "import shmsock; shmsock.attach = 'mine'; shmsock.Node; print(shmsock.attach)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n"


QUIET = """
import asyncio, shmsock
for name in shmsock.__all__:
    getattr(shmsock, name)
async def answer(reader, writer):
    writer.write(await reader.read())
    writer.close()
    await writer.wait_closed()
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is no news
    node = await shmsock.attach({!r}, name="quiet")
    server = await shmsock.start_server(answer, None, 7000, node=node)
    reader, writer = await shmsock.open_connection("quiet", 7000, node=node)
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read() == b"hello"
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    await node.aclose()
asyncio.run(main())
"""


def test_import_use_and_exit_are_quiet(shm_region: Path) -> None:
    argv = [sys.executable, "-X", "dev", "-W", "error", "-c", QUIET.format(str(shm_region))]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def cpu_time(script: str) -> float:
    best = 60.0
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", script], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, took)
    return best


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    start = cpu_time("pass")
    asyncio = cpu_time("import asyncio") - start
    for text in ("import asyncio", "import shmsock", "import shmsock; shmsock.attach"):
        seconds = cpu_time(text) - start
        print(f"{text:<32} {seconds * 1000:6.1f} ms  {seconds / asyncio:5.2f} of asyncio's")
