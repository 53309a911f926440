"""Builds the sdist, and from it a wheel for each Python and platform: `make wheels`.

One machine makes all of them. zig's C compiler (PyPI's ziglang) brings the C libraries of each platform, the
glibc of 2012 and musl among them; setuptools runs in an interpreter of each version, and takes its headers.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import ziglang
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

from release.sbom import NAME, problem, sbom

__all__ = ["PYTHONS", "TARGETS", "Target", "check", "make_sdist", "make_wheel"]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
SUMS = "SHA256SUMS"


class Target(NamedTuple):
    """A platform: what zig and auditwheel call it, and the end of a module's file name."""

    arch: str
    libc: str
    zig: str
    tag: str


TARGETS = {
    target.tag: target
    for arch in ("x86_64", "aarch64")
    for target in (
        Target(arch, "gnu", f"{arch}-linux-gnu.2.17", f"manylinux_2_17_{arch}"),
        Target(arch, "musl", f"{arch}-linux-musl", f"musllinux_1_2_{arch}"),
    )
}


class ReleaseError(Exception):
    """What could not be made, and why."""


def run(argv: Sequence[str | Path], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a command. Raises ReleaseError with what it said."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, argv))}: status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def tool(name: str, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a program of this environment."""
    beside = Path(sys.executable).parent
    path = f"{beside}:{os.environ['PATH']}"
    return run([beside / name, *arguments], env={"PATH": path, **(env or {})})


def epoch() -> int:
    """The time that is noted in what is built: that of the commit, so that it is the same each time."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given and (ROOT / ".git").exists():
        given = run(["git", "log", "-1", "--format=%ct"])
    return int(given or 315532800)  # 1980: a zip file knows nothing older


# -- the sdist ---------------------------------------------------------------------------------------------


def make_sdist(into: Path) -> Path:
    """Write it, each time the same bytes from the same sources."""
    with tempfile.TemporaryDirectory(prefix="shmsock-sdist-") as scratch:
        run([sys.executable, "-m", "build", "-q", "--sdist", "--no-isolation", "-o", scratch, str(ROOT)])
        (made,) = Path(scratch).glob("*.tar.gz")
        into.mkdir(parents=True, exist_ok=True)
        (into / made.name).write_bytes(_same_each_time(made))
    return into / made.name


def _same_each_time(archive: Path) -> bytes:
    """setuptools notes times and owners."""
    out = BytesIO()
    with (
        tarfile.open(archive) as old,
        gzip.GzipFile(fileobj=out, mode="wb", filename="", mtime=epoch()) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = epoch()
            member.pax_headers = {}
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member))
    return out.getvalue()


# -- interpreters ------------------------------------------------------------------------------------------


def interpreter(version: str) -> list[str]:
    """The command that runs CPython of that version. Raises ReleaseError where there is none."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version == own:
        return [sys.executable]
    return run([ROOT / ".ci" / "python", version]).split()


def environment(version: str) -> list[str]:
    """The command that runs an environment with what builds, made where it is not there."""
    command = interpreter(version)
    home = CACHE / f"venv-{version}"
    python = [*command[:-1], str(home / "bin" / "python")]
    requires = requirements()
    mark = home / ".made"
    wanted = f"{command} {requires}"
    if not mark.exists() or mark.read_text() != wanted:
        run([*command, "-m", "venv", "--clear", str(home)])
        run([*python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *requires])
        mark.write_text(wanted)
    return python


def requirements() -> list[str]:
    """What pyproject.toml says building takes."""
    line = next(t for t in (ROOT / "pyproject.toml").read_text().splitlines() if t.startswith("requires = "))
    return [part.strip(' "') for part in line.partition("[")[2].rstrip("]").split(",")]


# -- wheels ------------------------------------------------------------------------------------------------


def make_wheel(sdist: Path, version: str, target: Target, into: Path) -> Path:
    """Build it of the sdist, repair it, add what it is made of, check it."""
    python = environment(version)
    home = CACHE / f"{version}-{target.tag}"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(home, filter="data")
    (source,) = home.iterdir()
    cffi = run([*python, "-c", "import cffi; print(cffi.__version__)"]).strip()
    _headers(home, version, target, python)
    zig = f"{Path(ziglang.__file__).parent / 'zig'} cc -target {target.zig}"
    env = {
        "CC": zig,
        "LDSHARED": f"{zig} -shared -s",
        "CFLAGS": f"-g0 -Wno-error -I{home / 'include'}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version.replace('.', '')}-{target.arch}-linux-{target.libc}.so",
        "SOURCE_DATE_EPOCH": str(epoch()),
        "ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(CACHE / "zig"),
        "_PYTHON_HOST_PLATFORM": f"linux-{target.arch}",
    }
    pip = [*python, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-build-isolation"]
    run([*pip, "--no-deps", "--no-index", "-w", str(home / "built"), str(source)], env=env)
    (built,) = (home / "built").glob("*.whl")
    wheel = _finish(built, target, cffi, into)
    check([wheel])
    return wheel


PYCONFIG = """
import os, sysconfig
folder = f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}/python{sysconfig.get_python_version()}"
name = os.path.join(folder, "pyconfig.h")
print(open(name if os.path.exists(name) else sysconfig.get_config_h_filename()).read())
"""


def _headers(home: Path, version: str, target: Target, python: list[str]) -> None:
    """Debian has one pyconfig.h for each architecture, in a folder that a cross compiler does not look into.

    All that Python.h takes from it is the same on both of ours: preprocessed with either, no line differs.
    """
    folder = home / "include" / f"{target.arch}-linux-gnu" / f"python{version}"
    folder.mkdir(parents=True)
    (folder / "pyconfig.h").write_text(run([*python, "-c", PYCONFIG]))


def _finish(built: Path, target: Target, cffi: str, into: Path) -> Path:
    """Name what musl's library is called where it is installed, add the list of parts, have it repaired."""
    dates = {"SOURCE_DATE_EPOCH": str(epoch())}
    with tempfile.TemporaryDirectory(prefix="shmsock-wheel-") as scratch:
        tool("wheel", "unpack", "-d", scratch, built)
        (unpacked,) = Path(scratch).iterdir()
        (core,) = unpacked.glob("shmsock/native/_core.*.so")
        if target.libc == "musl":
            tool("patchelf", "--replace-needed", "libc.so", f"libc.musl-{target.arch}.so.1", core)
        (info,) = unpacked.glob("*.dist-info")
        (info / "sboms").mkdir()
        (info / "sboms" / NAME).write_text(sbom(unpacked, cffi, epoch()), encoding="utf-8")
        packed, repaired = Path(scratch, "packed"), Path(scratch, "repaired")
        packed.mkdir()
        tool("wheel", "pack", "-d", packed, unpacked, env=dates)
        (wheel,) = packed.iterdir()
        tool("auditwheel", "repair", "-w", repaired, wheel, env=dates)
        (done,) = repaired.iterdir()
        if target.tag not in done.name:
            raise ReleaseError(f"{done.name}: auditwheel found it to need more than {target.tag}")
        into.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(done, into))


def check(files: Sequence[Path]) -> None:
    """Have what PyPI, and those who install, would find wrong found here. Raises ReleaseError."""
    tool("twine", "check", "--strict", *files)
    for wheel in (file for file in files if file.suffix == ".whl"):
        tool("check-wheel-contents", wheel)
        with tempfile.TemporaryDirectory(prefix="shmsock-check-") as scratch:
            tool("wheel", "unpack", "-d", scratch, wheel)  # which compares the hashes
            (listed,) = Path(scratch).glob(f"*/*.dist-info/sboms/{NAME}")
            (core,) = Path(scratch).glob("*/shmsock/native/_core.*.so")
            if unknown := unknown_symbols(core.read_bytes()):
                raise ReleaseError(f"{wheel.name}: no library that it names has {', '.join(unknown)}")
            if wrong := problem(listed.read_text(encoding="utf-8")):
                raise ReleaseError(f"{wheel.name}: {wrong}")


def unknown_symbols(core: bytes) -> list[str]:
    """What it calls and neither CPython has nor the glibc that it is for, which would give it a version.

    Linking does not find these out, nor does auditwheel. What musl lacks, old glibc lacks as well.
    """
    elf = ELFFile(BytesIO(core))
    versions, symbols = elf.get_section_by_name(".gnu.version"), elf.get_section_by_name(".dynsym")
    if not isinstance(versions, GNUVerSymSection) or not isinstance(symbols, SymbolTableSection):
        return []  # musl's, which knows no versions
    found = []
    for number, symbol in enumerate(symbols.iter_symbols()):
        bare = versions.get_symbol(number).entry["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
        here = symbol["st_shndx"] != "SHN_UNDEF" or symbol["st_info"]["bind"] == "STB_WEAK"
        if bare and not here and symbol.name and not symbol.name.startswith(("Py", "_Py")):
            found.append(symbol.name)
    return found


def write_sums(folder: Path) -> None:
    """As sha256sum writes them, and checks them (-c)."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))


def make_all(pythons: Iterable[str], targets: Iterable[Target], into: Path) -> list[Path]:
    """The sdist and all wheels, as many at once as there are processors."""
    shutil.rmtree(into, ignore_errors=True)
    sdist = make_sdist(into)
    check([sdist])
    print(sdist.name)
    made = [sdist]
    for version in pythons:
        environment(version)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [(version, target) for version in pythons for target in targets]
        for wheel in pool.map(lambda each: make_wheel(sdist, each[0], each[1], into), work):
            print(wheel.name, flush=True)
            made.append(wheel)
    write_sums(into)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sdist and the wheels.")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="of this version only")
    parser.add_argument("--platform", action="append", choices=TARGETS, help="for this platform only")
    parser.add_argument("--into", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    try:
        make_all(given.python or PYTHONS, [TARGETS[tag] for tag in given.platform or TARGETS], given.into)
    except ReleaseError as error:
        sys.exit(f"wheels: {error}")


if __name__ == "__main__":
    main()
