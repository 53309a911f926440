"""Boot QEMU guests and run commands in them, for tests that need more than one kernel.

::

    with Fleet() as fleet:
        region = fleet.shared_file(1 << 26)
        a = fleet.boot("vm-a", ivshmem=[Ivshmem(region, 1 << 26)])
        b = fleet.boot("vm-b", ivshmem=[Ivshmem(region, 1 << 26)])   # both are booting now
        print(a.run(["uname", "-n"]).text)                           # waits until vm-a is up
        with b.start(["python", "server.py"]) as server:
            server.expect("ready")                                   # reads its output up to that line
            a.run(["python", "client.py"], timeout=30)

A guest has a stock Debian cloud kernel and the host's root file system, read-only: the same Python, virtual
environment and checkout are at the same paths. /tmp, /run and /dev/shm are the guest's own tmpfs, /tmp is the
working directory, everything runs as root. The guest keeps what it has read from the host's files: files that
the host *changes* while it runs may look old in it, new ones appear. There is no network device but ``lo``
unless one is asked for; commands go over a virtio-serial port to `agent`.

Nothing is left behind: `Fleet.close` ends every process it started, and the kernel ends them when the test
run itself is killed (PR_SET_PDEATHSIG); only its temporary files stay then.
"""

from __future__ import annotations

import compileall
import logging
import os
import secrets
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from shmsock.guests import agent as guest_agent
from shmsock.guests.devices import Bridge, Dax, Device, Ivshmem, IvshmemDoorbell, Tap
from shmsock.guests.guest import Command, CommandFailed, CommandTimeout, Guest, GuestDied, GuestError, Result
from shmsock.guests.image import (
    QEMU,
    GuestUnavailable,
    Kernel,
    build_initramfs,
    find_kernel,
    hidden,
    kvm_works,
    missing,
    require,
    virtiofsd,
)

__all__ = [
    "Bridge",
    "Command",
    "CommandFailed",
    "CommandTimeout",
    "Dax",
    "Fleet",
    "Guest",
    "GuestDied",
    "GuestError",
    "GuestUnavailable",
    "Ivshmem",
    "IvshmemDoorbell",
    "Result",
    "Tap",
    "missing",
]

BOOT_SECONDS = 90.0

KERNEL_WORDS = "console=ttyS0 panic=-1 quiet mitigations=off random.trust_cpu=on no_timer_check"
"""(The last: the kernel would check whether the timer's interrupts come within a few ticks, which an emulated
one's may not on a busy host, and panic; under KVM it does not check either.)"""

log = logging.getLogger("shmsock.qemu")


