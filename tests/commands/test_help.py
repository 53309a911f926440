"""The help of all commands, the manual page that is made from it, and what shells complete.

`python -m tests.commands.test_help` (`make docs`) writes the page.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shmsock.cli import cli
from shmsock.commands.completion import FILES
from shmsock.install.manual import manual, walk
from tests.region.conftest import FakeSysfs

ROOT = Path(__file__).resolve().parents[2]
SHARE = ROOT / "shmsock/install/share"
PAGE = SHARE / "man/man1/shmsock.1"
BIN = os.path.dirname(sys.executable)

COMMANDS = {context.command_path: (command, context) for command, context in walk(cli)}
for_each_command = pytest.mark.parametrize("path", COMMANDS)


# -- help


@for_each_command
def test_help_fits_a_terminal(path: str) -> None:
    shown = CliRunner().invoke(cli, [*path.split()[1:], "--help"], terminal_width=80).output
    assert [line for line in shown.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("path", [p for p, (c, _) in COMMANDS.items() if isinstance(c, click.Group)])
def test_summaries_are_whole(path: str) -> None:
    shown = CliRunner().invoke(cli, [*path.split()[1:], "--help"], terminal_width=80).output
    commands = shown.partition("\nCommands:\n")[2].splitlines()
    assert commands
    assert [line for line in commands if line.endswith("...") or line.startswith("   ")] == []


@for_each_command
def test_every_option_has_help_and_shows_its_default(path: str) -> None:
    command, context = COMMANDS[path]
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help, param.name
            default = param.get_default(context)
            record = param.get_help_record(context)
            assert record is not None
            if isinstance(default, (str, int, float)) and not param.is_flag:
                assert "[default: " in record[1], param.name


def test_a_default_that_is_not_shown_is_found() -> None:
    """The check above can fail: without the context's word, click shows none."""
    option = click.Option(["--size"], default="1M", help="Of it.")
    record = option.get_help_record(click.Context(click.Command("x", params=[option])))
    assert record is not None
    assert "default" not in record[1]


# -- the manual page


def page() -> str:
    tuning = (ROOT / "docs/tuning.md").read_text()
    rows = re.findall(r"^\| `(SHMSOCK_\w+)` \| (.*?) \| (.*?) \|$", tuning, re.MULTILINE)
    plain = [[re.sub(r"\[(.*?)\]\(.*?\)|`", r"\1", word) for word in row] for row in rows]
    return manual(cli, [(name, f"{what} [default: {default}]") for name, default, what in plain])


def test_the_page_is_that_of_the_help() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_the_page_can_be_read() -> None:
    man = shutil.which("man")
    if man is None:
        pytest.skip("man is not installed (Debian's package man-db)")
    argv = [man, "--warnings", "-l", str(PAGE)]
    env = {**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=True)
    assert done.stderr == ""
    lines = re.sub(".\b", "", done.stdout).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    words = " ".join(" ".join(lines).split())
    for path, (command, _) in COMMANDS.items():
        assert f" {path} [OPTIONS]" in words
        for option in (
            o
            for p in command.params
            for o in p.opts
            if o.startswith("--") and not getattr(p, "hidden", False)
        ):
            assert option in words
    assert "SHMSOCK_REGION which region: " in words


# -- completion


