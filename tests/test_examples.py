"""Every example runs, as people run it: in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.run.programs import free_port, program

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SECONDS = 60
Start = Callable[..., subprocess.Popen[str]]


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *(str(a) for a in arguments)]


def popen(name: str, *arguments: object) -> subprocess.Popen[str]:
    """With pipes to all of it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command(name, *arguments), text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def run(
    name: str, *arguments: object, text: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(name, *arguments), input=text, capture_output=True, text=True, timeout=SECONDS
    )
    assert not check or (done.returncode, done.stderr) == (0, ""), done.stderr
    return done


@pytest.fixture
def start(shm_region: Path) -> Iterator[Start]:
    """Starts an example that serves, and waits until it listens."""
    started = []

    def begin(name: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(command(name, *arguments), stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_echo(start: Start) -> None:
    server = start("echo_server.py", 7100)
    for _ in range(2):
        lines = run("echo_client.py", "localhost", 7100, text="hello\nworld\n").stdout.splitlines()
        assert [line.partition("  ")[0] for line in lines] == ["hello", "world"]
    server.send_signal(signal.SIGINT)
    assert server.stdout is not None
    assert server.stdout.read().count("connection from") == 2
    assert server.wait(SECONDS) == 0


def refused(name: str, *arguments: object) -> str:
    """The one line in which it says why it cannot go on."""
    done = run(name, *arguments, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    start, line = f"{name.removesuffix('.py')}: ", done.stderr
    assert (line.startswith(start), line.count("\n"), line[-1]) == (True, 1, "\n"), line
    return line.removeprefix(start)


EVERY: dict[str, list[object]] = {
    "anyio_echo.py": ["asyncio"],
    "chat.py": ["ann"],
    "dask_cluster.py": [],
    "datagrams.py": ["serve"],
    "echo_client.py": ["localhost"],
    "echo_server.py": [],
    "file_receive.py": [os.devnull],
    "file_send.py": [os.devnull, "localhost"],
    "json_rpc.py": ["serve"],
    "port_from_tcp.py": [],
    "raw_bar2.py": ["/nowhere", 0],
    "unmodified_asyncio.py": ["localhost.shm"],
    "web_service.py": ["http://localhost:8000"],
}


@pytest.mark.parametrize("name", EVERY)
def test_without_a_region(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", "/nowhere")
    assert refused(name, *EVERY[name]).startswith("region /nowhere does not exist")


def test_with_a_bad_name(shm_region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_NAME", "a!")
    assert refused("echo_server.py").startswith("SHMSOCK_NAME: 'a!' is no peer name")


def test_without_a_server(shm_region: Path) -> None:
    assert "no peer named 'vm-z'" in refused("echo_client.py", "vm-z")
    assert "nobody there listens on port 7001" in refused("file_send.py", os.devnull, "localhost")


def test_file(start: Start, tmp_path: Path) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(5_000_001))
    server = start("file_receive.py", received, 7101)
    said = run("file_send.py", sent, "localhost", 7101).stdout.split()
    assert server.stdout is not None
    assert server.stdout.read().split() == [said[0], str(received)]
    assert server.wait(SECONDS) == 0
    assert received.read_bytes() == sent.read_bytes()


def test_file_with_progress(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(bytes(3_000_000))
    start("file_receive.py", tmp_path / "received", 7101)
    ours, terminal = os.openpty()
    subprocess.run(
        command("file_send.py", tmp_path / "sent", "localhost", 7101),
        stderr=terminal,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=SECONDS,
    )
    os.close(terminal)
    shown = os.read(ours, 4096).decode().split("\r")
    os.close(ours)
    assert [line.strip() for line in shown if line.strip()] == [
        f"{min(size * (1 << 18), 3_000_000) * 100 // 3_000_000} %" for size in range(1, 13)
    ]


def test_json_rpc(start: Start) -> None:
    server = start("json_rpc.py", "serve")
    assert run("json_rpc.py", "localhost", "add", 20, 22).stdout == "42\n"
    assert run("json_rpc.py", "localhost", "upper", "hello").stdout == "HELLO\n"
    assert refused("json_rpc.py", "localhost", "divide", 1, 0).startswith("ZeroDivisionError")
    assert refused("json_rpc.py", "localhost", "remove", "/").startswith("KeyError")
    server.send_signal(signal.SIGINT)
    assert server.wait(SECONDS) == 0


def test_json_rpc_without_a_server(shm_region: Path) -> None:
    assert "nobody there listens on port 7003" in refused("json_rpc.py", "localhost", "add", 1)


def test_chat(shm_region: Path) -> None:
    with contextlib.ExitStack() as stack:
        ann = stack.enter_context(popen("chat.py", "ann"))
        assert ann.stdin is not None
        assert ann.stdout is not None
        assert ann.stdout.readline().startswith("listening on")
        bob = stack.enter_context(popen("chat.py", "bob"))
        assert bob.stdout is not None
        while bob.poll() is None:  # until both know each other
            ann.stdin.write("hello, \033[2J all\n")
            ann.stdin.flush()
            if bob.stdout.readline() == "ann: hello, [2J all\n":
                break
        said = bob.communicate("hello, ann\n", timeout=SECONDS)
        assert (bob.returncode, said[1]) == (0, "")
        lines = ann.communicate(timeout=SECONDS)[0].splitlines()
        assert lines == ["bob: (is here)", "bob: hello, ann", "bob: (has left)"]
        assert ann.returncode == 0


def test_a_web_service(shm_region: Path) -> None:
    port = free_port()
    line = f"uvicorn web_service:app --host 127.0.0.1 --port {port} --log-level warning"
    options = ["--name", "vm-b", "--listen", str(port)]
    with program(options, *line.split(), cwd=EXAMPLES) as server:
        while True:
            done = run("web_service.py", f"http://vm-b:{port}", check=False)
            if done.returncode == 0:
                break
            assert "vm-b" in done.stderr, done.stderr  # it is not there yet
        assert done.stdout.splitlines() == ["today: it works", "tomorrow: 404", "counted: 0 1 2"]
        server.stop()
        assert server.lines == []


def test_port_from_tcp(shm_region: Path) -> None:
    assert run("port_from_tcp.py").stdout.splitlines() == ["1 + 2 + 3 = 6", "20 + 22 = 42"]


def test_port_from_tcp_was_tcp(tmp_path: Path) -> None:
    """The comments tell the truth: with what stood there before, it runs over TCP."""
    lines = (EXAMPLES / "port_from_tcp.py").read_text().splitlines()
    changed = 0
    for number, line in enumerate(lines):
        if "# was: " in line:
            code, _, before = line.partition("  # was: ")
            start = code.index("shmsock.")
            lines[number] = code[:start] + before
            changed += 1
    assert changed == 2
    script = tmp_path / "tcp.py"
    script.write_text("\n".join(lines).replace("7002", "0").replace(
        "HOST, 0)", "HOST, PORT)"))  # fmt: skip
    text = script.read_text().replace("import shmsock\n", "")
    text = text.replace(
        "async with server:", "PORT2 = server.sockets[0].getsockname()[1]\n    async with server:"
    )
    text = text.replace("open_connection(HOST, PORT)", "open_connection(HOST, PORT2)")
    script.write_text(text)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.splitlines() == ["1 + 2 + 3 = 6", "20 + 22 = 42"], done.stderr


def test_datagrams(start: Start) -> None:
    server = start("datagrams.py", "serve")
    said = [run("datagrams.py", host, "tea").stdout for host in ("localhost", "*", "localhost")]
    assert [line.partition(" (says ")[0] for line in said] == ["tea: 1", "tea: 2", "tea: 3"]
    server.send_signal(signal.SIGINT)
    assert server.wait(SECONDS) == 0


def test_datagrams_without_a_server(shm_region: Path) -> None:
    assert refused("datagrams.py", "localhost", "tea").startswith("[Errno 111]")


@pytest.mark.parametrize(
    "name", sorted(EVERY.keys() - {"dask_cluster.py", "echo_server.py", "port_from_tcp.py"})
)
def test_usage(name: str) -> None:
    done = run(name, check=False)
    assert done.returncode == 1
    assert f"python {name}" in done.stderr


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio_echo(shm_region: Path, backend: str) -> None:
    assert run("anyio_echo.py", backend).stdout.split() == ["hello", "world"]


@pytest.mark.parametrize(("host", "address"), [("localhost.shm", "ff01:"), ("127.0.0.1", "127.0.0.1")])
def test_unmodified_asyncio(shm_region: Path, host: str, address: str) -> None:
    assert run("unmodified_asyncio.py", host).stdout.startswith(f"HELLO from {address}")


def test_dask_cluster(shm_region: Path) -> None:
    said = run("dask_cluster.py", 16).stdout.splitlines()
    assert said[0].startswith("the scheduler is shm://")
    assert said[1] == "the sum is 1999999000000, numpy says 1999999000000"
    assert said[2].endswith("got 16 MB through memory")


def test_raw_bar2(tmp_path: Path) -> None:
    region = tmp_path / "region"
    region.write_bytes(bytes(1 << 16))
    assert run("raw_bar2.py", region, 1000, 42).stdout == "byte 1000 of 65536: 42\n"
    assert run("raw_bar2.py", region, 1000).stdout == "byte 1000 of 65536: 42\n"


@pytest.mark.parametrize(
    ("port", "text"), [(70000, "must be 0-65535"), (-1, "must be 0-65535"), ("x", "invalid literal")]
)
@pytest.mark.parametrize("name", ["echo_client.py", "echo_server.py", "file_receive.py", "file_send.py"])
def test_ports_that_are_none(shm_region: Path, name: str, port: object, text: str) -> None:
    assert text in refused(name, *EVERY[name], port)


def test_a_port_that_is_taken(start: Start) -> None:
    start("echo_server.py", 7100)
    start("datagrams.py", "serve")
    assert "is already in use" in refused("echo_server.py", 7100)
    assert "is already in use" in refused("file_receive.py", os.devnull, 7100)
    assert "is already in use" in refused("datagrams.py", "serve")


@pytest.mark.parametrize(
    ("name", "arguments", "status"),
    [
        ("echo_server.py", [7100], 0),
        ("datagrams.py", ["serve"], 0),
        ("json_rpc.py", ["serve"], 0),
        ("chat.py", ["ann"], 130),
        ("file_receive.py", [os.devnull, 7100], 130),
        ("echo_client.py", ["localhost", 7100], 130),
        ("file_send.py", ["/dev/zero", "localhost", 7100], 130),
    ],
)
def test_interrupted(start: Start, name: str, arguments: list[object], status: int) -> None:
    """Ctrl-C, once, and nothing is said: not by who is connected to it either."""
    serves = status == 0 or name in ("chat.py", "file_receive.py")
    if not serves:
        server = start("echo_server.py", 7100)
        assert server.stdout is not None
    with popen(name, *arguments) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        if serves:
            assert process.stdout.readline().startswith("listening on ")
        else:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("connection from ")
            if name == "echo_client.py":
                process.stdin.write("hello\n")
                process.stdin.flush()
                assert process.stdout.readline().startswith("hello")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=SECONDS)[1]
    assert (process.returncode, said) == (status, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_goes(shm_region: Path, number: signal.Signals) -> None:
    """It says nothing, and who is connected to it a line: no tracebacks."""
    with popen("echo_server.py", 7100) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        with popen("echo_client.py", "localhost", 7100) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write("hello\n")
            client.stdin.flush()
            assert client.stdout.readline().startswith("hello")
            server.send_signal(number)
            assert server.communicate(timeout=SECONDS)[1] == ""
            said = client.communicate("again\n", timeout=SECONDS)[1]
    assert (client.returncode, said.count("\n"), said.startswith("echo_client: ")) == (1, 1, True), said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_receiver_that_goes(shm_region: Path, number: signal.Signals, tmp_path: Path) -> None:
    received = tmp_path / "received"
    with popen("file_receive.py", received, 7101) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        with popen("file_send.py", "/dev/zero", "localhost", 7101) as client:
            while not received.exists() or not received.stat().st_size:
                assert client.poll() is None
            server.send_signal(number)
            assert server.communicate(timeout=SECONDS)[1] == ""
            assert server.returncode in (130, -number)
            said = client.communicate(timeout=SECONDS)[1]
    assert (client.returncode, said.count("\n"), said.startswith("file_send: ")) == (1, 1, True), said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sender_that_goes(shm_region: Path, number: signal.Signals, tmp_path: Path) -> None:
    """Its receiver cannot tell: what was written before is a file, or the connection was reset."""
    received = tmp_path / "received"
    with popen("file_receive.py", received, 7101) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        with popen("file_send.py", "/dev/zero", "localhost", 7101) as client:
            while not received.exists() or not received.stat().st_size:
                assert client.poll() is None
            client.send_signal(number)
            client.communicate(timeout=SECONDS)
        server.send_signal(signal.SIGINT)
        said = server.communicate(timeout=SECONDS)[1]
        assert "Traceback" not in said


def test_a_file_that_cannot_be_stored(shm_region: Path, tmp_path: Path) -> None:
    with popen("file_receive.py", tmp_path, 7101) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        assert "file_send: " in run("file_send.py", __file__, "localhost", 7101, check=False).stderr
        said = server.communicate(timeout=SECONDS)[1]
    assert (server.returncode, said.count("\n"), "Is a directory" in said) == (1, 1, True), said


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_goes_wrong_among_tasks(shm_region: Path, backend: str) -> None:
    """anyio wraps it in a group."""
    script = (
        "import runpy, sys, shmsock.anyio as face\n"
        "async def refuse(*args): raise ConnectionRefusedError(111, 'nobody')\n"
        "face.connect_shm = refuse\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [sys.executable, "-W", "error", "-c", script, str(EXAMPLES / "anyio_echo.py"), backend]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (1, "anyio_echo: [Errno 111] nobody\n")


def test_raw_bar2_keeps_a_region_that_is_used(start: Start, shm_region: Path) -> None:
    server = start("echo_server.py", 7100)
    before = shm_region.read_bytes()[:64]
    assert f"process {server.pid}" in refused("raw_bar2.py", shm_region, 0, 7)
    assert refused("raw_bar2.py", shm_region, 9000, 7, "please").startswith("region file:")
    assert shm_region.read_bytes()[:64] == before
    assert "hello  (" in run("echo_client.py", "localhost", 7100, text="hello\n").stdout
    assert run("raw_bar2.py", shm_region, 0).stdout.endswith(": 83\n")
    server.kill()
    assert run("raw_bar2.py", shm_region, 0, 7, "force").stdout.endswith(": 7\n")


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    assert [p.name for p in EXAMPLES.glob("*.py") if here.count(f'"{p.name}"') < 2] == []
    assert sorted(EVERY) == sorted(p.name for p in EXAMPLES.glob("*.py"))
