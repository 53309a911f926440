"""A small client of QEMU's monitor protocol (QMP): one command at a time, and waiting for events."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

SECONDS = 20.0


class MonitorError(RuntimeError):
    """QEMU refused a command, did not answer, or is gone."""


class Monitor:
    """Speaks QMP over a connected socket; the greeting is awaited at the first command. Thread-safe."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._events: list[str] = []
        self._greeted = False
        self._lock = threading.Lock()

    def run(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer; underscores in argument names stand for dashes."""
        deadline = time.monotonic() + SECONDS
        with self._lock:
            if not self._greeted:
                while "QMP" not in self._message(deadline, command):
                    pass
                self._exchange("qmp_capabilities", {}, deadline)
                self._greeted = True
            self._events.clear()
            names = {name.replace("_", "-"): value for name, value in arguments.items()}
            return self._exchange(command, names, deadline)

    def wait_event(self, name: str, timeout: float = SECONDS) -> None:
        """Wait for an event that the last command caused."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while name not in self._events:
                message = self._message(deadline, f"event {name}")
                self._events.append(message.get("event", ""))

    def close(self) -> None:
        self._connection.close()

    def _exchange(self, command: str, arguments: dict[str, Any], deadline: float) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        try:
            self._connection.sendall(request + b"\n")
        except OSError as error:
            raise MonitorError(f"{command}: QEMU is gone ({error})") from error
        while True:
            message = self._message(deadline, command)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise MonitorError(f"{command}: {message['error']['desc']}")
            self._events.append(message.get("event", ""))

    def _message(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._connection.recv(1 << 16)
            except TimeoutError as error:
                raise MonitorError(f"{what}: no answer from QEMU") from error
            except OSError as error:
                raise MonitorError(f"{what}: QEMU is gone ({error})") from error
            if not data:
                raise MonitorError(f"{what}: QEMU is gone")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
