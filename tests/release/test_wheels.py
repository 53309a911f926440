"""What `make wheels` makes, for the Python that runs here: tags, machine code, contents, parts, installing.

All Pythons and all places are `make wheels test-wheels`. What was compiled once zig keeps in .cache.
"""

from __future__ import annotations

import email
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

import shmsock
from release import wheels
from release.sbom import NAME
from release.wheels import ROOT, TARGETS, ReleaseError, check, make_sdist, make_wheel, unknown_symbols

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = f"cp{VERSION.replace('.', '')}"
INFO = f"shmsock-{shmsock.__version__}.dist-info"
LONG = os.environ.get("SHMSOCK_LONG") == "1"
MADE = list(TARGETS) if LONG else ["manylinux_2_17_x86_64", "musllinux_1_2_x86_64", "manylinux_2_17_aarch64"]


class Made(NamedTuple):
    sdist: Path
    wheels: dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    into = tmp_path_factory.mktemp("dist")
    sdist = make_sdist(into)
    with ThreadPoolExecutor() as pool:
        built = pool.map(lambda tag: make_wheel(sdist, VERSION, TARGETS[tag], into), MADE)
        return Made(sdist, dict(zip(MADE, built, strict=True)))


def core_of(wheel: Path) -> tuple[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".so"))
        return name, archive.read(name)


@pytest.mark.parametrize("tag", MADE)
def test_tag_and_machine_code_agree(made: Made, tag: str) -> None:
    target, wheel = TARGETS[tag], made.wheels[tag]
    with zipfile.ZipFile(wheel) as archive:
        tags = email.message_from_bytes(archive.read(f"{INFO}/WHEEL")).get_all("Tag", [])
    assert f"{TAG}-{TAG}-{tag}" in tags
    assert {t.partition("linux")[0] for t in tags} == {f"{TAG}-{TAG}-{tag.partition('linux')[0]}"}
    name, data = core_of(wheel)
    assert name == f"shmsock/native/_core.cpython-{TAG[2:]}-{target.arch}-linux-{target.libc}.so"
    elf = ELFFile(BytesIO(data))
    assert elf.get_machine_arch() == {"x86_64": "x64", "aarch64": "AArch64"}[target.arch]
    dynamic = elf.get_section_by_name(".dynamic")
    assert isinstance(dynamic, DynamicSection)
    needed = {getattr(tag, "needed", "") for tag in dynamic.iter_tags("DT_NEEDED")}
    libc = "libc.so.6" if target.libc == "gnu" else f"libc.musl-{target.arch}.so.1"
    assert libc in needed
    assert needed <= {libc, "libpthread.so.0", "libc.so.6"}


def test_contents(made: Made) -> None:
    with zipfile.ZipFile(made.wheels[MADE[0]]) as archive:
        names = set(archive.namelist())
        urls = email.message_from_bytes(archive.read(f"{INFO}/METADATA")).get_all("Project-URL", [])
    assert {n.partition("/")[0].removesuffix(".data").removesuffix(".dist-info") for n in names} == {
        "shmsock",
        f"shmsock-{shmsock.__version__}",
    }
    assert {"shmsock/py.typed", "shmsock/native/LAYOUT.md", f"{INFO}/licenses/LICENSE"} <= names
    assert {u.partition(",")[0] for u in urls} >= {"Changelog", "Documentation", "Homepage"}


def test_the_sdist_has_what_git_has(made: Made) -> None:
    with tarfile.open(made.sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        assert set(listed.stdout.split()) - packed == set()
    assert [name for name in packed if name.endswith((".so", ".pyc"))] == []


def test_list_of_parts(made: Made) -> None:
    wheel = made.wheels[MADE[0]]
    with zipfile.ZipFile(wheel) as archive:
        listed = json.loads(archive.read(f"{INFO}/sboms/{NAME}"))
        about = email.message_from_bytes(archive.read(f"{INFO}/METADATA"))
    assert listed["metadata"]["component"]["purl"] == f"pkg:pypi/shmsock@{shmsock.__version__}"
    parts = {part["bom-ref"]: part for part in listed["components"]}
    name, data = core_of(wheel)
    assert parts["core"]["name"] == name
    assert parts["core"]["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}]
    wanted = [r for r in about.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(p["properties"][0]["value"] for p in parts.values() if "properties" in p) == sorted(wanted)


def test_a_list_that_is_none_is_found(made: Made, tmp_path: Path) -> None:
    spoilt = tmp_path / made.wheels[MADE[0]].name
    with zipfile.ZipFile(made.wheels[MADE[0]]) as whole, zipfile.ZipFile(spoilt, "w") as part:
        for name in whole.namelist():
            text = whole.read(name)
            if name.endswith(NAME):
                text = text.replace(b'"bomFormat"', b'"noFormat"')
            part.writestr(name, text)
    with pytest.raises(ReleaseError):
        check([spoilt])


def test_the_same_each_time(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At length with nothing that zig kept, and elsewhere."""
    if LONG:
        monkeypatch.setattr(wheels, "CACHE", tmp_path / "cache")
    sdist = make_sdist(tmp_path)
    assert sdist.read_bytes() == made.sdist.read_bytes()
    again = make_wheel(sdist, VERSION, TARGETS[MADE[0]], tmp_path)
    assert again.read_bytes() == made.wheels[MADE[0]].read_bytes()


def test_installed_and_used(made: Made, tmp_path: Path) -> None:
    wheel = made.wheels["manylinux_2_17_x86_64"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True)
    used = subprocess.run(
        [sys.executable, ROOT / "release" / "smoke.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert used.stdout.startswith(f"smoke: {shmsock.__version__}, ")
    assert str(tmp_path) in used.stdout


def test_what_no_library_has_is_found(made: Made) -> None:
    """A call of what came into glibc later is a name without a version."""
    _, core = core_of(made.wheels["manylinux_2_17_x86_64"])
    assert unknown_symbols(core) == []
    other = core.replace(b"\0PyObject_GetAttr\0", b"\0MyObject_GetAttr\0")
    assert unknown_symbols(other) == ["MyObject_GetAttr"]
