"""Installs what dist/ has where it is for, and uses it there: `make test-wheels`. Prints what ran where.

Nothing is fetched while installing: pip gets a folder of wheels, and the roots have no network.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from release.wheels import CACHE, PYTHONS, ROOT, TARGETS, ReleaseError, interpreter, run

DIST = ROOT / "dist"
# That of musl has no ctypes, which measuring takes.
DEMO = "/tmp/v/bin/shmsock demo --scale 0.05"
PYTHON = "/usr/bin/python3"
SMOKE = ROOT / "release" / "smoke.py"
# With what 3.10 needs besides: pip goes by the markers of the Python that it runs in.
NEEDED = ["cffi>=1.17", "anyio>=4.10", "click>=8.1", "rich>=13", "tomli>=2", "exceptiongroup>=1.2", "pip"]
# Those of the tests that need no server, guest or other interpreter.
TESTS = "pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis lxml pyte trio trustme uvloop"
TESTS += " prometheus-client"
SHORT = "tests/test_address.py tests/test_errors.py tests/engine/test_lifecycle.py tests/aio/test_streams.py"


def wheels_for(version: str, tag: str, more: list[str] | None = None) -> Path:
    """A folder with the wheel for it, what that needs, and smoke.py."""
    folder = CACHE / f"in-{version}-{tag}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("shmsock-*"):
        old.unlink()
    libc, _, arch = tag.partition("_2_17_" if "many" in tag else "_1_2_")
    platforms = [f"{libc}_{of}_{arch}" for of in (("2_17", "2_28") if "many" in tag else ("1_1", "1_2"))]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "-d",
        str(folder),
    ]
    command += ["--only-binary=:all:", "--python-version", version, *(f"--platform={p}" for p in platforms)]
    run([*command, *NEEDED, *(more or [])])
    (wheel,) = DIST.glob(f"shmsock-*-cp{version.replace('.', '')}-*{tag}.whl")
    shutil.copy(wheel, folder)
    shutil.copy(SMOKE, folder)
    return folder


def last(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("smoke: "))[7:]


def in_root(name: str, version: str, tag: str, *command: str) -> str:
    return last(root(name, wheels_for(version, tag), *command))


def root(name: str, folder: Path, *command: str) -> str:
    run([ROOT / "release" / "root", "make", name])
    return run([ROOT / "release" / "root", "run", name, folder, *command])


def installed(python: str) -> str:
    """The commands that install it there, and use it as smoke.py does."""
    return (
        f"{python} -m venv /tmp/v && /tmp/v/bin/pip install -q --no-index --find-links /in shmsock && "
        "/tmp/v/bin/python /in/smoke.py"
    )


def of_this_machine(version: str) -> str:
    folder = wheels_for(version, "manylinux_2_17_x86_64")
    command = interpreter(version)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="venv-") as place:
        run([*command, "-m", "venv", place])
        python = [*command[:-1], f"{place}/bin/python"]
        run([*python, "-m", "pip", "install", "-q", "--no-index", "--find-links", str(folder), "shmsock"])
        return last(run([*python, str(folder / "smoke.py")], cwd=folder))


def sdist() -> str:
    """Compiled where there is gcc and no git, and its own tests."""
    folder = wheels_for("3.11", "manylinux_2_17_x86_64", ["setuptools>=77", "wheel", *TESTS.split()])
    for wheel in folder.glob("shmsock-*.whl"):
        wheel.unlink()
    (archive,) = DIST.glob("shmsock-*.tar.gz")
    shutil.copy(archive, folder)
    pip = "/tmp/v/bin/pip install -q --no-index --find-links /in"
    script = (
        f"! command -v git && cd /tmp && python3 -m venv v && {pip} shmsock && v/bin/python /in/smoke.py && "
        f"tar xf /in/{archive.name} && cd {archive.name.removesuffix('.tar.gz')} && {pip} -e '.[test]' && "
        f"/tmp/v/bin/python -m pytest -q -p no:cacheprovider {SHORT}"
    )
    said = root("build", folder, "sh", "-c", script)
    return f"{last(said)}; its tests: {said.splitlines()[-1]}"


def main() -> None:
    failed = False
    x86, musl, arm = "manylinux_2_17_x86_64", "musllinux_1_2_x86_64", "manylinux_2_17_aarch64"
    rows: list[tuple[str, str, Callable[[], str]]] = [
        (f"{version} {x86}", "CPython of this machine", partial(of_this_machine, version))
        for version in PYTHONS
    ]
    whole = installed("python3")
    rows += [
        (
            f"3.11 {x86}",
            "bare Debian",
            partial(in_root, "debian", "3.11", x86, "sh", "-c", f"{whole} && {DEMO}"),
        ),
        (f"3.13 {musl}", "bare musl", partial(in_root, "musl", "3.13", musl, "sh", "-c", whole)),
        (f"3.11 {arm}", "qemu-user", partial(in_root, "arm64", "3.11", arm, PYTHON, "/in/smoke.py", "/in")),
        ("sdist", "bare Debian with gcc", sdist),
    ]
    for what, where, use in rows:
        try:
            said = use()
        except (ReleaseError, ValueError, StopIteration) as error:
            failed, said = True, f"FAILED: {error}"
        print(f"{what:<28} {where:<26} {said}", flush=True)
    used = {what for what, _, _ in rows}
    left = [f"{v} {tag}" for v in PYTHONS for tag in TARGETS if f"{v} {tag}" not in used]
    print(f"built and checked, and run nowhere: {', '.join(left)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
