"""A wheel of `make wheels` is installed where there is neither a compiler nor a network, and used in a guest.

As in tests/vm/test_bundle.py pip runs in the guest with SHMSOCK_LONG=1, and else on this host, as bare.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from release.wheels import ROOT, TARGETS, make_sdist, make_wheel
from shmsock.guests.image import cache_dir
from shmsock.guests.qemu import Guest
from shmsock.install.wheels import installed_wheels
from tests.vm.conftest import Pair
from tests.vm.test_bundle import LONG, SECONDS, alone, guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]
__all__ = ["guest"]


@pytest.fixture(scope="module")
def wheels() -> Iterator[Path]:
    """In a place that guests see: the one that was built, and what it needs, as it is installed here."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=cache_dir()) as directory:
        folder = Path(directory)
        installed_wheels(["pip", "cffi", "anyio", "click", "rich"], folder)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        with tempfile.TemporaryDirectory() as scratch:
            sdist = make_sdist(Path(scratch))
            make_wheel(sdist, version, TARGETS["manylinux_2_17_x86_64"], folder)
        shutil.copy(ROOT / "release" / "smoke.py", folder)
        yield folder


def test_installed_from_a_wheel(wheels: Path, guest: Guest, two_guests: Pair) -> None:
    (pip,) = wheels.glob("pip-*.whl")
    place = "/opt/shmsock" if LONG else f"{wheels}/opt"
    python = f"python3.{sys.version_info.minor}"
    install = f"{place}/bin/python {pip}/pip install --no-index --find-links {wheels} shmsock"
    commands = f"{python} -m venv --without-pip {place} && {install}"
    path = f"{Path(sys.base_prefix, 'bin')}:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": path, "PIP_NO_COMPILE": "1", "PIP_CONFIG_FILE": os.devnull}
    if LONG:
        guest.run(["sh", "-c", commands], env=env, timeout=SECONDS)
    else:
        alone(commands, wheels, env)
    said = guest.run([f"{place}/bin/python", f"{wheels}/smoke.py"], timeout=SECONDS).text
    assert said.startswith("smoke: ")
    assert f"{place}/lib/" in said
    assert "region pci:0000:00:" in guest.run([f"{place}/bin/shmsock", "info"], timeout=SECONDS).text
