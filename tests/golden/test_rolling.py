"""Processes of this version and of the one before on one region, under traffic, while one after the other is
upgraded, and set back; and versions to come, as this one with other terms."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner

import shmsock
from shmsock import region as regions
from shmsock.cli import cli
from shmsock.doctor.finding import Finding
from shmsock.doctor.peers import peers
from shmsock.engine.features import OWN, release_text
from shmsock.observe.snapshot import Section, inspect
from tests.golden.test_golden import restore
from tests.golden.versions import BEFORE, HERE, environment

PATIENCE = 60.0
THIS = release_text(OWN.release)
NEW, BIT = 9 << 24, 1 << 40


@pytest.fixture
def path() -> Iterator[str]:
    """A region that the version before has made."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        restore(f"{folder}/region", BEFORE, "idle")
        yield f"{folder}/region"


class Peer:
    """A process of peer.py: `async with Peer(...)`."""

    def __init__(self, version: str | None, loop: str, role: str, path: str, **terms: Any) -> None:
        self.command = [sys.executable, str(HERE / "peer.py"), loop, role, path]
        self.env = {**environment(version), **terms}

    async def __aenter__(self) -> Peer:
        pipe = subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            *self.command, env=self.env, stdin=pipe, stdout=pipe
        )
        return self

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)).decode().rstrip()

    async def rounds(self, count: int) -> None:
        """Wait until all came back right so often."""
        while count:
            line = await self.line()
            assert line.startswith(("round", "failed:")), line
            count -= line == "round"

    async def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), PATIENCE)
        assert self.process.returncode == 0

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            await self.kill()


def sections(path: str) -> dict[str | None, Section]:
    """What this version sees of the region, by name."""
    with regions.open(path, writable=False) as opened:
        return {section.name: section for section in inspect(opened).sections if section.state == "live"}


def sections_before(path: str) -> dict[str, str]:
    """What `shmsock info` of the version before tells: states by name."""
    info = [sys.executable, "-m", "shmsock", "info", path, "--json"]
    done = subprocess.run(
        info, env=environment(BEFORE), cwd=Path(path).parent, check=True, capture_output=True
    )
    (found,) = json.loads(done.stdout)["regions"]
    return {section["name"]: section["state"] for section in found["content"]["sections"]}


async def rolling(path: str, loop: str) -> None:
    """Both of the version before; the server is upgraded, then the client, and then both go back."""

    def peer(version: str | None, role: str) -> Peer:
        return Peer(version, loop, role, path)

    async with peer(BEFORE, "server") as server, peer(BEFORE, "client") as client:
        assert await server.line() == "ready"
        await client.rounds(2)
        await server.end()
        async with peer(None, "server") as server:
            await client.rounds(2)
            there = await asyncio.to_thread(sections, path)
            assert {name: s.release for name, s in there.items()} == {"server": THIS, "client": "0.1"}
            states = await asyncio.to_thread(sections_before, path)
            assert states["server"] == states["client"] == "live"
            await client.kill()
            async with peer(None, "client") as client:
                await client.rounds(2)
                await server.kill()
                async with peer(BEFORE, "server") as server:
                    await client.rounds(2)
                    await client.end()
                    async with peer(BEFORE, "client") as client:
                        await client.rounds(1)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_one_after_the_other_is_upgraded_under_traffic(path: str, loop: str) -> None:
    asyncio.run(rolling(path, loop))


KINDS = {
    "compatible": (0, BIT, 0, 0),
    "read-only": (0, 0, BIT, 0),
    "incompatible": (0, 0, 0, BIT),
    "minimum": (NEW, 0, 0, 0),
}


def told(path: str) -> tuple[Finding, str, str]:
    """What doctor, info and peers tell of a peer that this version does not connect to."""
    with regions.open(path, writable=False) as opened:
        (finding,) = [f for f in peers(opened, inspect(opened)) if f.name == "peer-version"]
    texts = [CliRunner().invoke(cli, [*words, path]).output for words in (["info"], ["peers", "-i"])]
    return finding, texts[0], texts[1]


def terms(kind: str) -> dict[str, str]:
    least, more, to_link, to_look = KINDS[kind]
    return {"TERMS": f"{NEW} {least} {OWN.features | more} {to_link} {to_look}"}


def line(needs: str, where: str) -> str:
    return (
        rf"peer '\w+' \(section \d\) runs shmsock .* needs {needs}.*: upgrade it {where}, "
        r"`pip install -U 'shmsock>=9\.0\.0'`"
    )


async def connects(path: str) -> None:
    async with shmsock.attach(path, name="client") as node:
        _, writer = await shmsock.open_connection("server", 7000, node=node)
        writer.close()
        transport, _ = await shmsock.create_datagram_endpoint(
            asyncio.DatagramProtocol, remote_addr=("server", 7001), node=node
        )
        transport.close()


async def with_server_to_come(path: str, kind: str) -> None:
    async with Peer(None, "asyncio", "server", path, **terms(kind)) as server:
        assert await server.line() == "ready"
        there = (await asyncio.to_thread(sections, path))["server"]
        assert there.release == "9.0.0"
        assert there.ports == ([7000, 7001] if kind in ("compatible", "read-only") else [])
        if kind == "compatible":
            assert there.upgrade == ""
            await connects(path)
            return
        lacks = "shmsock 9.0.0" if kind == "minimum" else "feature 40"
        assert "upgrade it here, " in there.upgrade
        finding, *told_of = await asyncio.to_thread(told, path)
        assert finding.level == "warning"
        assert finding.seen.endswith(f"needs {lacks}, and this is shmsock {THIS}")
        assert finding.mend == "upgrade it here, `pip install -U 'shmsock>=9.0.0'`"
        for text in told_of:
            assert re.search("runs shmsock 9.0.0 .*upgrade it here", text.replace("\n", " ")), text
        with pytest.raises(ConnectionRefusedError, match=line(re.escape(lacks), "here")):
            await connects(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_of_a_version_to_come(path: str, kind: str) -> None:
    asyncio.run(with_server_to_come(path, kind))


async def with_client_to_come(path: str) -> None:
    async with shmsock.attach(path, name="server") as node:
        server = await shmsock.start_server(print, None, 7000, node=node)
        async with Peer(None, "asyncio", "client", path, **terms("read-only")) as client:
            said = await client.line()
            assert re.fullmatch(f"failed: ConnectionRefusedError.*{line('feature 40', 'there')}", said), said
            _, writer = await shmsock.open_connection("server", 7000, node=node)  # others are not concerned
            writer.close()
        server.close()


def test_a_client_of_a_version_to_come(path: str) -> None:
    asyncio.run(with_client_to_come(path))


def test_versions_are_built_of_what_is_kept() -> None:
    home = Path(environment(BEFORE)["PYTHONPATH"])
    code = "import shmsock.native._core as core; print(core.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(BEFORE), cwd=home, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(home))
