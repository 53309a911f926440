"""Servers of libraries, and what leads to them: through memory, or over TCP as a control."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from tests.forward.processes import Forwarder
from tests.forward.processes import program as installed
from tests.run.programs import Program, free_port

ROOT = Path(__file__).parents[2]
DRIVER = ("python", "-m", "tests.integrations.driver")
APP = "tests.integrations.libraries.httpx_http:app"
TLS = "--certfile {dir}/server.pem --keyfile {dir}/server.key -c {dir}/hypercorn.toml"
#: What serves, and the line that says that it does. The others are the driver's.
COMMANDS = {
    "uvicorn": (f"uvicorn {APP} --host 127.0.0.1 --port {{port}} --no-access-log", "startup complete", 1),
    "uvicorn_workers": (
        f"uvicorn {APP} --host 127.0.0.1 --port {{port}} --no-access-log --workers 4",
        "startup complete",
        4,
    ),
    "hypercorn_h2": (f"hypercorn {APP} -b 127.0.0.1:{{port}} {TLS}", "Running on", 1),
    "redis": ("redis-server --port {port} --save {empty} --dir {dir}", "Ready to accept", 1),
    "nats": ("nats-server -c {dir}/nats.conf -a 127.0.0.1 -p {port}", "Server is ready", 1),
    "postgres": (
        "postgres -D {dir}/data -k {dir} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off",
        "ready to accept connections",
        1,
    ),
}
#: Library of the driver -> the server that it goes with.
SERVER_OF = {
    "aiohttp_http": "",
    "aiohttp_ws": "",
    "websockets_ws": "",
    "grpclib_rpc": "",
    "asyncssh_run": "",
    "httpx_http": "uvicorn",
    "httpx_http/workers": "uvicorn_workers",
    "httpx_http/h2": "hypercorn_h2",
    "redis_echo": "redis",
    "nats_request": "nats",
    "asyncpg_sql": "postgres",
    "psycopg_sql": "postgres",
}
NOT_ASYNCIO = ("redis", "nats", "postgres")


@dataclass
class Service:
    """The server of a library. `way` "shm": offered to peers as `server`; "tcp": over TCP alone. Where it is
    no asyncio program, a forwarder stands before it. `loop`: which loops they get; "": as they ask for."""

    library: str
    way: str
    loop: str
    directory: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.kind = SERVER_OF[self.library]
        self._between: list[Forwarder] = []
        self.start()
        if self.way == "shm" and self.kind in NOT_ASYNCIO:
            target = f"tcp:127.0.0.1:{self.port}"
            self._between.append(Forwarder(f"shm:{self.port}", target, name="server"))
            if self.library == "psycopg_sql":
                to = f"shm:server:{self.port}"
                self._between.append(Forwarder("tcp:127.0.0.1:0", to, name="near"))

    def start(self) -> None:
        line, says, times = COMMANDS.get(
            self.kind, (" ".join(DRIVER) + f" serve {self.library} {self.port}", "serving", 1)
        )
        words = line.split()
        if self.kind == "postgres":
            words[:1] = postgres("postgres").split()
        command = [word.format(port=self.port, dir=self.directory, empty="") for word in words]
        options = self._options
        if self.kind in NOT_ASYNCIO:
            command[0], options = installed(command[0]), None
        elif self.way == "shm":
            options = ["--listen", str(self.port), "--name", "server", "--loop", self.loop]
        self.program = Program(options, *command, env={"PYTHONPATH": str(ROOT)}, cwd=self.directory)
        self.program.wait_for(says, times)

    @property
    def _options(self) -> list[str] | None:
        return ["--loop", self.loop] if self.loop else None

    def restart(self) -> None:
        """Kill it, and start another one. Those that would leave files in /dev/shm are only stopped."""
        if self.kind in ("postgres", "uvicorn_workers", "hypercorn_h2"):
            self.end()
        self.program.close()
        self.start()

    def end(self) -> int:
        """Ask it to end, and return its exit code."""
        return self.program.stop(signal.SIGINT if self.kind in ("postgres", "nats") else signal.SIGTERM)

    def client(self, what: str, *more: str) -> Program:
        """Start the driver with the library's client."""
        library, host, port, options = self.library.partition("/")[0], "127.0.0.1", self.port, self._options
        if self.library == "psycopg_sql" and self._between:
            port = self._between[-1].port
        elif self.way == "shm":
            host, options = "server.shm", ["--name", "client", "--loop", self.loop]
        env = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default::ResourceWarning"}
        if self.kind == "hypercorn_h2" or what == "more":
            env["TEST_CA"] = str(self.directory / "ca.pem")
        return Program(options, *DRIVER, what, library, host, str(port), *more, env=env, cwd=self.directory)

    def stop(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.program.close)
            if self.program.process.poll() is None:
                stack.callback(self.end)
            for forwarder in self._between:
                stack.callback(forwarder.stop)


def postgres(command: str) -> str:
    """How to run a command of PostgreSQL, whose server refuses root."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{command}"))
    if not found:
        pytest.skip("postgresql is not installed")
    user = "setpriv --reuid=postgres --regid=postgres --clear-groups " if os.geteuid() == 0 else ""
    return f"{user}{found[-1]}"


@contextlib.contextmanager
def directory_of(kind: str) -> Iterator[Path]:
    """A directory that the server may use, with what it needs in it."""
    with tempfile.TemporaryDirectory(prefix="shmsock-apps-") as name:
        path = Path(name)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(path / "ca.pem"))
        made = authority.issue_cert("server.shm", "127.0.0.1", "localhost")
        made.private_key_pem.write_to_path(str(path / "server.key"))
        for number, pem in enumerate(made.cert_chain_pems):
            pem.write_to_path(str(path / "server.pem"), append=number > 0)
        (path / "hypercorn.toml").write_text("keep_alive_max_requests = 1000000\n")
        (path / "nats.conf").write_text("max_payload: 16MB\nmax_pending: 64MB\n")
        if kind == "postgres":
            make_cluster(path)
        yield path


@contextlib.contextmanager
def service(library: str, way: str, loop: str) -> Iterator[Service]:
    """Run a library's server in a directory of its own."""
    with directory_of(SERVER_OF[library]) as directory:
        made = Service(library, way, loop, directory)
        try:
            yield made
        finally:
            made.stop()


def make_cluster(path: Path) -> None:
    """A cluster of PostgreSQL that asks for a password, and knows TLS."""
    initdb = postgres("initdb")
    (path / "password").write_text("secret")
    (path / "server.key").chmod(0o600)
    if os.geteuid() == 0:
        for one in (path, *path.iterdir()):
            shutil.chown(one, "postgres", "postgres")
    initdb = f"{initdb} -D {path}/data -U tester -A scram-sha-256 --pwfile={path}/password -N"
    subprocess.run(initdb.split(), check=True, stdout=subprocess.DEVNULL, cwd=path)
    with open(path / "data/postgresql.conf", "a") as config:
        config.write(f"ssl = on\nssl_cert_file = '{path}/server.pem'\nssl_key_file = '{path}/server.key'\n")


__all__ = ["DRIVER", "SERVER_OF", "Service", "service"]
