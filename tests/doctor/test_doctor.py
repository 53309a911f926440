"""`shmsock doctor` on this host: set-ups that are broken, and what it says is wrong with each."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shmsock.doctor import memory
from shmsock.doctor.devices import devices
from shmsock.doctor.examine import examine
from shmsock.engine import layout as lay
from shmsock.native._core import ffi
from shmsock.region import bar2
from shmsock.region.processes import command_of
from tests.commands.test_cli import attach, good, shmsock, silence, usage  # noqa: F401
from tests.region.conftest import NOBODY, FakeSysfs, in_child
from tests.region.fake_vfio import put_in_group
from tests.region.test_dax import add

Attach = Callable[..., subprocess.Popen[str]]
STRANGERS = 1 << 20 | os.getpid() << 2
"""Three users that have nothing here."""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")

# A peer that beats, and whose loop does not turn.
STUCK = """
import asyncio, sys, shmsock
async def main():
    async with shmsock.attach(sys.argv[1], name=sys.argv[2]):
        print("attached", flush=True)
        sys.stdin.read()
asyncio.run(main())
"""

# A peer that fills 60 connections to itself, and reads none.
FULL = """
import asyncio, sys, shmsock
async def main():
    async with shmsock.attach(sys.argv[1], name=sys.argv[2]) as node:
        server = await shmsock.start_server(lambda reader, writer: None, port=7000, node=node, limit=1)
        held = [await shmsock.open_connection(sys.argv[2], 7000, node=node) for _ in range(60)]
        for _, writer in held:
            writer.write(bytes(1 << 20))
        print("attached", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""

# A peer that opens as many connections to itself as it can.
MANY = """
import asyncio, sys, shmsock
async def main():
    async with shmsock.attach(sys.argv[1], name=sys.argv[2]) as node:
        server = await shmsock.start_server(lambda reader, writer: None, port=7000, node=node)
        held = []
        try:
            while True:
                held.append(await shmsock.open_connection(sys.argv[2], 7000, node=node))
        except OSError:
            print("attached", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shmsock-test-", dir="/dev/shm") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def path(shm: Path) -> Path:
    """A region that is formatted, for 4 peers."""
    good("create", shm / "region", "--size", "4M", "--peers", 4)
    return shm / "region"


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "attached\n"
            yield process
        finally:
            process.kill()


def wrong(*arguments: object, look: bool = True) -> dict[str, Any]:
    """What doctor finds to be wrong, by name; the exit status goes with it."""
    done = shmsock("doctor", *arguments, "--json", *(["--look"] if look else []))
    assert done.exit_code in (0, 1), done.output
    said = json.loads(done.stdout)
    assert said["errors"] == sum(f["level"] == "error" for f in said["findings"])
    assert done.exit_code == (said["errors"] > 0)
    return not_well(said["findings"])


def not_well(findings: list[dict[str, Any]]) -> dict[str, Any]:
    found = {f["name"]: f for f in findings if f["level"] in ("warning", "error")}
    for finding in found.values():
        assert finding["why"], finding
        assert finding["mend"], finding
    return found


def only(found: dict[str, Any], name: str, level: str = "error") -> Any:
    """The one thing that is wrong."""
    assert list(found) == [name], found
    assert found[name]["level"] == level
    return found[name]


# -- what is healthy


def test_healthy(path: Path, attach: Attach) -> None:  # noqa: F811
    """Two peers, asked for an answer; nothing is a warning, in JSON and for people."""
    attach(path, "vm-a"), attach(path, "vm-b")
    assert wrong(path, look=False) == {}
    said = good("doctor", path)
    assert said.endswith("nothing is wrong\n")
    assert f"ok      mapped         file:{path}:" in said
    for name in "vm-a", "vm-b":
        (line,) = (line for line in said.splitlines() if line.startswith(f"ok      round-trip     {name} "))
        assert "answers: " in line
    assert "memory-type    cached (write-back)" in said
    assert all(len(line) <= 80 for line in said.splitlines())


def test_healthy_and_nobody_there(path: Path) -> None:
    assert wrong(path, look=False) == {}


@ROOT
def test_healthy_in_a_container(path: Path, attach: Attach) -> None:  # noqa: F811
    """Other namespaces for processes, mounts, networks and users' names; the file is shared."""
    attach(path, "vm-a")
    argv = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "--net"]
    argv += [sys.executable, "-m", "shmsock", "doctor", str(path), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not_well(said["findings"]) == {}
    (answers,) = (f for f in said["findings"] if f["name"] == "round-trip")
    assert answers["data"]["name"] == "vm-a"
    assert "a container" in said["findings"][0]["seen"]


# -- what is broken: a region


FIRST = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF, "uts": 0xEFFFFFFE, "cgroup": 0xEFFFFFFB, "mnt": 0xF0000000}


