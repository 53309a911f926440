"""The group `shmsock`: imports a subcommand when it is asked for, and turns errors into one line."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from shmsock.errors import RegionError

__all__ = ["Commands", "Failed", "message"]

MODULES = {
    "bench": "bench",
    "bind": "bind",
    "bundle": "bundle",
    "completion": "completion",
    "create": "create",
    "demo": "demo",
    "demo-vm": "demo_vm",
    "doctor": "doctor",
    "forward": "forward",
    "info": "info",
    "install-units": "install_units",
    "ivshmem-server": "ivshmem_server",
    "libvirt-xml": "libvirt_xml",
    "metrics": "metrics",
    "nc": "nc",
    "peers": "peers",
    "ping": "ping",
    "qemu-args": "qemu_args",
    "reap": "reap",
    "run": "run",
    "socks5": "socks5",
    "ss": "ss",
    "top": "top",
    "unbind": "bind",
}
"""The module of shmsock.commands that has the subcommand. There it goes by its name, with underscores."""


CORE = "shmsock.native._core"


class Failed(click.ClickException):
    """A message on stderr, and exit status 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"shmsock: {self.message}", err=True)


@contextlib.contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: its children and files go with it. Who ignores it, or has
    a handler, keeps that; `run` hands it on to its program."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Commands(click.Group):
    """Every error that a user can meet becomes one line; a traceback is for what nobody foresaw."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in MODULES:
            return None
        try:
            module = importlib.import_module(f"shmsock.commands.{MODULES[name]}")
        except ImportError as error:
            if error.name != CORE:
                raise
            from shmsock.commands.coreless import without_core

            return without_core(name, Failed(str(error)))
        command: click.Command = getattr(module, name.replace("-", "_"))
        if "_SHMSOCK_COMPLETE" in os.environ:  # a shell asks, and no command runs
            from shmsock.commands.complete import attach_values

            attach_values(command)
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            with _cleaning_up_on_sigterm():
                return super().invoke(context)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failed(message(error)) from error
        except ImportError as error:  # shmsock.pyz with another Python
            if error.name != CORE:
                raise
            raise Failed(str(error)) from None
        except KeyboardInterrupt:
            click.echo("\nshmsock: interrupted", err=True)
            sys.exit(130)


def message(error: OSError) -> str:
    """Tell a user of an error: what shmsock raises names the file itself."""
    if isinstance(error, RegionError) or error.filename is None:
        return error.strerror or str(error)
    return f"{error.filename}: {error.strerror}"
