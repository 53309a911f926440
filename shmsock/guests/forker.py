"""Runs Python programs in forks of one process that has imported what they need.

Starting Python and importing shmsock takes seconds where a guest is emulated; a fork takes milliseconds. Run
by file path (``python forker.py FD MODULE...``) by `agent`, which is process 1 of a guest: FD is a socket of
type SOCK_SEQPACKET. A request is a JSON object (argv, env, cwd) with three descriptors, which become the
program's standard input, output and error; the answer is its process id. The program is no child of this
process: its parent has ended, so process 1 inherits it and learns how it ends. End of file ends this process.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import runpy
import socket
import sys
import types
from pathlib import Path
from typing import Any

_REQUEST = 1 << 17


def main() -> None:
    """Import the modules, and fork for every request; the forks run their programs."""
    del sys.path[0]  # the folder of this file
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    if argv := _serve(connection):
        _run(argv)


def _serve(connection: socket.socket) -> list[str]:
    """Fork for every request. Returns in each fork, with what it shall run, and [] at the end of file."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, _REQUEST, 3)
        if not message:
            return []
        if not (middle := os.fork()):
            program = os.fork()
            if program:  # ends at once, and leaves the program to process 1
                connection.send(str(program).encode())
                os._exit(0)
            connection.close()
            gc.unfreeze()  # its collections see all, as in a process of its own
            return _become(json.loads(message), files)
        os.waitpid(middle, 0)
        for file in files:
            os.close(file)


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Take on the session, files, environment and folder that the request names; return its arguments."""
    os.setsid()
    for target, descriptor in enumerate(files):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    for number, name in (1, "stdout"), (2, "stderr"):  # unbuffered, as PYTHONUNBUFFERED has them
        file: Any = io.FileIO(number, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(file, write_through=True))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    argv: list[str] = request["argv"]
    return argv


def _run(argv: list[str]) -> None:
    """Do what ``python argv...`` does, with a file, ``-c code`` or ``-m module``."""
    option, *rest = argv
    if option == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        sys.modules["__main__"] = program = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), program.__dict__)
    elif option == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = argv, [str(Path(option).parent)]
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    main()
