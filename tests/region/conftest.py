"""What the region tests share: nothing leaks, and some things look different to another user."""

from __future__ import annotations

import encodings.ascii  # noqa: F401  (a child that is nobody may not read Python's own files)
import gc
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
AsUser = Callable[[Callable[[], Any]], Any]


def failing(code: int, call: Any = None, when: str = "") -> Callable[..., Any]:
    """A stand-in for `call` that fails, if `when` is given only where that ends the first argument."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        if when and not str(args[0]).endswith(when):
            return call(*args, **kwargs)
        raise OSError(code, os.strerror(code), *args[:1])

    return fail


def open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed them
    return found


def mappings(path: str) -> int:
    return Path("/proc/self/maps").read_text().count(path)


@pytest.fixture(autouse=True)
def no_leaks(tmp_path: Path) -> Iterator[None]:
    """After each test: no descriptor more than before, and nothing of its directory mapped."""
    gc.collect()
    before = open_files()
    yield
    gc.collect()
    assert open_files() == before
    assert mappings(str(tmp_path)) == mappings("/dev/shm/shmsock-test-") == 0


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory in shared memory that every user can enter and write."""
    directory = Path(tempfile.mkdtemp(prefix="shmsock-test-", dir="/dev/shm"))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A region file of 1 MiB, in the directory that is checked for leaks."""
    name = tmp_path / "region"
    name.write_bytes(bytes(1 << 20))
    return str(name)


def in_child(function: Callable[[], Any], uid: int | None = None) -> Any:
    """What `function` returns, or the exception that it raises, in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            try:
                answer = function()
            except BaseException as error:
                answer = (error, getattr(error, "errno", None))
            os.write(write, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data)


@pytest.fixture
def forked() -> AsUser:
    return in_child


@pytest.fixture
def as_nobody() -> AsUser:
    """Run something as another user; takes root."""
    if os.geteuid() != 0:
        pytest.skip("takes root to become another user")
    return lambda function: in_child(function, NOBODY)


class FakeSysfs:
    """A sysfs tree below a directory, with as many devices as wanted."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.devices = root / "bus/pci/devices"
        self.devices.mkdir(parents=True)

    def add(
        self,
        address: str = "0000:00:04.0",
        *,
        size: int = 1 << 20,
        doorbell: bool = False,
        revision: int = 1,
        enabled: int = 0,
        decoding: bool = True,
        driver: str | None = None,
        ids: tuple[int, int] = (0x1AF4, 0x1110),
        unassigned: bool = False,
        wc: bool = True,
    ) -> Path:
        """As QEMU's q35 and a 6.1 kernel show an ivshmem device; returns its directory."""
        device = self.devices / address
        device.mkdir()
        start = 0x800000000
        flags = 0x14220C | (0x20000000 if unassigned else 0)
        bars = [
            (0xFEBD1000, 0xFEBD10FF, 0x40200),
            (0xFEBD0000, 0xFEBD0FFF, 0x40200) if doorbell else (0, 0, 0),
            (0 if unassigned else start, size - 1 if unassigned else start + size - 1, flags)
            if size
            else (0, 0, 0),
        ]
        bars += [(0, 0, 0)] * 10
        config = bytearray(64)
        config[4] = 2 if decoding else 0
        for name, text in {
            "vendor": f"{ids[0]:#06x}",
            "device": f"{ids[1]:#06x}",
            "subsystem_vendor": "0x1af4",
            "subsystem_device": "0x1100",
            "class": "0x050000",
            "revision": f"{revision:#04x}",
            "enable": str(enabled),
            "numa_node": "-1",
            "resource": "\n".join(f"0x{a:016x} 0x{b:016x} 0x{c:016x}" for a, b, c in bars),
        }.items():
            (device / name).write_text(text + "\n")
        (device / "config").write_bytes(config)
        if driver:
            target = self.devices.parent / "drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            (device / "driver").symlink_to(f"../../drivers/{driver}")
        if size and not unassigned:
            for name in ("resource2", "resource2_wc")[: 2 if wc else 1]:
                with open(device / name, "wb") as file:
                    file.truncate(size)
        return device


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path / "sys")


@pytest.fixture
def shared_sysfs(shared: Path) -> FakeSysfs:
    """One that other users see as well."""
    return FakeSysfs(shared / "sys")
