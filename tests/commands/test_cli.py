"""The command `shmsock`: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import encodings.ascii  # noqa: F401  (a child that is nobody may not read Python's own files)
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shmsock.aio.attach import prepare_region
from shmsock.cli import cli
from shmsock.engine import layout as lay
from shmsock.engine.memory import Memory, native_core
from shmsock.region import open_file
from shmsock.testing import make_region
from tests.region.conftest import NOBODY, in_child

SECONDS = 60

# A process that is attached until its input ends: two connections to itself, and a port.
ATTACHED = """
import asyncio, sys, shmsock
async def handle(reader, writer):
    await reader.read(1)
    writer.close()
async def main():
    async with shmsock.attach(sys.argv[1], name=sys.argv[2]) as node:
        server = await shmsock.start_server(handle, port=7000, node=node)
        held = [await shmsock.open_connection(sys.argv[2], 7000, node=node) for _ in range(2)]
        print("attached", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for _, writer in held:
            writer.close()
        server.close()
asyncio.run(main())
"""


def shmsock(*arguments: object, text: str = "") -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=text, prog_name="shmsock")


def good(*arguments: object, text: str = "") -> str:
    done = shmsock(*arguments, text=text)
    assert done.exit_code == 0, done.output
    return done.stdout


def bad(*arguments: object, text: str = "") -> str:
    """The message of a command that fails."""
    done = shmsock(*arguments, text=text)
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.startswith("shmsock: ")
    return done.stderr


def usage(*arguments: object) -> str:
    done = shmsock(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shmsock-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def path(shm: Path) -> Path:
    return shm / "region"


Attach = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Starts a process that is attached to a region, and waits until it is."""
    started: list[subprocess.Popen[str]] = []

    def begin(region: Path, name: str = "vm-a") -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", ATTACHED, str(region), name]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        return process

    yield begin
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def content(region: Path) -> Any:
    return json.loads(good("info", region, "--json"))["regions"][0]["content"]


def states(region: Path) -> list[str]:
    return [section["state"] for section in content(region)["sections"]]


# -- all commands


def test_version_and_help() -> None:
    assert good("--version").startswith("shmsock, version ")
    for command in ("create", "info", "reap", "demo", "demo-vm", "bench"):
        assert command in good("--help")
        assert "Usage: shmsock " in good(command, "--help")
    assert "..." not in good("--help").partition("Commands:")[2]  # a summary that does not fit is cut off
    assert "No such command" in usage("nothing")


@pytest.mark.parametrize("command", [("nc", "-l", "7000"), ("socks5",), ("forward", "tcp:7001", "shm:b:1")])
def test_what_the_environment_says_of_nodes_is_checked_first(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMSOCK_NAME", "a b")
    assert "SHMSOCK_NAME: 'a b' is no peer name" in usage(*command)
    monkeypatch.setenv("SHMSOCK_NAME", "a")
    monkeypatch.setenv("SHMSOCK_SETTINGS", "x=1")
    assert "SHMSOCK_SETTINGS: 'x=1' is not FIELD=VALUE" in usage(*command)


def test_as_a_module_without_a_traceback(path: Path) -> None:
    argv = [sys.executable, "-m", "shmsock", "info", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"shmsock: region {path} does not exist: make it with `shmsock create")
    assert done.stderr.count("\n") == 1


# -- create


def test_create(path: Path) -> None:
    said = good("create", path, "--size", "16M", "--peers", 4, "--mode", "0660")
    assert f"made {path}: 16 MiB, mode 0660, all of it allocated" in said
    assert "for 4 peers; each has" in said
    assert "connections" in said
    assert (
        f"-object memory-backend-file,size=16M,mem-path={path},share=on,id=HMB -device ivshmem-plain" in said
    )
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777) == (16 << 20, 0o660)
    assert status.st_blocks * 512 >= 16 << 20
    assert content(path)["peers"] == 4


def test_create_relative_and_with_a_comma(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert f"mem-path={path.parent}/a,,b,share" in good("create", "a,b", "--size", "4M")
    assert (path.parent / "a,b").exists()
    good("create", f"file:{path}", "--size", "4M")
    assert path.exists()


def test_create_that_no_guest_could_use(path: Path) -> None:
    done = shmsock("create", path, "--size", "5M")
    assert done.exit_code == 0
    said = done.output
    assert "shmsock: warning: 5 MiB is no power of two" in said
    assert "for guests make it 4 MiB or 8 MiB" in said
    assert "-device" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1X"], "'1X' is no size"),
        (["--size", "0"], "is no size"),
        (["--size", "-1M"], "is no size"),
        (["--size", "4M", "--peers", "0"], "0 is not in the range 1<=x<=64"),
        (["--size", "4M", "--peers", "65"], "65 is not in the range"),
        (["--size", "4M", "--mode", "rw"], "'rw' is no mode"),
        (["--size", "4M", "--mode", "0400"], "'0400' is no mode"),
        (["--size", "4M", "--mode", "7777"], "'7777' is no mode"),
        ([], "Missing option '--size'"),
    ],
)
def test_create_bad_usage(path: Path, arguments: list[str], message: str) -> None:
    assert message in usage("create", path, *arguments)
    assert not path.exists()


