"""`shmsock forward`: the options of the forwarder in shmsock.forward."""

from __future__ import annotations

import click

from shmsock.commands.group import Failed
from shmsock.commands.params import attaching, check_environ

__all__ = ["forward", "serve"]


@click.command()
@click.argument("endpoints", nargs=-1, metavar="[LISTEN TARGET]...")
@click.option(
    "--config", type=click.Path(dir_okay=False), help="A TOML file with rules; SIGHUP reads it again."
)
@attaching
@click.option(
    "--proxy-protocol",
    type=click.Choice(["v1", "v2"]),
    help="Tell the target by a PROXY header who connects.",
)
@click.option(
    "--source-per-peer",
    is_flag=True,
    help="Connect to the target from 127.83.0.SECTION, not 127.0.0.1, so that it can tell peers apart.",
)
@click.option(
    "--connect-timeout", type=click.FloatRange(0.01, 3600), default=10.0, show_default=True, help="Seconds."
)
@click.option(
    "--idle-timeout",
    type=click.FloatRange(0.01, 86400),
    default=60.0,
    show_default=True,
    help="Seconds after which a silent client of udp: is forgotten.",
)
@click.option("--quiet", is_flag=True, help="Log no connections.")
def forward(
    endpoints: tuple[str, ...],
    config: str | None,
    region: str | None,
    name: str | None,
    proxy_protocol: str | None,
    source_per_peer: bool,
    connect_timeout: float,
    idle_timeout: float,
    quiet: bool,
) -> None:
    """Forward TCP, UDP and UNIX sockets to peers, and from them.

    Each rule is a pair: where to listen, and where it leads.

    \b
      shmsock forward tcp:127.0.0.1:6379 shm:vm-b:6379  # for redis-cli
      shmsock forward shm:6379 tcp:127.0.0.1:6379       # on vm-b
      shmsock forward unix:/run/db shm:db:5432 udp:127.0.0.1:53 shm:dns:53
      shmsock forward --config /etc/shmsock/forward.toml

    Endpoints: tcp:HOST:PORT, unix:PATH, udp:HOST:PORT, shm:NAME:PORT; to listen also shm:PORT,
    shm:localhost:PORT (for peers of this machine), tcp:*:PORT.

    A server behind a forwarder sees its clients come from 127.0.0.1, and many trust that: PostgreSQL's
    pg_hba.conf (trust), redis (protected mode), admin pages. Every peer of the region would be trusted. Have
    the server ask for a password, or tell it who connects: --proxy-protocol, --source-per-peer.

    SIGHUP reads the file again: rules that stay keep their connections, and a file with a mistake changes
    nothing. SIGUSR1 logs a summary of each rule. Runs until SIGTERM or Ctrl-C.
    """
    from shmsock.forward.endpoints import parse
    from shmsock.forward.rules import Rule, RuleError

    if len(endpoints) % 2 or not (endpoints or config):
        raise click.UsageError("pairs are expected, LISTEN and TARGET, or --config")
    rules = []
    try:
        for listen, target in zip(endpoints[::2], endpoints[1::2], strict=True):
            rules.append(
                Rule(
                    parse(listen, listens=True),
                    parse(target, listens=False),
                    proxy_protocol or "",
                    source_per_peer,
                    connect_timeout=connect_timeout,
                    idle_timeout=idle_timeout,
                )
            )
    except (ValueError, RuleError) as error:
        raise Failed(str(error)) from None
    serve(rules, config, region, name, quiet)


def serve(rules: list, config: str | None, region: str | None, name: str | None, quiet: bool) -> None:  # type: ignore[type-arg]
    """Carry out the rules until a signal comes. Raises Failed, OSError."""
    from shmsock.forward import service
    from shmsock.forward.rules import RuleError

    check_environ(name)
    service.log_to_stderr(quiet)
    try:
        service.run(service.serve(rules, config, region, name))
    except RuleError as error:
        raise Failed(str(error)) from None
