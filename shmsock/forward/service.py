"""Running a forwarder as a process of its own: signals, systemd, the file of rules."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from shmsock.forward.forwarder import Forwarder
from shmsock.forward.rules import Config, Rule, RuleError, read
from shmsock.server.setup import notify, raise_limit

__all__ = ["load", "log_to_stderr", "run", "serve"]

log = logging.getLogger("shmsock.forward")

LATE_S = 0.02
"""How long a line of the log waits for others."""


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` on uvloop where it is installed, else on asyncio's loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


class Lines(logging.Handler):
    """Writes lines together, where a loop runs: a write for each wakes whoever reads them each time."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._due: asyncio.TimerHandle | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + "\n")
            if record.levelno >= logging.WARNING:
                self.flush()
            elif self._due is None:
                self._due = asyncio.get_running_loop().call_later(LATE_S, self.flush)
        except RuntimeError:  # no loop runs
            self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        assert self.lock is not None
        with self.lock:
            lines, self._lines, self._due = self._lines, [], None
            with contextlib.suppress(OSError, ValueError):  # nobody reads them
                sys.stderr.write("".join(lines))
                sys.stderr.flush()


def log_to_stderr(quiet: bool) -> None:
    """Log connections and rules to stderr; `quiet`: warnings alone. systemd's journal has a clock of its
    own."""
    # What no line tells need not be found out for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(handlers=[Lines()], level=logging.WARNING, format=f"{stamp}%(message)s")
    log.setLevel(level)


def load(path: str) -> Config:
    """Read a file of rules. Raises RuleError, which names file, line and key."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return read(file.read())
    except OSError as error:
        raise RuleError(f"{path}: {error.strerror}") from None
    except RuleError as error:
        raise RuleError(f"{path}: {error}") from None


async def serve(
    rules: Sequence[Rule], path: str | None = None, region: str | None = None, name: str | None = None
) -> None:
    """Carry out `rules`, and those of the file, until SIGTERM or SIGINT. SIGHUP reads the file again, SIGUSR1
    logs a summary. Raises RuleError, and OSError when one of them cannot be listened on."""
    raise_limit()
    config = Config(()) if path is None else load(path)
    region, name = region or config.region, name or config.name
    forwarder = Forwarder(region, name)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    reloading = asyncio.Lock()

    async def reload() -> None:
        async with reloading:
            notify("RELOADING=1")
            try:
                await _reload(forwarder, rules, path, config)
            except (OSError, RuleError) as error:
                log.warning(
                    "%s; going on with the rules there are", getattr(error, "strerror", None) or error
                )
            notify("READY=1")

    tasks: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = loop.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    loop.add_signal_handler(signal.SIGUSR1, _summarize, forwarder)
    try:
        await forwarder.carry_out([*rules, *config.rules])
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
    finally:
        _summarize(forwarder)
        await forwarder.stop()


async def _reload(forwarder: Forwarder, rules: Sequence[Rule], path: str | None, before: Config) -> None:
    if path is None:
        return log.warning("SIGHUP: there is no file to read again (--config)")
    config = load(path)
    if (config.region, config.name) != (before.region, before.name):
        raise RuleError(f"{path}: region and name are those of the start: restart to change them")
    await forwarder.carry_out([*rules, *config.rules])
    log.info("%s: %d rules", path, len(config.rules))


def _summarize(forwarder: Forwarder) -> None:
    for line in forwarder.summary():
        log.info("%s", line)
