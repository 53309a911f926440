"""SHMSOCK_DEBUG: what happens to peers and connections is logged, and nothing when it is not asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, logging, sys, shmsock
if "logs" in sys.argv:
    logging.basicConfig(format="mine %(name)s %(levelname)s %(message)s")
async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
    writer.close()
async def main():
    async with shmsock.attach(sys.argv[1], name="vm-a") as node:
        async with await shmsock.start_server(echo, port=7000, node=node):
            reader, writer = await shmsock.open_connection("vm-a", 7000, node=node)
            for _ in range(100):
                writer.write(b"x")
                await reader.readexactly(1)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            try:
                await shmsock.open_connection(0, 7001, node=node)
            except ConnectionRefusedError:
                pass
asyncio.run(main())
"""


def said(region: Path, debug: str | None, *arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "SHMSOCK_DEBUG"}
    if debug is not None:
        env["SHMSOCK_DEBUG"] = debug
    argv = [sys.executable, "-c", PROGRAM, str(region), *arguments]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def test_the_life_of_a_connection(region: Path) -> None:
    lines = said(region, "1").splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} \d+ vm-a \(section 0\): ", line) for line in lines), lines
    text = "\n".join(lines)
    at = -1
    for step in (
        "attached as process",
        "listens on 7000",
        "asks section 0 for a connection: <Connection OPENING ('vm-a', 32768",
        "accepts a connection of section 0",
        "FIN: <Connection OPEN ('vm-a', 32768)",
        "lets go (no error)",
        "listens on 7000 no more",
        "over: ",
    ):
        at = text.find(step, at + 1)
        assert at >= 0, (step, text)
    assert "accepted by its peer" in text
    assert len(lines) < 40  # nothing is said of the 100 messages


def test_a_program_that_logs_itself(region: Path) -> None:
    lines = said(region, "1", "logs").splitlines()
    assert lines
    assert all(line.startswith("mine shmsock.engine DEBUG vm-a (section 0): ") for line in lines)


@pytest.mark.parametrize("debug", [None, "0", ""])
def test_nobody_asked(region: Path, debug: str | None) -> None:
    assert said(region, debug) == ""
