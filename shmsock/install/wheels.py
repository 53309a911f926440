"""Wheels of shmsock and of what it needs, for a machine without a network and a compiler.

For the Python that runs here they are made of what is installed, which takes no network; for another one on
this machine its pip builds and fetches them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from shmsock.install import BundleError

__all__ = ["installed_wheels", "wheels_for", "wheels_from_here"]

_LEFT_OUT = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "shmsock", "examples")


def wheels_from_here(add: Sequence[str], into: Path) -> None:
    """Make wheels of shmsock, pip, `add`, and what they need, from what is installed. Raises BundleError."""
    installed_wheels(["shmsock", "pip", *add], into)


def installed_wheels(names: Sequence[str], into: Path) -> None:
    """Make wheels of what is installed, and of what it needs. Raises BundleError."""
    wanted, seen = set(names), set()
    while wanted:
        seen |= wanted
        wanted = set(_needs(wanted)) - seen
    for name in sorted(seen):
        distribution = _distribution(name)
        if (source := _source(distribution)) and _is_editable(distribution):
            _build([sys.executable, "-m", "pip"], ["--no-deps", *_isolation()], source, into)
        else:
            _repack(distribution, into)


def wheels_for(python: str, add: Sequence[str], into: Path) -> None:
    """Have the pip of another Python make them. Raises BundleError."""
    own = _distribution("shmsock")
    _build([python, "-m", "pip"], ["pip", *add], _source(own) or f"shmsock=={own.version}", into)


def _needs(names: Iterable[str]) -> list[str]:
    """What the installed packages need in turn, by their markers: pip knows."""
    shown = _run([sys.executable, "-m", "pip", "show", *sorted(names)])
    found = re.findall(r"^Requires: *(.*)$", shown, re.MULTILINE)
    return [_normalized(name) for line in found for name in line.split(",") if name.strip()]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _distribution(name: str) -> metadata.Distribution:
    found = list(metadata.distributions(name=name))
    if not found:
        raise BundleError(f"{name} is not installed here: `{sys.executable} -m pip install {name}`")
    # In a checkout lies what building it left (an egg-info), which says nothing of how it was installed.
    return next((each for each in found if each.read_text("RECORD")), found[0])


def _direct_url(distribution: metadata.Distribution) -> dict[str, object]:
    found: dict[str, object] = json.loads(distribution.read_text("direct_url.json") or "{}")
    return found


def _is_editable(distribution: metadata.Distribution) -> bool:
    info = _direct_url(distribution).get("dir_info")
    return isinstance(info, dict) and bool(info.get("editable"))


def _source(distribution: metadata.Distribution) -> Path | None:
    """The folder that it was installed from, if that is still there."""
    url = urlparse(str(_direct_url(distribution).get("url", "")))
    folder = Path(unquote(url.path))
    return folder if url.scheme == "file" and (folder / "pyproject.toml").exists() else None


def _isolation() -> list[str]:
    """Without isolation where what builds is installed: that takes no network."""
    try:
        metadata.distribution("setuptools"), metadata.distribution("cffi")
    except metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"]


def _build(pip: list[str], options: Sequence[str], what: Path | str, into: Path) -> None:
    """Have pip make wheels. Sources are copied first: building leaves files there."""
    with tempfile.TemporaryDirectory(prefix="shmsock-build-") as scratch:
        if isinstance(what, Path):
            for name in _SOURCES:
                source, target = what / name, Path(scratch, name)
                if source.is_dir():
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
                else:
                    shutil.copy(source, target)
            what = scratch
        _run([*pip, "wheel", "-q", "--disable-pip-version-check", "-w", str(into), *options, what])


def _repack(distribution: metadata.Distribution, into: Path) -> None:
    """Make the wheel again that was installed."""
    name, version = re.sub(r"[-.]+", "_", distribution.metadata["Name"]), distribution.version
    tags = re.findall(r"^Tag: *(\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    if not tags or distribution.files is None:
        raise BundleError(
            f"{name} was not installed by pip, and cannot be packed again: use a virtual environment"
        )
    pythons, abis, platforms = (sorted(set(part)) for part in zip(*(t.split("-") for t in tags), strict=True))
    wheel = f"{name}-{version}-{'.'.join(pythons)}-{'.'.join(abis)}-{'.'.join(platforms)}.whl"
    record = []
    with zipfile.ZipFile(into / wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in distribution.files:
            if member := _member(file, f"{name}-{version}"):
                data = Path(str(distribution.locate_file(file))).read_bytes()
                archive.writestr(member, data)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                record.append(f'"{member}",sha256={digest},{len(data)}\n')
        last = f"{name}-{version}.dist-info/RECORD"
        archive.writestr(last, "".join([*record, f'"{last}",,\n']))


def _member(file: PurePosixPath, stem: str) -> str | None:
    """The name in a wheel of an installed file; None: pip made it when it installed."""
    parts = file.parts
    if "__pycache__" in parts or (len(parts) == 2 and file.name in _LEFT_OUT):
        return None
    if parts[0] != "..":
        folder = parts[0]
        return "/".join((f"{stem}.dist-info", *parts[1:]) if folder.endswith(".dist-info") else parts)
    outside = [part for part in parts if part != ".."]
    if outside[0] == "bin":  # scripts, made from the entry points
        return None
    return "/".join((f"{stem}.data", "data", *outside))


def _run(argv: Sequence[str]) -> str:
    """Run pip. Raises BundleError with what it said last."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    except OSError as error:
        raise BundleError(f"{argv[0]}: {error.strerror}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "it failed")
        raise BundleError(f"{' '.join(argv[:4])}: {why}")
    return done.stdout