def test_create_what_is_no_file() -> None:
    for url in ("pci:auto", "vfio:0000:00:04.0", "ivshmem:/s"):
        assert "a file is what can be created" in usage("create", url, "--size", "4M")


def test_create_too_small(path: Path) -> None:
    assert "too few for a region of 64 peers" in bad("create", path, "--size", "4096", "--peers", 64)
    assert list(path.parent.iterdir()) == []


def test_create_where_something_is(path: Path) -> None:
    good("create", path, "--size", "4M")
    before = content(path)["region_id"]
    assert "exists already" in bad("create", path, "--size", "4M")
    assert content(path)["region_id"] == before
    good("create", path, "--size", "4M", "--force")
    assert content(path)["region_id"] != before
    good("create", path, "--size", "8M", "--force")
    assert path.stat().st_size == 8 << 20


def test_create_force_over_something_else(path: Path) -> None:
    path.write_bytes(b"not a region" * 1000)
    good("create", path, "--size", "4M", "--force")
    assert content(path)["state"] == "formatted"


def test_create_force_while_in_use(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    process = attach(path)
    before = content(path)["region_id"]
    message = f"is in use by section 0 (vm-a, process {process.pid})"
    for size in ("8M", "16M"):
        assert message in bad("create", path, "--size", size, "--force")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert f"process {process.pid}, stopped" in bad("create", path, "--size", "8M", "--force")
    assert content(path)["region_id"] == before
    process.kill()
    process.wait()
    good("create", path, "--size", "8M", "--force")
    assert states(path) == ["free"] * 16


def test_info_of_one_that_is_alone(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    assert "share=on" not in good("info", path)
    attach(path)
    assert "is alone: if others run, they are on other memory" in good("info", path)
    attach(path, "vm-b")
    assert "share=on" not in good("info", path)


def test_create_elsewhere(shm: Path) -> None:
    assert "nor does the directory" in bad("create", shm / "no" / "region", "--size", "4M")
    assert "exists already" in bad("create", shm, "--size", "4M")
    message = bad("create", shm, "--size", "4M", "--force")
    assert "is a directory" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be somebody else")
@pytest.mark.parametrize("force", [False, True])
def test_create_where_somebody_else_has_a_file(path: Path, force: bool) -> None:
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    path.parent.chmod(0o755)
    os.seteuid(65534)
    try:
        message = bad("create", path, "--size", "4M", *(["--force"] if force else []))
    finally:
        os.seteuid(0)
    assert "uid 0 (root)" in message
    assert "have it removed, or" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount a file system")
def test_create_on_a_full_disk(shm: Path) -> None:
    mount = shm / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=True)
    try:
        assert "disk full" in bad("create", mount / "region", "--size", "64M")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_without_permission(path: Path) -> None:
    good("create", path, "--size", "4M")
    path.parent.chmod(0o755)
    for arguments in (["info", path], ["reap", path], ["create", path.parent / "x", "--size", "4M"]):
        message = in_child(partial(bad, *arguments), NOBODY)
        assert "no permission to" in message
        assert f"uid {NOBODY}" in message


# -- info


def test_info_of_an_empty_region(path: Path) -> None:
    good("create", path, "--size", "16M")
    said = good("info", path)
    assert f"region file:{path}: 16 MiB" in said
    assert "mode 0600" in said
    assert f"format version {lay.VERSION}" in said
    assert "sections: 16 free" in said


def test_info_while_in_use(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    process = attach(path)
    before = path.read_bytes()[: lay.HEADER]
    said = good("info", path)
    row = next(line for line in said.splitlines() if "vm-a" in line).split()
    assert row[:4] == ["0", "live", "vm-a", str(process.pid)]
    assert row[4] == "here"
    assert "7000" in row
    assert "futex" in row
    assert "4 with vm-a" in said
    section = content(path)["sections"][0]
    assert (section["state"], section["name"], section["pid"]) == ("live", "vm-a", process.pid)
    assert section["ports"] == [7000]
    assert section["here"] is True
    assert (section["doorbell"], section["futex"]) == (None, True)
    assert {c["state"] for c in section["connections"]} == {"open"}
    slots = {c["slot"] for c in section["connections"]}
    assert len(slots) == 4
    assert slots == {c["peer_slot"] for c in section["connections"]}
    assert path.read_bytes()[: lay.HEADER] == before

    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(SECONDS) == 0
    section = content(path)["sections"][0]
    assert (section["state"], section["connections"], section["ports"]) == ("left", [], [])


def test_info_of_the_dead_and_the_silent(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    first, second = attach(path, "vm-a"), attach(path, "vm-b")
    first.kill()
    first.wait()
    second.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, second.pid, os.WSTOPPED)
    assert states(path)[:3] == ["dead", "silent", "free"]
    assert "1 dead" in good("info", path)


@pytest.mark.parametrize(
    ("data", "state", "message"),
    [
        (bytes(1 << 20), "unformatted", "all zero"),
        (bytes(1 << 20), "unformatted", "too few for a region of 16 peers"),
        (bytes(5000), "broken", "5000 bytes are too few for a region of even one peer: make it 32 KiB"),
        (b"\x7fELF" + bytes(1 << 20), "foreign", "begins with 7f 45 4c 46"),
        (bytes(16) + b"\x01" + bytes(1 << 20), "unformatted", "did not come to the end"),
        (lay.MAGIC.to_bytes(8, "little") + b"\x09" + bytes(1 << 20), "broken", "version 9"),
        (
            lay.MAGIC.to_bytes(8, "little") + bytes([lay.VERSION]) + bytes(1 << 20),
            "broken",
            "do not go together",
        ),
    ],
)
def test_info_of_what_is_no_region(path: Path, data: bytes, state: str, message: str) -> None:
    path.write_bytes(data)
    said = good("info", path)
    assert f"{state}: " in said
    assert message in said
    assert content(path)["state"] == state


def test_info_of_garbage_in_every_section(path: Path) -> None:
    """Whatever is in there: shown, and no crash."""
    good("create", path, "--size", "4M")
    head = path.read_bytes()[: lay.HEADER]
    path.write_bytes(head + os.urandom((4 << 20) - lay.HEADER))
    assert f"format version {lay.VERSION}" in good("info", path)
    assert len(content(path)["sections"]) == 16


def test_info_of_a_truncated_region(path: Path) -> None:
    good("create", path, "--size", "8M")
    os.truncate(path, 4 << 20)
    assert "truncated" in good("info", path)
    os.truncate(path, 100)
    assert "has 100 bytes, expected at least 4 KiB" in bad("info", path)
    os.truncate(path, 0)
    assert "is empty" in bad("info", path)


def test_info_does_not_fill_holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 20)
    assert "unformatted" in good("info", path)
    assert path.stat().st_blocks == 0


def test_info_of_a_file_that_was_removed_while_in_use(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "32M")
    processes = [attach(path, "vm-a"), attach(path, "vm-b")]
    path.unlink()
    said = bad("info", path)
    assert f"region {path} does not exist: make it with `shmsock create {path} --size 64M`; " in said
    for process in processes:
        assert f"process {process.pid} (" in said
    good("create", path, "--size", "32M")  # what that said
    shown = good("info", path)
    assert "sections: 16 free" in shown
    assert f"the file at {path} was removed or replaced while process {processes[0].pid} (" in shown
    assert "still use the old one: restart them" in shown
    assert "sections: 14 free, 2 live" in shown
    assert "vm-b" in shown
    (old,) = json.loads(good("info", path, "--json"))["regions"][0]["old_files"]
    assert [holder["pid"] for holder in old["held_by"]] == sorted(process.pid for process in processes)
    assert [s["ports"] for s in old["content"]["sections"] if s["state"] == "live"] == [[7000], [7000]]
    for process in processes:
        process.kill()
        process.wait()
    assert "old one" not in good("info", path)


def test_info_of_what_another_user_holds(shm: Path, attach: Attach) -> None:
    shm.chmod(0o755)
    path = shm / "region"
    good("create", path, "--size", "32M", "--mode", "0666")
    attach(path)
    path.unlink()
    code, said = in_child(lambda: (shmsock("info", path).exit_code, bad("info", path)), NOBODY)
    assert code == 1
    assert "restart" not in said  # nobody may look at root's processes


def test_info_that_fails(shm: Path) -> None:
    assert "does not exist" in bad("info", shm / "nothing")
    assert "is a directory" in bad("info", shm)
    assert "no region URL" in bad("info", "region")
    assert "no PCI device at 0000:00:1f.7" in bad("info", "pci:00:1f.7")
    assert json.loads(shmsock("info", shm / "nothing", "--json").stdout)["regions"][0]["error"]


def test_info_of_the_default(shm_region: Path, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"region file:{shm_region}" in good("info")
    monkeypatch.setenv("SHMSOCK_REGION", "nonsense")
    assert "'nonsense' is no region URL" in bad("info")


@pytest.mark.parametrize(
    ("flags", "word", "said"),
    [
        (lay.FLAG_FUTEX, 3 << 32 | 1, "doorbell 3 (1 vector), futex"),
        (0, 65535 << 32 | 64, "doorbell 65535 (64 vectors)"),
        (0, 65536 << 32 | 1, "polling"),
        (0, 3 << 32 | 65, "polling"),
    ],
)
def test_info_tells_what_wakes_it(path: Path, attach: Attach, flags: int, word: int, said: str) -> None:
    """What cannot be a doorbell is none."""
    good("create", path, "--size", "8M")
    attach(path)
    with open_file(str(path)) as region:
        memory = Memory(native_core(), region.mmap)
        at = lay.read_layout(memory).section(0)
        memory.store(at + lay.FLAGS, flags)
        memory.store(at + lay.DOORBELL, word)
        memory.release()
    told = good("info", path)
    row = next(line for line in told.splitlines() if "vm-a" in line)
    assert f"  {said}  " in row
    assert ("of a former ivshmem server" in told) == said.startswith("doorbell")  # no server is there


# -- reap


def test_reap_nothing(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    attach(path)
    assert "nothing to free" in good("reap", path, "--watch", 1)
    assert states(path)[0] == "live"


def test_reap_the_dead(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    dead = [attach(path, "vm-a"), attach(path, "vm-b")]
    for process in dead:  # the last first, so that nobody is left who would free the other
        process.send_signal(signal.SIGSTOP)
    for process in dead:
        process.kill()
        process.wait()
    said = good("reap", path, "--watch", 1)
    assert said == "".join(
        f"freed section {i} (vm-{name}, process {process.pid}): its owner is dead\n"
        for i, (name, process) in enumerate(zip("ab", dead, strict=True))
    )
    assert states(path)[:2] == ["left", "left"]


def test_the_living_free_the_dead_by_themselves(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    dead, alive = attach(path, "vm-a"), attach(path, "vm-b")
    dead.kill()
    dead.wait()
    deadline = time.monotonic() + 20
    while states(path)[:2] != ["left", "live"]:
        assert time.monotonic() < deadline
    assert alive.poll() is None


def silence(path: Path, attach: Attach) -> subprocess.Popen[str]:
    """Section 0 belongs to another machine that was switched off: no beat, and no lock that tells."""
    process = attach(path, "vm-a")
    process.kill()
    process.wait()
    with path.open("r+b") as file:
        file.seek(lay.HEADER + lay.BOOT)
        file.write(os.urandom(16))
    return process


def test_reap_the_silent(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    silent = silence(path, attach)
    alive = attach(path, "vm-b")
    said = good("reap", path, "--watch", 1)
    assert f"section 0 (vm-a, process {silent.pid}) is silent" in said
    assert f"`shmsock reap file:{path} --section 0` frees it" in said
    assert states(path)[:2] == ["silent", "live"]

    assert "is alive" not in said
    assert f"section 1 (vm-b, process {alive.pid}) is live" in bad("reap", path, "--section", "vm-b", "--yes")
    assert "no section 'vm-x' has an owner; those that have: 0 (vm-a" in bad(
        "reap", path, "--section", "vm-x"
    )

    done = shmsock("reap", path, "--section", "vm-a", "--watch", 1, text="n\n")
    assert (done.exit_code, "left as it is" in done.stdout) == (1, True)
    assert states(path)[0] == "silent"
    assert shmsock("reap", path, "--section", "vm-a", "--watch", 1).exit_code == 1  # nobody answers
    assert states(path)[0] == "silent"
    assert "silent, and freed by hand" in good("reap", path, "--section", "0", "--watch", 1, text="y\n")
    assert states(path)[:2] == ["left", "live"]


def test_reap_without_asking(path: Path, attach: Attach) -> None:
    good("create", path, "--size", "8M")
    silence(path, attach)
    assert "freed section 0" in good("reap", path, "--section", "vm-a", "--yes", "--watch", 1)


def test_reap_that_fails(path: Path) -> None:
    assert "does not exist" in bad("reap", path)
    path.write_bytes(bytes(1 << 20))
    assert "not formatted" in bad("reap", path)
    assert "0.5 is not in the range" in usage("reap", path, "--watch", "0.5")


def test_a_region_that_testing_made(shm: Path) -> None:
    made = Path(make_region(shm, size=8 << 20, peers=3))
    assert states(made) == ["free"] * 3
    with open_file(str(made)) as region:
        prepare_region(region, 5)  # harmless: it is formatted already
    assert states(made) == ["free"] * 3


@pytest.mark.parametrize("command", [("peers",), ("ss",), ("top", "-n", 1), ("ping", "a", "--region")])
def test_errors_are_json_for_who_asked_for_that(command: tuple[object, ...], tmp_path: Path) -> None:
    done = shmsock(*command, tmp_path / "none", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)["error"]
    assert done.stderr == f"shmsock: {told}\n"
    assert "does not exist" in told


def test_sizes_are_told_in_units(tmp_path: Path) -> None:
    assert "1 MiB are too few for a region of 16 peers: make it 2 MiB or more" in bad(
        "create", tmp_path / "small", "--size", "1M"
    )
    said = bad("create", "/dev/shm/shmsock-test-large", "--size", "1048576M")
    assert "no room for 1 TiB more" in said
    assert re.search(r"; [\d.]+ [KMG]iB are free", said)
