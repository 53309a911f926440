"""The README's way from nothing to an answer: each of its commands, between two guests with a network."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from shmsock.guests.qemu import Bridge, Fleet, Guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

SECONDS = 500.0  # under emulation, beside others
README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What the README cannot know: a path of this test's own, addresses of its guests, and how long to measure.
SHORT = ["--only", "echo", "--rounds", "1", "--seconds", "0.1"]


def commands() -> list[list[str]]:
    """The blocks of shell commands, a list of lines each."""
    _, _, section = README.read_text().partition("\n## Is it worth it between your VMs?\n")
    blocks = BLOCK.findall(section.partition("\n## ")[0])
    return [[line.partition("  #")[0].rstrip() for line in block.splitlines()] for block in blocks]


@pytest.fixture
def region() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="shmsock-readme-", dir="/dev/shm") as directory:
        yield f"{directory}/vms"


def on_host(line: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def in_guest(guest: Guest, line: str) -> str:
    return guest.run(["sh", "-c", line], timeout=SECONDS).text


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to make a bridge")
def test_from_nothing_to_an_answer(region: str, fleet: Fleet) -> None:
    blocks = commands()
    assert sum(map(len, blocks)) <= 10
    (install, create, boot, look), (examine,), (serve,), (ping, compare) = blocks

    assert install == "pip install '.[bench]'"
    assert "bench" in (metadata.metadata("shmsock").get_all("Provides-Extra") or [])
    assert f"made {region}: " in on_host(create.replace("/dev/shm/vms", region))
    qemu, _, rest = boot.partition(" ... ")
    assert qemu == "qemu-system-x86_64"
    arguments = on_host(f"echo {rest.replace('/dev/shm/vms', region)}")

    with Bridge() as bridge:
        a, b = (fleet.boot(name, net=bridge.tap(), extra=shlex.split(arguments)) for name in ("vm-a", "vm-b"))
        address = in_guest(b, "ip -4 -o addr show scope global").split()[3].partition("/")[0]
        on_host(look.replace("/dev/shm/vms", region))
        for guest in a, b:
            assert in_guest(guest, examine).endswith("nothing is wrong")
        with b.start(["sh", "-c", serve]) as serving:
            serving.expect("vm-b port 7000", SECONDS)
            assert "vm-b" in in_guest(a, ping)
            line = compare.replace("10.0.0.2", address)
            assert line != compare
            said = in_guest(a, f"{line} {shlex.join(SHORT)}")
            page = in_guest(a, "cat report.html")
        assert re.search(
            r"^shmsock, uvloop beside uvloop TCP: .* times (faster|slower)", said, re.MULTILINE
        ), said
        assert "<svg" in page
