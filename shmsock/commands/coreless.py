"""What subcommands do where the C core cannot be loaded: say so, and `shmsock info` shows the devices."""

from __future__ import annotations

import click

from shmsock.region.pci import find_devices
from shmsock.region.sizes import human

__all__ = ["without_core"]


def without_core(name: str, why: click.ClickException) -> click.Command:
    """Make the subcommand that fails with `why`."""

    def fail(words: tuple[str, ...]) -> None:
        for device in find_devices() if name == "info" else ():
            size = device.bars[2].size
            click.echo(f"{device.address} {device.model}, {human(size)}, driver: {device.driver or 'none'}")
        raise why

    return click.Command(
        name,
        callback=fail,
        params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
        help="Needs the C core, which cannot be loaded here.",
        context_settings={"ignore_unknown_options": True},
    )