@pytest.fixture
def region(shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What completion looks at: the region of this test, and this shmsock."""
    monkeypatch.setenv("SHMSOCK_REGION", str(shm_region))
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    return shm_region


#: What is typed, and what may come for its last word.
TYPED = {
    "shmsock inst": {"install-units"},
    "shmsock unbind --": {"--yes", "--dry-run", "--help"},
    "shmsock install-units sysctl u": {"udev", "udev-dax", "udev-vfio"},
    "shmsock bench --only echo,bulk,conn": {
        f"echo,bulk,connect{rest}" for rest in ("", "-10000", "-protocol", "ions")
    },
    "shmsock create x --size ": set(),
}


def bash(line: str) -> set[str]:
    script = (
        f"source {SHARE / FILES['bash']}; COMP_LINE=$1; COMP_POINT=${{#1}}; "
        '_shmsock_completion shmsock; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return set(subprocess.check_output(["bash", "-c", script, "bash", line], text=True).split())


def fish(line: str) -> set[str]:
    program = shutil.which("fish")
    if program is None:
        pytest.skip("fish is not installed (Debian's package fish)")
    script = f"source {SHARE / FILES['fish']}; complete -C $argv[1]"
    found = subprocess.check_output([program, "--no-config", "-c", script, line], text=True)
    return {each.partition("\t")[0] for each in found.splitlines()}


@pytest.mark.parametrize("line", TYPED)
@pytest.mark.parametrize("shell", [bash, fish])
def test_shells_complete(shell: object, line: str, region: Path) -> None:
    assert callable(shell)
    assert shell(line) == TYPED[line]


def test_zsh_completes(region: Path, tmp_path: Path) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed (Debian's package zsh)")
    script = f"PS1=; autoload -Uz compinit; compinit -D; source {SHARE / FILES['zsh']}; print rea''dy\n"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", ZDOTDIR=str(tmp_path))
        os.execv(zsh, [zsh, "-f", "-i"])
    try:
        os.write(terminal, script.encode())
        until(terminal, b"\nready")
        os.write(terminal, b"shmsock install-units sysc\t")
        until(terminal, b"sysctl")
        os.write(terminal, b"\x15shmsock nc vm\t")
        until(terminal, b"nc vm")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def until(terminal: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 4096)


def test_regions_and_peers_are_completed(region: Path) -> None:
    script = """
import asyncio, subprocess, sys, shmsock
async def main():
    async with shmsock.attach(name="vm-one"):
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        print("done")
print("attached", flush=True)
asyncio.run(main())
"""
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        while bash("shmsock nc vm") != {"vm-one"}:  # it attaches just now
            assert process.poll() is None
        assert bash("shmsock reap --section ") == {"0"}
        assert bash("shmsock info ") == {str(region)}
        assert bash(f"shmsock nc --region {region} v") == {"vm-one"}
        process.communicate()
    assert bash("shmsock nc vm") == set()


def test_addresses_are_completed_though_they_have_colons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.shell_completion import BashComplete

    sysfs = FakeSysfs(tmp_path)
    for address in ("0000:00:04.0", "0000:00:05.0"):
        sysfs.add(address)
    monkeypatch.setattr("shmsock.region.find_devices", lambda *_: _devices(sysfs))
    monkeypatch.setenv("_SHMSOCK_COMPLETE", "bash_complete")
    shell = BashComplete(cli, {}, "shmsock", "_SHMSOCK_COMPLETE")

    def complete(*words: str) -> set[str]:
        return {item.value for item in shell.get_completions(list(words[:-1]), words[-1])}

    assert complete("bind", "") == {"0000:00:04.0", "0000:00:05.0"}
    assert complete("bind", "0000:00:05") == {"0000:00:05.0"}
    assert complete("info", "pci:0000:00:04") == {"pci:0000:00:04.0"}


def _devices(sysfs: FakeSysfs) -> list[object]:
    from shmsock.region.pci import find_devices

    return list(find_devices(sysfs.root))


def test_bash_replaces_what_comes_after_the_last_colon(tmp_path: Path) -> None:
    """A stand-in for shmsock: one value with colons."""
    stand_in = tmp_path / "shmsock"
    stand_in.write_text('#!/bin/sh\necho "$COMP_WORDS" "$COMP_CWORD" >&2\necho plain,pci:0000:00:04.0\n')
    stand_in.chmod(0o755)
    script = (
        f'source {SHARE / FILES["bash"]}; COMP_LINE="shmsock info pci:00"; COMP_POINT=${{#COMP_LINE}}; '
        f'_shmsock_completion {stand_in}; echo "${{COMPREPLY[@]}}"'
    )
    assert subprocess.check_output(["bash", "-c", script], text=True) == "0000:00:04.0\n"


@pytest.mark.parametrize("shell", FILES)
def test_completion_prints_what_is_installed(shell: str) -> None:
    assert CliRunner().invoke(cli, ["completion", shell]).stdout == (SHARE / FILES[shell]).read_text()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
