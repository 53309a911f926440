"""What a Python program imports at its start, as `shmsock run` put this folder first in PYTHONPATH: reaches
the program's loops, then does what the sitecustomize does that is hidden by this one."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"shmsock run: {text}", file=sys.stderr, flush=True)


def _reach() -> None:
    try:
        from shmsock.run.install import install
    except ImportError as error:
        _say(
            f"{sys.executable} cannot use shmsock ({error}): install it there "
            f"(`{sys.executable} -m pip install shmsock`), or run another Python"
        )
        if os.environ.get("SHMSOCK_RUN") == str(os.getpid()):  # what was asked for, and not a child of it
            os._exit(1)
        return
    install()


def _go_on_with_the_hidden_one() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec(__name__, others)
    if spec is not None and spec.loader is not None:
        import importlib.util

        sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_reach()
_go_on_with_the_hidden_one()