class Fleet:
    """Some guests, a temporary directory, and the promise that all of it is gone after `close`."""

    def __init__(self, *, show: Sequence[str | Path] = ()) -> None:
        """`show`: folders under /tmp and /run that guests shall see; their own tmpfs covers the others."""
        require()
        # A guest cannot write bytecode, and compiling takes seconds under emulation: have it there, quietly
        # if it cannot be.
        compileall.compile_dir(str(Path(guest_agent.__file__).parents[1]), quiet=2)
        self.kernel: Kernel = find_kernel()
        package = Path(guest_agent.__file__).parents[2]
        self._show = hidden([*sys.path, sys.prefix, sys.base_prefix, package, self.kernel.root, *show])
        self.guests: list[Guest] = []
        self.directory = Path(tempfile.mkdtemp(prefix="shmsock-vm-"))
        self._files: list[Path] = []
        self._namespace = uuid.uuid4()  # of the guests' machine ids

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def boot(
        self,
        name: str,
        *,
        ivshmem: Sequence[Device] = (),
        net: Tap | None = None,
        memory_mb: int = 512,
        cpus: int = 1,
        iommu: bool = False,
        modules: Sequence[str] = (),
        append: str = "",
        extra: Sequence[str] = (),
        accel: str = "auto",
        machine: str = "q35",
        cpu: str | None = None,
        timeout: float = BOOT_SECONDS,
    ) -> Guest:
        """Start a guest with this host name and return at once; whoever uses it first waits for it.

        A guest that is booted again under its name is the same machine as before (it has the same DMI UUID).
        `ivshmem`: devices, in this order on the PCI bus. `modules`: kernel modules to load besides. `iommu`:
        a virtual IOMMU, for vfio. `append`: more of the kernel's command line. `extra`: more arguments for
        QEMU. `accel`: "kvm", "tcg", or "auto": the environment variable SHMSOCK_QEMU_ACCEL, else KVM where
        it works (tried once per boot of the host), else emulation; `Guest.accel` tells which it became.
        """
        if any(guest.name == name and guest.alive for guest in self.guests):
            raise ValueError(f"a guest called {name} is running already")
        if accel == "auto":
            accel = os.environ.get("SHMSOCK_QEMU_ACCEL") or ("kvm" if kvm_works(self.kernel) else "tcg")
        if accel not in ("kvm", "tcg"):
            raise ValueError(f"accel is kvm, tcg or auto, not {accel!r}")
        marker = secrets.token_bytes(16)
        devices: list[Device] = [*ivshmem, *([net] if net else [])]
        config = {
            "hostname": name,
            "env": self._environment(),
            "modules": [*(m for device in devices for m in device.modules), *modules],
            "net": [{"mac": net.mac, "address": net.address}] if net else [],
        }
        stem = self.directory / f"{len(self.guests)}-{name}"
        guest = Guest(name, accel, timeout, config, marker, stem)
        if iommu:
            machine += ",kernel-irqchip=split"
            append = f"intel_iommu=on {append}"
        argv = [
            *(QEMU, "-name", name, "-uuid", str(uuid.uuid5(self._namespace, name)), "-machine", machine),
            *("-smp", str(cpus), "-m", str(memory_mb)),
            *("-accel", "kvm" if accel == "kvm" else "tcg,thread=multi"),
            *("-cpu", cpu or ("host" if accel == "kvm" else "max,la57=off")),
            *("-object", f"memory-backend-memfd,id=ram,size={memory_mb}M,share=on"),
            *("-numa", "node,memdev=ram"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(self.kernel.image), "-initrd", str(self._initramfs(stem, marker))),
            *("-append", f"{KERNEL_WORDS} {append}"),
            *(["-device", "intel-iommu,intremap=on"] if iommu else []),
            *(argument for index, device in enumerate(devices) for argument in device.arguments(index)),
            *extra,
        ]
        log.info("booting %s with kernel %s under %s", name, self.kernel.version, accel)
        guest._boot(argv, _serve_files())
        self.guests.append(guest)
        return guest

    def shared_file(self, size: int, directory: Path | str = "/dev/shm") -> Path:
        """An empty file of this size for guests to share, removed at the end. Hugetlbfs will do as well."""
        fd, name = tempfile.mkstemp(prefix="shmsock-vm-", dir=directory)
        self._files.append(Path(name))
        os.ftruncate(fd, size)
        os.close(fd)
        return Path(name)

    def report(self) -> Iterator[tuple[str, str]]:
        """For every guest a title and the text to show when a test failed."""
        for guest in self.guests:
            yield f"guest {guest.name}", guest.report()

    def close(self) -> None:
        """End every guest and helper, and remove the files. May be called again."""
        for guest in self.guests:
            guest.process.kill()  # all at once, then wait for each
        for guest in self.guests:
            guest.kill()
        self.guests.clear()
        for path in self._files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        path = [str(Path(sys.executable).parent), "/usr/local/sbin", "/usr/local/bin"]
        env = {
            "PATH": ":".join([*path, "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if self.kernel.root != Path("/"):
            env["MODPROBE_OPTIONS"] = f"-d {self.kernel.root}"
        if search := os.environ.get("PYTHONPATH"):
            env["PYTHONPATH"] = ":".join(os.path.abspath(path) for path in search.split(":"))
        return env

    def _initramfs(self, stem: Path, marker: bytes) -> Path:
        path = stem.with_suffix(".initramfs")
        script = Path(guest_agent.__file__).resolve()
        agent = [sys.executable, "-I", "-S", "-B", str(script), marker.hex()]
        build_initramfs(self.kernel, path, agent, self._show)
        return path


def _serve_files() -> list[str]:
    """The command that serves the host's files.

    It gets its own mount namespace, where the root is read-only: a guest that mounts it writable still
    cannot write.
    """
    server = virtiofsd()
    assert server is not None
    unshare = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid():
        unshare.append("--map-root-user")
    script = 'mount -o remount,bind,ro / && exec "$@"'
    return [*unshare, "sh", "-c", script, "sh", server, "-o", "source=/,cache=always,sandbox=chroot"]
