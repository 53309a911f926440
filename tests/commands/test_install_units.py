"""`shmsock install-units`: what it writes is what systemd takes, and what this shmsock understands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shmsock.cli import cli
from shmsock.install.system import NAMES, system_files, this_program
from shmsock.region import udev
from tests.region.conftest import NOBODY, in_child
from tests.test_docs import unknown_options


def install_units(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["install-units", *map(str, arguments)], prog_name="shmsock")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with everything installed."""
    done = install_units(*NAMES, "--root", tmp_path, "--size", "1G", "--region", "/dev/shm/vms-1")
    assert done.exit_code == 0, done.output
    return tmp_path


def test_everything_is_written_where_it_belongs(root: Path) -> None:
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        "etc/sysctl.d/60-shmsock.conf",
        "etc/systemd/system/shmsock-bind@.service",
        "etc/systemd/system/shmsock-forward.service",
        "etc/systemd/system/shmsock-ivshmem.service",
        "etc/systemd/system/shmsock-ivshmem.socket",
        "etc/systemd/system/shmsock-region.service",
        "etc/udev/rules.d/70-shmsock.rules",
        "etc/udev/rules.d/70-shmsock-dax.rules",
        "etc/udev/rules.d/70-shmsock-vfio.rules",
    }
    texts = [path.read_text() for path in root.rglob("*") if path.is_file()]
    assert [text for text in texts if re.search("@[A-Z_]+@", text)] == []
    assert udev.pci_rule() in (root / "etc/udev/rules.d/70-shmsock.rules").read_text().splitlines()
    assert "vm.nr_hugepages = 512" in (root / "etc/sysctl.d/60-shmsock.conf").read_text().splitlines()


def test_units_run_commands_that_there_are(root: Path) -> None:
    text = "\n".join(path.read_text() for path in (root / "etc/systemd/system").iterdir())
    commands = re.findall(rf"^Exec(?:Start|Stop)={re.escape(this_program())} (.*)", text, re.MULTILINE)
    assert len(commands) == 5
    assert [bad for command in commands if (bad := unknown_options(["shmsock", *command.split()]))] == []
    assert "create /dev/shm/vms-1 --size 1G --mode 0660" in commands


def test_systemd_takes_the_units(root: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (Debian's package systemd)")
    units = root / "etc/systemd/system"
    done = subprocess.run(
        [analyze, "verify", *sorted(units.iterdir())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_printed_is_what_would_be_written(root: Path) -> None:
    printed = install_units("udev", "forward", "--print").stdout
    for path in ("/etc/udev/rules.d/70-shmsock.rules", "/etc/systemd/system/shmsock-forward.service"):
        assert f"# {path}\n{(root / path[1:]).read_text()}" in printed
    everything = install_units("--print").stdout
    assert printed.splitlines()[0] in everything
    assert everything.count("# /etc/") == 9


def test_what_is_there_is_kept(root: Path) -> None:
    path = root / "etc/sysctl.d/60-shmsock.conf"
    assert install_units("sysctl", "--root", root, "--size", "1G").exit_code == 0  # the same once more
    path.write_text("mine\n")
    done = install_units("udev", "sysctl", "--root", root)
    assert (done.exit_code, path.read_text()) == (1, "mine\n")
    assert f"shmsock: {path} is there and differs" in done.stderr
    assert install_units("udev", "sysctl", "--group", "users", "--root", root, "--force").exit_code == 0
    assert "chgrp users" in (root / "etc/udev/rules.d/70-shmsock.rules").read_text()
    assert path.read_text() != "mine\n"


def test_what_is_done_then(tmp_path: Path) -> None:
    then = install_units("udev", "server", "--root", tmp_path).stdout.partition("then, as root:\n")[2]
    assert [line.split()[0] for line in then.splitlines()] == [
        "systemctl",
        "groupadd",
        "udevadm",
        "udevadm",
        "systemctl",
    ]
    assert "usermod -aG shmsock USER" in then


@pytest.mark.parametrize(
    ("prefix", "python", "protect"),
    [
        ("/opt/shm", "/usr/bin/python3", "yes"),
        ("/opt/shm", "/home/me/python/bin/python3.11", "read-only"),
        ("/home/me/venv", "/usr/bin/python3", "read-only"),
    ],
)
def test_a_unit_may_read_where_its_interpreter_is(
    prefix: str, python: str, protect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmsock.install.system.this_program", lambda: "/opt/shm/bin/shmsock")
    monkeypatch.setattr("sys.prefix", prefix)
    monkeypatch.setattr("os.path.realpath", lambda _: python)
    assert [file.text for file in system_files("region") if f"\nProtectHome={protect}\n" in file.text]


def test_a_group_that_is_not_there_is_told() -> None:
    said = install_units("region", "--print", "--group", "nobody-has-this").stderr
    assert "no group 'nobody-has-this' here" in said
    assert "no group" not in install_units("region", "--print", "--group", "root").stderr
    assert "no group" not in install_units("udev", "--print", "--group", "nobody-has-this").stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_write_is_told_what_to_do() -> None:
    def as_nobody() -> tuple[int, str]:
        done = install_units("sysctl", "--root", "/usr")
        return done.exit_code, done.stderr

    code, said = in_child(as_nobody, NOBODY)
    assert code == 1
    assert "cannot be written by" in said
    assert "as root, or --print" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name what to install, or --print: region, server,"),
        (("nothing",), "'nothing' is not one of 'region', 'server',"),
        (("region", "--region", "vms"), "expected an absolute path"),
        (("region", "--region", "/dev/shm/a b"), "expected an absolute path of plain characters"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], message: str) -> None:
    done = install_units(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
