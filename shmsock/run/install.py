"""Puts RunLoop under the loops of asyncio and uvloop: at once where they are imported, else when they are.

It becomes a base of the class itself. So every way to make such a loop is reached, and every class made from
it: asyncio.run, runners, policies, uvloop.run, threads, subclasses.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from shmsock.run.notices import say, warn
from shmsock.run.rules import Rules

__all__ = ["install"]


def install(rules: Rules | None = None) -> None:
    """Reach all loops that this process makes from now on. `rules`: those of the environment if None. For
    programs that `shmsock run` cannot reach (python -I): to be called before a loop is made. Raises
    ValueError when a variable of the environment is wrong."""
    given = Rules.from_environ() if rules is None else rules
    for name, reach in (("asyncio", _reach_asyncio), ("uvloop", _reach_uvloop)):
        if name in sys.modules:
            reach(sys.modules[name], given)
        else:
            sys.meta_path.insert(0, _AfterImport(name, partial(reach, rules=given)))


def _put_under(kind: Any, rules: Rules) -> None:
    from shmsock.run.loop import RunLoop

    RunLoop.rules = rules
    if not issubclass(kind, RunLoop):
        kind.__bases__ = (RunLoop, *kind.__bases__)


def _reach_asyncio(asyncio: Any, rules: Rules) -> None:
    _put_under(asyncio.SelectorEventLoop, rules)
    _tell_of_others(asyncio.BaseEventLoop, asyncio.SelectorEventLoop)
    if rules.loop == "uvloop":
        try:
            import uvloop
        except ImportError as error:
            say(f"--loop uvloop: {error} (pip install uvloop)")
            return
        asyncio.DefaultEventLoopPolicy._loop_factory = uvloop.Loop
        if hasattr(asyncio, "EventLoop"):  # from 3.13 on
            asyncio.EventLoop = uvloop.Loop


def _reach_uvloop(uvloop: Any, rules: Rules) -> None:
    _put_under(uvloop.Loop, rules)
    if rules.loop == "asyncio":
        import asyncio

        uvloop.Loop = asyncio.SelectorEventLoop


def _tell_of_others(base: Any, reached: Any) -> None:
    """Say it when a loop is made of a class that is not reached."""
    init = base.__init__

    def __init__(self: Any, *args: Any, **kwds: Any) -> None:
        if not isinstance(self, reached):
            kind = f"{type(self).__module__}.{type(self).__qualname__}"
            warn(f"loop-{kind}", f"a loop of class {kind} does not know shared memory: derive it from "
                 "asyncio.SelectorEventLoop or uvloop.Loop")  # fmt: skip
        init(self, *args, **kwds)

    base.__init__ = __init__


class _AfterImport(importlib.abc.MetaPathFinder):
    """Does something right after a module was imported, before whoever imports it sees it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # it may be found later
            return None
        spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and what is to be done after it."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)
