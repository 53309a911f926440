"""Instructions per operation: what is counted, what is complained of, and what the core needs now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shmsock.bench import floor, instructions
from shmsock.bench.instructions import OPERATIONS, Cost, complaints, count, references, spent

PROFILE = """\
# callgrind format
positions: line
events: Ir
summary: 999

ob=/lib/ld.so
fl=???
fn=start
0 700
cob=/program
cfi=???
cfn=main
calls=1 0
0 299

ob=/program
fl=???
fn=main
0 10
cfn=sh_write
calls=5 0
0 200
0 4
cob=/lib/libc.so
cfi=string.c
cfn=memcpy
calls=3 17
0 80
cfn=sh_write
calls=1 0
0 5

fn=sh_write
12 100

ob=/lib/libc.so
fl=string.c
fn=memcpy
17 80
cob=/lib/ld.so
cfi=???
cfn=resolve
calls=9 0
17 1
"""

valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="no valgrind: apt-get install valgrind"
)


def test_own_instructions_and_calls_out_are_counted() -> None:
    assert spent(PROFILE.splitlines(keepends=True), "/program") == Cost(114, 3)


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (Cost(110, 5), []),
        (Cost(50, 1), []),
        (Cost(111, 5), ["111 instructions per operation, and 100 before"]),
        (Cost(100, 6), ["6 calls per operation, and 5 before"]),
    ],
)
def test_a_tenth_more_is_complained_of(now: Cost, worse: list[str]) -> None:
    found = complaints({"echo": now, "new": Cost(1e9, 1e9)}, {"echo": Cost(100, 5), "gone": Cost(1, 1)})
    assert found == [f"echo: {text}" for text in worse]


def test_references_cover_what_is_counted() -> None:
    known = references()
    assert {"x86_64, gcc 12", "x86_64, clang 14"} <= set(known)
    assert [set(costs) for costs in known.values()] == [set(OPERATIONS)] * len(known)


def test_no_file_is_no_reference(tmp_path: Path) -> None:
    assert references(tmp_path / "none.json") == {}


@valgrind
@pytest.mark.slow
def test_the_core_needs_no_more_than_it_did() -> None:
    found, where = {}, ""
    for name in OPERATIONS:
        found[name], where = count(name)
    assert found["beside_30000"].instructions < 1.05 * found["beside_10"].instructions
    if where not in references():
        pytest.skip(f"no reference for {where}: python -m shmsock.bench.instructions --write")
    assert complaints(found, references()[where]) == []


@valgrind
@pytest.mark.slow
def test_more_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same core without the optimiser."""
    monkeypatch.setattr(instructions, "REFERENCE", tmp_path / "reference.json")
    monkeypatch.setattr(instructions, "OPERATIONS", {"echo": "an echo"})
    cost, where = count("echo")
    assert count("echo") == (cost, where)
    (tmp_path / "reference.json").write_text(json.dumps({where: {"echo": cost._asdict()}}))
    monkeypatch.setattr("sys.argv", ["instructions"])
    assert instructions.main() == 0
    monkeypatch.setenv("CFLAGS", "-O0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert instructions.main() == 1
    assert "worse: echo: " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["instructions", "--write"])
    assert instructions.main() == 0
    assert references(tmp_path / "reference.json")[where]["echo"].instructions > cost.instructions


def test_without_valgrind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "command_path", lambda name: None)
    monkeypatch.setattr("sys.argv", ["instructions"])
    assert instructions.main() == 2
    assert "apt-get install valgrind" in capsys.readouterr().err
    with pytest.raises(floor.FloorUnavailable):
        count("echo")
