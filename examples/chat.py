"""Everybody of the region in one room: python chat.py NAME

A line that is typed goes to all as a datagram; end of file (Ctrl-D) leaves the room.
"""

import asyncio
import sys
import threading

import shmsock

PORT = 7004
ALL = ("*", PORT)


class Room(asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        text = "".join(c for c in data.decode(errors="replace") if c.isprintable())  # no escape sequences
        print(f"{addr[0]}: {text}", flush=True)


async def main(name: str) -> None:
    room, _ = await shmsock.create_datagram_endpoint(Room, local_addr=(None, PORT), name=name)
    print("listening on", room.get_extra_info("sockname"), flush=True)
    loop, left = asyncio.get_running_loop(), asyncio.Event()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(room.sendto, line.rstrip("\n").encode(errors="replace"), ALL)
        loop.call_soon_threadsafe(left.set)

    room.sendto(b"(is here)", ALL)
    threading.Thread(target=read, daemon=True).start()  # so that Ctrl-C does not wait for a line
    await left.wait()
    room.sendto(b"(has left)", ALL)
    room.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as problem:
        sys.exit(f"chat: {problem}")
