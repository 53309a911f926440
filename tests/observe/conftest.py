"""Regions, processes that hold connections in them, and the commands that look at them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shmsock.cli import cli

Look = Callable[..., Any]


class Process:
    """A process of holders.py."""

    def __init__(self, region: Path, *arguments: str) -> None:
        argv = [sys.executable, "-m", "tests.observe.holders", str(region), *arguments]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.began = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tell(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def command(*arguments: object, env: dict[str, str | None] | None = None) -> Result:
    return CliRunner(env=env).invoke(cli, [str(a) for a in arguments], prog_name="shmsock")


def said(*arguments: object, env: dict[str, str | None] | None = None) -> str:
    done = command(*arguments, env=env)
    assert done.exit_code == 0, done.output
    return done.stdout


def seen(*arguments: object) -> Any:
    return json.loads(said(*arguments, "--json"))


@pytest.fixture
def region(shm_region: str) -> Path:
    return Path(shm_region)


@pytest.fixture
def start(region: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*arguments: str) -> Process:
        started.append(Process(region, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.end()
