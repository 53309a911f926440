"""Nodes of several threads of a process, each with a loop of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import closing

from shmsock import attach, open_connection, start_server

THREADS, EACH = 8, 4000 if os.environ.get("SHMSOCK_LONG") else 125
PATIENCE_S = 100


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        writer.write(data)
        await writer.drain()
    writer.close()


def test_nodes_of_threads_talk_crosswise(region: str) -> None:
    """They open and close connections to each other at once; without a GIL, in parallel."""
    together = threading.Barrier(THREADS)
    done: list[int] = []

    async def main(me: int) -> None:
        with closing(await attach(region, name=f"thread-{me}")) as node:
            async with await start_server(echo, port=7000, node=node):
                await asyncio.to_thread(together.wait, PATIENCE_S)
                for n in range(EACH):
                    host = f"thread-{(me + n) % THREADS}"
                    reader, writer = await open_connection(host, 7000, node=node)
                    data = os.urandom(1 + n * 37 % 3000)
                    writer.write(data)
                    assert await reader.readexactly(len(data)) == data
                    writer.close()
                    await writer.wait_closed()
                await asyncio.to_thread(together.wait, PATIENCE_S)
            assert node.statistics()["healed"] == 0
        done.append(me)

    def run(me: int) -> None:
        try:
            asyncio.run(main(me))
        finally:
            if me not in done:
                together.abort()

    threads = [threading.Thread(target=run, args=(me,)) for me in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(THREADS))
