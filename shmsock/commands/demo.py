"""`shmsock demo`: shmsock between two processes of this host."""

from __future__ import annotations

import click

__all__ = ["demo"]


@click.command()
@click.option(
    "--scale",
    type=click.FloatRange(0.01, 10),
    default=1.0,
    hidden=True,
    help="Of the time and bytes; for tests.",
)
def demo(scale: float) -> None:
    """Run a server and a client process of this host. An echo, a file, and a table beside TCP; 20 to 40 s."""
    from shmsock.bench.demo import run_demo
    from shmsock.commands.console import console

    run_demo(console(), scale)
