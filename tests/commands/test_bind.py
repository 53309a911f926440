"""`shmsock bind` and `unbind`: what they say, what they refuse, what they write, over a made-up sysfs."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shmsock.cli import cli
from shmsock.commands import bind as bind_module
from shmsock.commands.bind import Plan, Step, plan_bind, plan_unbind
from shmsock.errors import RegionError
from shmsock.region.iommu import NOIOMMU_SWITCH
from tests.region.conftest import FakeSysfs, failing
from tests.region.fake_vfio import put_in_group

ADDRESS = "0000:00:04.0"


class Kernel:
    """A sysfs that does as it is told: modprobe brings drivers, drivers_probe lets them take devices."""

    def __init__(self, root: Path) -> None:
        self.sysfs = FakeSysfs(root / "sys")
        self.root = self.sysfs.root
        self.bus = Path(self.root) / "bus/pci"
        self.proc = root / "proc"
        self.proc.mkdir()
        (self.bus / "drivers").mkdir()
        (self.bus / "drivers_probe").touch()
        self.takes = True
        self.done: list[str] = []

    def add(self, group: int | None = 1, driver: str | None = None, **options: Any) -> Path:
        device = self.sysfs.add(ADDRESS, doorbell=True, driver=driver, **options)
        (device / "driver_override").write_text("(null)\n")
        if driver:
            (self.bus / "drivers" / driver / "unbind").touch()
        if group is not None:
            put_in_group(self.sysfs, group, ADDRESS)
        return device

    def load(self, driver: str) -> None:
        (self.bus / "drivers" / driver).mkdir(exist_ok=True)
        (self.bus / "drivers" / driver / "unbind").touch()

    def happen(self, path: str, text: str) -> None:
        """The consequences of writing that file."""
        device = self.sysfs.devices / ADDRESS
        if path.endswith("driver_override"):
            (device / "driver_override").write_text(text or "(null)\n")
        elif path.endswith("unbind"):
            assert text == ADDRESS
            (device / "driver").unlink()
        elif path.endswith("drivers_probe"):
            assert text == ADDRESS
            wanted = (device / "driver_override").read_text().strip()
            if wanted != "(null)" and self.takes:
                (device / "driver").symlink_to(f"../../drivers/{wanted}")

    def bind(self, **options: Any) -> Plan:
        return plan_bind(ADDRESS, sysfs=self.root, dev="/dev/vfio", proc=str(self.proc), **options)

    def unbind(self) -> Plan:
        return plan_unbind(ADDRESS, sysfs=self.root, dev="/dev/vfio", proc=str(self.proc))

    def use(self, pid: int, name: str, file: str) -> None:
        """A process that has a file open."""
        (self.proc / f"{pid}/fd").mkdir(parents=True)
        (self.proc / f"{pid}/fd/3").symlink_to(file)
        (self.proc / f"{pid}/comm").write_text(name + "\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    run, write = subprocess.run, os.write

    def watch(fd: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if not path.startswith(kernel.root):
            return write(fd, data)
        text = data.decode().strip()
        kernel.done.append(f"{text} > {path.removeprefix(kernel.root)}")
        kernel.happen(path, text)
        return len(data)

    def start(argv: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        if argv[0] != "modprobe":
            return run(argv, **options)
        kernel.done.append(" ".join(argv))
        kernel.load(argv[1])
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(os, "write", watch)
    monkeypatch.setattr(subprocess, "run", start)
    return kernel


@pytest.fixture
def shmsock(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, over that kernel."""
    options: dict[str, Any] = {"sysfs": kernel.root, "dev": "/dev/vfio", "proc": str(kernel.proc)}
    monkeypatch.setattr(bind_module, "plan_bind", partial(plan_bind, **options))
    monkeypatch.setattr(bind_module, "plan_unbind", partial(plan_unbind, **options))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return lambda *arguments, text="": CliRunner().invoke(
        cli, list(arguments), input=text, prog_name="shmsock"
    )


BOUND = [
    "modprobe vfio-pci",
    f"vfio-pci > /bus/pci/devices/{ADDRESS}/driver_override",
    f"{ADDRESS} > /bus/pci/drivers_probe",
]
BACK = [
    f" > /bus/pci/devices/{ADDRESS}/driver_override",
    f"{ADDRESS} > /bus/pci/drivers/vfio-pci/unbind",
    f"{ADDRESS} > /bus/pci/drivers_probe",
]


