"""The command: what it hands on to the program, and what it says of programs that it cannot reach."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.programs import free_port, program, result

ASYNCIO = (
    "import asyncio as a; a.new_event_loop().close(); print('RunLoop' in str(a.SelectorEventLoop.mro()))"
)


def fails(code: int, *args: str, env: dict[str, str] | None = None) -> str:
    """Run `shmsock run` with these arguments, which ends like that, and return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "shmsock", "run", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == code, done
    return done.stdout + done.stderr


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_exit_code_input_arguments_and_signals_are_the_program_s_own() -> None:
    code = "import sys; print(sys.argv[1:], sys.stdin.readline().strip()); sys.exit(7)"
    with program([], "-c", code, "--listen", "x y") as running:
        running.tell("from here")
        assert running.ends() == 7
        assert running.lines == ["['--listen', 'x y'] from here"]
    with program([], "-c", "print('here', flush=True); input()") as running:
        running.wait_for("here")
        assert running.stop(signal.SIGTERM) == -signal.SIGTERM
    handle = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(3)); "
    with program([], "-c", handle + "print('here', flush=True); signal.pause()") as running:
        running.wait_for("here")
        assert running.stop(signal.SIGINT) == 3


def test_a_sigterm_that_is_ignored_stays_ignored() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)"
    command = [sys.executable, "-m", "shmsock", "run", "--", "-c", code]
    assert subprocess.check_output(["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command]) == b"True\n"


def test_standard_descriptors_that_are_closed_stay_so() -> None:
    code = "import os, sys; os.write(2, b'%r %r' % (sys.stdin, sys.stdout))"
    command = [sys.executable, "-m", "shmsock", "run", "--", "-c", code]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&-', "sh", *command], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"None None")


def test_the_process_is_the_program_and_signals_are_as_they_were() -> None:
    shell = "echo $$; grep SigIgn /proc/self/status"
    with program([], "sh", "-c", shell) as running:
        assert running.ends() == 0
        assert running.lines[0] == str(running.process.pid)
        assert int(running.lines[1].split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


@pytest.mark.parametrize("how", ["python", "script", "executable", "module", "m_before", "children"])
def test_programs_are_started_as_users_write_them(how: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(ASYNCIO)
    executable(tmp_path / "tool", f"#!{sys.executable}\n{ASYNCIO}")
    executable(tmp_path / "tool.py", f"#!{sys.executable}\n{ASYNCIO}")
    command = {
        "python": ["python", "plain.py"],
        "script": ["plain.py"],
        "executable": ["./tool.py"],
        "module": ["-m", "plain"],
        "m_before": ["plain"],
        "children": ["sh", "-c", "./tool; true"],
    }[how]
    options = ["-m"] if how == "m_before" else []
    assert result(options, *command, cwd=tmp_path) == "True"


@pytest.mark.parametrize(
    "command",
    [
        ["python", "-I", "x.py"],
        ["python", "-W", "error", "-Xdev", "-OE", "x.py"],
        ["python", "-S", "-c", "pass"],
        ["./tool"],
        ["./env"],
    ],
)
def test_options_that_keep_a_program_from_being_reached_are_said(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    executable(tmp_path / "tool", f"#!{sys.executable} -I\n")
    executable(tmp_path / "env", "#!/usr/bin/env -S python3 -sE\n")
    said = fails(1, "--", *command)
    assert said.count("\n") == 1
    assert "leave it out" in said


def test_options_of_the_program_itself_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("import sys; print(sys.argv[1:])")
    assert result([], "python", "-Wignore", "plain.py", "-I", cwd=tmp_path) == "['-I']"
    assert result([], "python", "-m", "plain", "-S", cwd=tmp_path) == "['-S']"


def test_another_interpreter_without_shmsock_is_said(tmp_path: Path) -> None:
    other = next(
        (p for p in ("/usr/bin/python3", getattr(sys, "_base_executable", "")) if os.path.exists(p)), ""
    )
    lacks = subprocess.run([other, "-c", "import shmsock"], cwd=tmp_path, capture_output=True).returncode
    if not lacks:
        pytest.skip("there is no other Python")
    said = fails(1, "--", other, "-c", "print('it runs')")
    assert said.count("\n") == 1
    assert f"{other} cannot use shmsock" in said
    said = fails(0, "--", "sh", "-c", f"{other} -c \"print('it runs')\"")  # a child of what was asked for
    assert "it runs" in said
    assert f"{other} cannot use shmsock" in said


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    assert "no-such-program: no such command" in fails(127, "--", "no-such-program")
    assert str(tmp_path) in fails(126, "--", executable(tmp_path / "odd", "#!/nowhere/python\n"))


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (["--listen", "80x"], {}, "SHMSOCK_LISTEN: '80x' has no port from 1 to 65535"),
        (["--listen", "8000,70000"], {}, "'70000' has no port"),
        (["--map", "vm-b"], {}, "SHMSOCK_MAP: 'vm-b' is not ADDRESS=PEER"),
        (["--map", "db.internal=vm-b"], {}, "for a name, map the address"),
        (["--map", "10.0.0.5:x=vm-b"], {}, "'10.0.0.5:x=vm-b' has no port"),
        (["--map", "10.0.0.5=vm b"], {}, "'vm b' is no peer name"),
        (["--map", "10.0.0.5=vm-b,10.0.0.5=vm-c"], {}, "leads to vm-c, and before to vm-b"),
        (["--auto", "10.0.0.1/24"], {}, "has host bits set"),
        ([], {"SHMSOCK_HOSTS": "/nowhere"}, "SHMSOCK_HOSTS: /nowhere: No such file"),
        ([], {"SHMSOCK_SETTINGS": "busy_poll=1"}, "SHMSOCK_SETTINGS: 'busy_poll=1' is not FIELD=VALUE"),
        ([], {"SHMSOCK_LOOP": "trio"}, "SHMSOCK_LOOP is 'trio'"),
        (["--name", "localhost"], {}, "SHMSOCK_NAME: a node cannot be named"),
    ],
)
def test_mistakes_are_found_before_the_program_starts(
    args: list[str], env: dict[str, str], said: str
) -> None:
    assert said in " ".join(fails(2, *args, "--", "python", "-c", "print('it runs')", env=env).split())


def test_the_options_and_the_path_reach_children() -> None:
    show = "import os; print(*sorted(k + '=' + v for k, v in os.environ.items() if k in ({0}))))"
    names = "'PYTHONPATH', 'SHMSOCK_LISTEN', 'SHMSOCK_MAP', 'SHMSOCK_REGION', 'SHMSOCK_NAME'"
    options = [
        "--listen",
        "1",
        "--listen",
        "2,3",
        "--map",
        "10.0.0.5=a",
        "--region",
        "file:/x",
        "--name",
        "n",
    ]
    show = f"import os; print(*(k + '=' + v for k, v in sorted(os.environ.items()) if k in ({names})))"
    said = result(options, "sh", "-c", f'python -c "{show}"', env={"PYTHONPATH": "/one::/two"})
    site = said.split(":")[0].removeprefix("PYTHONPATH=")
    assert os.listdir(site)
    assert said == (
        f"PYTHONPATH={site}:/one::/two SHMSOCK_LISTEN=1,2,3 SHMSOCK_MAP=10.0.0.5=a SHMSOCK_NAME=n "
        "SHMSOCK_REGION=file:/x"
    )


def test_a_sitecustomize_that_is_hidden_is_imported_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import asyncio, sys\nsys.customized = __name__, __file__\n")
    code = f"import sys; print(sys.customized, sys.modules['sitecustomize'].__file__); {ASYNCIO}"
    said = result([], "-c", code, env={"PYTHONPATH": str(tmp_path)})
    file = tmp_path / "sitecustomize.py"
    assert said == f"('sitecustomize', '{file}') {file}\nTrue"
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('its own')")
    said = result([], "-c", ASYNCIO, env={"PYTHONPATH": str(tmp_path)})
    assert "RuntimeError: its own" in said
    assert said.splitlines()[-1] == "True"


def test_nothing_is_imported_before_a_loop_is_made() -> None:
    code = (
        "import sys; print([m for m in sys.modules if m in ('asyncio', 'shmsock.aio', 'shmsock.run.loop')])"
    )
    assert result([], "-c", code) == "[]"


def test_an_asyncio_that_was_imported_before_is_reached(tmp_path: Path) -> None:
    """By a .pth file, say; or where a program calls install() itself."""
    code = f"import asyncio, shmsock.run.install; shmsock.run.install.install(); {ASYNCIO}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done


SERVE = """
import socket, sys
server = socket.create_server(("127.0.0.1", {port}))
print("ready", flush=True)
if {accepts}:
    server.accept()[0].close()
sys.stdin.read()
"""


@pytest.mark.parametrize("accepts", [False, True])
def test_a_port_that_no_loop_listened_on_is_told_once(accepts: bool) -> None:
    port = free_port()
    with program(["--listen", str(port)], "-c", SERVE.format(port=port, accepts=accepts)) as running:
        running.wait_for("ready")
        if accepts:
            socket.create_connection(("127.0.0.1", port)).close()
            running.wait_for("is not offered on shared memory")
        assert running.process.stdin is not None
        running.process.stdin.close()
        assert running.ends() == 0
        told = [line for line in running.lines if f"nothing listened on {port} through asyncio" in line]
        assert len(told) == 1
        assert f"`shmsock forward shm:{port} tcp:127.0.0.1:{port}`" in told[0]


def test_nothing_is_told_of_a_port_that_a_loop_or_a_child_may_have_listened_on(shm_region: Path) -> None:
    port = free_port()
    listens = (
        "import asyncio, os\nasync def main():\n"
        f" (await asyncio.start_server(print, '127.0.0.1', {port})).close()\n"
    )
    forks = "if os.fork():\n os.wait()\nelse:\n asyncio.run(main())"
    for how in ("asyncio.run(main())", forks):
        with program(["--listen", str(port), "--region", str(shm_region)], "-c", listens + how) as running:
            assert running.ends() == 0
            assert [line for line in running.lines if "nothing listened" in line] == []
