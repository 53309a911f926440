"""One end of a benchmark, the same code over TCP and over shared memory.

Run by path it imports nothing of shmsock unless it is told to, so that the TCP side is what everybody has.

    python handlers.py --module asyncio --loop uvloop --role server
    python handlers.py --module shmsock --loop asyncio --role client --host localhost --port 7000

With --shm-loop asyncio's own functions run on shmsock's loop, where a host that ends in .shm is a peer.
--measure says what the client does (see ends); a server is told it too where it is not a streams' one.

Prints JSON: the server its address, the client what it measured. The server ends with its standard input.
"""

from __future__ import annotations

import importlib

if __name__ == "__main__":
    # Beside this file, and found there as a package of its own: not as a part of shmsock.
    importlib.import_module("ends.command").main()
