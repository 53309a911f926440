"""Parameters that several subcommands have: sizes, permissions, PCI addresses, how many peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from shmsock.address import (
    MAX_SECTIONS,
    default_name,
    default_pin,
    default_publish,
    default_section,
    node_name,
)
from shmsock.engine.settings import Settings
from shmsock.region.pci import normalize_address
from shmsock.region.sizes import parse_size

__all__ = ["Address", "Mode", "Size", "attaching", "check_environ", "peers_option"]


_F = TypeVar("_F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """2G, 64M, 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, context)


class Mode(click.ParamType[int]):
    """Permissions, octal."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            mode = value if isinstance(value, int) else int(value, 8)
        except ValueError:
            mode = -1
        if mode & ~0o666 or mode & 0o600 != 0o600:
            self.fail(
                f"{value!r} is no mode for a region: expected octal digits such as 0600 or 0660",
                param,
                context,
            )
        return mode


class Address(click.ParamType[str]):
    """A PCI address, or the region URL that has it."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            return normalize_address(value.removeprefix("vfio:").removeprefix("pci:"))
        except ValueError as error:
            self.fail(f"{error}; `shmsock info` lists the devices", param, context)


def peers_option(help: str) -> Callable[[_F], _F]:
    """Add the number of sections that a region gets when it is formatted."""
    count = click.IntRange(1, MAX_SECTIONS)
    return click.option("--peers", type=count, default=16, show_default=True, help=help)


def attaching(command: _F) -> _F:
    """Add the options of what attaches: `region` and `name`."""
    what = "The region; without it SHMSOCK_REGION, or what is found."
    who = "What peers call this node; without it SHMSOCK_NAME, or the host's name."
    named = click.option("--name", metavar="NAME", help=who)(command)
    return click.option("--region", metavar="URL", help=what)(named)


def check_environ(name: str | None = None) -> None:
    """Refuse a `name`, or what the environment says of nodes, before anything begins. Raises UsageError."""
    from shmsock.aio.fallback import check_hosts

    try:
        Settings.from_environ()
        default_name() if name is None else node_name(name)
        default_pin(), default_section(), default_publish()
        check_hosts()
    except ValueError as error:
        raise click.UsageError(str(error)) from None
