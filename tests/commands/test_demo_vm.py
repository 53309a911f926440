"""`shmsock demo-vm`, with less to do."""

from __future__ import annotations

import pytest

from shmsock.bench import demo_vm
from shmsock.guests import image
from shmsock.guests.qemu import Fleet, GuestError
from tests.commands.test_cli import bad, good


@pytest.mark.vm
@pytest.mark.timeout(300)
def test_demo_vm() -> None:
    said = good("demo-vm", "--megabytes", 4, "--echoes", 200)
    for guest in ("vm-a", "vm-b"):
        assert f"{guest}: no network device; /sys/class/net has only lo" in said
        assert f"host to {guest}" in said
    assert "200 echoes of 64 B" in said
    assert said.count("at both ends") == 4
    assert "NO" not in said.split()


def test_demo_vm_without_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "missing", lambda: ["qemu-system-x86"])
    assert "sudo apt-get install qemu-system-x86" in bad("demo-vm")


def test_demo_vm_guest_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies(Fleet):
        def __init__(self) -> None:
            raise GuestError("the guest died")

    monkeypatch.setattr(demo_vm, "Fleet", Dies)
    assert bad("demo-vm") == "shmsock: the guest died\n"
