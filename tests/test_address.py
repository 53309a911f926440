"""Names, ports, and who this machine is."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shmsock import address


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("vm-b", "vm-b"),
        ("VM-B", "vm-b"),
        ("vm-b.", "vm-b"),
        ("vm-b.shm", "vm-b"),
        ("Vm-B.SHM.", "vm-b"),
        ("a.b_c-1", "a.b_c-1"),
        ("1a", "1a"),
        ("10.0.0.1", "10.0.0.1"),
        ("shm", "shm"),
        ("x" * 63, "x" * 63),
        ("x" * 63 + ".shm.", "x" * 63),
    ],
)
def test_names(given: str, expected: str) -> None:
    assert address.normalize_name(given) == expected
    assert address.normalize_name(expected) == expected


@pytest.mark.parametrize(
    "name",
    [
        "", ".", ".shm", "a b", "a\n", "a/b", "\0", "ä", "\u212a", "x" * 64, "x" * 10_000, "7", "007.shm",
        "a..", "a.shm.shm", "a.shm..",
    ],
)  # fmt: skip
def test_no_names(name: str) -> None:
    with pytest.raises(ValueError, match="is no peer name") as caught:
        address.normalize_name(name)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", [None, 3, b"vm-b"])
def test_names_are_str(name: Any) -> None:
    with pytest.raises(TypeError):
        address.normalize_name(name)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST.shm", "127.0.0.1", "0.0.0.0"])
def test_a_node_cannot_be_called_this_machine(name: str) -> None:
    with pytest.raises(ValueError, match="this machine"):
        address.node_name(name)


def test_ports() -> None:
    assert [address.check_port(port) for port in (0, 1, 65535, True)] == [0, 1, 65535, 1]


@pytest.mark.parametrize("port", [-1, 65536, 2**80])
def test_ports_out_of_range(port: int) -> None:
    with pytest.raises(OverflowError, match=r"^connect\(\): port must be 0-65535\.$"):
        address.check_port(port, "connect")


@pytest.mark.parametrize("port", ["80", 1.0, None])
def test_ports_are_int(port: Any) -> None:
    with pytest.raises(TypeError) as ours:
        address.check_port(port)
    with socket.socket() as control, pytest.raises(TypeError) as theirs:
        control.bind(("127.0.0.1", port))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("port", "number"),
    [(80, 80), ("80", 80), (b"80", 80), (" 80 ", 80), ("http", 80), (None, 0), ("0", 0), ("", 0), (True, 1)],
)
def test_port_numbers(port: object, number: int) -> None:
    assert address.port_number(port) == number


@pytest.mark.parametrize(
    ("port", "error"),
    [
        ("no-such-service", socket.gaierror),
        ("-1", socket.gaierror),
        ("65536", OverflowError),
        (-1, OverflowError),
        ([80], TypeError),
        (1.5, TypeError),
    ],
)
def test_what_is_no_port_number(port: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        address.port_number(port)


def test_port_message_is_the_one_of_socket() -> None:
    with socket.socket() as control, pytest.raises(OverflowError) as theirs:
        control.bind(("127.0.0.1", 65536))
    with pytest.raises(OverflowError) as ours:
        address.check_port(65536, "bind")
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::"])
def test_any(host: object) -> None:
    assert address.is_any(host)
    assert not address.is_local(host)


@pytest.mark.parametrize("host", ["localhost", "LocalHost.", "127.0.0.1", "::1"])
def test_local(host: object) -> None:
    assert address.is_local(host)
    assert not address.is_any(host)


@pytest.mark.parametrize("host", ["vm-b", 3, 0, b"localhost", [], "127.0.0.2"])
def test_neither(host: object) -> None:
    assert not address.is_local(host)
    assert not address.is_any(host)


def test_default_region_is_per_user() -> None:
    assert address.default_region() == f"/dev/shm/shmsock-{os.geteuid()}"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("VM-a", "vm-a"),
        ("vm a!", "vm-a-"),
        ("größe", "gr--e"),
        ("vm.example.org.", "vm.example.org"),
        ("vm.shm", "vm"),
        ("42", "host-42"),
        ("4" * 63, "host-" + "4" * 58),
        ("x" * 100, "x" * 63),
        ("x" * 62 + ".org", "x" * 62),
        ("x" * 59 + ".shmoo", "x" * 59),
        ("localhost", "host-localhost"),
        ("127.0.0.1", "host-127.0.0.1"),
        ("", "host"),
        ("(none)", "-none-"),
        ("...", "host"),
    ],
)
def test_default_name_from_the_host(host: str, name: str) -> None:
    assert address.default_name({}, host) == name
    assert address.node_name(name) == name


def test_default_name_from_the_environment() -> None:
    assert address.default_name({"SHMSOCK_NAME": "VM-B.shm"}, "other") == "vm-b"
    assert address.default_name({"SHMSOCK_NAME": ""}, "other") == "other"
    with pytest.raises(ValueError, match="SHMSOCK_NAME: 'a b' is no peer name"):
        address.default_name({"SHMSOCK_NAME": "a b"}, "other")


def test_default_name_of_this_host() -> None:
    name = address.default_name({})
    assert address.node_name(name) == name


def test_boot_id(tmp_path: Path) -> None:
    file = tmp_path / "boot_id"
    assert address.boot_id(str(file)) == bytes(16)
    file.write_text("0b1d8b4c-5d5f-4b57-9a4e-4d1c3f5a7e90\n")
    assert address.boot_id(str(file)) == bytes.fromhex("0b1d8b4c5d5f4b579a4e4d1c3f5a7e90")
    assert len(address.boot_id()) == 16
    assert address.boot_id() == address.boot_id()


@pytest.mark.parametrize(
    "uuid",
    [
        "", "garbage", "0b1d8b4c", "00000000-0000-0000-0000-000000000000",
        "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "Not Settable", "ü", "0b1d8b4c" * 20,
    ],
)  # fmt: skip
def test_machine_id_falls_back(tmp_path: Path, uuid: str) -> None:
    dmi, file = tmp_path / "product_uuid", tmp_path / "machine-id"
    dmi.write_text(uuid)
    assert address.machine_id(str(dmi), str(file)) == bytes(16)
    file.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    assert address.machine_id(str(dmi), str(file)).hex() == "3d1219c7c4c5404aaa1f6d2a48adfda4"


def test_machine_id_prefers_the_firmware(tmp_path: Path) -> None:
    dmi, file = tmp_path / "product_uuid", tmp_path / "machine-id"
    dmi.write_text("0B1D8B4C-5D5F-4B57-9A4E-4D1C3F5A7E90\n")
    file.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    assert address.machine_id(str(dmi), str(file)).hex() == "0b1d8b4c5d5f4b579a4e4d1c3f5a7e90"
    assert len(address.machine_id()) == 16


def test_pins() -> None:
    assert address.check_pin({"VM-b.shm": 3, "vm-c": 63}) == {"vm-b": 3, "vm-c": 63}
    assert address.default_pin({}) == address.default_pin({"SHMSOCK_PIN": " , "}) == {}
    assert address.default_pin({"SHMSOCK_PIN": "vm-b=3, VM-C = 5,"}) == {"vm-b": 3, "vm-c": 5}


@pytest.mark.parametrize("pin", [{"7": 1}, {"a b": 1}, {"a": -1}, {"a": 64}, {"a": 1, "A": 2}])
def test_no_pins(pin: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"name|section"):
        address.check_pin(pin)


@pytest.mark.parametrize("kind", ["3", None, 3.0])
def test_a_pin_is_a_number(kind: Any) -> None:
    with pytest.raises(TypeError):
        address.check_pin({"a": kind})


@pytest.mark.parametrize(
    "text", ["vm-b", "vm-b=", "vm-b=x", "=3", "vm-b=-1", "vm-b=64", "a=1,a=2", "a=1,A=2"]
)
def test_what_is_no_list_of_pins(text: str) -> None:
    with pytest.raises(ValueError, match="SHMSOCK_PIN: "):
        address.default_pin({"SHMSOCK_PIN": text})


def test_section_from_the_environment() -> None:
    assert address.default_section({}) is address.default_section({"SHMSOCK_SECTION": ""}) is None
    assert address.default_section({"SHMSOCK_SECTION": " 3"}) == 3
    for text in ("x", "-1", "3.0"):
        with pytest.raises(ValueError, match="SHMSOCK_SECTION is"):
            address.default_section({"SHMSOCK_SECTION": text})
