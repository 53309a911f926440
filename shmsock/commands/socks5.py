"""`shmsock socks5`: a SOCKS5 proxy that leads to peers."""

from __future__ import annotations

import click

from shmsock.commands.forward import serve
from shmsock.commands.group import Failed
from shmsock.commands.params import attaching

__all__ = ["socks5"]


@click.command()
@click.option("--listen", "address", default="127.0.0.1:1080", metavar="HOST:PORT", help="Where.")
@click.option("--only-shm", is_flag=True, help="Lead to peers alone; other hosts are not allowed.")
@attaching
@click.option("--quiet", is_flag=True, help="Log no connections.")
def socks5(address: str, only_shm: bool, region: str | None, name: str | None, quiet: bool) -> None:
    """Serve as a SOCKS5 proxy. Hosts that end in .shm are peers, all others are reached over TCP.

    \b
        curl --socks5-hostname 127.0.0.1:1080 http://vm-b.shm:8000/

    Names must be left to the proxy: socks5h:// in many programs, proxy_dns in proxychains. There is no
    password: who can connect here can reach what this machine can, so listen on a loopback address.
    """
    from shmsock.forward.endpoints import SOCKS5, Endpoint, parse
    from shmsock.forward.rules import Rule

    try:
        rule = Rule(parse(f"tcp:{address}", listens=True), Endpoint(SOCKS5), only_shm=only_shm)
    except ValueError as error:
        raise Failed(str(error)) from None
    serve([rule], None, region, name, quiet)
