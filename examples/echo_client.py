"""Send lines to an echo server and print what comes back: python echo_client.py HOST [PORT] < lines

HOST is the name of the VM, or of the host; "localhost" is this machine.
"""

import asyncio
import signal
import sys
import time

import shmsock


async def main(host: str, port: int) -> None:
    reader, writer = await shmsock.open_connection(host, port)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends the wait for a line, too
    for line in sys.stdin.buffer:
        start = time.perf_counter()
        writer.write(line)
        await writer.drain()
        back = await reader.readexactly(len(line))
        print(f"{back.decode().rstrip()}  ({(time.perf_counter() - start) * 1e6:.0f} us)")
    writer.close()
    await writer.wait_closed()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 7000))
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.IncompleteReadError:
        sys.exit("echo_client: the server ended the connection before it had answered")
    except (OSError, ValueError, OverflowError) as problem:
        sys.exit(f"echo_client: {problem}")
