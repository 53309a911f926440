"""The C core (see LAYOUT.md for what lies in memory, core.h for what is called).

Importing it says, before anything else does, when the core is not there: these are the sources then.
"""

from __future__ import annotations

import importlib.util
import sys

__all__: list[str] = []


def _not_built() -> str:
    from pathlib import Path

    python = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
    root = Path(__file__).resolve().parent.parent.parent
    return (
        f"shmsock: in {root} are sources whose C core was not built for {python}: run `make setup` there and "
        "use .venv/bin/python, or `pip install -e .`; if you have installed shmsock elsewhere (`pip install "
        ".`), start Python in another directory, since it finds what lies in the current one first"
    )


if importlib.util.find_spec("shmsock.native._core") is None:
    if ("-m", "shmsock") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False):
        sys.exit(_not_built())  # a person reads it
    raise ImportError(_not_built(), name="shmsock.native._core")
