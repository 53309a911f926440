"""Uses what is installed: an echo and a file between two processes. It executes nothing.

So qemu-user runs it, too. python smoke.py [WHEELS]: shmsock is installed first, from a folder of wheels
which has pip's among them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import runpy
import sys
import tempfile
from pathlib import Path

ECHOES, PIECE, PIECES = 2000, 1 << 16, 256


def install(wheels: str) -> None:
    """As `pip install --no-index` does, in a process of its own: pip forbids to import anything after it."""
    place = tempfile.mkdtemp()
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        sys.path.insert(0, place)
        return
    (pip,) = Path(wheels).glob("pip-*.whl")
    sys.path.insert(0, str(pip))
    sys.argv = ["pip", "install", "-q", "--no-index", "--find-links", wheels, "--target", place, "shmsock"]
    runpy.run_module("pip", run_name="__main__")


async def serve(ready: int) -> None:
    import shmsock

    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(ECHOES):
            writer.write(await reader.readexactly(64))
        sha = hashlib.sha256()
        while data := await reader.read(PIECE):
            sha.update(data)
        writer.write(sha.digest())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        done.set()

    async with await shmsock.start_server(handle, port=7000):
        os.write(ready, b".")
        await done.wait()


async def use() -> None:
    import shmsock

    reader, writer = await shmsock.open_connection("smoke", 7000)
    for number in range(ECHOES):
        sent = b"%064d" % number
        writer.write(sent)
        assert await reader.readexactly(64) == sent
    sha = hashlib.sha256()
    for _ in range(PIECES):
        piece = os.urandom(PIECE)
        sha.update(piece)
        writer.write(piece)
        await writer.drain()
    writer.write_eof()
    assert await reader.read() == sha.digest()
    writer.close()
    await writer.wait_closed()


def main() -> None:
    if len(sys.argv) > 1:
        install(sys.argv[1])
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="shmsock-smoke-") as region:
        region.truncate(32 << 20)
        os.environ.update(SHMSOCK_REGION=region.name)
        heard, ready = os.pipe()
        if child := os.fork():
            os.environ["SHMSOCK_NAME"] = "smoke-client"
            os.close(ready)
            assert os.read(heard, 1) == b"."
            asyncio.run(use())
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        else:
            os.environ["SHMSOCK_NAME"] = "smoke"
            asyncio.run(serve(ready))
            os._exit(0)
    import shmsock

    known, number = platform.libc_ver()
    libc = f"glibc-{number}" if known == "glibc" else "musl"
    machine = f"{platform.machine()}, {libc}, CPython {platform.python_version()}"
    where = Path(shmsock.__file__).parent
    print(f"smoke: {shmsock.__version__}, {machine}: {ECHOES} echoes, {PIECE * PIECES >> 20} MiB, {where}")


if __name__ == "__main__":
    main()