def test_there_and_back(kernel: Kernel, shmsock: Callable[..., Result]) -> None:
    directory = kernel.add()
    done = shmsock("bind", "00:04.0", text="y\n")
    assert done.exit_code == 0, done.output
    assert kernel.done == BOUND
    said = done.stdout.splitlines()
    assert said == [
        f"{ADDRESS} ivshmem-doorbell goes to vfio-pci, as root:",
        "    # load the driver",
        "    modprobe vfio-pci",
        "    # no other driver shall take it",
        f"    echo vfio-pci > {directory}/driver_override",
        "    # let the driver take it",
        f"    echo {ADDRESS} > {kernel.bus}/drivers_probe",
        "done",
        f"to use it: SHMSOCK_REGION=vfio:{ADDRESS} (pci:auto finds it too)",
        "to let others than root: chgrp shmsock /dev/vfio/1; chmod 0660 /dev/vfio/1",
        f"to undo: shmsock unbind {ADDRESS}; a reboot does too",
    ]
    assert "Do it? [y/N]" in done.stderr
    kernel.done.clear()
    again = shmsock("bind", ADDRESS)
    assert (again.exit_code, kernel.done) == (0, [])
    assert "is bound to vfio-pci already: nothing to do\n" in again.stdout
    assert f"SHMSOCK_REGION=vfio:{ADDRESS}" in again.stdout
    back = shmsock("unbind", f"vfio:{ADDRESS}", "--yes")
    assert back.exit_code == 0, back.output
    assert kernel.done == BACK
    assert f"    echo > {directory}/driver_override\n" in back.stdout
    assert f"    echo {ADDRESS} > {directory}/driver/unbind\n" in back.stdout
    assert f"SHMSOCK_REGION=pci:{ADDRESS}\nto bind it again: shmsock bind {ADDRESS}\n" in back.stdout
    kernel.done.clear()
    again = shmsock("unbind", ADDRESS)
    assert (again.exit_code, kernel.done) == (0, [])
    assert "is not bound to vfio (its driver: none): nothing to do" in again.stdout


def test_nothing_is_done_unasked(kernel: Kernel, shmsock: Callable[..., Result]) -> None:
    kernel.add()
    for arguments, text, status in ((["--dry-run"], "", 0), ([], "n\n", 1), ([], "", 1)):
        done = shmsock("bind", ADDRESS, *arguments, text=text)
        assert (done.exit_code, kernel.done) == (status, []), done.output
        assert f"    echo {ADDRESS} > {kernel.bus}/drivers_probe\n" in done.stdout
        assert "\ndone\n" not in done.stdout
    kernel.bind().apply()
    kernel.done.clear()
    for arguments, text, status in ((["--dry-run"], "", 0), ([], "n\n", 1)):
        done = shmsock("unbind", ADDRESS, *arguments, text=text)
        assert (done.exit_code, kernel.done) == (status, [])


def test_from_another_driver(kernel: Kernel) -> None:
    kernel.add(driver="uio_ivshmem")
    kernel.load("vfio-pci")
    kernel.bind().apply()
    assert kernel.done == [
        BOUND[1],
        f"{ADDRESS} > /bus/pci/drivers/uio_ivshmem/unbind",
        BOUND[2],
    ]


def test_half_done_is_undone(kernel: Kernel) -> None:
    directory = kernel.add()
    kernel.takes = False
    with pytest.raises(
        RegionError, match=rf"was not taken by vfio-pci \(its driver: none\).*shmsock unbind {ADDRESS}"
    ):
        kernel.bind().apply()
    kernel.done.clear()
    kernel.unbind().apply()
    assert kernel.done == BACK[:1]
    assert (directory / "driver_override").read_text() == "(null)\n"


def test_another_driver_of_the_family(kernel: Kernel, shmsock: Callable[..., Result]) -> None:
    kernel.add()
    done = shmsock("bind", "--yes", "--driver", "mlx5_vfio_pci", ADDRESS)
    assert done.exit_code == 0, done.output
    assert kernel.done[0] == "modprobe mlx5_vfio_pci"
    for wrong in "uio_pci_generic", "../vfio", "vfio pci":
        done = shmsock("bind", "--yes", "--driver", wrong, ADDRESS)
        assert done.exit_code == 1
        assert f"{wrong!r} is no driver of the vfio family" in done.stderr


def test_no_iommu(kernel: Kernel, shmsock: Callable[..., Result]) -> None:
    kernel.add(group=None)
    done = shmsock("bind", "--yes", ADDRESS)
    assert (done.exit_code, done.stdout, kernel.done) == (1, "", [])
    for words in "intel-iommu,intremap=on", "`intel_iommu=on`", f"`shmsock bind --noiommu {ADDRESS}`":
        assert words in done.stderr


def test_noiommu(kernel: Kernel, shmsock: Callable[..., Result]) -> None:
    kernel.add(group=None)
    switch = Path(kernel.root) / NOIOMMU_SWITCH
    done = shmsock("bind", "--yes", "--noiommu", ADDRESS)
    assert done.exit_code == 1
    assert "taint" in done.stdout
    assert "CONFIG_VFIO_NOIOMMU is off, as in Debian 12's kernels" in done.stderr
    switch.parent.mkdir(parents=True)
    switch.touch()
    kernel.done.clear()
    done = shmsock("bind", "--yes", "--noiommu", ADDRESS)
    assert done.exit_code == 0, done.output
    assert kernel.done == [f"1 > /{NOIOMMU_SWITCH}", *BOUND[1:]]
    assert "TAINTS THE KERNEL" in done.stdout
    put_in_group(kernel.sysfs, 0, ADDRESS, name="vfio-noiommu")
    assert "nothing to do" in shmsock("bind", "--noiommu", ADDRESS).stdout
    kernel.unbind().apply()
    done = shmsock("bind", "--yes", "--noiommu", ADDRESS)
    assert "there is an IOMMU" in done.stderr


