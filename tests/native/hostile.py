"""Builds and runs the core against hostile memory and races: `python -m tests.native.hostile WHAT NUMBER`.

WHAT is `fuzz`, with random inputs, for so many million calls; `libfuzzer`, which makes inputs of those that
reach something new, for so many seconds; `coverage`, millions of calls; or `races`, seconds of each kind. The
parts are in core/: the core is compiled as it is, with a header in front that is asked at each access to
shared memory.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from shmsock.native import build

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "core"
OUT = ROOT / "build" / "hostile"

ADDRESSES = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KINDS = {
    "alone": ["-O2", "-DALONE", *ADDRESSES],
    "libfuzzer": ["-O1", "-fsanitize=fuzzer", *ADDRESSES],
    "coverage": ["-O1", "-DALONE", "-fprofile-instr-generate", "-fcoverage-mapping"],
    "races": ["-O1", "-fsanitize=thread", "-DCOPIES_MAY_RACE"],
    "races-strict": ["-O1", "-fsanitize=thread"],
    "scribble": ["-O1", "-DCOPIES_MAY_RACE", *ADDRESSES],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "handle_abort=1",
    "LLVM_PROFILE_FILE": os.devnull,  # else in the directory that it is started in
    "TSAN_OPTIONS": f"suppressions={HERE / 'tsan.supp'}:halt_on_error=1",
}


def compiled(kind: str) -> Path:
    """Compile that kind of program, unless it is there."""
    fuzz = kind in ("alone", "libfuzzer", "coverage")
    core = [path for path in build.sources() if path.name != "fake.c"]
    sources = [*core, HERE / "party.c", HERE / ("fuzz.c" if fuzz else "races.c")]
    front = HERE / ("lies.h" if fuzz else "races.h")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-pthread", "-g", "-Wall", "-Wextra", "-Werror", *KINDS[kind]]
    digest = hashlib.sha256("\0".join(flags).encode())
    for path in [*sources, *build.headers(), *sorted(HERE.glob("*.h"))]:
        digest.update(path.read_bytes())
    program = OUT / f"{kind}-{digest.hexdigest()[:16]}"
    if not program.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        made = program.with_suffix(f".{os.getpid()}")
        command = ["clang", *flags, f"-I{build.HERE}", "-include", str(front), *map(str, sources)]
        subprocess.run([*command, "-o", str(made)], check=True)
        made.replace(program)
    return program


def run(kind: str, *args: object, **more: str) -> str:
    """Run that program to its end. Returns what it said; raises AssertionError if it found something."""
    command = ["nice", "-n", "10", str(compiled(kind)), *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT, **more}, capture_output=True, text=True)
    assert done.returncode == 0, f"{kind} {args}: {done.stdout[-500:]}{done.stderr[:6000]}"
    return done.stdout


def libfuzzer(seconds: int) -> None:
    corpus = OUT / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-len_control=0", "-timeout=60"]
    command = [
        "nice",
        "-n",
        "10",
        str(compiled("libfuzzer")),
        *options,
        f"-artifact_prefix={OUT}/",
        str(corpus),
    ]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)


def coverage(millions: int) -> None:
    """Print which lines of the core no input reached, and how many were."""
    raw, merged = OUT / "coverage.raw", OUT / "coverage.profile"
    print(run("coverage", 1, millions, LLVM_PROFILE_FILE=str(raw)), end="")
    subprocess.run(["llvm-profdata", "merge", str(raw), "-o", str(merged)], check=True)
    what = [str(compiled("coverage")), f"-instr-profile={merged}", str(build.HERE)]
    shown = subprocess.run(["llvm-cov", "show", *what], check=True, capture_output=True, text=True).stdout
    for line in shown.splitlines():
        if line.startswith("/") or line.partition("|")[2].strip().startswith("0|"):
            print(line)
    subprocess.run(["llvm-cov", "report", *what], check=True)


def main(what: str, amount: int) -> None:
    if what == "fuzz":
        print(run("alone", int.from_bytes(os.urandom(3), "little"), amount), end="")
    elif what == "libfuzzer":
        libfuzzer(amount)
    elif what == "coverage":
        coverage(amount)
    else:
        for kind, *more in (("races",), ("races-strict",), ("scribble", "scribble")):
            seed = int.from_bytes(os.urandom(3), "little")
            print(f"{kind}, seed {seed}: {run(kind, amount, seed, *more)}", end="")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
