"""Starts `shmsock` from one file, shmsock.pyz: it is that file's __main__, and nobody imports it elsewhere.

What is compiled cannot be loaded from a zip file: it is put into memory (memfd), for the Python that it was
made for. Under another one everything works that needs no C core.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import zipfile
from collections.abc import Sequence
from types import ModuleType

COMPILED = {"shmsock.native._core": "C core of shmsock", "_cffi_backend": "compiled part of cffi"}


class Compiled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the compiled modules in the file; those of another Python are an error when they are needed."""

    def __init__(self, archive: str) -> None:
        self.archive = archive

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in COMPILED:
            return None
        with zipfile.ZipFile(self.archive) as files:
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                member = name.replace(".", "/") + suffix
                if member in files.namelist():
                    fd = os.memfd_create(member.rpartition("/")[2])
                    with open(fd, "wb", closefd=False) as copy:
                        copy.write(files.read(member))
                    place = f"/proc/self/fd/{fd}"
                    loader = importlib.machinery.ExtensionFileLoader(name, place)
                    return importlib.util.spec_from_file_location(name, place, loader=loader)
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        with zipfile.ZipFile(self.archive) as files:
            made = [member for member in files.namelist() if member.startswith("shmsock/native/_core.")]
        others = ", ".join(member.split(".")[1] for member in made) or "no Python"
        version = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"this needs the {COMPILED[spec.name]}, which is here for {others} and not for {version}: start "
            f"{os.path.basename(self.archive)} with that Python, or install shmsock (`shmsock bundle`)",
            name=spec.name,
        )

    def exec_module(self, module: ModuleType) -> None:
        """Never comes: no module was created."""


if __name__ == "__main__":
    sys.meta_path.insert(0, Compiled(os.path.dirname(os.path.abspath(__file__))))
    runpy.run_module("shmsock", run_name="__main__")
