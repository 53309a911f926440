"""The C core against memory that lies, and in threads: short forms of `make fuzz` and `make races`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from shmsock.native import build
from tests.native import hostile


def count(said: str, what: str) -> int:
    found = re.search(rf"{what}: (\d+)", said)
    assert found is not None, said
    return int(found[1])


def test_whatever_memory_says_the_core_keeps_its_bounds_and_its_word() -> None:
    said = hostile.run("alone", 1, 1)
    assert count(said, "calls of the core") >= 1_000_000
    assert count(said, "lies") > 100_000


@pytest.mark.parametrize("kind", ["races", "races-strict"])
def test_threads_over_one_mapping_race_nowhere(kind: str) -> None:
    said = hostile.run(kind, 2, 1)
    assert count(said, "bytes read") > 0


def test_a_thread_that_scribbles_harms_nobody_s_memory() -> None:
    assert count(hostile.run("scribble", 2, 1, "scribble"), "words scribbled") > 0


# The fuzzer can fail: checks of the core, and what is left where they are missing.
WITHOUT = [
    ("ring.c", "\n        || off + (1ull << log2_bytes) > g->section_bytes", ""),
    ("ring.c", "SH_LOW(p) - ep->head > ep->rx_bytes || ", ""),
    ("handshake.c", "in.slot >= nd->g.slots || ", ""),
    ("link.c", "if (slots[n] < nd->used)", ""),
    ("datagram.c", "h.length > left", "h.length > left + SH_DATAGRAM_MAX"),
]


@pytest.mark.parametrize(
    ("file", "check", "rest"), WITHOUT if os.environ.get("SHMSOCK_LONG") else WITHOUT[:1]
)
def test_a_check_that_is_missing_is_missed(
    file: str, check: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in [*build.sources(), *build.HERE.glob("*.h")]:
        text = path.read_text()
        if path.name == file:
            assert check in text
            text = text.replace(check, rest)
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(hostile, "OUT", tmp_path)
    with pytest.raises(AssertionError, match="alone"):
        hostile.run("alone", 1, 4)
