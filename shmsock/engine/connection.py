"""One endpoint of a connection: its state, and the moves that both the user and the peer can make.

Theory. A connection is two slots, one in each peer's section. A slot's owner writes its words, the other only
reads them, so each side tells its own story and looks at the other's. A side that has said REL ("I will never
again read your ring or write this connection") waits in CLOSING until the other says so too; Release is one
store, generation + 1, after which slot and ring are free for reuse, and which the other side reads as REL.

    event                    OPENING                  OPEN                                   CLOSING
    ACCEPT, matches          -> OPEN, look once       violation                              -
    ACCEPT, stale            notify the slot it names (any state)
    REFUSE                   Release, fail            ignore                                 ignore
    cancel, timeout          Release at once          abort                                  -
    write_eof                -                        FIN                                    -
    close                    = cancel                 FIN+REL -> CLOSING, look once          -
    abort, violation         = cancel                 RST+REL -> CLOSING, look once          add RST
    peer FIN, all read       -                        EOF                                    -
    peer REL                 -                        writes fail; read to FIN, Release      Release
    peer RST, generation     -                        Release, reset (*)                     Release
    peer gone                Release, fail            drain to its last tail, then EOF       Release
                                                      if FIN, else reset

(*) A changed generation is EOF to who accepted and has read nothing: the opener gave up before it saw the
ACCEPT.

Release is -> FREE. From OPEN it notifies the peer; in CLOSING that was told all it waits for. The credit of a
cancelled CONNECT comes back with its answer.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import TYPE_CHECKING, Any

from shmsock.errors import violation, wrong_thread

if TYPE_CHECKING:
    from shmsock.engine.engine import Engine
    from shmsock.engine.peers import Peer

__all__ = [
    "BAD",
    "CLOSED",
    "DATA",
    "EMPTY",
    "EOF",
    "FIN",
    "GROW",
    "MOVED",
    "OPENING",
    "REL",
    "RESET",
    "RESET_BIT",
    "SPACE",
    "STALE",
    "UNBOUND",
    "VIOLATION",
    "YIELD",
    "Connection",
    "State",
]

# statuses of read and write (enum sh_status)
EMPTY, EOF, RESET, YIELD, VIOLATION, STALE, CLOSED, UNBOUND, GROW = -1, -2, -3, -4, -5, -6, -7, -8, -9
# bits of look (enum sh_bits)
DATA, FIN, REL, RESET_BIT, BAD, SPACE, MOVED = 1, 2, 4, 8, 16, 32, 64
COPY_MAX = 1 << 20
SH_TAKE = 4096  # what sh_take copies itself


class State(Enum):
    FREE = "FREE"
    OPENING = "OPENING"
    OPEN = "OPEN"
    CLOSING = "CLOSING"


FREE, OPENING, OPEN, CLOSING = State  # an attribute of an Enum takes as long as a call, before Python 3.12


class Connection:
    """`handler` belongs to the driver. `local` and `remote` are (name, port). All methods are called by the
    node's thread."""

    __slots__ = (
        "__weakref__",
        "accepted",
        "engine",
        "ep",
        "error",
        "gen",
        "handler",
        "local",
        "orphaned_ns",
        "outgrown",
        "peer",
        "peer_slot",
        "remote",
        "ring",
        "rx",
        "rx_bytes",
        "slot",
        "state",
    )

    def __init__(
        self, engine: Engine, slot: int, ring: tuple[int, int], peer: int, accepted: bool, may_grow: bool
    ) -> None:
        self.engine, self.slot, self.ring, self.peer = engine, slot, ring, peer
        self.accepted = accepted
        self.outgrown: tuple[tuple[int, int], ...] = ()  # rings before this one, while the peer may read them
        self.ep: Any = engine.lib.sh_ep_at(engine.nd, slot)
        self.gen: int = engine.lib.sh_ep_alloc(self.ep, *ring, accepted, may_grow)
        self.state = OPENING
        self.handler: Any = None
        self.local: tuple[str, int] = ("", 0)
        self.remote: tuple[str, int] = ("", 0)
        self.peer_slot = -1
        self.rx: Any = b""  # until follow(): what reads in C alone needs none
        self.rx_bytes = 0
        self.orphaned_ns = 0
        self.error: OSError | None = None

    def __repr__(self) -> str:
        where = f"slot {self.slot} of generation {self.gen}"
        return f"<Connection {self.state.value} {self.local} - {self.remote} {where}>"

    # -- moves of the peer

    def open(self, peer: Peer, peer_slot: int, peer_gen: int) -> int:
        """OPENING -> OPEN with that slot. LOOK bits for looked(), RESET (that slot is gone) or VIOLATION."""
        engine = self.engine
        bits: int = engine.lib.sh_ep_open(self.ep, self.peer, peer_slot, peer_gen)
        if bits >= 0:
            self.peer_slot, self.state = peer_slot, OPEN
            peer.connections[peer_slot] = self
            if not peer.here:  # its identity makes no sense: all the same, there is something to end when
                peer.here = True  # it falls silent
                engine.peers.note(peer)
        return bits

    def follow(self) -> None:
        """The peer's ring is to be read for the first time, or has grown: `rx` and `rx_bytes` are of it."""
        engine = self.engine
        size = engine.ffi.new("uint32_t *")
        off = engine.lib.sh_ep_follow(self.ep, size)
        self.rx, self.rx_bytes = engine.memory.view(off, size[0]), size[0]

    def let_go(self) -> None:
        """The peer's ring is not read any more: it may be unmapped. What a read has found in it is void."""
        self.rx, self.rx_bytes = b"", 0

    def look(self) -> int:
        """Take in what the peer did; returns LOOK bits for the driver, 0 when there is nothing for it. May
        end the connection."""
        return 0 if self.state is FREE else self.looked(self.engine.lib.sh_poll(self.ep))

    def looked(self, bits: int) -> int:
        """The same, when the core has looked."""
        if self.state is OPEN and not bits & (RESET_BIT | BAD | REL):
            return bits
        if self.state is FREE:
            return 0
        if self.state is CLOSING:
            if bits & (RESET_BIT | BAD | REL):
                self.release()
            return 0
        if bits & RESET_BIT:
            self.fail(ConnectionResetError(errno.ECONNRESET, f"connection reset by peer {self.remote}"))
        elif bits & BAD:
            self.violated("an impossible position, epoch or flag in a slot")
        elif bits & REL and bits & FIN and not bits & DATA:
            self.release()
        return bits

    def gone(self, now_ns: int) -> None:
        """The peer is dead, has left, or dropped the link."""
        if self.state is not OPEN:
            self.release()
            return
        if not self.orphaned_ns:
            self.orphaned_ns = now_ns or 1
            self.engine.lib.sh_ep_orphan(self.ep)

    def violated(self, seen: str) -> None:
        peer = self.peer
        self.error = violation(f"{self.remote[0]!r} (section {peer})", seen)
        self.abort()
        self.engine.offence(peer)

    def fail(self, error: OSError) -> None:
        self.error = error
        self.release()

    def broke(self, why: BaseException) -> None:
        """Bytes were taken, and could not be handed over: the peer gets a reset, the handler is told."""
        self.fail(ConnectionAbortedError(errno.ECONNABORTED, f"bytes of {self.remote} were lost: {why!r}"))
        self.engine.emit("ready", self, RESET_BIT)

    # -- moves of the user

    def finish(self) -> None:
        """write_eof: FIN behind what was written."""
        if self.state is OPEN:
            self.engine.lib.sh_ep_shut(self.ep, 1, 0, 0)
            self.engine.stir()

    def close(self) -> None:
        """FIN and REL: what was written arrives, nothing more is read."""
        self._shut(rst=0)

    def abort(self) -> None:
        """RST and REL: the peer gets a reset, now."""
        self._shut(rst=1)

    def cut(self) -> None:
        """REL without FIN: what was written arrives, then a reset, since it was not all."""
        self._shut(rst=0, fin=0)

    def _shut(self, rst: int, fin: int = 1) -> None:
        if self.state is OPENING or (self.state is OPEN and self.orphaned_ns):
            self.release()
        elif self.state is not FREE and (self.state is OPEN or rst):
            bits = self.engine.lib.sh_ep_shut(self.ep, fin and 1 - rst, 1, rst)
            self.state = CLOSING
            self.engine.stir()
            self.looked(bits)

    def release(self) -> None:
        """-> FREE. The slot and its ring are the engine's again."""
        if self.state is not FREE:
            notify = self.state is not OPENING
            self.state = FREE
            if self.rx_bytes:
                self.let_go()
            if self.handler is not None:
                self.handler.freed()  # `ep` may be another connection's after this
            self.engine.lib.sh_ep_release(self.ep, int(notify))
            self.engine.released(self)

    # -- bytes

    def write(self, data: Any, size: int) -> int:
        """Bytes taken, at most `size`; fewer when the ring is full (an event comes when there is space); or a
        status."""
        if self.state is not OPEN:
            return CLOSED
        taken: int = self.engine.lib.sh_write(self.ep, data, size)
        if taken == GROW:
            self.engine.slots.grow(self, size)
            taken = self.engine.lib.sh_write_some(self.ep, data, size)
        if taken == VIOLATION:
            self.violated("its head went where nothing was written")
        self.engine.stir()
        return taken

    def read(self, want: int) -> bytes | int:
        """1 to `want` bytes that are there, or a status. Does not wait."""
        span = self.span(want)
        return self.take(span) if span > 0 else span

    def available(self) -> int:
        """How many bytes read() would give, or a status. Takes nothing."""
        span = self.span(COPY_MAX)
        return span & 0xFFFFFFFF if span > 0 else span

    def span(self, want: int) -> int:
        """Where 1 to `want` bytes are that are there, for take(); or a status."""
        if self.state is not OPEN:
            return self.ended()
        span: int = self.engine.lib.sh_read_now(self.ep, min(want, COPY_MAX))
        if span == GROW:
            self.follow()
            span = self.engine.lib.sh_read_now(self.ep, min(want, COPY_MAX))
        return span if span > 0 else self.ended_by(span)

    def take(self, span: int, header: int = 0) -> bytes | int:
        """Take out what sh_read_now, sh_read_begin or, behind a header, sh_recv found. RESET when the slot
        changed hands under the copy."""
        data = self.copy(span)
        status = self.taken(len(data) + header)
        if status == GROW:  # a signal handler looked into the ring, and found a larger one
            return self.read(len(data))
        return self.ended_by(status) if status else data

    def copy(self, span: int) -> bytes:
        """The same bytes, which stay in the ring until taken() is called: nothing is lost with whoever has no
        room for them."""
        at, end = span >> 32, (span >> 32) + (span & 0xFFFFFFFF)
        if end <= self.rx_bytes:
            data: bytes = self.rx[at:end]
        else:
            data = self.rx[at:] + self.rx[: end - self.rx_bytes]
        return data

    def taken(self, n: int) -> int:
        """So many bytes were copied: their space is the peer's again. 0; or a status, and the copy is
        worthless, as the slot or the ring changed under it."""
        status: int = self.engine.lib.sh_read_end(self.ep, n)
        self.engine.stir()
        return status

    def ended(self) -> int:
        """What reading from a connection that is not open answers."""
        return EOF if self.error is None else RESET

    def ended_by(self, status: int) -> int:
        """A status that read_now, read_begin or read_end gave: act on it, hand it on. GROW: come again."""
        if self.state is not OPEN:
            return self.ended()
        if status == VIOLATION:
            self.violated("an impossible position, epoch or flag in a slot")
            return RESET
        if status == RESET:
            if self.error is None:
                what = "reset by peer" if not self.orphaned_ns else "lost: its peer is gone,"
                self.fail(ConnectionResetError(errno.ECONNRESET, f"connection {what} {self.remote}"))
        elif status == EOF:
            if self.engine.lib.sh_poll(self.ep) & REL or self.orphaned_ns:
                self.release()  # read to FIN, and the peer reads nothing any more
        elif status == STALE:
            if self.engine.alive and not self.engine.lib.sh_node_is_inert(self.engine.nd):
                raise wrong_thread(repr(self))
            self.error = self.error or self.engine.failure()
            return RESET
        elif status == GROW:
            self.follow()
        return status
