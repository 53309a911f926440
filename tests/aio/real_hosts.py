"""Hosts at addresses that proxies make up for real ones, in a network namespace of its own: run by
test_no_packets.py as `unshare --net python -m tests.aio.real_hosts LOOP`. Says whom it reached."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import uvloop

import shmsock

HOSTS = ["198.18.0.1", "198.19.255.254"]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """With the address that was connected to."""
    await reader.readline()
    writer.write(writer.get_extra_info("sockname")[0].encode())
    writer.close()


async def wrong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"a peer")
    writer.close()


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with (
        await asyncio.start_server(wrong, "*.shm", 8080),
        await asyncio.start_server(answer, "0.0.0.0", 8080),
    ):
        for host in HOSTS:
            reader, writer = await asyncio.open_connection(host, 8080)
            writer.write(b"password\n")
            print((await reader.read()).decode(), flush=True)
            writer.close()
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, 8080))
                await loop.sock_sendall(sock, b"password\n")
                print((await loop.sock_recv(sock, 100)).decode(), flush=True)


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for host in HOSTS:
        subprocess.run(["ip", "addr", "add", f"{host}/32", "dev", "lo"], check=True)
    made = shmsock.loop_factory(uvloop.Loop if sys.argv[1] == "uvloop" else None)()
    made.run_until_complete(main())
    made.run_until_complete(made.shutdown_asyncgens())
    made.close()
