"""A peer that goes on writing where it wrote before: what is decided on its bytes is decided on a copy."""

from __future__ import annotations

import asyncio
import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shmsock import Settings
from tests.aio.conftest import End, Run, World

SCRIBBLER = """
import mmap, sys
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, "r+b") as file:
    region = mmap.mmap(file.fileno(), 0)
places, at = [], region.find(b"X\\n", first, last)
while at >= 0 and len(places) < 64:
    places.append(at)
    at = region.find(b"X\\n", at + 1, last)
print("ready", flush=True)
while True:
    for at in places:
        region[at : at + 2] = b"\\n."
        region[at : at + 2] = b"X\\n"
"""


@contextmanager
def scribbler(path: str) -> Iterator[None]:
    """Another process that moves the ends of lines in rings forth and back, all the time."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as region:
        argv = [sys.executable, "-c", SCRIBBLER, path, "4096", str(len(region))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("length", [700, 3000])
@pytest.mark.parametrize("read", ["readline", "readuntil"])
def test_a_line_has_one_end(run: Run, world: World, length: int, read: str) -> None:
    line = b"." * (length - 2) + b"X\n"

    async def write(end: End) -> None:
        while True:
            end.writer.write(line)
            await end.writer.drain()

    async def main() -> None:
        async with world.pair(settings=Settings(ring_bytes=4096)) as (c, s):
            c.writer.write(line * (4096 // length))  # and that is all of the ring
            with scribbler(world.region):
                writing = asyncio.create_task(write(c))
                moved = 0
                while moved < 500:
                    got = await (s.reader.readline() if read == "readline" else s.reader.readuntil(b"\n"))
                    assert got.endswith(b"\n")
                    assert got.count(b"\n") == 1
                    moved += not got.endswith(b"X\n")
                writing.cancel()

    run(main())
