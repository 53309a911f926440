"""Puts RunLoop under the loops of asyncio and uvloop, when the first of them is made.

It becomes a base of the class itself. So every way to make such a loop is reached, and every class made from
it: asyncio.run, runners, policies, uvloop.run, threads, subclasses. A program that makes none pays nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
from _thread import allocate_lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmsock.run.rules import Rules

__all__ = ["install"]


def install(rules: Rules | None = None) -> None:
    """Reach all loops that this process makes from now on. `rules`: those of the environment if None; when
    one of its variables is wrong, a line on stderr says so and nothing is reached. For programs that
    `shmsock run` cannot reach (python -I): to be called before a loop is made."""
    for name, reach in (
        ("asyncio", _reach_asyncio),
        ("uvloop", _reach_uvloop),
        ("socket", _reach_socket),
        ("aiohttp.resolver", _reach_aiohttp),
    ):
        if name in sys.modules:
            reach(sys.modules[name], rules)
        else:
            sys.meta_path.insert(0, _AfterImport(name, reach, rules))
    if (
        rules is None
        and os.environ.get("SHMSOCK_LISTEN")
        and os.environ.get("SHMSOCK_RUN") == str(os.getpid())
    ):
        atexit.register(_at_the_end, os.getpid())


def _at_the_end(pid: int) -> None:
    from shmsock.run.notices import tell_of_unoffered

    tell_of_unoffered(_listen(None), pid)


def _listen(rules: Rules | None) -> frozenset[int]:
    """The ports that are to be offered; none where the variables are wrong, which is told elsewhere."""
    from shmsock.run.rules import Rules

    try:
        return (Rules.from_environ() if rules is None else rules).listen
    except ValueError:
        return frozenset()


def _reach_asyncio(asyncio: Any, rules: Rules | None) -> None:
    _when_first_made(asyncio.BaseEventLoop, asyncio.SelectorEventLoop, rules)
    if _asked_for(rules) == "uvloop":
        import uvloop

        # The default policy, whose public name warns from 3.14 on.
        asyncio.unix_events._UnixDefaultEventLoopPolicy._loop_factory = uvloop.Loop
        if hasattr(asyncio, "EventLoop"):  # from 3.13 on
            asyncio.EventLoop = uvloop.Loop


def _reach_uvloop(uvloop: Any, rules: Rules | None) -> None:
    _when_first_made(uvloop.Loop, uvloop.Loop, rules)
    if _asked_for(rules) == "asyncio":
        import asyncio

        uvloop.Loop = asyncio.SelectorEventLoop


def _reach_aiohttp(resolver: Any, rules: Rules | None) -> None:
    """Have aiohttp ask the loop for addresses, also where aiodns is installed: that would ask a name server,
    for `.shm` hosts too."""
    resolver.DefaultResolver = resolver.ThreadedResolver
    if "aiohttp.connector" in sys.modules:
        sys.modules["aiohttp.connector"].DefaultResolver = resolver.ThreadedResolver  # type: ignore[attr-defined]


def _asked_for(rules: Rules | None) -> str:
    return os.environ.get("SHMSOCK_LOOP", "").strip() if rules is None else rules.loop


def _when_first_made(root: Any, kind: Any, rules: Rules | None) -> None:
    """Put RunLoop under the class `kind` before the first loop of a class derived from `root` is made. When
    one is made that is no `kind`, say so."""
    init, lock = root.__init__, allocate_lock()

    def reach() -> None:
        with lock:
            if "shmsock_reach" in vars(kind):
                del kind.shmsock_reach
                _put_under(kind, rules)

    def __init__(self: Any, *args: Any, **kwds: Any) -> None:
        reach()
        if not isinstance(self, kind):
            from shmsock.run.notices import warn

            name = f"{type(self).__module__}.{type(self).__qualname__}"
            hint = "derive it from asyncio.SelectorEventLoop or uvloop.Loop"
            warn(f"loop-{name}", f"a loop of class {name} does not know shared memory: {hint}")
        init(self, *args, **kwds)

    root.__init__ = __init__
    kind.shmsock_reach = staticmethod(reach)  # also for who is about to derive from it: see loop_factory()


def _put_under(kind: Any, given: Rules | None) -> None:
    try:
        from shmsock.run.loop import RunLoop
        from shmsock.run.rules import Rules

        RunLoop.rules = Rules.from_environ() if given is None else given
        kind.__bases__ = (RunLoop, *kind.__bases__)
    except (ImportError, ValueError, OSError) as error:
        _say(error)


def _say(error: Exception) -> None:
    from shmsock.run.notices import say

    say(f"{error}; not all of this program goes through shared memory")


def _reach_socket(socket: Any, rules: Rules | None) -> None:
    """Have who looks up a host in shared memory for sockets of its own be told, and no name server asked."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwds: Any) -> Any:
        from shmsock.address import SUFFIX

        name = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else host
        if isinstance(name, str) and name.lower().removesuffix(".").endswith(SUFFIX):
            raise socket.gaierror(
                socket.EAI_NONAME,
                f"{name!r} is in shared memory, where event loops lead and no sockets: go there by `shmsock "
                "forward` or `shmsock socks5`, or with an asyncio library that connects by its loop",
            )
        return look_up(host, *args, **kwds)

    socket.getaddrinfo = getaddrinfo
    if os.environ.get("SHMSOCK_LISTEN") if rules is None else rules.listen:
        _watch_accept(socket.socket, rules)


def _watch_accept(kind: Any, rules: Rules | None) -> None:
    """Tell of a program that accepts connections itself at a port that its loops were to offer."""
    accept, ports = kind.accept, _listen(rules)

    def accept_and_tell(self: Any) -> Any:
        got = accept(self)
        asyncio = sys.modules.get("asyncio")
        if asyncio is None or asyncio._get_running_loop() is None:
            name = self.getsockname()
            if isinstance(name, tuple) and name[1] in ports:
                from shmsock.run.notices import unoffered

                unoffered(name[1])
        return got

    kind.accept = accept_and_tell


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
        except ImportError as error:  # of uvloop
            _say(error)


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
