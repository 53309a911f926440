"""What runs as process 1 of a test guest: starts commands for the host over a virtio-serial port.

Run by file path (``python agent.py MARKER``) from the initramfs that `image` builds;
standard library only. The host side, `qemu`, imports the framing below from here.

The wire. The agent sends the raw marker, the host answers with the same marker, and frames follow both
ways: two big-endian 32-bit lengths, a JSON object, bytes. What comes before the marker is thrown away on
both sides: after a reset of the machine the stream may hold half a frame of the life before.

====== ======== =================================================================================
from   op       meaning
====== ======== =================================================================================
host   config   hostname, env, modules, net: prepare the guest; answered by ``ready`` or ``failed``
host   spawn    id, argv, env, cwd: start a command in its own session. With ``modules`` it is a Python
                program, and a fork of a process that has imported these (`forker`)
host   stdin    id, bytes; no bytes: end of file
host   signal   id, number: to the command's process group
agent  output   id, stream (``stdout`` or ``stderr``), bytes
agent  exit     id, code: the exit status, negative for a signal
====== ======== =================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO, Any

PORT = "shmsock.agent"
_LENGTHS = struct.Struct(">II")
_CHUNK = 1 << 16
_REQUEST = 1 << 17  # bytes that a forker takes (forker.py)
_LAST_WORDS = 16  # chunks read when a command has ended: a child with its pipe might never stop writing


def pack(head: dict[str, Any], body: bytes = b"") -> bytes:
    """Build one frame."""
    text = json.dumps(head).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


def unpack(buffer: bytearray) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Take every whole frame off the front of `buffer`."""
    while len(buffer) >= _LENGTHS.size:
        head, body = _LENGTHS.unpack_from(buffer)
        start, end = _LENGTHS.size + head, _LENGTHS.size + head + body
        if len(buffer) < end:
            return
        frame = json.loads(bytes(buffer[_LENGTHS.size : start])), bytes(buffer[start:end])
        del buffer[:end]
        yield frame


class _Command:
    """One process the host asked for; its three pipes are unbuffered and never block."""

    def __init__(self, ident: int, pid: int, stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.ident = ident
        self.pid = pid
        self.input = bytearray()  # not yet accepted by the pipe
        self.end_of_input = False
        self.stdin = stdin
        self.outputs = {"stdout": stdout, "stderr": stderr}
        for pipe in (stdin, stdout, stderr):
            os.set_blocking(pipe.fileno(), False)


class _Forker:
    """A process that has imported some modules, and its fork for every program that wants them."""

    def __init__(self, modules: Sequence[str], env: dict[str, str]) -> None:
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).with_name("forker.py"))
        with other:
            argv = [sys.executable, script, str(other.fileno()), *modules]
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                env=env,
                cwd="/",
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def start(self, argv: Sequence[str], env: dict[str, str], cwd: str) -> tuple[int, list[Any]]:
        """Returns the program's process id and the other ends of its standard files."""
        request = json.dumps({"argv": argv, "env": env, "cwd": cwd}).encode()
        if len(request) > _REQUEST:
            raise OSError(f"arguments and environment take {len(request)} bytes, expected at most {_REQUEST}")
        (stdin, input), (output, stdout), (errors, stderr) = os.pipe(), os.pipe(), os.pipe()
        try:
            socket.send_fds(self._connection, [request], [stdin, stdout, stderr])
            answer = self._connection.recv(_CHUNK)
        except ConnectionError:
            answer = b""
        finally:
            for fd in stdin, stdout, stderr:
                os.close(fd)
        ends: list[Any] = [FileIO(input, "w"), FileIO(output), FileIO(errors)]
        if not answer:
            raise OSError("its modules cannot be imported; the console says why")
        return int(answer), ends


