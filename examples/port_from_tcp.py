"""A program for TCP becomes one for shared memory in two lines: python port_from_tcp.py

What was there before stands behind the two lines that are marked.
"""

import asyncio
import sys

import shmsock

HOST, PORT = "localhost", 7002


async def add(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A line of numbers in, their sum out."""
    while line := await reader.readline():
        writer.write(b"%d\n" % sum(map(int, line.split())))
        await writer.drain()
    writer.close()


async def main() -> None:
    server = await shmsock.start_server(add, HOST, PORT)  # was: asyncio.start_server(add, HOST, PORT)
    async with server:
        reader, writer = await shmsock.open_connection(HOST, PORT)  # was: asyncio.open_connection(HOST, PORT)
        for numbers in ("1 2 3", "20 22"):
            writer.write(f"{numbers}\n".encode())
            await writer.drain()
            print(f"{numbers.replace(' ', ' + ')} = {(await reader.readline()).decode().strip()}")
        writer.close()
        await writer.wait_closed()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as problem:
        sys.exit(f"port_from_tcp: {problem}")
