"""`shmsock ping`: round trips to a peer, whatever its program does."""

from __future__ import annotations

import asyncio
import json
import statistics
from dataclasses import asdict

import click

from shmsock.commands.group import Failed
from shmsock.commands.observing import errors_told
from shmsock.commands.params import check_environ

__all__ = ["ping"]


@click.command()
@click.argument("host")
@click.option(
    "-c",
    "--count",
    type=click.IntRange(1, 1000000),
    default=10,
    show_default=True,
    help="Round trips in a row.",
)
@click.option(
    "-W",
    "--timeout",
    type=click.FloatRange(0.01),
    default=3.0,
    show_default=True,
    help="Seconds to wait for an answer.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--region", metavar="URL", help="The region; without it SHMSOCK_REGION, or what is found.")
def ping(host: str, count: int, timeout: float, as_json: bool, region: str | None) -> None:
    """Ask HOST, a peer, for answers, and time them.

    HOST is a peer's name, or the number of its section. It needs nothing of the peer's program: its event
    loop answers. Tells who wakes whom, and the time of a round trip twice: warm, and from idle, after a
    second without traffic. That one takes milliseconds where a peer is not woken but polls, and more in a
    guest without KVM; nothing is wrong then.

    Exit status: 0 when every peer of that name answered, else 1.
    """
    from shmsock.doctor.round_trips import Answers, ask, attached, duration
    from shmsock.engine.peers import Peer

    check_environ()

    async def asked() -> list[Answers]:
        async with attached(region, "ping") as node:
            peers, listeners = node.engine.peers, node.engine.listeners
            found: list[Peer]
            if host.isdecimal():
                there = node.engine.layout.peers
                if int(host) >= there:
                    raise Failed(f"section {host}: the region has {there}, from 0 on")
                found = [peer for peer in peers.there() if peer.section == int(host)]
            else:
                wanted = None if listeners.is_own_machine(host) else listeners.peer_name(host)
                found = [peer for peer in peers.named(wanted) if peer.section != node.section]
            if not found:
                raise listeners.unknown(int(host) if host.isdecimal() else host)
            return await ask(node, found, count, patience_s=timeout)

    with errors_told(as_json):
        found = asyncio.run(asked())
    if as_json:
        click.echo(json.dumps([asdict(answers) for answers in found], indent=2))
    for answers in [] if as_json else found:
        kernel = "this kernel" if answers.here else "another kernel"
        click.echo(f"{answers.name}: section {answers.section}, process {answers.pid}, {kernel}")
        click.echo(f"    {answers.ways()}")
        if answers.warm_us:
            low, high = min(answers.warm_us), max(answers.warm_us)
            click.echo(
                f"    {len(answers.warm_us)} warm: min {duration(low)}, median "
                f"{duration(statistics.median(answers.warm_us))}, max {duration(high)}"
            )
        if answers.idle_us is not None:
            click.echo(f"    from idle: {duration(answers.idle_us)}")
        if not answers.answered:
            click.echo(f"    no answer within {timeout:g} s")
    if not all(answers.answered for answers in found):
        raise Failed("no answer: it is stopped or busy; `shmsock doctor` tells more")
