"""Copies of other processes' descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shmsock.region.descriptors import copy_descriptor, copy_eventfd, eventfd_id


class Other:
    """A process with an eventfd, and a pipe."""

    def __init__(self, name: str = "shmsock-keeper") -> None:
        code = (
            f"open('/proc/self/comm', 'w').write({name!r})\n"
            "import os, sys; from shmsock.region.descriptors import eventfd_id\n"
            "fd = os.eventfd(0); pipe = os.pipe()[0]; print(fd, eventfd_id(fd), pipe, flush=True)\n"
            "if sys.stdin.read(1): print(os.eventfd_read(fd), flush=True)\n"
            "sys.stdin.read()"
        )
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
        self.pid = self.process.pid
        self.fd, self.ident, self.pipe = (int(word) for word in self.line().split())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> None:
        if self.process.returncode is None:
            self.process.communicate()


@pytest.fixture
def other() -> Iterator[Other]:
    made = Other()
    yield made
    made.end()


def test_what_is_written_to_the_copy_arrives(other: Other) -> None:
    fd = copy_eventfd(other.pid, other.fd, other.ident)
    assert fd >= 0
    assert eventfd_id(fd) == other.ident
    os.eventfd_write(fd, 7)
    os.close(fd)
    assert other.process.stdin is not None
    other.process.stdin.write("?")
    other.process.stdin.flush()
    assert other.line() == "7\n"


def test_another_one_than_meant_is_not_taken(other: Other) -> None:
    mine = os.eventfd(0)
    before = os.listdir("/proc/self/fd")
    assert 0 != eventfd_id(mine) != other.ident
    assert copy_eventfd(other.pid, other.fd, eventfd_id(mine)) == -1
    assert copy_eventfd(other.pid, other.fd, 0) == -1
    assert copy_eventfd(other.pid, other.pipe, other.ident) == -1
    assert os.listdir("/proc/self/fd") == before
    os.close(mine)


def test_nothing_to_be_had(other: Other) -> None:
    assert copy_eventfd(other.pid, 99, other.ident) == -1
    with pytest.raises(OSError, match="pidfd_getfd"):
        copy_descriptor(other.pid, 99)
    pid = other.pid
    other.end()
    assert copy_eventfd(pid, other.fd, other.ident) == -1


def test_of_programs_without_a_node_nothing_is_taken() -> None:
    """The words may be a VM's, which would have root ring others' eventfds."""
    other = Other("some-server")
    assert copy_eventfd(other.pid, other.fd, other.ident) == -1
    other.end()


def test_of_other_users_nothing_is_taken(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert copy_eventfd(other.pid, other.fd, other.ident) == -1


def test_only_eventfds_have_an_id(other: Other) -> None:
    pipe = os.pipe()
    assert eventfd_id(pipe[0]) == 0
    for fd in pipe:
        os.close(fd)
    assert eventfd_id(pipe[0]) == 0
