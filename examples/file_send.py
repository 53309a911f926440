"""Send a file: python file_send.py FILE HOST [PORT]

write_eof() ends the file, the other direction stays open: the receiver answers with the SHA-256 of what
it got. On a terminal it shows how far it is.
"""

import asyncio
import hashlib
import os
import sys

import shmsock


async def main(path: str, host: str, port: int) -> None:
    reader, writer = await shmsock.open_connection(host, port)
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        size, shown = os.fstat(file.fileno()).st_size, -1
        while data := file.read(1 << 18):
            writer.write(data)
            await writer.drain()  # no faster than the receiver takes it
            sha.update(data)
            if sys.stderr.isatty() and size and (percent := file.tell() * 100 // size) != shown:
                shown = percent
                print(f"\r{percent} %", end="\n" if percent >= 100 else "", file=sys.stderr, flush=True)
    writer.write_eof()
    answer = await reader.readexactly(sha.digest_size)
    if answer != sha.digest():
        sys.exit(f"file_send: {path} arrived with SHA-256 {answer.hex()}, expected {sha.hexdigest()}")
    print(f"{sha.hexdigest()}  {path}")
    writer.close()
    await writer.wait_closed()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 7001))
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.IncompleteReadError:
        sys.exit("file_send: the receiver ended the connection before it had answered")
    except (OSError, ValueError, OverflowError) as problem:
        sys.exit(f"file_send: {problem}")
