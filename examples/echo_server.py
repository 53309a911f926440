"""Echo for whoever connects: python echo_server.py [PORT]

On the host the region is SHMSOCK_REGION, or your own in /dev/shm; in a guest it is the ivshmem device.
"""

import asyncio
import signal
import sys

import shmsock


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("peername")
    print(f"connection from {peer}", flush=True)
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        print(f"{peer} is gone", flush=True)
    except asyncio.CancelledError:
        pass  # Ctrl-C: Python 3.11 would print a traceback
    finally:
        writer.close()


async def main() -> None:
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    server = await shmsock.start_server(handle, port=int(sys.argv[1]) if len(sys.argv) > 1 else 7000)
    name, port = server.sockets[0].getsockname()
    print(f"listening on {name!r}, port {port}", flush=True)
    await asyncio.Event().wait()  # serve_forever() would wait for those who are connected when Ctrl-C comes


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass  # Ctrl-C
    except (OSError, ValueError, OverflowError) as problem:
        sys.exit(f"echo_server: {problem}")
