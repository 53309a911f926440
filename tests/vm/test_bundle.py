"""`shmsock bundle`: what it packs is installed by the commands that it prints, and used in a guest.

pip takes a minute and more in an emulated guest: it runs there with SHMSOCK_LONG=1, and else on this host,
likewise without a network and a compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from shmsock.guests.image import cache_dir
from shmsock.guests.qemu import Guest
from shmsock.region import udev
from tests.vm.conftest import Pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

SECONDS = 600.0  # pip takes a minute under emulation, and more beside others
ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("SHMSOCK_LONG") == "1"
EACH_COMPILER = 'for c in gcc cc clang; do p=$(readlink -f "$(command -v $c)") && %s "$p"; done; :'


class Bundle(NamedTuple):
    """The file, where its content lies on this host, and the commands that install it."""

    file: Path
    content: Path
    commands: list[str]


@pytest.fixture(scope="module")
def bundle() -> Iterator[Bundle]:
    """Made once, offline, in a place that guests see."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=cache_dir()) as directory:
        file = Path(directory, "shm.tar.gz")
        done = subprocess.run(
            [sys.executable, "-m", "shmsock", "bundle", file],
            env={**os.environ, "CFLAGS": "-O0", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        first, *commands = done.stdout.splitlines()
        assert first.startswith(f"made {file}, ")
        with tarfile.open(file) as archive:
            archive.extractall(directory, filter="data")
        (content,) = (path.parent for path in Path(directory).glob("*/README"))
        yield Bundle(file, content, [command.strip() for command in commands])


def test_what_is_in_it(bundle: Bundle) -> None:
    assert len(bundle.commands) == 3
    said = (bundle.content / "README").read_text()
    assert [command for command in bundle.commands if command not in said] == []
    assert {path.name for path in (bundle.content / "wheels").iterdir() if path.suffix != ".whl"} == set()
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert {path.name for path in (bundle.content / "examples").iterdir()} == examples
    rule = (bundle.content / "files/70-shmsock.rules").read_text()
    assert udev.pci_rule() in rule
    assert "/opt/shmsock/bin/shmsock bind" in (bundle.content / "files/shmsock-bind@.service").read_text()


def test_one_file_without_the_core(bundle: Bundle, tmp_path: Path) -> None:
    """As another Python sees it, for which no core is in it."""
    pyz = tmp_path / "shmsock.pyz"
    with zipfile.ZipFile(bundle.content / "shmsock.pyz") as whole, zipfile.ZipFile(pyz, "w") as part:
        for member in whole.namelist():
            name = member.replace("/_core.cpython", "/_core.other")
            part.writestr(name, whole.read(member))

    def run(*arguments: str) -> tuple[int, str, str]:
        argv = [sys.executable, "-I", "-S", str(pyz), *arguments]
        done = subprocess.run(argv, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    for arguments in (("info",), ("create", "/dev/shm/none", "--size", "4M"), ("nc", "vm-b", "7000")):
        status, out, error = run(*arguments)
        assert (status, out, error.count("\n")) == (1, "", 1)
        assert error.startswith("shmsock: this needs the C core of shmsock, which is here for other-")
    assert run("--help")[0] == 0
    assert udev.pci_rule() in run("install-units", "udev", "--print")[1]


def alone(commands: str, folder: Path, env: dict[str, str]) -> None:
    """Run them on this host, without a network and a compiler."""
    hidden = EACH_COMPILER % "mount --bind /bin/false"
    argv = ["unshare", "--mount", "--net", "sh", "-c", f"{hidden}; ! cc --version && {commands}"]
    subprocess.run(argv, cwd=folder, env={**os.environ, **env}, check=True)


@pytest.fixture
def guest(two_guests: Pair) -> Iterator[Guest]:
    """A guest in which /opt can be written to, and no compiler works."""
    guest = two_guests.a
    guest.run(["sh", "-c", f"mount -t tmpfs tmpfs /opt; {EACH_COMPILER % 'mount --bind /bin/false'}"])
    assert guest.run(["cc", "--version"], check=False).returncode == 1
    yield guest
    guest.run(["sh", "-c", f"umount /opt; {EACH_COMPILER % 'umount'}; rm -rf /tmp/*"])


def test_installed_in_a_guest(bundle: Bundle, guest: Guest, two_guests: Pair) -> None:
    path = f"{Path(sys.base_prefix, 'bin')}:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": path, "PIP_NO_COMPILE": "1", "PIP_CONFIG_FILE": os.devnull}  # compiling takes a minute
    place = "/opt/shmsock" if LONG else f"{bundle.file.parent}/opt"
    guest.run(["cp", bundle.file, "."])
    if LONG:
        for command in bundle.commands:
            guest.run(["sh", "-c", command], env=env, timeout=SECONDS)
    else:
        commands = " && ".join(command.replace("/opt/shmsock", place) for command in bundle.commands)
        alone(commands, bundle.file.parent, env)
        guest.run(["sh", "-c", bundle.commands[0]])
    installed = guest.run([f"{place}/bin/python", "-c", "import shmsock; print(shmsock.__file__)"])
    assert installed.text.startswith(f"{place}/lib/")

    (folder,) = guest.run(["sh", "-c", "ls -d shmsock-*"]).text.split()
    server = [f"{place}/bin/python", f"{folder}/examples/echo_server.py"]
    with guest.start(server, env={"SHMSOCK_NAME": "vm-a"}) as serving:
        serving.expect("listening on 'vm-a', port 7000", SECONDS)
        done = subprocess.run(
            [sys.executable, ROOT / "examples/echo_client.py", "vm-a"],
            env={**os.environ, "SHMSOCK_REGION": str(two_guests.region), "SHMSOCK_NAME": "host"},
            input="hello\n",
            capture_output=True,
            text=True,
        )
        assert (done.returncode, "hello" in done.stdout) == (0, True), done
        said = guest.run([f"{place}/bin/shmsock", "info"], timeout=SECONDS).text
        assert "region pci:0000:00:" in said
        assert "vm-a" in said
        python = ["python3." + str(sys.version_info.minor), "-I", "-S"]
        looked = guest.run([*python, f"{folder}/shmsock.pyz", "info"], env=env, timeout=SECONDS).text
        assert looked.splitlines()[0] == said.splitlines()[0]
        assert "vm-a" in looked