class Agent:
    """One thread, one selector: the port, the commands' pipes, and the ends of children."""

    def __init__(self, port: int, marker: bytes) -> None:
        self.port = port
        self.marker = marker
        self.received = bytearray()
        self.env: dict[str, str] = {}
        self.commands: dict[int, _Command] = {}  # by process id
        self.forkers: dict[tuple[str, ...], _Forker] = {}  # by their modules
        self.selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Greet the host and do what it says, for ever."""
        woken, waker = socket.socketpair()
        woken.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._write(self.marker)
        while self.marker not in self.received:
            self._receive()
        del self.received[: self.received.index(self.marker) + len(self.marker)]
        self._frames()
        self._watch(self.port, selectors.EVENT_READ, self._frames_from_port)
        self._watch(woken.fileno(), selectors.EVENT_READ, lambda: self._reap(woken))
        while True:
            for key, _ in self.selector.select():
                if key.fd in self.selector.get_map():  # an earlier one of this round may have closed it
                    key.data()

    def _watch(self, fd: int, events: int, call: Callable[[], None]) -> None:
        self.selector.register(fd, events, call)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.port, view) :]

    def _send(self, body: bytes = b"", **head: Any) -> None:
        self._write(pack(head, body))

    def _receive(self) -> None:
        data = os.read(self.port, _CHUNK)
        if not data:  # nobody at the other end (yet)
            time.sleep(0.02)
        self.received += data

    def _frames_from_port(self) -> None:
        self._receive()
        self._frames()

    def _frames(self) -> None:
        for head, body in unpack(self.received):
            op = head["op"]
            if op == "config":
                self._configure(head)
            elif op == "spawn":
                self._spawn(head)
            else:
                for command in [c for c in self.commands.values() if c.ident == head["id"]]:
                    if op == "signal":
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(command.pid, head["number"])
                    elif op == "stdin":
                        command.input += body
                        command.end_of_input |= not body
                        self._feed(command)

    def _configure(self, head: dict[str, Any]) -> None:
        self.env = head["env"]
        try:
            socket.sethostname(head["hostname"])
            self._tool("busybox", "ip", "link", "set", "lo", "up")
            if head["modules"]:
                self._tool("modprobe", "-a", *head["modules"])
            for card in head["net"]:
                name = _interface(card["mac"])
                self._tool("busybox", "ip", "addr", "add", card["address"], "dev", name)
                self._tool("busybox", "ip", "link", "set", name, "up")
        except (OSError, RuntimeError) as error:
            self._send(op="failed", error=str(error))
        else:
            self._send(op="ready")

    def _tool(self, *argv: str) -> None:
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr.strip()}")

    def _spawn(self, head: dict[str, Any]) -> None:
        argv, env = head["argv"], {**self.env, **head["env"]}
        try:
            if head["modules"]:
                pid, files = self._forker(tuple(head["modules"])).start(argv[1:], env, head["cwd"])
            else:
                pid, files = _start(argv, env, head["cwd"])
        except (OSError, ValueError) as error:
            self._send(
                f"cannot start {argv}: {error}\n".encode(), op="output", id=head["id"], stream="stderr"
            )
            self._send(op="exit", id=head["id"], code=127)
            return
        command = self.commands[pid] = _Command(head["id"], pid, *files)
        for stream, file in command.outputs.items():
            self._watch(file.fileno(), selectors.EVENT_READ, partial(self._drain, command, stream, 1))

    def _forker(self, modules: tuple[str, ...]) -> _Forker:
        if modules not in self.forkers:
            self.forkers[modules] = _Forker(modules, self.env)
        return self.forkers[modules]

    def _drain(self, command: _Command, stream: str, chunks: int) -> None:
        file = command.outputs[stream]
        for _ in range(chunks):
            try:
                data = os.read(file.fileno(), _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self._close(file)
                return
            self._send(data, op="output", id=command.ident, stream=stream)

    def _feed(self, command: _Command) -> None:
        if command.stdin.closed:
            return
        fd = command.stdin.fileno()
        watched = fd in self.selector.get_map()
        try:
            while command.input:
                del command.input[: os.write(fd, command.input[:_CHUNK])]
        except BlockingIOError:
            if not watched:
                self._watch(fd, selectors.EVENT_WRITE, lambda: self._feed(command))
            return
        except OSError:  # it does not read any more
            command.input.clear()
            command.end_of_input = True
        if command.end_of_input:
            self._close(command.stdin)
        elif watched:
            self.selector.unregister(fd)

    def _close(self, file: Any) -> None:
        if not file.closed:
            with contextlib.suppress(KeyError):
                self.selector.unregister(file.fileno())
            file.close()

    def _reap(self, woken: socket.socket) -> None:
        """Collect every dead child: the host's commands, and the orphans that process 1 inherits."""
        with contextlib.suppress(BlockingIOError):
            while woken.recv(_CHUNK):
                pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            command = self.commands.pop(pid, None)
            if command is None:
                continue
            self._close(command.stdin)
            for stream, file in command.outputs.items():
                if not file.closed:  # stays watched: a grandchild may go on writing
                    self._drain(command, stream, _LAST_WORDS)
            self._send(op="exit", id=command.ident, code=os.waitstatus_to_exitcode(status))


def _start(argv: Sequence[str], env: dict[str, str], cwd: str) -> tuple[int, list[Any]]:
    """Start a program; returns its process id and the other ends of its standard files."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=env, cwd=cwd, start_new_session=True
    )
    process.returncode = 0  # it is waited for by its process id
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.pid, [process.stdin, process.stdout, process.stderr]


def _interface(mac: str) -> str:
    """Name the network interface with this address, once its driver has made it."""
    for _ in range(100):
        for path in Path("/sys/class/net").iterdir():
            if (path / "address").read_text().strip() == mac:
                return path.name
        time.sleep(0.05)
    raise RuntimeError(f"no network interface has the address {mac}")


def _open_port() -> int:
    for _ in range(500):
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                return os.open(f"/dev/{name.parent.name}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.02)
    raise RuntimeError(f"no virtio-serial port is called {PORT}")


def main() -> None:
    """Serve until the machine goes. The end of process 1 is a kernel panic, and that is the end of QEMU."""
    try:
        Agent(_open_port(), bytes.fromhex(sys.argv[1])).serve()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        time.sleep(0.5)  # the serial line
        raise


if __name__ == "__main__":
    main()
