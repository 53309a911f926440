"""The core compiles without a warning everywhere it should, and is packed and built whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools.errors import CompileError

from shmsock.native import build

ROOT = Path(build.__file__).resolve().parents[2]
ARM64 = "aarch64-linux-gnu-gcc"
NOT_OPTIMISED = "-O0"  # where only what is compiled matters


Done = subprocess.CompletedProcess[str]


def compile_object(compiler: str, source: Path, scratch: Path, *flags: str) -> Done:
    """To an object, not only -fsyntax-only: some warnings need the optimiser."""
    python = f"-I{sysconfig.get_paths()['include']}"
    command = [compiler, *build.CFLAGS, *flags, f"-I{build.HERE}", python, "-fPIC", "-c", str(source)]
    return subprocess.run([*command, "-o", str(scratch / "out.o")], text=True, capture_output=True)


@pytest.mark.parametrize("defines", [[], [build.FAKE_MEMORY]], ids=["real", "fake-memory"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_core_compiles_without_a_warning(compiler: str, defines: list[str], tmp_path: Path) -> None:
    wrapper = tmp_path / "_core.c"
    build.emit("_core", wrapper, fake=bool(defines))
    # The engine's tests compile fake memory with the optimiser, and the same warnings are errors there.
    flags = [NOT_OPTIMISED, *(f"-D{name}" for name in defines)] if defines else []
    for source in [*build.sources(), *build.extension(), wrapper]:
        done = compile_object(compiler, source, tmp_path, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


@pytest.mark.skipif(shutil.which(ARM64) is None, reason=f"no {ARM64}: apt-get install gcc-aarch64-linux-gnu")
def test_core_compiles_for_arm64(tmp_path: Path) -> None:
    for source in build.sources():
        done = compile_object(ARM64, source, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_warning_is_an_error(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int f(int used) { int unused; return used; }\n")
    done = compile_object(compiler, source, tmp_path)
    assert done.returncode != 0
    assert "unused" in done.stderr


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(
        CompileError, match=r"missing: the C compiler 'no-such-cc' .*apt-get install gcc libc6-dev"
    ):
        build.build_variant("_none", [], tmp_path)


def test_without_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-nostdinc")
    with pytest.raises(CompileError) as caught:
        build.build_variant("_none", [], tmp_path)
    assert "apt-get" not in str(caught.value)  # they are there, and something else is wrong
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    python = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    with pytest.raises(CompileError, match=rf"missing: Python's headers \({tmp_path}/Python.h\).*{python}"):
        build.build_variant("_none", [], tmp_path)


@pytest.mark.parametrize("module", ["shmsock", "shmsock.cli"])
def test_sources_that_were_not_built(tmp_path: Path, module: str) -> None:
    """A line says what to do: to a person as the only one, to a program as an ImportError."""
    shutil.copytree(build.HERE.parent, tmp_path / "shmsock", ignore=shutil.ignore_patterns("*.so"))
    argv = [sys.executable, "-m", "shmsock", "info"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"in {tmp_path} are sources" in done.stderr
    assert "make setup" in done.stderr
    script = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout == done.stderr


def test_headers_stand_alone(tmp_path: Path) -> None:
    for header in build.headers():
        source = tmp_path / f"{header.stem}.c"
        line = f'#include "{header.relative_to(build.HERE)}"\n'
        source.write_text(2 * line + "int sh_some_name;\n")
        done = compile_object("gcc", source, tmp_path, "-Wno-unused-function")
        assert done.returncode == 0, done.stderr


def test_variant_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", NOT_OPTIMISED)
    ffi, lib = build.build_variant("_core_fake", [build.FAKE_MEMORY], tmp_path)
    assert ffi.typeof("void(*)(void)") == ffi.typeof(lib.sh_fake_reset)
    (built,) = tmp_path.glob("_core_fake-*/*.so")
    before = built.stat().st_mtime_ns
    assert build.build_variant("_core_fake", [build.FAKE_MEMORY], tmp_path) == (ffi, lib)
    assert built.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [built.parent]


def test_sdist_and_wheel_are_whole(tmp_path: Path) -> None:
    """Through the build backend itself, which needs no network."""
    tree = tmp_path / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "shmsock", tree / "shmsock", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)

    def backend(cwd: Path, hook: str) -> Path:
        script = f"from setuptools import build_meta; build_meta.{hook}({str(tmp_path)!r})"
        environment = {**os.environ, "CFLAGS": NOT_OPTIMISED}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=cwd, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (made,) = tmp_path.glob("*.tar.gz" if hook == "build_sdist" else "*.whl")
        return made

    needed = [
        *build.sources(),
        *build.extension(),
        *build.headers(),
        build.HERE / "LAYOUT.md",
        ROOT / "shmsock" / "py.typed",
    ]
    needed.append(ROOT / "shmsock" / "bench" / "floor.c")
    archive = backend(tree, "build_sdist")
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
        assert {str(file.relative_to(ROOT)) for file in needed} <= packed
        assert {"LICENSE", "pyproject.toml", "shmsock/native/build.py"} <= packed

    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", unpacked, "--strip-components=1"], check=True)
    with zipfile.ZipFile(backend(unpacked, "build_wheel")) as wheel:
        wheel.extractall(tmp_path / "site")
    site = tmp_path / "site"
    core = f"shmsock/native/_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert (site / core).exists()
    assert [str(file) for file in needed if not (site / file.relative_to(ROOT)).exists()] == []
    assert not list(site.rglob("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import shmsock; print(shmsock.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(site))
