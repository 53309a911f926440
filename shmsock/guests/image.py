"""What a test guest is booted from: Debian's cloud kernel, a tiny initramfs, the host's root file system.

No disk image is built. The initramfs (busybox and a few kernel modules) mounts the host's root read-only
through virtiofs, puts a tmpfs over /tmp, /run and /dev/shm (folders of the host's that guests need from
there are mounted again), and starts `agent` as process 1. The host's running kernel does not matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
ROOT_TAG = "rootfs"
MODULES = ("virtio_pci", "virtiofs", "virtio_console")
KVM_SECONDS = 15.0

_COMMANDS = {
    QEMU: "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")  # Debian 13; Debian 12
_INSTALLED = Path("/")
_PROBE = "shmsock.probe"
_PROBE_OK = "shmsock: the kernel runs"
_ADMIN_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
fail() { echo "shmsock: guest start: $1 failed"; $b sleep 1; $b reboot -f; }
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
if $b grep -q @PROBE@ /proc/cmdline; then echo "@PROBE_OK@"; $b poweroff -f; fi
for m in @MODULES@; do $b insmod /modules/$m || fail "insmod $m"; done
root=/root # where the root file system of the guest is to be
$b mount -t virtiofs -o ro @TAG@ $root || fail "mounting the root file system"
$b mkdir /dev/pts /dev/shm
$b mount -t devpts devpts /dev/pts
show() { $b mkdir -p "$1" "$2"; $b mount --bind "$1" "$2" || fail "showing $1"; }
@KEEP@
for d in $root/tmp $root/run /dev/shm; do $b mount -t tmpfs -o mode=1777 tmpfs $d || fail "tmpfs on $d"; done
@SHOW@
for d in /dev /proc /sys; do $b mount --move $d $root$d || fail "moving $d"; done
echo "shmsock: the root file system is there, starting the agent"
exec $b switch_root $root @AGENT@
fail switch_root
"""

log = logging.getLogger("shmsock.qemu")


class GuestUnavailable(RuntimeError):
    """This machine cannot boot test guests: packages are missing. The message says which."""


@dataclass(frozen=True)
class Kernel:
    """A Debian cloud kernel: its image, and the directory under which ``lib/modules/<version>`` lies."""

    version: str
    image: Path
    root: Path

    @property
    def modules(self) -> Path:
        return self.root / "lib/modules" / self.version


def cache_dir() -> Path:
    """Where an unpacked kernel and the verdict on KVM are kept: ``$XDG_CACHE_HOME/shmsock``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shmsock"


def command_path(name: str) -> str | None:
    """Like `shutil.which`, and looking into the system directories that a user's PATH may lack."""
    return shutil.which(name, path=_ADMIN_PATH)


def virtiofsd() -> str | None:
    """The program that gives the host's files to a guest."""
    return next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None) or command_path("virtiofsd")


def missing() -> list[str]:
    """The Debian packages to install before guests can boot; empty when all is there."""
    wanted = {package for command, package in _COMMANDS.items() if not command_path(command)}
    busybox = command_path("busybox")
    if busybox and b"/ld-linux" in Path(busybox).read_bytes()[:4096]:  # needs libraries the initramfs has not
        wanted.add("busybox-static")
    if not virtiofsd():
        release = Path("/etc/os-release")
        debian_12 = release.exists() and "bookworm" in release.read_text()
        wanted.add("qemu-system-common" if debian_12 else "virtiofsd")
    if not _kernels() and not (command_path("apt-get") and command_path("dpkg-deb")):
        wanted.add("linux-image-cloud-amd64")
    return sorted(wanted)


def require() -> None:
    """Raise `GuestUnavailable` when something is missing."""
    if packages := missing():
        raise GuestUnavailable(f"test guests need more packages: sudo apt-get install {' '.join(packages)}")


def _kernels() -> list[Kernel]:
    """Every complete cloud kernel, installed or unpacked in the cache, oldest first."""
    found = []
    for root in (_INSTALLED, cache_dir() / "kernel"):
        for image in (root / "boot").glob("vmlinuz-*-cloud-amd64"):
            kernel = Kernel(image.name.removeprefix("vmlinuz-"), image, root)
            if (kernel.modules / "modules.dep").exists() and os.access(image, os.R_OK):
                found.append(kernel)
    return sorted(found, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.version)])


def find_kernel() -> Kernel:
    """The newest cloud kernel installed; without one, Debian's current one, unpacked into the cache."""
    if not _kernels():
        _unpack_kernel(cache_dir() / "kernel")
    if kernels := _kernels():
        return kernels[-1]
    raise GuestUnavailable("no cloud kernel was found: sudo apt-get install linux-image-cloud-amd64")


