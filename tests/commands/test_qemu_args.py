"""`shmsock qemu-args`: what it prints. That guests start by it is tested in tests/vm."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmsock.guests.devices import Dax, Ivshmem, IvshmemDoorbell
from shmsock.hypervisors.qemu import DAX
from tests.commands.test_cli import bad, good, shmsock, usage


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shmsock-test-", dir="/dev/shm") as directory:
        yield Path(directory) / "a,b c"


def test_plain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good("create", path, "--size", "16M", "--mode", "0660")
    done = shmsock("qemu-args", path, "--id", "ivshmem7")
    assert done.exit_code == 0, done.output
    backend, device = done.stdout.splitlines()
    quoted = str(path).replace(",", ",,")
    assert shlex.split(backend) == [
        "-object",
        f"memory-backend-file,size=16M,mem-path={quoted},share=on,id=ivshmem7",
    ]
    assert device == "-device ivshmem-plain,memdev=ivshmem7"
    assert "mode 0660: QEMU must be able to read and write it" in done.stderr
    # what tests boot their guests with is the same
    assert shlex.split(done.stdout) == Ivshmem(path, 16 << 20).arguments(7)
    monkeypatch.setenv("SHMSOCK_REGION", str(path))
    assert good("qemu-args", "--id", "ivshmem7") == done.stdout


def test_doorbell() -> None:
    said = good("qemu-args", "--doorbell", "/run/a.sock", "--vectors", 2, "--id", "ivshmem0")
    assert shlex.split(said)[4:] == IvshmemDoorbell("/run/a.sock", vectors=2).arguments(0)
    assert shlex.split(said)[:4] == [
        *("-machine", "q35,kernel-irqchip=split"),
        *("-device", "intel-iommu,intremap=on"),
    ]
    assert good("qemu-args", "ivshmem:/run/a.sock", "--vectors", 2, "--id", "ivshmem0") == said


@pytest.mark.parametrize("kind", list(DAX))
def test_dax(path: Path, kind: str) -> None:
    assert "shmsock qemu-args" in good("create", path, "--size", "16M", "--dax")
    said = good("qemu-args", path, "--dax", kind, "--id", "dax3")
    assert shlex.split(said) == Dax(path, 16 << 20, kind).arguments(3)
    assert "maxmem=128G" in good("qemu-args", path, "--dax", kind, "--max-memory", "128G")
    assert "ivshmem-plain" in good("qemu-args", path)  # to that as well
    plain = path.with_name("plain")
    good("create", plain, "--size", "16M")
    assert "is not made for --dax: a guest would find no /dev/dax0.0" in bad(
        "qemu-args", plain, "--dax", kind
    )
    again = bad("qemu-args", plain, "--dax", kind).rpartition("`shmsock ")[2].partition("`")[0]
    good(*shlex.split(again))  # the file is there: its advice has --force
    assert "/plain" in good("qemu-args", plain, "--dax", kind)
    assert "--max-memory 1K has no room" in usage("qemu-args", path, "--dax", kind, "--max-memory", "1K")
    shown = json.loads(good("info", path, "--json"))["regions"][0]
    assert (shown["dax"], shown["file_size"]) == (True, 16 << 20)
    assert "made for --dax: the file has 16 MiB" in good("info", path)


def test_what_cannot_be_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMSOCK_REGION", raising=False)
    assert f"region {path} does not exist: make it with `shmsock create" in bad("qemu-args", path)
    path.touch()
    os.truncate(path, 5 << 20)
    assert "has 5 MiB, expected a power of two, as a BAR has" in bad("qemu-args", path)
    assert "--size 8MiB" in bad("qemu-args", path)
    assert "name the REGION, set SHMSOCK_REGION, or use --doorbell" in usage("qemu-args")
    assert "name no REGION beside it" in usage("qemu-args", path, "--doorbell", "/run/a")
    assert "one of them" in usage("qemu-args", "--doorbell", "/run/a", "--dax", "nvdimm")
    assert "a device of this guest" in usage("qemu-args", "pci:auto")
