"""Datagrams: python datagrams.py serve, and from elsewhere: python datagrams.py HOST TEXT ('*' reaches all)

Counts words, as a collector of statistics would; whoever sent gets the count back.
"""

import asyncio
import sys
from collections import Counter

import shmsock

PORT = 8125


class Collector(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport, self.counts = transport, Counter[str]()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.counts[word := data.decode(errors="replace")] += 1
        self.transport.sendto(f"{word}: {self.counts[word]}".encode(), addr)


class Sender(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self.answer.done():  # ("*" asks all of them)
            self.answer.set_result(f"{data.decode()} (says {addr[0]})")

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def serve() -> None:
    transport, _ = await shmsock.create_datagram_endpoint(Collector, local_addr=(None, PORT))
    print("listening on", transport.get_extra_info("sockname"), flush=True)
    await asyncio.Event().wait()


async def send(host: str, text: str) -> None:
    transport, sender = await shmsock.create_datagram_endpoint(Sender, remote_addr=(host, PORT))
    transport.sendto(text.encode(errors="surrogateescape"))
    print(await asyncio.wait_for(sender.answer, 10))
    transport.close()


if __name__ == "__main__":
    if sys.argv[1:] != ["serve"] and len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        asyncio.run(serve() if sys.argv[1] == "serve" else send(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(0 if sys.argv[1] == "serve" else 130)
    except (OSError, ValueError, asyncio.TimeoutError) as problem:
        sys.exit(f"datagrams: {str(problem) or 'no answer came within 10 s'}")
