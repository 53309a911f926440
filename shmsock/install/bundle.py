"""One file with all that a guest needs which has neither a network nor a compiler; and shmsock.pyz."""

from __future__ import annotations

import compileall
import py_compile
import re
import tarfile
import tempfile
import zipapp
import zipfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from shmsock.install.system import NAMES, system_files
from shmsock.install.wheels import wheels_for, wheels_from_here

__all__ = ["PLACE", "make_bundle", "make_pyz"]

PLACE = "/opt/shmsock"
"""Where the commands install it."""

_README = """\
shmsock {version} for Python {python}, without a network and a compiler. As root:

{commands}

Then {place}/bin/shmsock info tells what this machine has, and {place}/bin/python runs programs.
For people without root: another place than {place}, and the rule in files/ (udev).

shmsock.pyz     all commands in one file, nothing installed: python{python} shmsock.pyz info
examples/       programs; files/ has udev rules and units, as `shmsock install-units` writes them
wheels/         what is installed; pip installs it
"""


def make_bundle(output: Path | None, python: str | None, add: Sequence[str]) -> tuple[Path, list[str]]:
    """Write the bundle, by default here under a name of its own. Returns it, and what to type in the guest.

    `python`: another interpreter of this machine, of the guest's version. `add`: packages to go along, such
    as uvloop. Raises BundleError, OSError.
    """
    with tempfile.TemporaryDirectory(prefix="shmsock-bundle-") as scratch:
        wheels = _wheels(Path(scratch), python, add)
        own = _own(wheels)
        version, tag = own.name.split("-")[1], own.name.split("-")[2]
        name = f"shmsock-{version}"
        output = output or Path(f"{name}-{tag}.tar.gz")
        needs = re.sub(r"cp(\d)(\d+)", r"\1.\2", tag)
        commands = [
            f"tar xf {output.name}",
            f"python{needs} -m venv --without-pip {PLACE}",
            f"{PLACE}/bin/python {name}/pip install --no-index --no-deps {name}/wheels/*.whl",
        ]
        root = Path(scratch, name)
        root.mkdir()
        wheels.rename(root / "wheels")
        _unpack_pip(next((root / "wheels").glob("pip-*.whl")), root, compiled=python is None)
        _pyz(root / "wheels", root / "shmsock.pyz")
        for path, data in _beside(_own(root / "wheels")):
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(data)
        (root / "README").write_text(
            _README.format(
                version=version, python=needs, place=PLACE, commands="\n".join(f"    {c}" for c in commands)
            )
        )
        with tarfile.open(output, "w:gz") as archive:
            archive.add(root, name, filter=_as_root)
    return output, commands


def make_pyz(output: Path, python: str | None) -> None:
    """Write one file that Python runs with nothing installed. Raises BundleError, OSError."""
    with tempfile.TemporaryDirectory(prefix="shmsock-bundle-") as scratch:
        _pyz(_wheels(Path(scratch), python, ()), output)


def _wheels(scratch: Path, python: str | None, add: Sequence[str]) -> Path:
    wheels = scratch / "wheels"
    wheels.mkdir()
    if python is None:
        wheels_from_here(add, wheels)
    else:
        wheels_for(python, add, wheels)
    return wheels


def _own(wheels: Path) -> Path:
    return next(wheels.glob("shmsock-*.whl"))


def _pyz(wheels: Path, output: Path) -> None:
    """Put the packages of all wheels into one file that Python runs."""
    with tempfile.TemporaryDirectory(prefix="shmsock-pyz-") as scratch:
        for wheel in wheels.glob("*.whl"):
            if not wheel.name.startswith("pip-"):
                with zipfile.ZipFile(wheel) as files:
                    files.extractall(scratch, [m for m in files.namelist() if ".data/" not in m])
        start = resources.files(__package__) / "zipmain.py"
        Path(scratch, "__main__.py").write_text(start.read_text(encoding="utf-8"), encoding="utf-8")
        zipapp.create_archive(scratch, output, "/usr/bin/env python3", compressed=True)


def _unpack_pip(wheel: Path, root: Path, compiled: bool) -> None:
    """Python runs the folder `pip` as it is; compiled here, it starts in a fraction of the time."""
    with zipfile.ZipFile(wheel) as files:
        files.extractall(root, [member for member in files.namelist() if member.startswith("pip/")])
    wheel.unlink()
    if compiled:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(root / "pip", stripdir=root, quiet=2, invalidation_mode=mode)


def _beside(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Examples, which the wheel has, and files of the system."""
    with zipfile.ZipFile(wheel) as files:
        for member in files.namelist():
            if "/share/doc/shmsock/examples/" in member:
                yield f"examples/{Path(member).name}", files.read(member)
    for name in NAMES:
        for file in system_files(name, program=f"{PLACE}/bin/shmsock"):
            yield f"files/{Path(file.path).name}", file.text.encode()


def _as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info
