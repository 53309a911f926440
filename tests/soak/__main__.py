"""Peers on all loops and wake modes, hundreds of connections that do this and that, and processes that die
all the time: `python -m tests.soak --hours 3`, or `make soak HOURS=3`.

Every byte is checked, every connection has to end as it should unless its peer was killed just then, every
timer has to be on time, and what a process holds has to be the same at the end as at the beginning. Exits
with 1 and the faults where that does not hold. With `--lies` one more process writes nonsense: into its own
section, and then only what it takes part in may break; or into everything, and then all may, but no process
may crash, hang or grow. `--report DIRECTORY` writes soak.json, and soak.svg with plots.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import click
import trustme

from tests.soak.peer import LOST

STILL = {"busy_poll_us": 0, "hot_us": 0}
POLLED = {"doorbells": False}
KINDS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    # name: loop, face, settings, by the ivshmem server (eventfds) or the file (futexes)
    "asyncio": ("asyncio", "streams", {}, False),
    "uvloop": ("uvloop", "streams", {}, True),
    "trio": ("trio", "anyio", {}, False),
    "still": ("asyncio", "streams", STILL, True),
    "polled": ("uvloop", "streams", POLLED, False),
    "anyio": ("asyncio", "anyio", STILL, False),
    "bells": ("trio", "anyio", STILL, True),
}
LIAR = "liar"
"""The name of the process that writes nonsense, where there is one; and its kind."""
LIAR_KIND: tuple[str, str, dict[str, Any], bool] = ("asyncio", "streams", {}, False)
STEADY = ("asyncio", "uvloop", "trio")
"""Those that live from the first minute to the last: what they hold has to stay the same."""
EXCUSED_BEFORE_S, EXCUSED_AFTER_S = 0.5, 10.0
"""How long before a death is logged, and after its name is back, its connections may break."""
LINKS = 2 * len(KINDS)
"""Those that datagrams keep, with each peer, for a while."""
GROWTH = {"memory": 8 << 20, "threads": 2, "descriptors": 16}
"""What may come and go; more at the end of the run than at its beginning is a leak."""
WARM_UP = 0.2
"""The part of a run in which caches fill."""


@dataclass
class Peer:
    name: str
    process: asyncio.subprocess.Process
    readers: list[asyncio.Task[None]]
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)


@dataclass
class Death:
    name: str
    how: str
    start: float
    end: float = float("inf")

    def excuses(self, name: str, at: float) -> bool:
        return name == self.name and self.start - EXCUSED_BEFORE_S <= at <= self.end + EXCUSED_AFTER_S


class Soak:
    def __init__(
        self,
        directory: Path,
        seconds: float,
        clients: int,
        pause_s: float,
        bulk: int,
        seed: int,
        lies: str | None,
    ) -> None:
        self.lies = lies
        self.kinds = {**KINDS, LIAR: LIAR_KIND} if lies else KINDS
        self.directory, self.seconds, self.clients = directory, seconds, clients
        self.pause_s, self.bulk, self.dice = pause_s, bulk, random.Random(seed)
        self.peers: dict[str, Peer] = {}
        self.samples: dict[str, list[dict[str, Any]]] = {name: [] for name in self.kinds}
        self.faults: list[dict[str, Any]] = []
        self.heard: list[str] = []
        self.said: list[str] = []
        self.lost = 0
        self.deaths: list[Death] = []
        self.totals: Counter[str] = Counter()
        self.start = time.monotonic()
        self.region = ""
        self.socket = str(directory / "ivshmem.sock")

    async def make_region(self) -> asyncio.subprocess.Process:
        """The region's file, and an ivshmem server that gives it out with doorbells."""
        shared = tempfile.mkdtemp(prefix="shmsock-soak-", dir="/dev/shm")
        self.region = f"{shared}/region"
        command = [sys.executable, "-m", "shmsock"]
        made = await asyncio.create_subprocess_exec(
            *command,
            "create",
            self.region,
            "--size",
            "256M",
            "--peers",
            "16",
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert await made.wait() == 0
        server = await asyncio.create_subprocess_exec(
            *command,
            "ivshmem-server",
            "--socket",
            self.socket,
            "--region",
            self.region,
            stderr=asyncio.subprocess.PIPE,
        )
        assert server.stderr is not None
        line = b""
        while b"room for" not in line:
            line = await server.stderr.readline()
            assert line, "the ivshmem server did not start"
        self.log = asyncio.ensure_future(server.stderr.read())  # who comes and goes
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.directory / "ca.pem"))
        authority.issue_cert("soak").private_key_and_cert_chain_pem.write_to_path(
            str(self.directory / "server.pem")
        )
        return server

    def said_by(self, stream: asyncio.StreamReader, name: str) -> asyncio.Task[None]:
        """Keep what a process says on standard error: nobody should."""

        async def keep() -> None:
            while line := await stream.readline():
                told = f"{name}: {line.decode().rstrip()}"
                self.heard.append(told)
                # Who lost its section says so, which is right; and a doorbell may be late where all else is.
                if b"polling instead, until one does" in line:
                    continue
                if not self.lies or (
                    name != LIAR and re.match(rb"[\w.]+: ", line) and b"NodeClosedError" not in line
                ):
                    self.said.append(told)

        return asyncio.ensure_future(keep())

    async def start_peer(self, name: str) -> None:
        loop, face, settings, by_server = self.kinds[name]
        configuration = {
            "name": name,
            "loop": loop,
            "face": face,
            "settings": settings,
            "region": f"ivshmem:{self.socket}" if by_server else self.region,
            "hosts": list(self.kinds),
            "file": self.region,
            "lies": self.lies if name == LIAR else None,
            "secure": [other for other, kind in self.kinds.items() if kind[1] == "streams"],
            "certificates": str(self.directory),
            "clients": self.clients,
            "pause_s": self.pause_s,
            "bulk": self.bulk,
            "seed": self.dice.random(),
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-m", "tests.soak.peer", json.dumps(configuration)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        peer = Peer(name, process, [self.said_by(process.stderr, name)])
        self.peers[name] = peer
        peer.readers.append(asyncio.ensure_future(self.listen(peer)))
        with anyio.fail_after(120):
            await peer.ready.wait()

    async def listen(self, peer: Peer) -> None:
        assert peer.process.stdout is not None
        while line := await peer.process.stdout.readline():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # half a line of one that was killed
            if "fault" in said:
                self.faults.append(said)
                continue
            if "sample" in said:
                peer.last = said["sample"]
                self.samples[peer.name].append({"at": said["at"] - self.start, **peer.last})
            if "ready" in said:
                peer.first = peer.last
                peer.ready.set()
            if "stopped" in said:
                peer.stopped.set()
        peer.ready.set()
        peer.stopped.set()

    async def gone(self, peer: Peer) -> None:
        """Wait for its end, and for all that it said."""
        await peer.process.wait()
        await asyncio.gather(*peer.readers)
        self.totals.update(
            {key: peer.last.get(key, 0) for key in ("bytes", "exchanges", "connects", "datagrams", "words")}
        )

    async def all_run(self) -> bool:
        """Has none ended that was not asked to? Then the rest is of no use. But where everything is written
        over a process may lose its section: it comes back then."""
        for peer in list(self.peers.values()):
            if peer.process.returncode == LOST and (self.lies == "everywhere" or peer.name == LIAR):
                await self.gone(peer)
                self.lost += 1
                await self.start_peer(peer.name)
        return all(peer.process.returncode is None for peer in self.peers.values())

    async def trouble(self) -> None:
        """Kill, stop, or end one of the mortal peers, and bring it back."""
        peer = self.peers[self.dice.choice([name for name in self.kinds if name not in STEADY])]
        how = self.dice.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP 0.3 s", "SIGSTOP 4 s"])
        death = Death(peer.name, how, time.monotonic())
        self.deaths.append(death)
        if how.startswith("SIGSTOP"):
            peer.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(float(how.split()[1]))
            peer.process.send_signal(signal.SIGCONT)
        else:
            peer.process.send_signal(getattr(signal, how))
            await self.gone(peer)
            await self.start_peer(peer.name)
        death.end = time.monotonic()

    async def end(self) -> None:
        """Ask all to come to an end, first as clients and then as servers."""
        for word, event in (("stop", "stopped"), ("end", None)):
            for peer in self.peers.values():
                assert peer.process.stdin is not None
                peer.process.stdin.write(f"{word}\n".encode())
            with anyio.fail_after(150):
                for peer in self.peers.values():
                    await (getattr(peer, event).wait() if event else self.gone(peer))

    async def run(self) -> None:
        server = await self.make_region()
        try:
            await asyncio.gather(*map(self.start_peer, self.kinds))
            await asyncio.sleep(1)
            self.start = time.monotonic()
            self.faults.clear()  # of the time in which not all were there
            for samples in self.samples.values():
                samples.clear()
            while time.monotonic() - self.start < self.seconds and await self.all_run():
                await asyncio.sleep(self.dice.random() * 3)
                await self.trouble()
            if self.lies != "everywhere":
                await asyncio.sleep(EXCUSED_AFTER_S)
            if await self.all_run():
                await self.end()
        finally:
            for process in [server, *(peer.process for peer in self.peers.values())]:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            os.unlink(self.region)
            os.rmdir(os.path.dirname(self.region))

    def unexcused(self) -> list[str]:
        found = []
        for fault in self.faults:
            names = {fault["name"], fault["host"]}
            at = fault["at"]
            excused = fault["fault"] != "wrong" and any(
                death.excuses(n, at) for death in self.deaths for n in names
            )
            if fault["fault"] != "late":
                excused |= self.lies == "everywhere" or (self.lies is not None and LIAR in names)
            if not excused:
                ends = f"{fault['name']} with {fault['host']}"
                found.append(f"{at - self.start:.1f} s: {ends}: {fault['fault']}: {fault['error'][:200]}")
        return found

    def growth(self) -> list[str]:
        """What the steady peers hold more of in the last third than in the first, after the warm-up."""
        found = []
        for name in STEADY if not self.lost else ():
            samples = [sample for sample in self.samples[name] if sample["at"] > WARM_UP * self.seconds]
            third = len(samples) // 3
            if not third:
                found.append(f"{name}: told nothing after the warm-up")
                continue
            for what, may in GROWTH.items():
                early, late = (
                    statistics.median(s[what] for s in part) for part in (samples[:third], samples[-third:])
                )
                if late > early + may:
                    found.append(f"{name}: {what} {early:,.0f} at first, {late:,.0f} at last")
        return found

    def left(self) -> list[str]:
        """What is still held when all is over."""
        found = []
        for name, peer in self.peers.items():
            if peer.process.returncode == LOST and self.lies:
                continue
            if peer.process.returncode != 0:
                found.append(f"{name} ended with {peer.process.returncode}")
            elif peer.last["connections"] > LINKS:
                found.append(f"{name} holds {peer.last['connections']} connections")
        return found

    def verdict(self) -> list[str]:
        return [*self.unexcused()[:50], *self.growth(), *self.left(), *self.said[:50]]

    def summary(self) -> dict[str, Any]:
        return {
            "seconds": round(time.monotonic() - self.start),
            **self.totals,
            "deaths": Counter(death.how for death in self.deaths),
            "sections_lost": self.lost,
            "broken_by_deaths": len(self.faults) - len(self.unexcused()),
            "latest_timer_s": max((s["late_s"] for name in STEADY for s in self.samples[name]), default=None),
            "verdict": self.verdict(),
        }


def plot(soak: Soak, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 2, figsize=(12, 10), sharex=True, layout="constrained")
    shown = [
        ("memory", "memory beside the region, MiB", 1 << 20),
        ("connections", "connections", 1),
        ("descriptors", "descriptors", 1),
        ("arena_free_bytes", "arena that is free, MiB", 1 << 20),
        ("late_s", "latest timer of each second, ms", 1e-3),
        ("bytes", "bytes that were right, GB", 1e9),
    ]
    for axes, (key, title, unit) in zip(panels.flat, shown, strict=True):
        for name in STEADY:
            samples = soak.samples[name]
            axes.plot(
                [s["at"] / 60 for s in samples], [s.get(key, 0) / unit for s in samples], label=name, lw=1
            )
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        for death in soak.deaths:
            axes.axvline((death.start - soak.start) / 60, color="#ccc", lw=0.3, zorder=0)
    panels[0, 0].legend()
    for axes in panels[-1]:
        axes.set_xlabel("minutes; grey: a peer is killed or stopped")
    figure.savefig(path)


@click.command(help=__doc__)
@click.option("--hours", type=float, default=3.0, show_default=True)
@click.option("--seconds", type=float, help="Instead of --hours.")
@click.option("--clients", default=40, show_default=True, help="Clients of each of the seven processes.")
@click.option(
    "--pause", "pause_s", default=0.2, show_default=True, help="Longest pause of a client, in seconds."
)
@click.option(
    "--bulk", default=4 << 20, show_default=True, help="Most bytes of an exchange, in one direction."
)
@click.option("--lies", type=click.Choice(["own", "everywhere"]), help="Have a process write nonsense.")
@click.option("--seed", type=int, help="By chance where it is not given.")
@click.option("--report", type=click.Path(path_type=Path), help="Where soak.json and soak.svg go.")
def main(
    hours: float,
    seconds: float | None,
    clients: int,
    pause_s: float,
    bulk: int,
    lies: str | None,
    seed: int | None,
    report: Path | None,
) -> None:
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(Path(directory), seconds or hours * 3600, clients, pause_s, bulk, seed, lies)
        asyncio.run(soak.run())
    summary = {"seed": seed, **soak.summary()}
    if report:
        report.mkdir(parents=True, exist_ok=True)
        everything = {
            **summary,
            "samples": soak.samples,
            "heard": soak.heard,
            "deaths": [vars(death) for death in soak.deaths],
        }
        (report / "soak.json").write_text(json.dumps(everything))
        plot(soak, report / "soak.svg")
    print(json.dumps(summary, indent=1))
    sys.exit(bool(summary["verdict"]))


if __name__ == "__main__":
    main()
