"""A process whose ring of a peer waits in write(2), until its test lets it go on: what the test does to the
eventfd meanwhile comes after the look that found room in it. `python -m tests.aio.stuck URL FD THREAD HOW`

FD is a socket, for the descriptor by which the kernel tells of that write: seccomp_unotify(2). THREAD is one
that another thread echoes, as long as it can run. HOW says what rings: "write", or "read", which makes space.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import platform
import select
import socket
import struct
import sys
import threading

import shmsock
from tests.aio.conftest import until
from tests.aio.test_doorbells import nodes, ping

WRITE, SECCOMP = {"x86_64": (1, 317), "aarch64": (64, 277)}[platform.machine()]
NO_NEW_PRIVS = 38
SET_MODE_FILTER, NEW_LISTENER = 1, 8
ALLOW, USER_NOTIF = 0x7FFF0000, 0x7FC00000
NOTIF_RECV, NOTIF_SEND, CONTINUE = 0xC0502100, 0xC0182101, 1
LOAD, IF_EQUAL, RETURN = 0x20, 0x15, 0x06


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def hold_writes(fd: int) -> int:
    """From here on this thread's writes to `fd` wait. Returns the descriptor that tells of them."""
    steps = [
        (LOAD, 0, 0, 0),  # the number of the call
        (IF_EQUAL, 0, 3, WRITE),
        (LOAD, 0, 0, 16),  # its first argument
        (IF_EQUAL, 0, 1, fd),
        (RETURN, 0, 0, USER_NOTIF),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    program = Program(len(steps), code)
    listener: int = libc.syscall(SECCOMP, SET_MODE_FILTER, NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def held(listener: int, seconds: float) -> int | None:
    """The next write that waits; None: none came in that time."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    if not any(event & select.POLLIN for _, event in poll.poll(seconds * 1000)):
        return None
    number: int = struct.unpack_from("=Q", fcntl.ioctl(listener, NOTIF_RECV, bytes(80)))[0]
    return number


def echoes(channel: socket.socket) -> None:
    with channel:
        while data := channel.recv(16):
            channel.send(data)


def let_go(listener: int, number: int) -> None:
    """That write goes on as if nothing had been."""
    fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", number, 0, 0, CONTINUE))


MUCH = 4 << 20


async def fills(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """More than any ring holds: it waits for space, and its node sleeps meanwhile."""
    writer.write(bytes(MUCH))
    await writer.drain()
    writer.close()


async def main(url: str, channel: socket.socket, how: str) -> None:
    async with nodes(url) as ends:
        await ends.are_woken_by("doorbell", "doorbell")
        async with ends.connection() as (reader, writer):
            await ping(reader, writer)
            await shmsock.start_server(fills, None, 7001, node=ends.b)
            much, end = await shmsock.open_connection("b", 7001, node=ends.a)
            sleeping = ends.b.engine.layout.section(ends.b.section) + 0x80
            await until(
                lambda: ends.b.engine.memory.load(sleeping) & 1 and ends.b.statistics()["accepted"] == 2
            )
            reach = ends.a.region.doorbell.reach(ends.b.region.doorbell.id)
            listener = hold_writes(reach.fd)
            socket.send_fds(channel, [b"held"], [listener])
            os.close(listener)
            for action in how, "write":
                rung = ends.a.statistics()["kicks"]
                while ends.a.statistics()["kicks"] == rung:
                    await (ping(reader, writer) if action == "write" else much.read(4096))
                channel.send(b"kicks")
            end.close()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as end:
        threading.Thread(target=echoes, args=(socket.socket(fileno=int(sys.argv[3])),), daemon=True).start()
        asyncio.run(main(sys.argv[1], end, sys.argv[4]))
