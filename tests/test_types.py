"""The types that users of the package see: all known, to pyright as to mypy, and stubs that are true."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.test_site import MODULES, named

ROOT = Path(__file__).resolve().parent.parent


@cache
def symbols() -> list[dict[str, Any]]:
    """All names of the package, as pyright judges them."""
    argv = [
        str(Path(sys.executable).with_name("basedpyright")),
        "--pythonpath",
        sys.executable,
        "--outputjson",
    ]
    argv += ["--verifytypes", "shmsock", "--ignoreexternal"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found: list[dict[str, Any]] = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    return found


def unknown(names: set[str]) -> list[str]:
    """What is not known of these names, nor of what is below them."""
    wrong = []
    for symbol in symbols():
        name = symbol["name"]
        if symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]:
            continue
        if any(name == given or name.startswith(f"{given}.") for given in names):
            wrong.append(f"{name}: {[found['message'] for found in symbol['diagnostics']]}")
    return wrong


def public(module: str) -> set[str]:
    """The public names of a module, by where they are and where they are defined."""
    names = set()
    for name, there in named(module):
        names.add(name)
        if hasattr(there, "__qualname__"):
            names.add(f"{getattr(there, '__module__', module)}.{there.__qualname__}")
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [m for m in MODULES if not m.endswith("dask")]
)  # Dask's classes have no types
def test_the_public_face_is_known(module: str) -> None:
    names = public(module)
    known = {symbol["name"] for symbol in symbols()}
    assert len(names & known) * 2 >= len(names)
    assert unknown(names) == []


@pytest.mark.slow
def test_what_is_not_known_is_found() -> None:
    assert unknown({"shmsock.integrations.dask.ShmBackend"})


@pytest.mark.slow
def test_stubs_are_true() -> None:
    stubs = sorted((ROOT / "shmsock").rglob("*.pyi"))
    assert stubs
    names = [".".join(stub.relative_to(ROOT).with_suffix("").parts) for stub in stubs]
    assert all(importlib.util.find_spec(name) for name in names)
    argv = [sys.executable, "-m", "mypy.stubtest", *names]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