@pytest.mark.parametrize(
    ("own", "of_first", "marks", "kind"),
    [
        ({}, FIRST["mnt"], (), "a machine of its own"),
        ({}, FIRST["mnt"], ("hypervisor",), "a guest"),
        ({}, FIRST["mnt"], ("QEMU",), "a guest"),
        ({}, FIRST["mnt"], ("hypervisor", ".dockerenv"), "a guest"),  # its root was an image of docker's
        ({}, None, ("hypervisor", ".dockerenv"), "a guest"),  # for who may not see process 1
        ({"uts": 1}, None, ("hypervisor", ".dockerenv"), "a container"),
        ({"mnt": 1}, FIRST["mnt"], ("run/.containerenv",), "a container"),  # with the host's processes
        ({"mnt": 1}, FIRST["mnt"], (), "a machine of its own"),  # a service with a private /tmp
        ({"pid": 1, "mnt": 1}, 1, ("hypervisor",), "a container"),
        ({"ipc": 1}, FIRST["mnt"], (), "a container"),
    ],
)
def test_which_kind_of_machine(
    tmp_path: Path, own: dict[str, int], of_first: int | None, marks: tuple[str, ...], kind: str
) -> None:
    """`of_first`: process 1's mount namespace."""
    for at in ("proc/self/ns", "proc/1/ns", "run", "sys/class/dmi/id"):
        (tmp_path / at).mkdir(parents=True)
    for name, first in FIRST.items():
        (tmp_path / "proc/self/ns" / name).symlink_to(f"{name}:[{own.get(name, first)}]")
    if of_first is not None:
        (tmp_path / "proc/1/ns/mnt").symlink_to(f"mnt:[{of_first}]")
    flags = "fpu hypervisor" if "hypervisor" in marks else "fpu"
    (tmp_path / "proc/cpuinfo").write_text(f"processor : 0\nflags : {flags} lahf_lm\n")
    (tmp_path / "sys/class/dmi/id/sys_vendor").write_text("QEMU\n" if "QEMU" in marks else "Dell Inc.\n")
    for mark in set(marks) - {"hypervisor", "QEMU"}:
        (tmp_path / mark).touch()
    root = str(tmp_path)
    machine = next(examine(None, sysfs=f"{root}/sys", proc=f"{root}/proc", root=root))
    assert machine.seen.startswith(kind)


@ROOT
def test_no_region_and_no_device() -> None:
    """A user who has not begun: there is no device, and nothing else either."""
    found = only(in_child(wrong, STRANGERS), "device")
    assert "no ivshmem device (PCI 1af4:1110) is here" in found["seen"]
    assert "-device ivshmem-plain" in found["mend"]


def test_no_device_that_was_named() -> None:
    assert "no ivshmem device" in only(wrong("pci:auto"), "device")["seen"]
    assert "no PCI device at 0000:00:1f.7" in only(wrong("pci:00:1f.7"), "device")["seen"]


def test_no_region(shm: Path) -> None:
    found = only(wrong(shm / "nothing"), "no-region")
    assert f"region {shm}/nothing does not exist" in found["seen"]
    assert f"shmsock create {shm}/nothing" in found["mend"]


@ROOT
def test_no_permission(path: Path) -> None:
    found = only(in_child(lambda: wrong(path), NOBODY), "permission")
    assert (
        f"no permission to open region {path} for reading and writing: it belongs to uid 0" in found["seen"]
    )
    assert "chgrp, chmod 0660" in found["mend"]


@ROOT
def test_permission_to_read_only(path: Path) -> None:
    path.chmod(0o644)
    assert "for reading and writing" in only(in_child(lambda: wrong(path), NOBODY), "permission")["seen"]


def test_unformatted(shm: Path) -> None:
    (shm / "region").write_bytes(bytes(4 << 20))
    found = only(wrong(shm / "region", look=False), "unformatted", "warning")
    assert "nobody formatted it yet" in found["seen"]
    assert "share=on" in found["mend"]
    assert not any((shm / "region").read_bytes())  # nor did doctor


