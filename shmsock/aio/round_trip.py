"""Round trips to a peer that need nothing of its program: it is asked for a connection to a port at which it
does not listen, and refuses. Who answers is its loop."""

from __future__ import annotations

import asyncio
import time

from shmsock.aio.driver import Opening
from shmsock.aio.node import Node
from shmsock.engine.connection import State
from shmsock.engine.peers import Peer

__all__ = ["round_trip"]

_HIGHEST = 65535


async def round_trip(node: Node, peer: Peer, timeout: float) -> float | None:
    """Return the seconds until the peer's answer; None: there was none within `timeout` seconds. Raises
    OSError when it cannot be asked, or is gone."""
    node.check()
    engine = node.engine
    taken = {port for port, _ in engine.layout.listener_entries(peer.section)}
    port = next(p for p in range(_HIGHEST, 0, -1) if p not in taken)
    begin = time.perf_counter()
    conn = engine.connect(
        peer.section, port, local=(node.name, engine.listeners.ephemeral()), remote=peer.name
    )
    conn.handler = opening = Opening()
    try:
        while conn.state is State.OPENING and (words := node.pump.spin_for_answer(conn.peer, conn.slot)):
            if words is True:  # it has begun to listen there just now
                engine.handshake.opened(conn)
            else:
                engine.attend(words, engine.home.now())
        if conn.state is State.OPENING:
            await asyncio.wait_for(opening.answered(node.loop), timeout)
    except ConnectionRefusedError:
        pass
    except asyncio.TimeoutError:
        return None
    finally:
        conn.handler = Opening()  # what is still to be told is told to nobody
        if engine.alive and conn.state is not State.FREE:
            conn.close()
    return time.perf_counter() - begin
