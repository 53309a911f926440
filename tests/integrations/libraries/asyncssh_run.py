"""asyncssh: commands, and files over SFTP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh

BODY = 10 << 20


class Open(asyncssh.SSHServer):
    """Asks for no password."""

    def begin_auth(self, username: str) -> bool:
        return False


async def echo(process: Any) -> None:
    process.stdout.write(await process.stdin.read())
    process.exit(0)


@asynccontextmanager
async def server(port: int) -> AsyncIterator[None]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    async with asyncssh.listen(
        "127.0.0.1",
        port,
        server_factory=Open,
        server_host_keys=[key],
        process_factory=echo,
        sftp_factory=True,
        encoding=None,
    ):
        yield


def connect(host: str, port: int) -> Any:
    return asyncssh.connect(host, port, username="tester", known_hosts=None, config=None, client_keys=None)


@asynccontextmanager
async def client(host: str, port: int) -> AsyncIterator[Any]:
    connection = await connect(host, port)

    async def ask(data: bytes) -> bytes:
        nonlocal connection
        if connection.is_closed():
            connection = await connect(host, port)
        done = await connection.run("echo", input=data, encoding=None, check=True)
        answer: bytes = done.stdout
        return answer

    yield ask
    connection.close()
    await connection.wait_closed()


async def more(host: str, port: int) -> None:
    """Copies of a file by SFTP, there and back."""
    Path("sent").write_bytes(os.urandom(BODY))
    async with connect(host, port) as connection:
        async with connection.start_sftp_client() as sftp:
            await sftp.put("sent", f"{os.getcwd()}/there")
            await sftp.get(f"{os.getcwd()}/there", "back")
        assert Path("back").read_bytes() == Path("sent").read_bytes()
