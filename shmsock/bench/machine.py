"""The machine that figures were measured on, and its load at that moment."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shmsock.bench.child import have_uvloop
from shmsock.bench.ends import probe

__all__ = ["describe", "machine", "note_load", "now"]


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        **probe.machine(),
        "shmsock": importlib.metadata.version("shmsock"),
        "load": round(os.getloadavg()[0], 1),
    }
    if have_uvloop():
        found["uvloop"] = importlib.metadata.version("uvloop")
    if commit := _commit():
        found["commit"] = commit
    return found


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _commit() -> str | None:
    """Name the commit of the checkout that this package lies in, if it does."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        argv = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def describe(known: dict[str, Any]) -> str:
    parts = [f"{known['cpu']} ({known['cpus']} CPUs)", f"Linux {known['kernel']}", known["python"]]
    parts += [f"uvloop {known['uvloop']}"] if "uvloop" in known else ["no uvloop"]
    parts += [f"shmsock {known['shmsock']}" + (f" at {known['commit']}" if "commit" in known else "")]
    return ", ".join(parts) + f", load {known['load']}"


def note_load(console: Console, known: dict[str, Any]) -> None:
    """Say when the machine did other work meanwhile, which is in all figures."""
    known["load_after"] = load = round(os.getloadavg()[0], 1)
    if load > 2 * known["cpus"]:
        console.print(
            f"  The machine did other work (load {load} on {known['cpus']} CPUs): times are longer than they "
            "need be, and a guest takes the CPU time that others had for its own."
        )