def test_not_ivshmem(kernel: Kernel, shmsock: Callable[..., Result]) -> None:
    kernel.add(ids=(0x8086, 0x10D3))
    for command in "bind", "unbind":
        done = shmsock(command, "--yes", ADDRESS)
        assert (done.exit_code, kernel.done) == (1, [])
        assert "is 8086:10d3, expected 1af4:1110 (ivshmem)" in done.stderr
    assert "no PCI device at 0000:00:09.0" in shmsock("bind", "00:09.0").stderr
    done = shmsock("bind", "eth0")
    assert done.exit_code == 2
    assert "'eth0' is no PCI address" in done.stderr
    assert "`shmsock info` lists the devices" in done.stderr


def test_others_in_its_group(kernel: Kernel) -> None:
    kernel.add(group=None)
    kernel.sysfs.add("0000:00:04.1", ids=(0x8086, 0x2918))
    put_in_group(kernel.sysfs, 7, ADDRESS, "0000:00:04.1")
    says = (
        "Also in its IOMMU group 7, and out of use for other drivers: 0000:00:04.1 (8086:2918, driver none)"
    )
    assert says in "\n".join(kernel.bind().lines())
    (kernel.sysfs.devices / "0000:00:04.1/driver").symlink_to("../../drivers/e1000")
    with pytest.raises(
        RegionError, match=r"group 7 .* is 0000:00:04.1 \(8086:2918, e1000\).*addr="
    ) as caught:
        kernel.bind()
    assert caught.value.errno == errno.EBUSY
    (kernel.sysfs.devices / ADDRESS / "driver").symlink_to("../../drivers/vfio-pci")
    with pytest.raises(RegionError, match="group 7"):  # bound, and of no use
        kernel.bind()


def test_plain_device(kernel: Kernel) -> None:
    kernel.sysfs.add(ADDRESS)
    put_in_group(kernel.sysfs, 1, ADDRESS)
    with pytest.raises(
        RegionError, match=rf"ivshmem-plain has no interrupts.*pci:{ADDRESS}.*ivshmem-doorbell"
    ):
        kernel.bind()


def test_in_use_through_sysfs(kernel: Kernel) -> None:
    """Once vfio opens the device, the kernel takes the memory from those who mapped it through sysfs."""
    directory = kernel.add()
    kernel.use(17, "server", f"{directory}/resource2_wc")
    with pytest.raises(
        RegionError, match=rf"through sysfs \(pci:{ADDRESS}\) by process 17 \(server\)"
    ) as caught:
        kernel.bind()
    assert caught.value.errno == errno.EBUSY


def test_in_use_through_vfio(kernel: Kernel) -> None:
    """The kernel would wait for the process to end, and the writer with it."""
    kernel.add()
    kernel.bind().apply()
    kernel.use(18, "server", "/dev/vfio/1")
    with pytest.raises(RegionError, match=r"in use by process 18 \(server\): stop that first") as caught:
        kernel.unbind()
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EACCES, "takes root: run it with sudo"),
        (errno.EROFS, "failed: sysfs is mounted read-only"),
        (errno.EIO, "failed: Input/output error; `dmesg"),
    ],
)
def test_writing_fails(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    directory = kernel.add()
    kernel.load("vfio-pci")
    monkeypatch.setattr(os, "open", failing(code, os.open, "driver_override"))
    with pytest.raises(RegionError, match=f"`echo vfio-pci > {directory}/driver_override` {says}") as caught:
        kernel.bind().apply()
    assert caught.value.errno == code
    assert kernel.done == []


def test_modprobe_fails(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.add()
    answer = subprocess.CompletedProcess((), 1, "", "modprobe: FATAL: Module vfio-pci not found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(RegionError, match="`modprobe vfio-pci` failed: modprobe: FATAL: Module vfio-pci not"):
        kernel.bind().apply()
    monkeypatch.setattr(subprocess, "run", failing(errno.ENOENT))
    with pytest.raises(RegionError, match="there is no modprobe; install kmod"):
        kernel.bind().apply()
    assert kernel.done == []


def test_still_bound(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.add()
    kernel.bind().apply()
    monkeypatch.setattr(kernel, "happen", lambda path, text: None)
    with pytest.raises(RegionError, match="is bound to vfio-pci still"):
        kernel.unbind().apply()


def test_only_root_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = tmp_path / "x"
    plan = Plan("a plan", [Step("why", str(written), "1")])
    monkeypatch.setattr(bind_module, "plan_bind", lambda *_, **__: plan)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for options in ([], ["--yes"]):
        result = CliRunner().invoke(cli, ["bind", *options, ADDRESS], prog_name="shmsock")
        assert (result.exit_code, "only root" in result.stderr, "Do it?" in result.stderr) == (1, True, False)
    assert not written.exists()
