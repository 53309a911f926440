"""The manual page, made from the help of all commands: share/man/man1/shmsock.1."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator

import click

__all__ = ["manual", "walk"]

_HEAD = r""".\" Made from the help of the commands by `make docs`.
.TH SHMSOCK 1 "" shmsock "User Commands"
.nh
.ad l
.SH NAME
shmsock \- sockets for asyncio over the shared memory of virtual machines
.SH SYNOPSIS
.B shmsock
.RI [ OPTIONS ]
.I COMMAND
.RI [ ARGS ...]
.SH DESCRIPTION
"""
_STATUS = (
    "0: done; 1: it failed, and a line on stderr says why; 2: wrong usage; 130: interrupted.",
    "doctor: 1 where it finds an error; warnings and notes leave it 0.",
    "ping: 0 only if every peer of that name answered.",
    "run: that of the program; 126: it cannot be started; 127: there is no such command.",
)


def walk(cli: click.Command) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield a command and all below it, each with the context in which its help is made."""
    return _below(cli, click.Context(cli, info_name="shmsock", terminal_width=80, **cli.context_settings))


def _below(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    yield command, context
    if not isinstance(command, click.Group):
        return
    for name in command.list_commands(context):
        sub = command.get_command(context, name)
        assert sub is not None
        own = click.Context(sub, info_name=name, parent=context, **sub.context_settings)
        yield from _below(sub, own)


def manual(cli: click.Command, environment: Iterable[tuple[str, str]]) -> str:
    """Write the page; `environment` has names of variables, and what they are for."""
    lines = [_HEAD.rstrip("\n")]
    section = ""
    for command, context in walk(cli):
        if command is not cli:
            lines += [".SH COMMANDS"] * (not section)
            lines += [f'.SS "{_quoted(_usage(command, context))}"']
            section = "COMMANDS"
        lines += _text(command.help or "")
        if command is cli:
            lines += [".SH OPTIONS"]
        for param in command.get_params(context):
            if (record := param.get_help_record(context)) and record[1]:
                lines += [".TP", rf"\fB{_quoted(record[0])}\fR", _quoted(record[1])]
        lines += _epilog(command, context)
    lines += [".SH ENVIRONMENT"]
    for name, what in environment:
        lines += [".TP", rf"\fB{_quoted(name)}\fR", _quoted(what)]
    lines += [".SH EXIT STATUS", *map(_quoted, _STATUS)]
    lines += [".SH SEE ALSO", ".BR qemu (1),", ".BR virsh (1),", ".BR systemd.unit (5)"]
    return "\n".join(lines) + "\n"


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def _text(help: str) -> Iterator[str]:
    """Paragraphs; what stands behind \\b keeps its lines."""
    for number, paragraph in enumerate(inspect.cleandoc(help).split("\n\n")):
        if number:
            yield ".PP"
        if paragraph.startswith("\b"):
            yield from (".nf", *map(_quoted, paragraph.splitlines()[1:]), ".fi")
        else:
            yield _quoted(" ".join(paragraph.split()))


def _epilog(command: click.Command, context: click.Context) -> Iterator[str]:
    formatter = click.HelpFormatter(width=80)
    command.format_epilog(context, formatter)
    if text := formatter.getvalue().strip():
        yield from (".PP", ".nf", *map(_quoted, text.splitlines()), ".fi")


def _quoted(text: str) -> str:
    """Text as roff wants it."""
    text = re.sub(r"\s+$", "", text).replace("\\", r"\e").replace("-", r"\-").replace('"', r"\(dq")
    return re.sub(r"^([.'])", r"\\&\1", text)
