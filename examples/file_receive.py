"""Take one file and store it: python file_receive.py FILE [PORT]"""

import asyncio
import hashlib
import signal
import sys

import shmsock


async def main(path: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    if task := asyncio.current_task():
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    done = loop.create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sha = hashlib.sha256()
        try:
            with open(path, "wb") as file:
                while data := await reader.read(1 << 18):
                    file.write(data)
                    sha.update(data)
            writer.write(sha.digest())
        except asyncio.CancelledError:
            pass  # Ctrl-C: Python 3.11 would print a traceback
        except OSError as problem:
            if not done.done():
                done.set_exception(problem)
        finally:
            writer.close()
        if not done.done():
            done.set_result(sha.hexdigest())

    server = await shmsock.start_server(handle, port=port)
    print("listening on {!r}, port {}".format(*server.sockets[0].getsockname()), flush=True)
    print(f"{await done}  {path}")
    server.close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 7001))
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C
        sys.exit(130)
    except (OSError, ValueError, OverflowError) as problem:
        sys.exit(f"file_receive: {problem}")
