"""`shmsock demo`: a server and a client process of this host, an echo, a file, and a table beside TCP."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from shmsock.bench.child import Child, cpus, have_uvloop
from shmsock.bench.measures import BOTH
from shmsock.bench.pairs import private_region
from shmsock.bench.runner import Bench, Host
from shmsock.errors import region_error

__all__ = ["progress_bar", "run_demo"]

ECHOES = 20_000
FILE_BYTES = 256_000_000
ROUNDS, SECONDS = 2, 0.6


def worker(role: str, *more: object) -> list[str]:
    return [sys.executable, "-m", "shmsock.bench.worker", role, *(str(m) for m in more)]


def progress_bar(console: Console, speed: bool = True) -> Progress:
    """Its speed is that of the moment."""
    return Progress(
        TextColumn("  {task.description:<14}"),
        BarColumn(),
        DownloadColumn(),
        *([TransferSpeedColumn()] if speed else []),
        console=console,
    )


def run_demo(console: Console, scale: float = 1.0) -> None:
    """About 20 seconds at `scale` 1. Raises OSError; nothing is left behind, whatever happens."""
    server_cpu, client_cpu, where = cpus()
    with private_region("demo") as region:
        console.print(f"A private region in /dev/shm, a server process and a client process; {where}.\n")
        loop = "uvloop" if have_uvloop() else "asyncio"
        common = ("--region", region, "--name", "demo", "--loop", loop)
        with tempfile.TemporaryDirectory(prefix="shmsock-demo-", dir=roomy(FILE_BYTES * 3)) as directory:
            source, copy = Path(directory, "file"), Path(directory, "copy")
            serve = worker("serve", *common, "--cpu", server_cpu, "--port", 7000, "--save", copy)
            with Child(serve) as server:
                listening = server.line()
                console.print(f"[bold]Echo[/]  {listening['host']!r} listens on port {listening['port']}")
                count = max(100, int(ECHOES * scale))
                with Child(worker("echo", "demo", *common, "--cpu", client_cpu, "--count", count)) as client:
                    *_, done = client.lines()
                rate = done["count"] / done["seconds"]
                console.print(
                    f"  {done['count']} round trips of {done['size']} B, one at a time: "
                    f"p50 {done['p50_us']:.1f} us, p99 {done['p99_us']:.1f} us, {rate:,.0f} a second\n"
                )
                size = max(1_000_000, int(FILE_BYTES * scale))
                make_file(source, size)
                console.print(f"[bold]A file[/]  {size / 1e6:.0f} MB of random bytes, hashed at both ends")
                _send_file(console, worker("send", "demo", *common, "--cpu", client_cpu), source, copy, size)
    _table(console, scale)


def _send_file(console: Console, send: list[str], source: Path, copy: Path, size: int) -> None:
    with Child([*send, "--bytes", str(size), "--file", str(source)]) as client, progress_bar(console) as bar:
        task = bar.add_task("file", total=size)
        for said in client.lines():
            bar.update(task, completed=said["sent"])
    if not said["same"] or copy.stat().st_size != size:
        raise region_error(
            5, "the file arrived with another SHA-256 than it was sent with: please report this"
        )
    speed = size / said["seconds"] / 1e6
    console.print(
        f"  SHA-256 {said['sha256_sent'][:16]}... at both ends; {speed:.0f} MB/s with hashing and storing\n"
    )


def _table(console: Console, scale: float) -> None:
    start = time.monotonic()
    console.print("[bold]Beside TCP[/] on 127.0.0.1, the same handlers, measured in turn")
    Bench(console, Host(console, "demo"), ROUNDS, SECONDS * scale).run([BOTH])
    console.print(
        f"  {ROUNDS} rounds in {time.monotonic() - start:.0f} s; `shmsock bench` measures more carefully."
    )


def make_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - start)))


def roomy(size: int) -> str:
    """Shared memory where there is room, so that no disk is measured; else where temporary files go."""
    return "/dev/shm" if shutil.disk_usage("/dev/shm").free > size else tempfile.gettempdir()
