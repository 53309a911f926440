"""The commands and the Python of README.md and the guides run as they stand there.

Before a block that does not, a comment says why, or which test runs it: <!-- not run: why -->,
<!-- run by tests/... -->. A line with an ellipsis is no whole command. Regions are of this test, and programs
that users have are made for it. All blocks are parsed.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import shmsock
from tests.test_docs import ROOT, compiled

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    "cat curl docker export make mkdir pip python[0-9.]* qemu-system-x86_64 scp shmsock source ssh tar wrk"
)
FIRST = re.compile(rf"(?:\w+=\S+ )*(?:{'|'.join(COMMANDS.split())}) ")
BLOCK = re.compile(
    r"(?:<!-- (not run|run by):? ([^>]*?) -->\n+)?"
    r"(?:^```(sh|python)\n(.*?)^```$|(?<=\n\n)((?:^    [^\n]*\n(?:\n(?=    ))?)+))",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    where: str
    python: bool
    text: str
    mark: str
    why: str


def blocks(guide: Path) -> Iterator[Block]:
    text = guide.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        mark, why, language, fenced, indented = found.groups()
        block = fenced or textwrap.dedent(indented)
        if not language and not FIRST.match(block):
            if "await " not in block:
                assert not mark, f"{guide.name}: a mark for nothing, {found[0]!r}"
                continue
            language = "python"
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{guide.name}:{line}", language == "python", block, mark or "", why or "")


ALL = [block for guide in GUIDES for block in blocks(guide)]
SHELL = [block for block in ALL if not block.python]
PYTHON = [block for block in ALL if block.python]


def ids(chosen: list[Block]) -> list[str]:
    """Without lines, which change: the guide, and the number of the block in it."""
    seen: list[str] = []
    for block in chosen:
        name = block.where.partition(":")[0]
        seen.append(f"{name}-{1 + sum(one.startswith(name) for one in seen)}")
    return seen


def run_elsewhere(block: Block) -> bool:
    """Do the tests that are named know all of shmsock's commands in it, or read them there?"""
    tests = [ROOT / test for test in block.why.split(" and ")]
    if not all(test.is_file() for test in tests):
        return False
    known = "\n".join(test.read_text(encoding="utf-8") for test in tests)
    commands = re.findall(r"\bshmsock ([a-z][\w-]+)", block.text)
    return f'"{block.where.partition(":")[0]}"' in known or all(command in known for command in commands)


def test_marks_name_what_there_is() -> None:
    assert [f"{b.where}: {b.why}" for b in ALL if b.mark == "run by" and not run_elsewhere(b)] == []
    marks = sum(len(re.findall("<!-- (?:not run|run by)", guide.read_text("utf-8"))) for guide in GUIDES)
    assert marks == sum(bool(b.mark) for b in ALL), "a mark that stands before no block"
    assert len(SHELL) > 20
    assert len(PYTHON) > 5


@pytest.mark.parametrize("block", SHELL, ids=ids(SHELL))
def test_shell_is_shell(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- run


def to_run(block: Block) -> str:
    """Whole commands, without their comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return "\n".join(line.partition("  #")[0] for line in lines if "..." not in line)


#: What is run of each guide, block after block.
RUN = {
    guide.name: text
    for guide in GUIDES
    if (text := "\n".join(to_run(b) for b in SHELL if not b.mark and b.where.startswith(guide.name)).strip())
}


@pytest.fixture
def somewhere(tmp_path: Path, shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run commands in, with the programs that guides take for the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (tmp_path / "my_service.py").write_text(
        "import asyncio, shmsock\n"
        "async def main():\n"
        "    async with shmsock.attach(name='vm-a'):\n"
        "        pass\n"
        "asyncio.run(main())\n"
    )
    return tmp_path


@pytest.mark.parametrize("guide", RUN)
def test_commands_run(guide: str, somewhere: Path, shm_region: Path) -> None:
    own = f"{shm_region}-of"
    text = re.sub(r"/dev/shm/([\w-]+)", rf"{own}-\1", RUN[guide]).replace("256M", "4M")
    text = re.sub(r"(?m)^shmsock create (\S+)", r"rm -f \1; \g<0>", text)  # as another way to the same file
    try:
        done = subprocess.run(["bash", "-euxc", text], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr + done.stdout
    finally:
        subprocess.run(["bash", "-c", f"rm -rf {own}-*"], check=True)


RUN_PYTHON = [
    b for b in PYTHON if not b.mark and not b.where.startswith("README")
]  # that: tests/test_docs.py


@pytest.mark.parametrize("block", RUN_PYTHON, ids=ids(RUN_PYTHON))
def test_python_runs(block: Block, shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a server called vm-b that listens on port 7000."""
    import uvloop

    monkeypatch.setenv("SHMSOCK_NAME", "vm-b")
    text = re.sub(r'"pci:[\w:.]+"', repr(str(shm_region)), block.text)

    async def main() -> None: ...

    names: dict[str, Any] = {"shmsock": shmsock, "uvloop": uvloop, "main": main}
    code = compiled(text)
    if not code.co_flags & 0x80:  # CO_COROUTINE: it awaits nothing, and may run a loop
        exec(code, names)
        names["loop"].close()
        return

    async def run() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await shmsock.start_server(handle, port=7000)
        await eval(code, names)
        if "writer" in names:
            names["writer"].close()
        server.close()

    asyncio.run(run())
