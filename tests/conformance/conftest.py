"""Coroutine functions run on the network that they are given; afterwards nothing may be left."""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.aio.conftest import keepers, open_files
from tests.conformance.certificates import Contexts


def descriptors() -> list[str]:
    """What tests can leave open; not what an interpreter opens once."""
    return sorted(
        what
        for what in open_files().values()
        if what.startswith(("socket:", "anon_inode:")) or "shmsock" in what
    )


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    # There may be some that a test of another kind left to the collector.
    files, threads = Counter(descriptors()), keepers()
    yield
    gc.collect()
    assert Counter(descriptors()) <= files, "descriptors are left"
    assert keepers() <= threads, "heartbeat threads are left"


@pytest.fixture(scope="package")
def tls() -> Contexts:
    return Contexts()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    args = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    net: Any = args["net"]
    net.run(lambda: test(**args))
    return True
