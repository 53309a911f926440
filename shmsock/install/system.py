"""Files of the system that people install: units of systemd, udev rules, a setting of the kernel."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources

from shmsock.region import udev
from shmsock.region.sizes import short_size

__all__ = ["NAMES", "SystemFile", "system_files", "this_program"]

HUGE_PAGE = 2 << 20
_UNITS = "/etc/systemd/system/"
_UDEV = ("udevadm control --reload", "udevadm trigger --subsystem-match={}")


@dataclass(frozen=True)
class SystemFile:
    """A file, where it belongs, and what root does then."""

    path: str
    text: str
    then: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """What goes by one name: files of shmsock/install/files, or a rule."""

    what: str
    then: tuple[str, ...]
    files: tuple[str, ...] = ()
    rule: Callable[[str], str] | None = None
    group: str = "kvm"
    """That QEMU runs as, with Debian's libvirt."""


_KINDS = {
    "region": _Kind(
        "a region in /dev/shm, made when the host boots",
        ("systemctl enable --now shmsock-region.service",),
        (f"{_UNITS}shmsock-region.service",),
    ),
    "server": _Kind(
        "an ivshmem server, started when the first VM connects",
        ("systemctl enable --now shmsock-ivshmem.socket",),
        (f"{_UNITS}shmsock-ivshmem.socket", f"{_UNITS}shmsock-ivshmem.service"),
    ),
    "forward": _Kind(
        "a forwarder, with the rules in /etc/shmsock/forward.toml",
        ("systemctl enable --now shmsock-forward.service",),
        (f"{_UNITS}shmsock-forward.service",),
        group=udev.GROUP,
    ),
    "bind": _Kind(
        "in a guest: a doorbell device given to vfio-pci at boot",
        ("systemctl enable --now shmsock-bind@0000:00:10.0.service    # the device's address",),
        (f"{_UNITS}shmsock-bind@.service",),
    ),
    "udev": _Kind(
        "in a guest: a group may use every ivshmem device",
        tuple(command.format("pci") for command in _UDEV),
        (udev.PCI_FILE,),
        udev.pci_rule,
        udev.GROUP,
    ),
    "udev-vfio": _Kind(
        "in a guest: a group may use what vfio-pci has",
        tuple(command.format("vfio") for command in _UDEV),
        (udev.VFIO_FILE,),
        udev.vfio_rule,
        udev.GROUP,
    ),
    "udev-dax": _Kind(
        "in a guest: a group may use regions in persistent memory",
        tuple(command.format("dax") for command in _UDEV),
        (udev.DAX_FILE,),
        udev.dax_rule,
        udev.GROUP,
    ),
    "sysctl": _Kind(
        "huge pages for a region on hugetlbfs",
        ("sysctl --system",),
        ("/etc/sysctl.d/60-shmsock.conf",),
    ),
}
NAMES = {name: kind.what for name, kind in _KINDS.items()}
"""What can be installed, and what it is."""


def system_files(
    name: str,
    *,
    region: str = "/dev/shm/vms",
    size: int = 256 << 20,
    group: str | None = None,
    program: str | None = None,
) -> Iterator[SystemFile]:
    """Make the files that go by `name`, for a region of that path and size, open to `group`.

    `program`: what runs shmsock there; by default what runs it here.
    """
    kind = _KINDS[name]
    group = group or kind.group
    then = list(kind.then)
    if kind.rule:
        then.insert(
            0, f"groupadd --system --force {group}; usermod -aG {group} USER    # who then logs in again"
        )
    shmsock = program or this_program()
    # Its interpreter, too, as systemd would find it: that of a virtual environment leads elsewhere.
    needed = [shmsock] if program else [shmsock, sys.prefix + "/", os.path.realpath(sys.executable)]
    at_home = any(re.search(r"(^|[\s:])/(home|root|run/user)/", where) for where in needed)
    words = {
        "GROUP": group,
        "PAGES": str(-(-size // HUGE_PAGE)),
        "PROTECT_HOME": "read-only" if at_home else "yes",
        "REGION": region,
        "SHMSOCK": shmsock,
        "SIZE": short_size(size),
    }
    for path in kind.files:
        if kind.rule:
            text = f"# {kind.what[0].upper()}{kind.what[1:]}.\n{kind.rule(group)}\n"
        else:
            source = resources.files(__package__) / "files" / os.path.basename(path)
            text = re.sub(r"@([A-Z_]+)@", lambda found: words[found[1]], source.read_text(encoding="utf-8"))
        yield SystemFile(path, text, tuple(then) if path == kind.files[-1] else ())


def this_program() -> str:
    """The command that runs this shmsock: its script, else the interpreter with the module."""
    beside = os.path.join(os.path.dirname(sys.executable), "shmsock")
    for path in (os.path.abspath(sys.argv[0]), beside):
        if os.path.basename(path) == "shmsock" and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return f"{sys.executable} -m shmsock"