def test_something_else(shm: Path) -> None:
    (shm / "region").write_bytes(b"\x7fELF" + bytes(1 << 20))
    assert "begins with 7f 45 4c 46" in only(wrong(shm / "region", look=False), "format")["seen"]


def test_garbage_in_every_section(path: Path) -> None:
    """Whatever is in there: told, and no crash."""
    head = path.read_bytes()[: lay.HEADER]
    path.write_bytes(head + os.urandom((4 << 20) - lay.HEADER))
    assert list(wrong(path, look=False)) in (["peer-silent", "sections"], ["sections"])


def test_another_version(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(lay.H_VERSION)
        file.write((lay.VERSION - 1).to_bytes(8, "little"))
    found = only(wrong(path), "version")
    assert f"it has format version {lay.VERSION - 1}, and this shmsock {lay.VERSION}" in found["seen"]
    assert "install one shmsock everywhere" in found["mend"]


def test_truncated(path: Path) -> None:
    os.truncate(path, 1 << 20)
    assert "has 4 MiB, and 1 MiB of it are here" in only(wrong(path), "size")["seen"]


def test_truncated_while_it_is_looked_at(path: Path, attach: Attach) -> None:  # noqa: F811
    attach(path, "vm-a")
    code = """
import os, sys
from shmsock.doctor.examine import examine
try:
    for finding in examine(sys.argv[1], attach=False):
        if finding.name == "peers":
            os.truncate(sys.argv[1], 0)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "was made smaller while it was looked at" in done.stdout


def test_a_process_with_a_name_for_terminals(tmp_path: Path) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17/comm").write_bytes(b"qemu\x1b[31m\rx\xff\n")
    assert command_of(17, str(tmp_path)) == "qemu?[31m?x\N{REPLACEMENT CHARACTER}"


def test_replaced_under_live_processes(path: Path, attach: Attach) -> None:  # noqa: F811
    process = attach(path)
    path.unlink()
    found = only(wrong(path), "replaced")
    assert f"process {process.pid} (" in found["seen"]
    good("create", path, "--size", "4M")
    found = only(wrong(path), "replaced")
    assert f"process {process.pid} (" in found["seen"]
    assert "restart them" in found["mend"]
    process.kill()
    process.wait()
    assert wrong(path) == {}


@ROOT
def test_default_regions_of_two_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has one, and is alone in it."""
    regions = [Path(f"/dev/shm/shmsock-{uid}") for uid in (STRANGERS + 1, STRANGERS + 2)]
    try:
        for region in regions:
            good("create", region, "--size", "4M")
            os.chown(region, int(region.name[8:]), -1)
        found = only(in_child(wrong, STRANGERS + 1), "other-users", "warning")
        assert f"({regions[1]})" in found["seen"]
        assert "SHMSOCK_REGION=/dev/shm/NAME" in found["mend"]
    finally:
        for region in regions:
            region.unlink(missing_ok=True)


@pytest.fixture
def small(shm: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mount = shm / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@ROOT
def test_a_full_disk(small: Path) -> None:
    with (small / "region").open("wb") as file:
        file.truncate(16 << 20)
    assert list(wrong(small / "region")) == ["unformatted", "disk-full"]
    (small / "ballast").write_bytes(bytes(1536 << 10))
    found = wrong(small / "region")["disk-full"]
    assert found["level"] == "error"
    assert "16 MiB of the region have no storage yet" in found["seen"]
    (small / "region").unlink()
    assert list(wrong(small / "region")) == ["no-region", "disk-full"]


@pytest.fixture
def hugetlbfs(shm: Path) -> Iterator[Path]:
    """A mount on which no page can be had."""
    mount = shm / "huge"
    mount.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@ROOT
def test_huge_pages_are_missing(hugetlbfs: Path) -> None:
    size = 1 << 40  # more than this machine has
    with (hugetlbfs / "region").open("wb") as file:
        file.truncate(size)
    found = only(wrong(hugetlbfs / "region"), "huge-pages")
    assert f"it takes {size >> 21} huge pages of 2 MiB" in found["seen"]
    assert "sysctl vm.nr_hugepages=" in found["mend"]


# -- what is broken: peers


def test_a_dead_peer(path: Path, attach: Attach) -> None:  # noqa: F811
    process = attach(path)
    process.kill()
    process.wait()
    found = only(wrong(path), "peer-dead", "warning")
    assert f"section 0 (vm-a, process {process.pid})" in found["seen"]
    assert found["mend"] == f"shmsock reap file:{path}"


def test_a_stopped_peer(path: Path, attach: Attach) -> None:  # noqa: F811
    process = attach(path)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    found = only(wrong(path, look=False), "peer-stopped", "warning")  # nor is it asked
    assert f"kill -CONT {process.pid}" in found["mend"]


def test_a_silent_peer(path: Path, attach: Attach) -> None:  # noqa: F811
    silence(path, attach)
    assert f"shmsock reap file:{path} --section 0" in only(wrong(path), "peer-silent", "warning")["mend"]


def test_a_stalled_peer(path: Path, attach: Attach) -> None:  # noqa: F811
    """It beats, and does not answer; another one does."""
    attach(path, "vm-b")
    with running(STUCK, path, "vm-a") as process:
        found = only(wrong(path, look=False), "peer-stalled")
        assert f"vm-a (section 1, process {process.pid}) is there, and does not answer" in found["seen"]


def test_all_sections_are_taken(path: Path, attach: Attach) -> None:  # noqa: F811
    for name in "abcd":
        attach(path, f"vm-{name}")
    assert "all 4 sections are taken" in only(wrong(path, look=False), "sections")["seen"]


@pytest.mark.parametrize(("script", "name"), [(FULL, "arena-full"), (MANY, "slots-full")])
def test_a_peer_that_has_used_up_its_section(path: Path, script: str, name: str) -> None:
    with running(script, path, "vm-a") as process:
        found = only(wrong(path), name, "warning")
        assert f"section 0 (vm-a, process {process.pid}) uses " in found["seen"]
        assert "--size 8M --peers 4" in found["mend"]


def test_a_server_that_is_gone(shm: Path) -> None:
    """And a peer that it had, whose doorbell nobody can ring."""
    socket, region = shm / "socket", shm / "region"
    good("create", region, "--size", "4M")
    argv = [sys.executable, "-m", "shmsock", "ivshmem-server", "--socket", str(socket)]
    with subprocess.Popen([*argv, "--region", str(region)], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            server.stderr.readline()
            with running(STUCK, f"ivshmem:{socket}", "vm-a"):
                assert wrong(f"ivshmem:{socket}") == {}
                server.kill()
                server.wait()
                found = only(wrong(f"ivshmem:{socket}"), "server")
                assert "shmsock ivshmem-server" in found["mend"]
                assert "doorbell 0" in only(wrong(region), "doorbell", "warning")["seen"]
        finally:
            server.kill()


# -- what is broken: the memory


def test_uncached_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which whatever is mapped takes as long as a device's memory does."""
    from shmsock.doctor.memory import time_reads, time_writes

    write_ns = 60.0

    def mapped(buffer: Any) -> bool:
        address = int(ffi.cast("uintptr_t", buffer))
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= address < end:
                return str(path) in line
        return False

    def reads(buffer: Any, at: int, size: int, times: int) -> int:
        took = time_reads(buffer, at, size, times)
        return took + size // 8 * times * 150 if mapped(buffer) else took

    def writes(buffer: Any, at: int, size: int, times: int) -> int:
        took = time_writes(buffer, at, size, times)
        return took + int(size // 8 * times * write_ns) if mapped(buffer) else took

    assert wrong(path, look=False) == {}
    monkeypatch.setattr(memory, "time_reads", reads)
    monkeypatch.setattr(memory, "time_writes", writes)
    found = only(wrong(path, look=False), "memory-type", "warning")
    assert "the memory is uncached: 15" in found["seen"]
    assert found["data"]["type"] == "uncached"
    write_ns = 2.0
    assert "is write-combining" in only(wrong(path, look=False), "memory-type", "warning")["seen"]
    assert "is uncached or write-combining" in only(wrong(path), "memory-type", "warning")["seen"]


def test_what_helps_against_uncached_memory() -> None:
    with mmap.mmap(-1, 4096) as ours:
        assert memory.judge("pci:0000:00:04.0", ours, 0, 4096, write=True).level == "ok"


# -- what is broken: devices, as sysfs shows them


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path / "sys")


def of_sysfs(sysfs: FakeSysfs, tmp_path: Path) -> dict[str, Any]:
    found = examine(None, attach=False, sysfs=sysfs.root, dev=str(tmp_path / "dev"))
    return not_well([vars(finding) for finding in found])


@pytest.mark.parametrize(
    ("device", "name", "seen", "mend"),
    [
        ({"size": 0}, "bar", "has no BAR2", "memory-backend a larger size=, a power of 2"),
        ({"unassigned": True}, "bar", "no room was found", "smaller size="),
        ({"driver": "uio_ivshmem"}, "driver", "bound to uio_ivshmem", "driver/unbind"),
        ({"driver": "vfio-pci"}, "driver", "ivshmem-plain, which has no interrupts", "shmsock unbind 0000"),
        ({"doorbell": True}, "iommu", "no IOMMU, which vfio needs", "-device intel-iommu,intremap=on"),
    ],
)
def test_devices(
    sysfs: FakeSysfs, tmp_path: Path, device: dict[str, Any], name: str, seen: str, mend: str
) -> None:
    sysfs.add(**device)
    found = of_sysfs(sysfs, tmp_path)
    assert seen in found[name]["seen"]
    assert mend in found[name]["mend"]


def test_lockdown(sysfs: FakeSysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    sysfs.add()
    security = Path(sysfs.root) / "kernel/security"
    security.mkdir(parents=True)
    (security / "lockdown").write_text("none [integrity] confidentiality\n")
    monkeypatch.setattr(bar2, "map_device", forbidden)
    found = of_sysfs(sysfs, tmp_path)["lockdown"]
    assert "the kernel forbids to map" in found["seen"]
    assert "lockdown=none" in found["mend"]


def test_devices_that_are_not_bound(sysfs: FakeSysfs, tmp_path: Path) -> None:
    sysfs.add(doorbell=True)
    group = put_in_group(sysfs, 3, "0000:00:04.0")
    assert of_sysfs(sysfs, tmp_path)["unbound"]["mend"] == "shmsock bind 0000:00:04.0"
    sysfs.add("0000:00:04.1", ids=(0x1AF4, 0x1005), driver="virtio-pci")
    (group / "devices" / "0000:00:04.1").symlink_to(sysfs.devices / "0000:00:04.1")
    assert "0000:00:04.1 (1af4:1005, virtio-pci)" in of_sysfs(sysfs, tmp_path)["iommu"]["seen"]


def test_a_healthy_device(sysfs: FakeSysfs, tmp_path: Path) -> None:
    device = sysfs.add(size=4 << 20)
    (device / "resource2").unlink()
    good("create", device / "resource2", "--size", "4M")
    (device / "resource2_wc").unlink()
    assert of_sysfs(sysfs, tmp_path) == {}


def test_persistent_memory(sysfs: FakeSysfs, tmp_path: Path) -> None:
    """One that another driver has, and one that is not ours."""
    add(sysfs, "LNXSYSTM:00/ACPI0012:00", driver="kmem")
    found = of_sysfs(sysfs, tmp_path)["driver"]
    assert "dax:dax0.0 (" in found["seen"]
    assert "--mode=devdax dax0.0" in found["mend"]
    add(sysfs, "pci0000:00/0000:00:01.0/virtio0", 1, "00000000-0000-0000-0000-000000000001")
    said = [finding.seen for finding in devices(sysfs.root) if finding.level == "ok"]
    assert any("dax:dax1.0" in seen and "which shmsock did not make" in seen for seen in said)


# -- the command


def test_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such option" in usage("doctor", "--nonsense").lower()
    monkeypatch.setenv("SHMSOCK_SETTINGS", "x=1")
    assert "SHMSOCK_SETTINGS" in usage("doctor")


def test_ping(path: Path, attach: Attach) -> None:  # noqa: F811
    process = attach(path, "vm-a")
    said = good("ping", "vm-a", "--region", path, "-c", 3)
    assert f"vm-a: section 0, process {process.pid}, this kernel" in said
    assert "it wakes us by futex; we wake it by futex" in said
    assert "3 warm: min " in said
    assert "from idle: " in said
    (answers,) = json.loads(good("ping", 0, "--region", path, "-c", 3, "--json"))
    assert (answers["name"], len(answers["warm_us"])) == ("vm-a", 3)
    assert answers["idle_us"] > 0
    done = shmsock("ping", "vm-x", "--region", path)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "no peer named 'vm-x'" in done.stderr
    done = shmsock("ping", 99, "--region", path)
    assert (done.exit_code, done.stderr) == (1, "shmsock: section 99: the region has 4, from 0 on\n")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    done = shmsock("ping", "vm-a", "--region", path, "-W", 0.2)
    assert done.exit_code == 1
    assert "no answer within 0.2 s" in done.stdout
