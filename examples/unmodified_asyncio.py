"""A program that knows nothing of shmsock, on a loop that does: python unmodified_asyncio.py HOST

HOST localhost.shm is this machine through shared memory, 127.0.0.1 the same through TCP.
"""

import asyncio
import sys

import shmsock

# ---- the program


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(line.upper())
        await writer.drain()
    writer.close()


async def main(host: str) -> None:
    server = await asyncio.start_server(shout, host, 0)
    reader, writer = await asyncio.open_connection(host, server.sockets[0].getsockname()[1])
    writer.write(b"hello\n")
    print((await reader.readline()).decode().strip(), "from", writer.get_extra_info("peername")[0])
    writer.close()
    await writer.wait_closed()
    server.close()


# ---- how it is started (asyncio.Runner and uvloop.run take the factory as loop_factory=)

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    loop = shmsock.loop_factory()()
    try:
        loop.run_until_complete(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as problem:
        sys.exit(f"unmodified_asyncio: {problem}")
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
