"""Instructions per operation of the core, counted by valgrind's callgrind: the same on a noisy machine.

    python -m shmsock.bench.instructions            show them, and fail where one needs more than it did
    python -m shmsock.bench.instructions --write    take them as the reference for this compiler

Counted is what the core executes itself, and how often it calls what is not the core's: the C library, and
through it the kernel. What the library executes is another matter on every processor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from shmsock.bench import floor
from shmsock.guests.image import command_path

__all__ = ["OPERATIONS", "Cost", "complaints", "count", "references"]

#: The works of floor.c, and what one of each is.
OPERATIONS = {
    "echo": "64 B there and back, both ends busy-polling",
    "pumped_echo": "64 B there and back, each end told, pumped and armed again",
    **{
        f"beside_{n}": f"the same beside {n:,} connections on which nothing is said"
        for n in (10, 1000, 30_000)
    },
    "write": "64 KiB written, and read in one piece",
    "idle_pump": "a pass in which 16 peers have nothing to say",
    "wake": "falling asleep, being woken by a futex for 64 B, reading them",
}
SLACK = 1.10
REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "instructions.json"


class Cost(NamedTuple):
    """The cost of one operation."""

    instructions: float
    calls: float


def count(operation: str) -> tuple[Cost, str]:
    """One work of floor.c under callgrind; and for which machine and compiler that holds."""
    valgrind = command_path("valgrind")
    if valgrind is None:
        raise floor.FloorUnavailable("instructions are counted by valgrind: apt-get install valgrind")
    program = str(floor.program())
    with tempfile.TemporaryDirectory() as scratch:
        profile = Path(scratch) / "profile"
        argv = [valgrind, "-q", "--tool=callgrind", f"--callgrind-out-file={profile}"]
        argv += ["--compress-strings=no", "--compress-pos=no", f"--toggle-collect=work_{operation}"]
        env = {**os.environ, "LD_BIND_NOW": "1"}
        done = subprocess.run([*argv, program, "count", operation], capture_output=True, text=True, env=env)
        if done.returncode:
            raise floor.FloorUnavailable(f"counting {operation} failed: {done.stderr.strip()}")
        with profile.open(encoding="utf-8") as lines:
            total = spent(lines, program)
    said = json.loads(done.stdout)
    cost = Cost(*(round(value / said["times"], 1) for value in total))
    return cost, f"{platform.machine()}, {said['compiler']}"


def spent(profile: Iterable[str], program: str) -> Cost:
    """By the program itself: instructions, and calls out of it. The format is in callgrind's manual."""
    instructions = calls = 0
    ours = callee_ours = included = False
    for line in profile:
        key, _, value = line.rstrip("\n").partition("=")
        if key == "ob":
            ours = callee_ours = value == program
        elif key == "cob":
            callee_ours = value == program
        elif key == "calls":
            calls += int(value.split()[0]) if ours and not callee_ours else 0
            callee_ours, included = ours, True  # an object named is that of one call; its cost comes next
        elif line[0].isdigit():
            instructions += int(line.split()[1]) if ours and not included else 0
            included = False
    return Cost(instructions, calls)


def references(file: Path | None = None) -> dict[str, dict[str, Cost]]:
    """For each machine and compiler what each operation cost as it was recorded."""
    file = file or REFERENCE
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {where: {name: Cost(**cost) for name, cost in costs.items()} for where, costs in known.items()}


def complaints(found: dict[str, Cost], reference: dict[str, Cost]) -> list[str]:
    """List what costs more than a tenth more than it did."""
    return [
        f"{name}: {now:g} {what} per operation, and {before:g} before"
        for name, cost in found.items()
        if name in reference
        for what, now, before in zip(Cost._fields, cost, reference[name], strict=True)
        if now > before * SLACK
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Instructions per operation of shmsock's core.")
    parser.add_argument("--write", action="store_true", help="take these as the reference for this compiler")
    write = parser.parse_args().write
    found, where = {}, ""
    try:
        for name in OPERATIONS:
            found[name], where = count(name)
    except floor.FloorUnavailable as problem:
        print(problem, file=sys.stderr)
        return 2
    known = references()
    reference = known.get(where, {})
    print(f"{where}: instructions of the core and calls out of it, per operation")
    for name, cost in found.items():
        old = reference.get(name)
        before = f" (before: {old.instructions:g} {old.calls:g})" if old else ""
        print(f"  {cost.instructions:>8g} {cost.calls:>6g}  {name}: {OPERATIONS[name]}{before}")
    if write:
        known[where] = found
        text = {at: {name: cost._asdict() for name, cost in costs.items()} for at, costs in known.items()}
        REFERENCE.parent.mkdir(exist_ok=True)
        REFERENCE.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    if not reference:
        print(f"no reference for {where}: --write makes these it")
    worse = complaints(found, reference)
    print(*(f"worse: {complaint}" for complaint in worse), sep="\n", end="\n" if worse else "")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
