"""Builds the native core: what pyproject.toml names as build_ext, and the variants that tests load.

cffi reads the declarations of core.h between the markers ``/* cdef-begin */`` and ``/* cdef-end */`` (for a
variant with SHMSOCK_FAKE_MEMORY also those between ``/* cdef-fake-begin */`` and ``/* cdef-fake-end */``) and
writes a wrapper in C, which is compiled together with every ``*.c`` beside this file. Into the same shared
object go the ``*.c`` of extension/, types of CPython that do the hot calls.

Setuptools loads this file by its path, before the package can be imported: it imports nothing of shmsock.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cffi
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

HERE = Path(__file__).resolve().parent
FAKE_MEMORY = "SHMSOCK_FAKE_MEMORY"

#: CFLAGS of the environment follow these once more, so that ``CFLAGS=-Wno-error pip install .`` works.
CFLAGS = ["-std=c11", "-O2", "-D_GNU_SOURCE", "-pthread", "-fvisibility=hidden"]
CFLAGS += ["-Wall", "-Wextra", "-Werror"]

# The wrapper is cffi's code, and held to cffi's standard.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wsign-compare"
#include "core.h"
"""


def sources() -> list[Path]:
    """The C files of the core."""
    return sorted(HERE.glob("*.c"))


def extension() -> list[Path]:
    """The C files that know Python."""
    return sorted((HERE / "extension").glob("*.c"))


def headers() -> list[Path]:
    return [*sorted(HERE.glob("*.h")), *sorted((HERE / "extension").glob("*.h"))]


def cdef(fake: bool = False) -> str:
    """The declarations of core.h that Python sees."""
    text = (HERE / "core.h").read_text(encoding="utf-8")
    found = []
    for kind in ("cdef", "cdef-fake") if fake else ("cdef",):
        blocks = re.findall(rf"/\* {kind}-begin \*/(.*?)/\* {kind}-end \*/", text, re.DOTALL)
        if not blocks:
            raise ValueError(f"core.h has no declarations between /* {kind}-begin */ and /* {kind}-end */")
        found += blocks
    return "\n".join(found)


def emit(module: str, path: Path, fake: bool = False) -> None:
    """Write cffi's wrapper for `module` (its full name) to `path`."""
    ffi = cffi.FFI()
    ffi.cdef(cdef(fake))
    ffi.set_source(module, PREAMBLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(path))


def _for_setuptools(path: Path) -> str:
    """Relative where it can be: setuptools puts objects, and what it packs, at the path it is given."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


class BuildExt(build_ext):
    """build_ext that knows what the core is made of."""

    def finalize_options(self) -> None:
        super().finalize_options()
        for ext in self.extensions:
            ext.sources = [_for_setuptools(p) for p in sources() + extension()]
            ext.depends = [_for_setuptools(p) for p in [*headers(), HERE / "build.py"]]
            ext.include_dirs = [str(HERE)]
            ext.extra_compile_args = CFLAGS + shlex.split(os.environ.get("CFLAGS", ""))
            ext.extra_link_args = ["-pthread"]

    def build_extension(self, ext: Any) -> None:
        wrapper = Path(self.build_temp) / f"{ext.name}.c"
        emit(ext.name, wrapper, fake=(FAKE_MEMORY, None) in ext.define_macros)
        ext.sources.append(str(wrapper))
        try:
            super().build_extension(ext)
        except CCompilerError as error:
            if not (missing := _missing(self.compiler.compiler_so)):
                raise
            raise CompileError(f"{error}\n{missing}") from None


def _missing(compiler: list[str]) -> str:
    """What it takes to compile with that command and is not there, and how to get it; empty: nothing."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    lacks = [] if shutil.which(compiler[0]) else [f"the C compiler {compiler[0]!r} (or another: CC=clang)"]
    lacks += [] if header.exists() else [f"Python's headers ({header})"]
    lacks += [] if Path("/usr/include/stdio.h").exists() else ["the C library's headers (stdio.h)"]
    if not lacks:
        return ""
    return (
        f"shmsock has a core in C, and to compile it there is missing: {', '.join(lacks)}. Install it "
        f"first: `apt-get install gcc libc6-dev {python}-dev` on Debian and Ubuntu, `dnf install gcc "
        "python3-devel` on Fedora, `apk add gcc musl-dev linux-headers python3-dev` on Alpine"
    )


def _fingerprint(name: str, defines: list[str]) -> str:
    """Of everything that goes into a variant."""
    digest = hashlib.sha256()
    settings = [name, *defines, sys.version, cffi.__version__]
    settings += [os.environ.get(variable, "") for variable in ("CC", "CFLAGS")]
    digest.update("\0".join(settings).encode())
    for path in [*sources(), *extension(), *headers(), HERE / "build.py"]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_variant(name: str, defines: Iterable[str], dest_dir: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Compile the core once more, as module `name` with `defines`, and return its (ffi, lib).

    What was compiled before from the same sources is taken from `dest_dir`; sessions that build the same
    variant at the same time do not disturb each other.
    """
    defines = list(defines)
    home = Path(dest_dir).resolve() / f"{name}-{_fingerprint(name, defines)}"
    file = home / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    if not file.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{name}-") as scratch:
            built = _compile(name, defines, Path(scratch))
            home.mkdir(exist_ok=True)
            os.replace(built, file)
        _forget_old(home)
    qualified = f"{__name__}.{home.name}.{name}"
    module = sys.modules.get(qualified)
    if module is None:
        spec = importlib.util.spec_from_file_location(qualified, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[qualified] = module
    return module.ffi, module.lib


def _compile(name: str, defines: list[str], scratch: Path) -> Path:
    macros: list[tuple[str, str | None]] = []
    for define in defines:
        key, is_given, value = define.partition("=")
        macros.append((key, value if is_given else None))
    extension = Extension(name, sources=[], define_macros=macros)
    command = BuildExt(Distribution({"name": name, "ext_modules": [extension]}))
    command.build_temp = str(scratch / "objects")
    command.build_lib = str(scratch / "built")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(name))


def _forget_old(home: Path, keep: int = 8) -> None:
    """Leave the newest variants in the cache: enough for every Python version and a branch or two."""
    kind = home.name.rpartition("-")[0]
    known = sorted(home.parent.glob(f"{kind}-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in known[keep:]:
        shutil.rmtree(old, ignore_errors=True)
