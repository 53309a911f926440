"""The worker of the demonstrations, on this host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsock.bench.child import Child, have_uvloop
from shmsock.bench.demo import make_file, worker


@pytest.fixture(params=["asyncio", "uvloop"])
def common(request: pytest.FixtureRequest, shm_region: Path) -> tuple[str, ...]:
    if request.param == "uvloop" and not have_uvloop():
        pytest.skip("uvloop is not installed")
    return "--region", str(shm_region), "--name", "vm-a", "--loop", request.param


@pytest.fixture
def serving(common: tuple[str, ...], tmp_path: Path) -> Iterator[dict[str, Any]]:
    make_file(tmp_path / "theirs", 3_000_000)
    files = "--file", str(tmp_path / "theirs"), "--save", str(tmp_path / "received")
    with Child(worker("serve", *common, *files, "--port", 0)) as child:
        yield child.line()
    assert child.process.returncode == 0


def ask(role: str, *arguments: object) -> list[dict[str, Any]]:
    with Child(worker(role, *arguments)) as child:
        return list(child.lines())


def test_echo(serving: dict[str, Any], common: tuple[str, ...]) -> None:
    assert (serving["event"], serving["host"]) == ("listening", "vm-a")
    said = ask("echo", "vm-a", *common, "--port", serving["port"], "--count", 500)[-1]
    assert (said["count"], said["size"]) == (500, 64)


def test_send_random_bytes(serving: dict[str, Any], common: tuple[str, ...]) -> None:
    said = ask("send", "vm-a", *common, "--port", serving["port"], "--bytes", 5_000_000)[-1]
    assert said["same"]
    assert (said["sent"], said["received"]) == (5_000_000, 0)
    assert said["there"]["sha256_received"] == said["sha256_sent"]


def test_send_files_both_ways(serving: dict[str, Any], common: tuple[str, ...], tmp_path: Path) -> None:
    mine, back = tmp_path / "mine", tmp_path / "back"
    make_file(mine, 3_000_000)
    files = "--file", mine, "--save", back, "--both"
    said = ask("send", "vm-a", *common, "--port", serving["port"], "--bytes", 3_000_000, *files)[-1]
    assert said["same"]
    assert said["sha256_sent"] == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert back.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "received").read_bytes() == mine.read_bytes()
