"""The processes of this host that have a region's file mapped, QEMUs above all: shared or private, how much
of it, and which file, as one that was removed is another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shmsock.doctor.finding import Finding
from shmsock.errors import listing
from shmsock.region.processes import command_of, pids
from shmsock.region.sizes import format_size, short_size

__all__ = ["Mapped", "mappings", "qemus"]

_DELETED = " (deleted)"
_ALONE = "everything looks healthy in that guest, and it is alone"


@dataclass(frozen=True)
class Mapped:
    """A process that has a file mapped."""

    pid: int
    command: str
    size: int
    """Bytes of the file, of one mapping."""
    shared: bool
    inode: int
    deleted: bool

    @property
    def qemu(self) -> bool:
        return self.command.startswith(("qemu", "kvm"))

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def mappings(path: str, proc: str = "/proc") -> tuple[list[Mapped], int]:
    """Find who has the file at `path`, or one that was removed from there, mapped; and count the processes
    that may not be inspected."""
    needles = {path, path + _DELETED}
    found: dict[tuple[int, int, bool], tuple[int, int, bool]] = {}
    hidden = 0
    for pid in pids(proc):
        try:
            with open(f"{proc}/{pid}/maps", encoding="utf-8", errors="surrogateescape") as table:
                for line in table:
                    # address perms offset major:minor inode path
                    words = line.rstrip("\n").split(None, 5)
                    if len(words) < 6 or words[5] not in needles:
                        continue
                    start, end = (int(word, 16) for word in words[0].split("-"))
                    key = int(pid), int(words[4]), words[1].endswith("s")
                    first, last, gone = found.get(key, (1 << 64, 0, False))
                    offset = int(words[2], 16)  # one mapping may be several lines
                    span = (min(first, offset), max(last, offset + end - start))
                    found[key] = (*span, gone or words[5].endswith(_DELETED))
        except PermissionError:
            hidden += 1
        except (OSError, ValueError):
            continue  # it has ended
    return [
        Mapped(pid, command_of(pid, proc), last - first, shared, inode, deleted)
        for (pid, inode, shared), (first, last, deleted) in found.items()
        if pid != os.getpid()
    ], hidden


def qemus(path: str, url: str, proc: str = "/proc") -> Iterator[Finding]:
    """Tell of the QEMUs that have the file at `path`, or should."""
    found, hidden = mappings(path, proc)
    try:
        status = os.stat(path)
        inode, size = status.st_ino, status.st_size
    except OSError:
        inode = size = 0
    good = []
    for one in found:
        if one.deleted or (inode and one.inode != inode):
            if one.qemu:
                yield Finding(
                    "qemu-deleted",
                    "error",
                    f"{one} has a file of that name that was removed or replaced",
                    f"it shares the old bytes with nobody who comes now: {_ALONE}",
                    "stop and start its guest (a reboot inside it is not enough)",
                    url,
                )
        elif not one.shared:
            yield Finding(
                "qemu-private",
                "error",
                f"{one} has {path} mapped privately",
                f"its writes reach nobody: {_ALONE}",
                "start it with share=on in its -object memory-backend-file",
                url,
            )
        elif one.qemu and size and one.size != size:
            unit = short_size(size)
            yield Finding(
                "qemu-size",
                "error",
                f"{one} has {format_size(one.size)} of the {format_size(size)} of {path}",
                "its guest sees a region that is cut off, and refuses it",
                f"start it with size={unit} in its -object memory-backend-file",
                url,
            )
        else:
            good.append(one)
    if machines := [one for one in good if one.qemu]:
        yield Finding("qemu", "ok", f"mapped and shared by {listing(machines)}", region=url)
    yield from _elsewhere({one.pid for one in found}, url, proc)
    if hidden and os.geteuid():
        yield Finding(
            "hidden",
            "note",
            f"{hidden} processes of other users could not be looked at",
            "one of them may be a QEMU with a private or old map of the file",
            "run it as root",
            url,
        )


def _elsewhere(known: Iterable[int], url: str, proc: str) -> Iterator[Finding]:
    """Tell of QEMUs with ivshmem devices, none of which has this file."""
    others: list[int] = []
    for pid in pids(proc):
        if int(pid) not in known and command_of(pid, proc).startswith(("qemu", "kvm")):
            with contextlib.suppress(OSError), open(f"{proc}/{pid}/cmdline", "rb") as file:
                words = file.read(1 << 16).decode(errors="replace").split("\0")
                if any(word.startswith(("ivshmem", '{"driver":"ivshmem')) for word in words):
                    others.append(int(pid))
    if others:
        yield Finding(
            "qemu-elsewhere",
            "note",
            f"with other memory, so no peers here: {listing(others)}",
            region=url,
            data={"pids": others},
        )
