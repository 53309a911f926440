"""`shmsock nc`: standard input and output over shared memory."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys

import click

from shmsock.commands.params import attaching, check_environ

__all__ = ["nc"]


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[HOST] PORT")
@click.option("-l", "--listen", "listens", is_flag=True, help="Wait for one connection to PORT.")
@click.option("-w", "--timeout", type=click.FloatRange(0.01), help="Seconds to wait for the peer's answer.")
@attaching
def nc(
    words: tuple[str, ...], listens: bool, timeout: float | None, region: str | None, name: str | None
) -> None:
    """Connect standard input and output to PORT of HOST, a peer. With -l: to who connects to PORT.

    \b
        shmsock nc vm-b 7000 < file
        ssh -o ProxyCommand='shmsock nc %h %p' vm-b

    The end of the input is passed on, and the output goes on until the peer has ended, too. (sshd in vm-b is
    reached through a forwarder there: shmsock forward shm:22 tcp:127.0.0.1:22.)
    """
    from shmsock.forward.nc import connect, listen

    *hosts, digits = words
    if len(hosts) != (0 if listens else 1):
        raise click.UsageError("HOST PORT, or -l PORT, was expected")
    port: int = click.IntRange(1, 65535)(digits)
    check_environ(name)
    mine = {"region": region, "name": name}
    try:
        asyncio.run(listen(port, **mine) if listens else connect(hosts[0], port, timeout, **mine))
    except BrokenPipeError as error:
        if error.errno != errno.EPIPE or error.filename is not None:
            raise
        sys.stderr.close()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)  # as any filter whose reader is gone
