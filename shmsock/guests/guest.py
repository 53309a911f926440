"""One test guest and the commands in it: the host's end of what `agent` does in the guest.

`qemu` makes guests; all that is known here of QEMU's arguments is what connects it to this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmsock.guests import agent as guest_agent
from shmsock.guests.image import ROOT_TAG, command_path
from shmsock.guests.qmp import Monitor, MonitorError

_KILL_SECONDS = 10.0  # for a killed command to be reported gone, which under emulation and load takes a while
_SERIAL_LINES = 60
_spawner = ThreadPoolExecutor(1, "shmsock-spawn")


class GuestError(RuntimeError):
    """Something went wrong with a guest or with a command in it."""


class GuestDied(GuestError):
    """The guest did not boot, ended, or was reset, while it was needed. Carries the end of its serial log."""


class CommandFailed(GuestError):
    """A command ended otherwise than wanted. Carries its output."""


class CommandTimeout(GuestError, TimeoutError):
    """A command (or a line of its output) did not come in time. Carries its output so far."""


@dataclass(frozen=True)
class Result:
    """How a command ended; `returncode` is negative for a signal, as in `subprocess`."""

    args: Sequence[str]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """What it wrote to stdout, decoded and stripped."""
        return self.stdout.decode(errors="replace").strip()


class Command:
    """A command running in a guest; made by `Guest.start`. Leaving its ``with`` block kills it."""

    def __init__(self, guest: Guest, ident: int, args: Sequence[str]) -> None:
        self.guest = guest
        self.args = list(args)
        self.returncode: int | None = None
        self._ident = ident
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._read = 0  # how much of stdout readline() gave out
        self._lost = ""  # why no more will be heard of it

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running and self.guest.alive:
            self.kill()
            with contextlib.suppress(GuestError):  # a guest that hangs: what went before says more
                self.wait(0 if self.guest.paused else _KILL_SECONDS)

    def __repr__(self) -> str:
        state = "running" if self.running else self._lost or f"exit status {self.returncode}"
        return f"<Command {self.args} in {self.guest.name}: {state}>"

    @property
    def running(self) -> bool:
        return self.returncode is None and not self._lost

    @property
    def stdout(self) -> bytes:
        """All it wrote to stdout so far."""
        with self.guest._changed:
            return bytes(self._output["stdout"])

    @property
    def stderr(self) -> bytes:
        """All it wrote to stderr so far."""
        with self.guest._changed:
            return bytes(self._output["stderr"])

    def wait(self, timeout: float = 60.0, *, check: bool = False) -> Result:
        """Wait for its end. `check`: raise `CommandFailed` unless the exit status is 0."""
        if not self.guest._wait_for(lambda: not self.running, timeout):
            raise CommandTimeout(self._story(f"still running after {timeout:g} s"))
        if self.returncode is None:
            raise GuestDied(self.guest._story(f"{self._lost} while running {self.args}"))
        if check and self.returncode:
            raise CommandFailed(self._story(f"exit status {self.returncode}"))
        return Result(self.args, self.returncode, self.stdout, self.stderr)

    def readline(self, timeout: float = 30.0) -> str:
        """The next line of its stdout, without the newline. `CommandFailed` if it ended and there is none."""
        out = self._output["stdout"]

        def complete() -> bool:
            return out.find(b"\n", self._read) >= 0 or not self.running

        if not self.guest._wait_for(complete, timeout):
            raise CommandTimeout(self._story(f"no line on stdout within {timeout:g} s"))
        with self.guest._changed:
            end = out.find(b"\n", self._read)
            line = bytes(out[self._read :] if end < 0 else out[self._read : end])
            self._read = len(out) if end < 0 else end + 1
        if end < 0 and not line:
            self.wait(0)  # raises if the guest died
            raise CommandFailed(self._story(f"ended with exit status {self.returncode}, and no line is left"))
        return line.decode(errors="replace")

    def expect(self, text: str, timeout: float = 30.0) -> str:
        """Read lines of stdout until one contains `text`; returns that one."""
        deadline = time.monotonic() + timeout
        while text not in (line := self.readline(max(0.0, deadline - time.monotonic()))):
            pass
        return line

    def send(self, data: bytes) -> None:
        """Write to its stdin."""
        for start in range(0, len(data), 1 << 20):
            self.guest._send(data[start : start + (1 << 20)], op="stdin", id=self._ident)

    def close_stdin(self) -> None:
        """End its stdin."""
        self.guest._send(op="stdin", id=self._ident)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command and to what it started (its process group)."""
        self.guest._send(op="signal", id=self._ident, number=int(number))

    def _story(self, what: str) -> str:
        parts = [f"{self.args} in {self.guest.name}: {what}"]
        for name, data in ("stdout", self.stdout), ("stderr", self.stderr):
            if data:
                parts.append(f"--- {name}\n{data.decode(errors='replace').rstrip()}")
        return "\n".join(parts)


