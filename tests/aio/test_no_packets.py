"""Kernel sockets that are given an address which stands for a name: they fail at once, and nothing leaves by
any interface, whatever the routes. (In network namespaces: as root, or where a user may make namespaces.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aio.processes import PATIENCE
from tests.forked import ROOT

ALONE = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
# Without a scope the kernel takes it, and drops it: it is for this host only, where nobody can have it.
SILENT = ("sendto AF_INET6 (7000, 0, 0)", "sendto AF_INET6 (7000,)")


@pytest.mark.parametrize("routes", ["routed", "alone"])
def test_nothing_leaves(shm_region: Path, loop_name: str, routes: str) -> None:
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.aio.capture", loop_name, routes],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=True,
    )
    *attempts, packets = [json.loads(line) for line in done.stdout.splitlines()]
    assert packets == []
    assert len(attempts) > 20
    for what, said, at_once in attempts:
        assert said != "no error" or what.startswith(SILENT), what
        assert at_once, what


def test_real_hosts_are_left_alone(shm_region: Path, loop_name: str) -> None:
    """198.18.0.0/15, which proxies give to real hosts, is the kernel's."""
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.aio.real_hosts", loop_name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.split() == [host for host in (b"198.18.0.1", b"198.19.255.254") for _ in range(2)]
