"""Puts RunLoop under the loops of asyncio and uvloop: at once where they are imported, else when they are.

It becomes a base of the class itself. So every way to make such a loop is reached, and every class made from
it: asyncio.run, runners, policies, uvloop.run, threads, subclasses. Nothing is imported before asyncio is.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmsock.run.rules import Rules

__all__ = ["install"]


def install(rules: Rules | None = None) -> None:
    """Reach all loops that this process makes from now on. `rules`: those of the environment if None. For
    programs that `shmsock run` cannot reach (python -I): to be called before a loop is made. Raises
    ValueError when a variable of the environment is wrong and asyncio is imported; else a line on stderr says
    so later."""
    for name, reach in (("asyncio", _reach_asyncio), ("uvloop", _reach_uvloop)):
        if name in sys.modules:
            reach(sys.modules[name], rules)
        else:
            sys.meta_path.insert(0, _AfterImport(name, reach, rules))


def _put_under(kind: Any, rules: Rules | None) -> Rules:
    from shmsock.run.loop import RunLoop
    from shmsock.run.rules import Rules

    RunLoop.rules = Rules.from_environ() if rules is None else rules
    if not issubclass(kind, RunLoop):
        kind.__bases__ = (RunLoop, *kind.__bases__)
    return RunLoop.rules


def _reach_asyncio(asyncio: Any, rules: Rules | None) -> None:
    rules = _put_under(asyncio.SelectorEventLoop, rules)
    _tell_of_others(asyncio.BaseEventLoop, asyncio.SelectorEventLoop)
    if rules.loop == "uvloop":
        import uvloop

        asyncio.DefaultEventLoopPolicy._loop_factory = uvloop.Loop
        if hasattr(asyncio, "EventLoop"):  # from 3.13 on
            asyncio.EventLoop = uvloop.Loop


def _reach_uvloop(uvloop: Any, rules: Rules | None) -> None:
    rules = _put_under(uvloop.Loop, rules)
    if rules.loop == "asyncio":
        import asyncio

        uvloop.Loop = asyncio.SelectorEventLoop


def _tell_of_others(base: Any, reached: Any) -> None:
    """Say it when a loop is made of a class that is not reached."""
    init = base.__init__

    def __init__(self: Any, *args: Any, **kwds: Any) -> None:
        if not isinstance(self, reached):
            from shmsock.run.notices import warn

            kind = f"{type(self).__module__}.{type(self).__qualname__}"
            hint = "derive it from asyncio.SelectorEventLoop or uvloop.Loop"
            warn(f"loop-{kind}", f"a loop of class {kind} does not know shared memory: {hint}")
        init(self, *args, **kwds)

    base.__init__ = __init__


class _AfterImport:
    """Finds a module as others would, and does something right after it was imported, before whoever imports
    it sees it."""

    def __init__(self, name: str, then: Callable[[Any, Rules | None], None], rules: Rules | None) -> None:
        self._name, self._then, self._rules = name, then, rules

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        for finder in list(sys.meta_path):
            ask = getattr(finder, "find_spec", None)
            spec = ask(fullname, path, target) if ask is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def act(self, module: Any) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            self._then(module, self._rules)
        except (ImportError, ValueError, OSError) as error:
            from shmsock.run.notices import say

            say(f"{error}; not all of this program goes through shared memory")


class _Loader:
    """Another loader, and what is to be done after it."""

    def __init__(self, loader: Any, after: _AfterImport) -> None:
        self._loader, self._after = loader, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after.act(module)