class Guest:
    """One virtual machine; made by `Fleet.boot`, and booting when you get it."""

    def __init__(
        self, name: str, accel: str, boot_timeout: float, config: dict[str, Any], marker: bytes, stem: Path
    ) -> None:
        self.name = name
        self.accel = accel
        self.boot_timeout = boot_timeout
        self.serial_log = stem.with_suffix(".serial.log")
        self.qemu_log = stem.with_suffix(".qemu.log")
        self.paused = False
        self.process: subprocess.Popen[bytes]
        self._stem = stem
        self._config = config
        self._marker = marker
        self._changed = threading.Condition()  # guards all below, and the commands' state
        self._state = "booting"  # then "ready"; anything else tells why not
        self._in_step = False  # past the marker
        self._running: dict[int, Command] = {}
        self._ended: weakref.WeakValueDictionary[int, Command] = weakref.WeakValueDictionary()
        self._last_id = 0
        self._sending = threading.Lock()

    def __repr__(self) -> str:
        return f"<Guest {self.name} ({self.accel}): {self._state}>"

    # -- commands

    def run(
        self,
        args: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str = "/tmp",
        input: bytes = b"",
        check: bool = True,
        modules: Sequence[str] = (),
    ) -> Result:
        """Run a command to its end. A program called "python" is this interpreter.

        Raises `CommandFailed` unless it exits with 0 (or ``check=False``); `CommandTimeout`, after killing
        it, when it takes longer than `timeout`; `GuestDied` when the guest does.
        """
        with self.start(args, env=env, cwd=cwd, modules=modules) as command:
            if input:
                command.send(input)
            command.close_stdin()
            return command.wait(timeout, check=check)

    def start(
        self,
        args: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/tmp",
        modules: Sequence[str] = (),
    ) -> Command:
        """Start a command; its stdin is a pipe that stays open. `env` adds to the guest's environment.

        `modules`, for a Python program: one process of the guest imports these once, and each program that
        names the same is a fork of it; under emulation that saves seconds.
        """
        self.wait_ready()
        argv = [os.fspath(arg) for arg in args]
        with self._changed:
            self._last_id += 1
            command = self._running[self._last_id] = Command(self, self._last_id, argv)
        self._send(
            op="spawn", id=command._ident, argv=argv, env=dict(env or {}), cwd=cwd, modules=list(modules)
        )
        return command

    def kill_commands(self) -> None:
        """Kill every command still running; for guests that several tests share."""
        with self._changed:
            running = list(self._running.values())
        for command in running:
            command.kill()
        for command in running:
            command.wait(_KILL_SECONDS)

    # -- the machine

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self.process.poll() is None

    def wait_ready(self, timeout: float | None = None) -> Guest:
        """Wait until the guest takes commands; everything that needs it does that by itself."""
        timeout = self.boot_timeout if timeout is None else timeout
        if not self._wait_for(lambda: self._state != "booting", timeout):
            raise GuestDied(self._story(f"{self.name} did not boot within {timeout:g} s"))
        if self._state != "ready":
            raise GuestDied(self._story(f"{self.name}: {self._state}"))
        return self

    def kill(self) -> None:
        """SIGKILL to QEMU: the machine is gone without a last word. The name may be booted again."""
        self.process.kill()
        self.process.wait()
        self._reader.join()  # the port is at its end now
        self._port.close()
        self.monitor.close()
        self._server.kill()
        self._server.wait()

    def reset(self) -> None:
        """Press the reset button: commands end with `GuestDied`, the guest boots again (not waited for)."""
        self.wait_ready()
        with self._changed:
            self._state, self._in_step = "booting", False
            self._lose_commands("the guest was reset")
        self.monitor.run("set-action", reboot="reset")
        self.monitor.run("system_reset")
        self.monitor.wait_event("RESET")  # the firmware does another one: _greet() sets the action back

    def stop(self) -> None:
        """Pause the machine: its processors stand still, its memory stays mapped."""
        self.monitor.run("stop")
        self.paused = True

    def cont(self) -> None:
        """Let a stopped machine go on."""
        self.monitor.run("cont")
        self.paused = False

    def serial(self, lines: int | None = None) -> str:
        """The guest's console, or the last lines of it."""
        text = self.serial_log.read_text(errors="replace") if self.serial_log.exists() else ""
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    def report(self) -> str:
        """What one wants to see when a test failed: state, QEMU's words, the serial log."""
        return self._story(repr(self))

    def _story(self, what: str) -> str:
        parts = [what]
        if words := self.qemu_log.read_text(errors="replace").strip():
            parts.append(f"--- QEMU said\n{words}")
        parts.append(f"--- end of the serial log of {self.name}\n{self.serial(_SERIAL_LINES) or '(empty)'}")
        return "\n".join(parts)

    # -- the port to the agent

    def _boot(self, argv: Sequence[str], filesystem: Sequence[str]) -> None:
        path = str(self._stem.with_suffix(".fs"))
        self._port, port = socket.socketpair()
        control, monitor = socket.socketpair()
        self.monitor = Monitor(control)
        command = [
            *argv,
            *("-chardev", f"socket,id=fs,path={path}"),
            *("-device", f"vhost-user-fs-pci,chardev=fs,tag={ROOT_TAG}"),
            *("-chardev", f"socket,id=agent,fd={port.fileno()}", "-device", "virtio-serial-pci"),
            *("-device", f"virtserialport,chardev=agent,name={guest_agent.PORT}"),
            *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-serial", f"file:{self.serial_log}"),
        ]
        with port, monitor, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)  # here, not in the server: QEMU can connect at once
            listener.listen(1)
            serve = [*filesystem, f"--fd={listener.fileno()}"]
            self._server = _spawn(serve, self._stem.with_suffix(".fs.log"), [listener.fileno()])
            try:
                self.process = _spawn(command, self.qemu_log, [port.fileno(), monitor.fileno()])
            except BaseException:
                self._server.kill()
                self._server.wait()
                raise
        self._reader = threading.Thread(target=self._read, name=f"shmsock-{self.name}", daemon=True)
        self._reader.start()

    def _wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(predicate, timeout)

    def _send(self, body: bytes = b"", **head: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # a dead guest is noticed by the reader
            self._port.sendall(guest_agent.pack(head, body))

    def _read(self) -> None:
        received = bytearray()
        while True:
            try:
                data = self._port.recv(1 << 20)
            except OSError:
                data = b""
            if not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)
            with self._changed:
                received += data
                if not data:
                    self._state = f"QEMU ended with status {self.process.poll()}"
                    self._lose_commands("the guest died")
                elif not self._in_step:
                    self._find_marker(received)
                if self._in_step:
                    for head, body in guest_agent.unpack(received):
                        self._handle(head, body)
                self._changed.notify_all()
            if not data:
                return

    def _find_marker(self, received: bytearray) -> None:
        """Skip, after a boot or a reset, to where the agent begins, and answer it (see `agent`)."""
        before, marker, after = bytes(received).partition(self._marker)
        if marker:
            received[:] = after
            self._in_step = True
            hello = self._marker + guest_agent.pack({"op": "config", **self._config})
            threading.Thread(target=self._greet, args=(hello,), daemon=True).start()
        else:
            received[:] = before[-len(self._marker) :]

    def _greet(self, hello: bytes) -> None:
        """Answer in a thread of its own: a sender of the life before may still fill the socket."""
        with contextlib.suppress(OSError, MonitorError):
            self.monitor.run("set-action", reboot="shutdown")  # a panic ends QEMU again
            with self._sending:
                self._port.sendall(hello)

    def _handle(self, head: dict[str, Any], body: bytes) -> None:
        ident = head.get("id", 0)
        command = self._running.get(ident) or self._ended.get(ident)
        match head["op"]:
            case "ready":
                self._state = "ready"
            case "failed":
                self._state = f"preparing it failed: {head['error']}"
            case "output" if command:
                command._output[head["stream"]] += body
            case "exit" if command:
                command.returncode = head["code"]
                self._ended[ident] = self._running.pop(ident)  # children of it may still write

    def _lose_commands(self, why: str) -> None:
        for command in self._running.values():
            command._lost = why
        self._running.clear()
        self._changed.notify_all()


def _spawn(argv: Sequence[str], output: Path, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a program that dies with this process: of SIGKILL, by PR_SET_PDEATHSIG.

    That signal comes when the *thread* that started the program ends, so one thread starts them all. It is
    set by setpriv, not in a preexec_fn, which is unsafe with threads about.
    """
    program = command_path(argv[0]) or argv[0]
    with output.open("ab") as file:
        return _spawner.submit(
            lambda: subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                start_new_session=True,
            )
        ).result()
