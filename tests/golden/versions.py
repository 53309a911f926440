"""Released versions, kept as their sources (shmsock-VERSION.tar.xz) to be built by the tests: of each what a
peer and the commands that look take."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "golden"
KEPT = sorted(file.name[len("shmsock-") : -len(".tar.xz")] for file in HERE.glob("shmsock-*.tar.xz"))
BEFORE = "0.1.0"
"""The version before this one."""

PARTS = ["__init__.py", "__main__.py", "address.py", "cli.py", "errors.py", "public.py", "wakeup.py"]
PARTS += ["aio", "anyio", "commands", "engine", "native", "observe", "region"]

#: Run in the folder of a version's sources: compiles its core, and puts it where it belongs.
BUILD = """
import importlib.util, pathlib, shutil, sys
spec = importlib.util.spec_from_file_location("build", "shmsock/native/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
made = build._compile("shmsock.native._core", [], pathlib.Path("build").resolve())
shutil.move(made, "shmsock/native")
"""


def archive(version: str) -> Path:
    return HERE / f"shmsock-{version}.tar.xz"


def pack(root: Path, version: str) -> Path:
    """Keep the sources of the checkout in `root` as that version."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        unwanted = "__pycache__" in member.name or member.name.endswith((".so", ".pyc"))
        return None if unwanted else member

    with tarfile.open(archive(version), "w:xz", preset=9) as file:
        for part in sorted(PARTS):
            if (root / "shmsock" / part).exists():
                file.add(root / "shmsock" / part, f"shmsock/{part}", filter=plain)
    return archive(version)


def built(version: str) -> Path:
    """The folder of a version that was kept, built for this interpreter: what PYTHONPATH has to begin with.
    It is built once."""
    home = CACHE / f"{version}-{archive(version).stat().st_size}-{sysconfig.get_config_var('SOABI')}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # by one of the processes that run tests side by side
        if not (home / "done").exists():
            with tarfile.open(archive(version)) as file:
                file.extractall(home)
            env = {**os.environ, "CFLAGS": "-Wno-error"}
            done = subprocess.run(
                [sys.executable, "-c", BUILD], cwd=home, env=env, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (home / "done").touch()
    return home


def environment(version: str | None) -> dict[str, str]:
    """The environment of a process that imports that version; None, or one that is not kept: this one."""
    return {**os.environ, "PYTHONPATH": str(built(version) if version in KEPT else ROOT)}
