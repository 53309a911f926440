"""The models: right as built, and wrong with any of their rules taken out (README.md says how to run one)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.models.views import BUILT, CHANGES, FULL, loses

HERE = Path(__file__).resolve().parent
MODELS = sorted(HERE.glob("*.pml"))

RIGHT = [
    "wake DOORBELLS=3 TIMERS=1",
    "wake DOORBELLS=2 TIMERS=1 DEATHS=1",
    "wake FUTEXES=2 TIMERS=1",
    "wake FUTEXES=2 DEATHS=1",
    "wake FUTEXES=1 RESTARTS=1",
    "wake FUTEXES=2 NAPS=2 TIMERS=1",
    "wake FUTEXES=1 NAPS=1 RESTARTS=1",
    "wake POLLED=2 TIMERS=1 DEATHS=1",
    "wake DOORBELLS=1 FUTEXES=1",
    "wake FUTEXES=1 POLLED=1",
    "notify N=3",
    "notify N=3 LANES=3",
    "space MORE=1",
    "space FIRST=1 NEED=8 MORE=8",
    "space FIRST=1 NEED=8 MORE=8 NO_QUARTER",
    "grow N=3",
    "grow N=4",
    "attach N=1",
    "attach D0=0",
    "attach D1=0",
    "attach N=1 D1=0 LAST_KEPT",
    "attach N=1 D1=0 NO_ANSWER",
    "slot G=2",
    "slot G=3",
    "slot DROP=1",
    "reuse",
    "reuse DROPS=0",
    "reuse DROPS=0 N=3",
    "used",
    "features",
    "features LIVES=4",
]

WRONG = [
    "wake DOORBELLS=1 NO_F2",
    "wake FUTEXES=1 NO_F2",
    "wake DOORBELLS=1 NO_R2",
    "wake FUTEXES=1 NO_R2",
    "wake DOORBELLS=2 NO_COUNTER",
    "wake FUTEXES=2 NO_COUNTER",
    "wake DOORBELLS=2 DEATHS=1 SLEEP_FROM_0",
    "wake FUTEXES=2 DEATHS=1 SLEEP_FROM_0",
    "wake DOORBELLS=2 ALWAYS_KICK",
    "wake DOORBELLS=2 ONE_SLEEP",
    "wake DOORBELLS=2 TIMERS=1 ONLY_NEWS",
    "wake FUTEXES=2 TIMERS=1 WAIT_ON_NOTIFY",
    "wake FUTEXES=2 TIMERS=1 NO_KICKED_FOR",
    "wake FUTEXES=2 TIMERS=1 SLEEP_SEQ_FIRST",
    "wake FUTEXES=1 ARMED_FIRST",
    "wake FUTEXES=1 ARM_LATE",
    "wake FUTEXES=2 FILL_FIRST",
    "wake POLLED=1 NO_WAKE",
    "wake POLLED=1 LATE_SEEN",
    "wake FUTEXES=1 NAPS=1 NO_F2",
    "wake FUTEXES=2 NAPS=1 NAP_FIRST",
    "wake FUTEXES=1 NAPS=1 NO_NAP_R2",
    "wake FUTEXES=1 NAPS=1 ONE_WORD",
    "notify NO_F1",
    "notify NO_R1",
    "notify NO_R1_ARM",
    "notify NO_R1_REARM",
    "notify NOTIFY_FIRST",
    "notify TOGGLES_FIRST",
    "notify LOG_LATE",
    "notify NO_SECOND_LOAD",
    "notify ONE_TOO_MANY",
    "notify NO_SCAN",
    "notify LANES=3 SECOND_IS_LAST",
    "notify LANES=3 LOG_FIRST",
    "notify POLL_FIRST",
    "notify ALWAYS_TOGGLE",
    "notify NO_ARM",
    "notify ARM_BLIND",
    "notify NO_REARM",
    "notify REARM_BLIND",
    "notify SLEEP_TOUCHED",
    *(
        f"space FIRST=1 NEED=8 MORE=8 {flag}"
        for flag in (
            "NO_W_PRODUCER",
            "NO_SECOND_POLL",
            "NO_W_ARM",
            "NO_W_REARM",
            "NO_ARM_WANT",
            "NO_REARM_WANT",
            "NO_ARM_SPACE",
            "NO_REARM_SPACE",
            "KNOWN_IGNORED",
        )
    ),
    "grow NO_COPY",
    "grow DESCRIPTOR_FIRST",
    "grow P_FIRST",
    "grow EARLY_REUSE",
    "grow DESCRIPTOR_UNASKED",
    "attach D1=0 NOCLEAR",
    "attach D1=0 NOTIFY_FIRST",
    "attach UNTAGGED",
    "attach D1=0 SAME_INC",
    "attach NO_FIRST_POLL",
    "attach NO_SRC",
    "attach N=1 D1=0 LAST_KEPT NO_ANSWER",
    "slot STALE_IGNORED",
    "slot EARLY_FREE",
    "slot DROP=1 NORECHECK",
    "slot FIN_APART",
    "slot EOF_AT_DONE",
    "reuse DROPS=0 CHECK_FIRST",
    "reuse USERS_FIRST",
    "reuse ACK_FIRST",
    "reuse USERS_CLEARED",
    "reuse TAG_CLEARED",
    "reuse MAIL_LEFT",
    "used USED_LATE",
    "used USED_ANEW",
    "used ARENA_FIRST",
    "used STEP_NONE",
    "features BITS_LATE",
    "features BITS_FIRST",
    "features NO_COMPARE",
]


# The largest: so many states that optimising their search pays.
LARGE = {
    "wake DOORBELLS=1 FUTEXES=1",
    "wake FUTEXES=2 TIMERS=1",
    "wake FUTEXES=2 DEATHS=1",
    "wake FUTEXES=1 POLLED=1",
    "wake FUTEXES=2 NAPS=2 TIMERS=1",
    "notify N=3",
    "notify N=3 LANES=3",
    "space MORE=1",
    "attach N=1",
    "attach D0=0",
    "attach D1=0",
    "slot G=3",
}

COMPILED_QUICKLY = ("clang", "-O0")
WHOLE = ("-m1000000", "-w22")
FIRST = ("-m100000", "-w18")
"""Depth and table of a search: its memory is got first, and the first error comes soon."""


def search(case: str, where: Path, compiler: Sequence[str], limits: Sequence[str]) -> str:
    """Everything that can happen in a model, or the first error. Returns what the search says."""
    for tool in ("spin", compiler[0]):
        assert shutil.which(tool), f"{tool} is missing: .ci/setup test installs it (Debian package {tool})"
    model, *defines = case.split()
    for file in (*HERE.glob("*.h"), HERE / f"{model}.pml"):
        shutil.copy(file, where)

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0 or command[0] == "./pan", f"{' '.join(command)}:\n{done.stdout}"
        return done.stdout

    said = run("spin", "-a", *(f"-D{define}" for define in defines), f"{model}.pml")
    assert "error" not in said.lower(), said
    run(*compiler, "-w", "-DSAFETY", "-DNOCLAIM", "-DCOLLAPSE", "-DVECTORSZ=2048", "-o", "pan", "pan.c")
    return run("./pan", *limits)


@pytest.mark.parametrize("case", RIGHT)
def test_is_right_as_built(case: str, tmp_path: Path) -> None:
    said = search(case, tmp_path, ("gcc", "-O1") if case in LARGE else COMPILED_QUICKLY, WHOLE)
    assert "errors: 0\n" in said, said
    for incomplete in ("Search not completed", "max search depth too small", "out of memory"):
        assert incomplete not in said, said
    assert "Full statespace search" in said, said


@pytest.mark.parametrize("case", WRONG)
def test_is_wrong_without_the_rule(case: str, tmp_path: Path) -> None:
    said = search(case, tmp_path, COMPILED_QUICKLY, FIRST)
    assert "assertion violated" in said, said
    assert "errors: 1\n" in said, said


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_each_flag_is_explained_and_tried(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    used = set(re.findall(r"^#ifn?def (\w+)$", text, re.M)) | set(re.findall(r"defined\((\w+)\)", text))
    flags = used - set(re.findall(r"^#ifndef (\w+)\n#define \1 ", text, re.M))
    head = text.partition("*/")[0]
    tried = {
        define
        for case in (*RIGHT, *WRONG)
        if case.split()[0] == file.stem
        for define in case.split()[1:]
        if "=" not in define
    }
    assert flags == tried
    assert [flag for flag in flags if not re.search(rf"\b{flag}\b", head)] == []
    # what is listed there as a rule is in an own case that goes wrong
    rules = set(re.findall(r"^ \*   (\w+) {2,}\S", head.partition("Flags")[2], re.M))
    assert {case.split()[-1] for case in WRONG if case.split()[0] == file.stem} - rules <= {"NO_ANSWER"}
    assert rules <= {case.split()[-1] for case in WRONG}


@pytest.mark.parametrize(("change", "lost"), CHANGES, ids=lambda value: str(value))
def test_on_a_weaker_memory(change: dict[str, str], lost: bool) -> None:
    assert loses(change)[0] is lost


def test_each_full_fence_is_needed() -> None:
    fences = {name for name, kind in BUILT.items() if kind == FULL}
    assert fences == {
        name for change, lost in CHANGES if lost and len(change) == 1 for name in change if name in fences
    }
