"""`shmsock demo-vm`: two QEMU guests without any network, and this host as a third peer, on one region."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shmsock.bench.child import Child, have_uvloop
from shmsock.bench.demo import progress_bar, worker
from shmsock.bench.vm import explained
from shmsock.bench.words import speed
from shmsock.guests.pair import GuestsFailed, boot_pair
from shmsock.guests.qemu import Command, Fleet, Guest

__all__ = ["guest_lines", "run_demo_vm"]

LINE_S = 300.0
PORT = 7000
MODULES = ("shmsock.aio.attach", "shmsock.aio.endpoints")
"""What a worker needs, and a guest imports once."""


def guest_lines(command: Command) -> Iterator[dict[str, Any]]:
    """Yield what a worker in a guest says, up to "done"."""
    while True:
        said: dict[str, Any] = json.loads(command.readline(LINE_S))
        yield said
        if said["event"] == "done":
            command.wait(LINE_S, check=True)
            return


def run_demo_vm(console: Console, size: int, echoes: int) -> bool:
    """True: all arrived. Raises OSError (packages that are missing, ...)."""
    with explained(), Fleet() as fleet:
        return _Demo(console, fleet, size, echoes).run()


class _Demo:
    def __init__(self, console: Console, fleet: Fleet, size: int, echoes: int) -> None:
        self.console, self.fleet, self.size, self.echoes = console, fleet, size, echoes
        self.table = Table(title="What went over BAR2", title_justify="left", title_style="bold")
        for column in ("", "what", "how fast", "arrived"):
            self.table.add_column(column)
        self.good = True
        self.loop = ("--loop", "uvloop" if have_uvloop() else "asyncio")

    def run(self) -> bool:
        self.console.print(
            "This takes about half a minute; without KVM, which is tried first, about 3 minutes."
        )
        guests, path = boot_pair(self.console, self.fleet)
        a, b = guests
        for guest in guests:
            self._check_network(guest)
        serving = [self._start(guest, "serve", "--file", "/tmp/file") for guest in guests]
        for guest, command in zip(guests, serving, strict=True):
            said = json.loads(command.readline(LINE_S))
            self.console.print(
                f"  {guest.name} serves port {said['port']} on {said['region']}, section {said['section']}"
            )
        self._file_both_ways(a, b)
        self._echo(a, "vm-b")
        self._third_peer(path)
        for command in serving:
            command.close_stdin()
            command.wait(LINE_S, check=True)
        self.console.print(self.table)
        self.console.print(
            "MB/s: of each way, from the first byte until both ends had all of it.",
            style="dim",
            highlight=False,
        )
        return self.good

    def _start(self, guest: Guest, role: str, *more: object) -> Command:
        _, *arguments = worker(role, *self.loop, "--port", PORT, *more)
        return guest.start(["python", *arguments], modules=MODULES)

    def _check_network(self, guest: Guest) -> None:
        found = guest.run(["ls", "/sys/class/net"]).text.split()
        if found != ["lo"]:
            raise GuestsFailed(f"{guest.name} has network devices, expected none: {', '.join(found)}")
        self.console.print(f"  {guest.name}: no network device; /sys/class/net has only {found[0]}")

    def _row(self, who: str, what: str, rate: str, good: bool, arrived: str) -> None:
        self.good &= good
        self.table.add_row(who, what, rate, f"[green]{arrived}[/]" if good else "[red]NO[/]")

    def _file_both_ways(self, a: Guest, b: Guest) -> None:
        """Files of random bytes in the guests' own memory; hashed at both ends while they pass."""
        with self.console.status("making a file of random bytes in each guest"):
            script = f"head -c {self.size} /dev/urandom > /tmp/file"
            with ThreadPoolExecutor(2) as pool:
                made = [pool.submit(g.run, ["sh", "-c", script], timeout=LINE_S) for g in (a, b)]
                for done in made:
                    done.result()
        send = ("send", "vm-b", "--bytes", self.size, "--file", "/tmp/file", "--both")
        with progress_bar(self.console, speed=False) as bar, self._start(a, *send) as command:
            tasks = {"sent": bar.add_task("vm-a to vm-b", total=self.size)}
            tasks["received"] = bar.add_task("vm-b to vm-a", total=self.size)
            said = self._follow(guest_lines(command), bar, tasks)
        rate = speed(self.size / said["seconds"] / 1e6)
        what = f"{self.size / 1e6:.0f} MB, both ways at once"
        for way, sha in (("vm-a to vm-b", said["sha256_sent"]), ("vm-b to vm-a", said["sha256_received"])):
            self._row(way, what, rate, said["same"], f"SHA-256 {sha[:12]}... at both ends")

    def _follow(
        self, lines: Iterator[dict[str, Any]], bar: Progress, tasks: dict[str, Any]
    ) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for said in lines:
            for what, task in tasks.items():
                bar.update(task, completed=said[what])
        return said

    def _echo(self, guest: Guest, to: str) -> None:
        status = self.console.status(f"{self.echoes} echoes of 64 B from {guest.name} to {to}")
        with status, self._start(guest, "echo", to, "--count", self.echoes) as command:
            *_, said = guest_lines(command)
        self._echo_row(f"{guest.name} to {to}", said)

    def _echo_row(self, way: str, said: dict[str, Any]) -> None:
        took = f"p50 {said['p50_us']:.0f} us, p99 {said['p99_us']:.0f} us"
        self._row(way, f"{said['count']} echoes of 64 B", took, True, "every byte as it was sent")

    def _third_peer(self, path: str) -> None:
        """This host, on the very same file."""
        own = ("--region", path, "--name", "host", *self.loop, "--port", PORT)
        for name in ("vm-a", "vm-b"):
            with self.console.status(f"this host talks to {name}"):
                with Child(worker("echo", name, *own, "--count", max(1, self.echoes // 10))) as child:
                    *_, said = child.lines()
                self._echo_row(f"host to {name}", said)
                size = max(1, self.size // 10)
                with Child(worker("send", name, *own, "--bytes", size)) as child:
                    *_, said = child.lines()
            rate = speed(size / said["seconds"] / 1e6)
            sha = f"SHA-256 {said['sha256_sent'][:12]}... at both ends"
            self._row(f"host to {name}", f"{size / 1e6:.1f} MB", rate, said["same"], sha)
