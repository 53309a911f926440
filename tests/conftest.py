"""For all tests."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import zlib
from collections import defaultdict
from collections.abc import Generator, Iterator

import pytest

# A test run that was started in the background may have been told to ignore SIGINT, and children inherit
# that: those that a test sends one must get it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _size in ("COLUMNS", "LINES"):  # which xdist sets: what commands print is folded for them
    os.environ.pop(_size, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--across",
        action="store_true",
        help="run a third of each test's cases, and of those on uvloop one: for the other Python versions",
    )


def _some_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the other cases. A version has others than the two before it: three have all of them.

    uvloop has its own loop and transports, whatever the version; asyncio's are the version's.
    """
    cases = defaultdict(list)
    for item in items:
        test, _, case = item.nodeid.partition("[")
        if not {"control", "slow", "vm"} & {mark.name for mark in item.iter_markers()}:
            cases[test, "uvloop" in case].append(item)
    dropped = set()
    for (test, on_uvloop), found in cases.items():
        shift = zlib.crc32(test.encode()) + sys.version_info[1]
        if on_uvloop:
            kept = found[shift % len(found) :][:1]
        else:
            kept = found[shift % min(len(found), 3) :: 3]
        dropped |= {*found} - {*kept}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("across"):
        _some_cases(config, items)


def _must_run(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a skip fails, but for what another version of Python has: the reason names that version."""
    if not (report.skipped and os.environ.get("CI")) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not re.search(r"\b3\.\d+\b", reason):
        report.outcome = "failed"
        report.longrepr = f"In CI nothing may be skipped. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _must_run(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _must_run(report)
    return report


@pytest.fixture(scope="module", autouse=True)
def _collecting_is_cheap() -> Iterator[None]:
    """Many tests collect: only what they made themselves is looked at then."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