def _unpack_kernel(target: Path) -> None:
    """Download and unpack the package that linux-image-cloud-amd64 stands for. Nothing is installed."""
    target.mkdir(parents=True, exist_ok=True)
    with _lock(target / "lock"), tempfile.TemporaryDirectory(dir=target) as scratch:
        if _kernels():
            return
        try:
            depends = _output("apt-cache", "depends", "linux-image-cloud-amd64", cwd=scratch)
            package = re.search(r"linux-image-\d\S*-cloud-amd64", depends)
            if package is None:
                raise GuestUnavailable("no cloud kernel in the package lists: run apt-get update")
            log.info("downloading %s", package[0])
            _output("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package[0], cwd=scratch)
            _output("dpkg-deb", "-x", str(next(Path(scratch).glob("*.deb"))), scratch, cwd=scratch)
            version = package[0].removeprefix("linux-image-")
            modules = next(Path(scratch).glob(f"**/lib/modules/{version}"))
            (target / "boot").mkdir(exist_ok=True)
            (target / "lib/modules").mkdir(parents=True, exist_ok=True)
            shutil.move(modules, target / "lib/modules" / version)
            _output(command_path("depmod") or "depmod", "-b", str(target), version, cwd=scratch)
            shutil.move(Path(scratch, "boot", f"vmlinuz-{version}"), target / "boot")
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise GuestUnavailable(
                f"no cloud kernel is installed, and downloading one failed ({reason}): "
                "sudo apt-get install linux-image-cloud-amd64"
            ) from error


def _output(*argv: str, cwd: str) -> str:
    return subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True).stdout


class _lock:
    """An exclusive lock between processes: two test runs may meet here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.file = self.path.open("a")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def hidden(folders: Iterable[str | Path]) -> list[Path]:
    """Those of the folders that a guest's own /tmp or /run would hide, the outermost ones alone."""
    found: list[Path] = []
    for path in sorted({Path(folder).resolve() for folder in folders if Path(folder).is_dir()}):
        under = any(path.is_relative_to(top) and path != Path(top) for top in ("/tmp", "/run"))
        if under and not any(path.is_relative_to(other) for other in found):
            found.append(path)
    return found


def build_initramfs(kernel: Kernel, path: Path, agent: Sequence[str], show: Sequence[Path] = ()) -> None:
    """Write an initramfs that ends in running `agent`, a command in the host's root file system.

    `show` are folders of the host's under /tmp and /run that are to be seen there all the same.
    """
    busybox = command_path("busybox")
    assert busybox is not None
    modules = list(_load_order(kernel))
    init = _INIT
    for name, value in {
        "PROBE_OK": _PROBE_OK,
        "PROBE": _PROBE,
        "MODULES": " ".join(file.name.partition(".ko")[0] for file in modules),
        "TAG": ROOT_TAG,
        "KEEP": "\n".join(f"show {shlex.quote(f'/root{folder}')} /keep/{n}" for n, folder in enumerate(show)),
        "SHOW": "\n".join(f"show /keep/{n} {shlex.quote(f'/root{folder}')}" for n, folder in enumerate(show)),
        "AGENT": shlex.join(agent),
    }.items():
        init = init.replace(f"@{name}@", value)
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "modules", "proc", "root", "sys")]
    entries.append(("init", stat.S_IFREG | 0o755, init.encode()))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes()))
    for file in modules:
        code = file.read_bytes()
        if file.suffix == ".xz":
            import lzma  # which not every CPython was built with

            code = lzma.decompress(code)
        entries.append((f"modules/{file.name.partition('.ko')[0]}", stat.S_IFREG | 0o644, code))
    path.write_bytes(_cpio(entries))


def _load_order(kernel: Kernel) -> Iterator[Path]:
    """The files of `MODULES` and of what they need, in the order to load them."""
    needs: dict[str, tuple[Path, list[str]]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        file, _, others = line.partition(":")
        needs[_module_name(file)] = kernel.modules / file, [_module_name(other) for other in others.split()]
    done = set()
    for wanted in MODULES:
        for name in [*reversed(needs[wanted][1]), wanted] if wanted in needs else []:  # else built in
            if name not in done:
                done.add(name)
                yield needs[name][0]


def _module_name(file: str) -> str:
    return Path(file).name.partition(".ko")[0].replace("-", "_")


def _cpio(entries: Sequence[tuple[str, int, bytes]]) -> bytes:
    """An archive in the "newc" format (the kernel's early-userspace/buffer-format documentation)."""
    archive = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def kvm_works(kernel: Kernel) -> bool:
    """Whether a stock kernel boots under KVM here: tried once per boot of this machine, and remembered.

    /dev/kvm may be there and answer and a guest still never reach user space (seen under nested
    virtualisation), so nothing short of a boot will do: the initramfs alone, with a time limit.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    key = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {kernel.version}"
    cache = cache_dir()
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):
        return not _try_kvm(kernel)
    with _lock(cache / "kvm.lock"):
        verdict = cache / "kvm.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(verdict.read_text())
            if known["key"] == key:
                return bool(known["works"])
        problem = _try_kvm(kernel)
        log.info("KVM: %s", problem or "works")
        verdict.write_text(json.dumps({"key": key, "works": not problem, "problem": problem}))
        return not problem


def _try_kvm(kernel: Kernel) -> str:
    """Why the kernel does not get as far as the initramfs; empty when it does."""
    with tempfile.TemporaryDirectory(prefix="shmsock-kvm-") as scratch:
        initramfs, serial = Path(scratch, "initramfs"), Path(scratch, "serial.log")
        build_initramfs(kernel, initramfs, ["/nothing"])
        argv = ["setpriv", "--pdeathsig", "KILL", QEMU, "-machine", "q35,accel=kvm", "-cpu", "host"]
        argv += ["-m", "256", "-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{serial}"]
        argv += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        argv += ["-append", f"console=ttyS0 panic=-1 quiet {_PROBE}"]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_SECONDS)
        except subprocess.TimeoutExpired:
            return f"a stock kernel does not reach user space within {KVM_SECONDS:.0f} s"
        if serial.exists() and _PROBE_OK.encode() in serial.read_bytes():
            return ""
        return f"QEMU ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()}"
