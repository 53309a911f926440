"""`shmsock run`: start a program whose event loops know shared memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import shmsock.run
from shmsock.commands.group import Failed
from shmsock.commands.params import attaching, check_environ
from shmsock.run.rules import LOOPS, Rules

__all__ = ["run"]

_PYTHON = re.compile(r"python[\d.]*t?")
#: Options of Python that keep the program from being reached.
_DEAF = {
    "I": "-I ignores PYTHONPATH",
    "E": "-E ignores PYTHONPATH",
    "S": "-S imports no sitecustomize",
}


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--loop", type=click.Choice(LOOPS), help="The loops that it gets; otherwise those that it asks for."
)
@click.option(
    "--listen",
    multiple=True,
    metavar="PORTS",
    help="Offer these TCP ports of the program on shared memory as well, to all peers: 8000,9000.",
)
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="ADDRESS=PEER",
    help="Connections to this address lead to that peer: 10.0.0.5=vm-b, or 10.0.0.5:8000=vm-b.",
)
@click.option(
    "--auto",
    multiple=True,
    metavar="RANGE",
    help="Connections into this range (10.0.0.0/24) lead to the peer that publishes the address and offers "
    "the port, else over TCP. Whoever maps the region can claim an address of the range.",
)
@attaching
@click.option("-m", "module", is_flag=True, help="COMMAND is a module, as for python -m.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    loop: str | None,
    listen: tuple[str, ...],
    mapped: tuple[str, ...],
    auto: tuple[str, ...],
    region: str | None,
    name: str | None,
    module: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND, an asyncio program as it is. Hosts ending in .shm are peers of the region, and what
    the options say goes through shared memory too.

    \b
      shmsock run --listen 8000 -- uvicorn app:app --workers 4
      shmsock run --map 10.0.0.5=vm-b -- python client.py
      shmsock run -- -m mymodule

    The options are passed on in the environment (SHMSOCK_LISTEN and so on), to child processes too. Python's
    -I, -E and -S keep a program from being reached; so does an interpreter without shmsock. Without a region
    to be had the program runs over TCP alone, with one warning.
    """
    given = {
        "SHMSOCK_LOOP": loop,
        "SHMSOCK_LISTEN": ",".join(listen),
        "SHMSOCK_MAP": ",".join(mapped),
        "SHMSOCK_AUTO": ",".join(auto),
        "SHMSOCK_REGION": region,
        "SHMSOCK_NAME": name,
    }
    os.environ.update({key: value for key, value in given.items() if value})
    try:
        Rules.from_environ()
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    check_environ()
    words = _as_python(command, module)
    file = shutil.which(words[0]) or shutil.which(words[0], path=os.path.dirname(sys.executable))
    if file is None:
        click.echo(f"shmsock: {words[0]}: no such command", err=True)
        sys.exit(127)
    for option in _python_options(file, words[1:]):
        if option in _DEAF:
            raise Failed(f"python {_DEAF[option]}, which is how a program is reached: leave it out")
    site = str(Path(shmsock.run.__file__).parent / "site")
    given_path = os.environ.get("PYTHONPATH")
    before = [entry for entry in given_path.split(os.pathsep) if entry != site] if given_path else []
    os.environ["PYTHONPATH"] = os.pathsep.join([site, *before])
    os.environ["SHMSOCK_RUN"] = str(os.getpid())
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and the program would inherit that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execv(file, words)
    except OSError as error:
        click.echo(f"shmsock: {file}: {error.strerror}", err=True)
        sys.exit(126)


def _as_python(command: tuple[str, ...], module: bool) -> list[str]:
    """Put the interpreter before a module and before a script that does not name one."""
    if module:
        return [sys.executable, "-m", *command]
    script = command[0].endswith(".py") and os.path.isfile(command[0])
    if command[0].startswith("-") or (script and not ("/" in command[0] and os.access(command[0], os.X_OK))):
        return [sys.executable, *command]
    return list(command)


def _python_options(file: str, args: list[str]) -> Iterator[str]:
    """Yield the one-letter options of Python that a command gives it: in its arguments, or in the first line
    of a script."""
    if not _PYTHON.fullmatch(os.path.basename(file)):
        try:
            with open(file, "rb") as script:
                line = script.readline(512)
        except OSError:
            return
        words = line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []
        at = [i for i, word in enumerate(words) if _PYTHON.fullmatch(os.path.basename(word))]
        if not at:
            return
        args = words[at[0] + 1 :]
    skip = False
    for arg in args:
        if skip:
            skip = False
            continue
        if not arg.startswith("-") or arg in ("-", "--"):
            return
        if arg.startswith("--"):
            continue
        for i, letter in enumerate(arg[1:], 2):
            if letter in "cm":
                return
            if letter in "WX":
                skip = i == len(arg)
                break
            yield letter
