"""`shmsock ivshmem-server`: the options of the server in shmsock.server."""

from __future__ import annotations

import os
from typing import Any

import click

from shmsock.commands.params import Mode, Size, peers_option

__all__ = ["ivshmem_server"]


@click.command("ivshmem-server")
@click.option("--socket", "path", metavar="PATH", help="Where to listen; not needed when systemd does.")
@click.option("--region", required=True, metavar="FILE|memfd", help="The memory; a file is made if need be.")
@click.option("--size", type=Size(), help="A power of two such as 64M; of a file that is there: its own.")
@click.option("--vectors", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each client.")
@click.option(
    "--mode", type=Mode(), default="0600", show_default=True, help="Permissions of socket and new file."
)
@peers_option("How many of shmsock can be attached; of memory that is formatted here.")
@click.option("--clients", type=click.IntRange(2, 65536), default=1024, show_default=True, help="At most.")
@click.option(
    "--per-process",
    type=click.IntRange(0, 65536),
    default=64,
    show_default=True,
    help="Connections that one process may have; 0: as many as there are.",
)
@click.option(
    "--timeout",
    "patience",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Seconds after which a client that takes no message is dropped.",
)
def ivshmem_server(path: str | None, region: str, size: int | None, **limits: Any) -> None:
    """Serve ivshmem-doorbell devices of QEMU.

    And processes of this host, until SIGTERM or Ctrl-C. Hands out the memory and the eventfds by which
    clients ring each other. Takes its socket from systemd (LISTEN_FDS) when started so. Logs
    to stderr who comes and goes.
    """
    from shmsock.server.server import IvshmemServer, run_server
    from shmsock.server.setup import MEMFD, activated

    if size is not None and size & (size - 1):
        raise click.BadParameter(
            f"{size} bytes are no power of two, as a PCI BAR must be", param_hint="--size"
        )
    if region == MEMFD and size is None:
        raise click.UsageError("--region memfd takes a --size, such as 64M")
    listener = activated()
    if listener is None and not path:
        raise click.UsageError("--socket is missing, and systemd passed none (LISTEN_FDS)")
    if listener is not None and path and os.path.abspath(path) != os.path.abspath(listener.path):
        raise click.UsageError(f"--socket is {path}, and systemd passed {listener.path}: leave --socket out")
    run_server(IvshmemServer(listener or path or "", region, size=size, **limits))
