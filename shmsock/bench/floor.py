"""The floor under all figures: the core's ring between two processes in C, without Python (floor.c).

The program is compiled when it is first asked for, from the sources that lie in the package, and kept in the
user's cache. It needs a C compiler; whoever measures does without it where there is none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from shmsock import native
from shmsock.bench import child
from shmsock.errors import RegionError
from shmsock.guests.image import cache_dir

__all__ = ["FloorUnavailable", "available", "cache_line_ns", "program", "run"]

SOURCE = Path(__file__).with_name("floor.c")
NATIVE = Path(native.__file__).parent

#: As native/build.py has them: what is measured is what is installed.
CFLAGS = ["-std=c11", "-O2", "-D_GNU_SOURCE", "-pthread", "-fvisibility=hidden", "-fPIC"]
CFLAGS += ["-Wall", "-Wextra", "-Werror"]

LINE_S = 0.04
KEPT = 8


class FloorUnavailable(RegionError):
    """The program cannot be compiled or run here. The message says why."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EIO, why)


def available() -> bool:
    """Can it be compiled here?"""
    try:
        return bool(program())
    except FloorUnavailable:
        return False


def cache_line_ns(cpus: tuple[int, int] | None = None) -> float | None:
    """Measure a cache line's way from one CPU to another and back at this moment: the median, in ns.

    Takes less than a tenth of a second, once the program is compiled. None where it cannot be measured: no C
    compiler, or one CPU only.
    """
    server, client = cpus or child.cpus()[:2]
    if server == client:
        return None
    try:
        return float(run("line", server, client, LINE_S)["p50_ns"])
    except FloorUnavailable:
        return None


def run(what: str, *arguments: object) -> dict[str, Any]:
    """Run the program with these arguments, which floor.c lists, and return what it says."""
    argv = [str(program()), what, *(str(a) for a in arguments)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise FloorUnavailable(
            f"{shlex.join(argv)} ended with exit status {done.returncode}: {done.stderr.strip()}"
        )
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def program(cache: Path | None = None) -> Path:
    """The compiled program; compiled anew when the core, floor.c or the compiler has changed."""
    compiler = _compiler()
    digest = hashlib.sha256()
    for path in [SOURCE, *sorted(NATIVE.glob("*.[ch]"))]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    flags = CFLAGS + shlex.split(os.environ.get("CFLAGS", ""))
    digest.update("\0".join([*compiler, *flags]).encode())
    try:
        digest.update(str(os.stat(compiler[0]).st_mtime_ns).encode())
        home = (cache or cache_dir()) / "floor"
        built = home / f"floor-{digest.hexdigest()[:16]}"
        if not built.exists():
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home, prefix=".") as scratch:
                made = Path(scratch) / "floor"
                _compile([*compiler, *flags], made)
                os.replace(made, built)
            _forget_old(home)
    except OSError as error:
        raise FloorUnavailable(f"cannot keep the compiled floor program: {error}") from error
    return built


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    seen = f"CC={named[0]} is no program" if named else "no C compiler (cc, gcc, clang)"
    raise FloorUnavailable(f"{seen}: the floor program needs one, apt-get install gcc libc6-dev")


def _compile(command: list[str], made: Path) -> None:
    sources = [SOURCE, *sorted(NATIVE.glob("*.c"))]  # of which none knows Python
    argv = [*command, f"-I{NATIVE}", *map(str, sources), "-o", str(made)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise FloorUnavailable(f"{command[0]} did not compile the floor program:\n{done.stderr.strip()}")


def _forget_old(home: Path) -> None:
    known = sorted(home.glob("floor-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in known[KEPT:]:
        old.unlink(missing_ok=True)
