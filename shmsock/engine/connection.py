"""One endpoint of a connection: its state, and the moves that both the user and the peer can make.

Theory. A connection is two slots, one in each peer's section. A slot's owner writes its words, the other only
reads them, so each side tells its own story and polls the other's. A slot whose side has said DONE ("I will
never again read your ring or write this connection") is CLOSING until the other says so too; a release is one
store, generation + 1, after which slot and ring are free for reuse, and which the other side reads as DONE.
CLOSING is the core's alone (sh_ep_close): the Connection has let go of the slot, and is FREE.

    event                    OPENING                  OPEN                                   CLOSING
    ACCEPT, matches          -> OPEN, poll once       as stale                               as stale
    ACCEPT, stale            notify the slot that it names: its owner polls, and finds what became of this one
    ACCEPT, its slot gone    release, fail            as stale                               as stale
    ACCEPT, impossible slot  the same, and violation  as stale                               as stale
    REFUSE, backlog full     CONNECT again, later     ignore                                 ignore
    REFUSE, else             release, fail            ignore                                 ignore
    cancel, timeout          release at once          abort                                  -
    write_eof                -                        FIN                                    -
    close                    = cancel                 FIN+DONE -> CLOSING, poll once         -
    cut                      = cancel                 DONE without FIN -> CLOSING, poll once -
    abort, violation         = cancel                 RST+DONE -> CLOSING, poll once         -
    peer FIN, all read       -                        EOF                                    -
    peer DONE                -                        writes fail; read to FIN, release      release
    peer RST, generation     -                        release, reset (*)                     release
    peer gone                release, fail            drain to its last tail, then EOF       release
                                                      if FIN, else reset

(*) A changed generation is EOF to the accepting side while that has read nothing: the opener gave up before
it saw the ACCEPT.

A release leads to FREE. From OPEN it notifies the peer; from CLOSING it does not, as the peer already has our
DONE. An orphan (its peer is gone) is released by close, cut and abort. The credit of a cancelled CONNECT
comes back with its answer. What is in OPENING waits, in the core, for a credit, for its answer, or for the
time to ask again (enum sh_ep_state); the rows of ACCEPT and REFUSE are its own (native/connect.c).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

from shmsock.engine.features import NONE
from shmsock.engine.home import Home
from shmsock.engine.slots import Held, Slots
from shmsock.errors import violation, wrong_thread
from shmsock.native._core import lib

__all__ = [
    "ADOPTIONS_PER_S",
    "BAD",
    "CLOSED",
    "COPY_MAX",
    "DATA",
    "DONE",
    "EMPTY",
    "EOF",
    "FIN",
    "MOVED",
    "OPEN",
    "OPENING",
    "RESET",
    "RESET_BIT",
    "SPACE",
    "STALE",
    "UNBOUND",
    "VIOLATION",
    "VIOLATIONS",
    "YIELD",
    "Connection",
    "Link",
    "State",
]

# statuses of read and write (enum sh_status)
EMPTY: int = lib.SH_EMPTY
EOF: int = lib.SH_EOF
RESET: int = lib.SH_RESET
YIELD: int = lib.SH_YIELD
VIOLATION: int = lib.SH_VIOLATION
STALE: int = lib.SH_STALE
CLOSED: int = lib.SH_CLOSED
UNBOUND: int = lib.SH_UNBOUND
UNREADABLE: int = lib.SH_UNREADABLE
# bits of a poll (enum sh_bits)
DATA: int = lib.SH_POLL_DATA
FIN: int = lib.SH_POLL_FIN
DONE: int = lib.SH_POLL_DONE
RESET_BIT: int = lib.SH_POLL_RESET
BAD: int = lib.SH_POLL_BAD
SPACE: int = lib.SH_POLL_SPACE
MOVED: int = lib.SH_POLL_MOVED
COPY_MAX: int = lib.SH_COPY_MAX  # bytes of one read
MIN_RING: int = lib.SH_MIN_RING
MAX_FORMER: int = lib.SH_EPOCH_LEAD
VIOLATIONS: int = lib.SH_VIOLATIONS
ADOPTIONS_PER_S = 10
IMPOSSIBLE = "an impossible position, epoch or flag in a slot"


class State(Enum):
    FREE = "FREE"
    OPENING = "OPENING"
    OPEN = "OPEN"


FREE, OPENING, OPEN = State  # an attribute of an Enum takes as long as a call, before Python 3.12


class Link:
    """What this node has to do with one peer."""

    home: Home
    section: int
    violations: int

    def __init__(self, home: Home, section: int) -> None:
        self.home, self.section = home, section
        self.violations = 0
        self.backoff_s = 1
        self.ignore_until_ns = 0
        self.adoptions: deque[int] = deque(maxlen=ADOPTIONS_PER_S)  # when, by the pump's clock
        self.terms = NONE  # the peer's, as they were when its tag was adopted, or was not because of them
        self.features = 0  # that both sides have

    def offence(self, violations: int = 1) -> None:
        """Count violations. After three the pump drops the link; not at once, as the caller is in the middle
        of using it."""
        self.home.counts["violations"] += 1
        self.violations += violations
        if self.violations >= VIOLATIONS:
            self.home.condemned.add(self.section)
            self.home.stir()


class _Asked:
    """An attribute that few connections need: the core is asked for it once. (Not by __getattr__, with which
    every attribute takes longer.)"""

    def __init__(self, ask: Callable[[Connection], Any]) -> None:
        self._ask = ask

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, conn: Connection | None, owner: type) -> Any:
        if conn is None:
            return self
        value = self._ask(conn)
        setattr(conn, self._name, value)
        return value


def _ep_of(conn: Connection) -> Any:
    return conn.home.lib.sh_ep_at(conn.home.nd, conn.slot)


def _gen_of(conn: Connection) -> Any:
    return conn.home.lib.sh_ep_gen(conn.ep)


class Connection(Held):
    """One endpoint. `handler` belongs to the driver. `local` and `remote` are (name, port).

    All methods are called by the node's thread. The handler's are called by events (ready, connected, failed,
    silent), and freed() in the middle of a release.
    """

    home: Home
    link: Link
    slots: Slots[Connection]
    peer: int
    local: tuple[str, int]
    remote: tuple[str, int]
    orphaned_ns: int
    state: State

    # Values that most connections never change are the class's, which saves time in __init__.
    state = OPENING
    accepted = False
    handler: Any = None
    orphaned_ns = 0
    error: OSError | None = None

    #: The core's endpoint, and the slot's generation. (A connection that is asked has the slot, or was asked
    #: while it had it.)
    ep: Any = _Asked(_ep_of)
    gen: Any = _Asked(_gen_of)

    def __init__(
        self,
        home: Home,
        slots: Slots[Connection],
        link: Link,
        slot: int,
        local: tuple[str, int],
        remote: tuple[str, int],
    ) -> None:
        """In OPENING. `slot` is what the core gave."""
        self.home, self.slots, self.link = home, slots, link
        self.slot: int = slot
        self.peer = link.section
        self.local, self.remote = local, remote
        slots.connections[slot] = self

    def __repr__(self) -> str:
        return f"<Connection {self.state.value} {self.local} - {self.remote} slot {self.slot}>"

    @property
    def ring(self) -> tuple[int, int]:
        """The ring that is written to, as (offset in the section, bytes)."""
        return self._ring(0)

    @property
    def outgrown(self) -> tuple[tuple[int, int], ...]:
        """The rings before this one, while the peer may read them."""
        former = (self._ring(i + 1) for i in range(MAX_FORMER))
        return tuple(ring for ring in former if ring[0])

    def _ring(self, which: int) -> tuple[int, int]:
        word = self.home.lib.sh_ep_ring(self.ep, which)
        return word & -MIN_RING, 1 << (word & (MIN_RING - 1))

    # -- events, to be emitted

    def ready(self, bits: int) -> None:
        """Tell the handler the bits of a poll: something moved."""
        if self.handler is not None:
            try:
                self.handler.ready(bits)
            except (SystemExit, KeyboardInterrupt):
                # The loop may be run again, by asyncio.run to clean up: what is ready still is.
                self.home.events.appendleft((self.ready, bits))
                raise

    def connected(self, _: None = None) -> None:
        """Tell the handler that the peer has accepted."""
        if self.handler is not None:  # None: the task that asked for it was cancelled
            self.handler.connected()

    def failed(self, error: OSError) -> None:
        """Tell the handler that the peer refused, or is gone."""
        if self.handler is not None:
            self.handler.failed(error)

    def silent(self, _: None = None) -> None:
        """Tell the handler that the peer that is to answer does not beat, while another of its name does."""
        if self.handler is not None and self.state is OPENING:
            self.handler.silent(self)

    # -- moves of the peer

    def poll(self) -> None:
        """See what the peer did, and tell the handler."""
        if self.state is not FREE:
            self.inspect(self.home.lib.sh_poll(self.ep))

    def inspect(self, bits: int) -> None:
        """Act on the bits of a poll that the core has made, and tell the handler. May end the connection."""
        if bits := self.settle(bits):
            self.home.emit(self.ready, bits)

    def settle(self, bits: int) -> int:
        """Change the state as the bits of a poll demand. Returns the bits to tell the handler, 0 for none."""
        if self.state is OPEN and not bits & (RESET_BIT | BAD | DONE):
            return bits
        if self.state is FREE:
            return 0
        if bits & RESET_BIT:
            self.fail(ConnectionResetError(errno.ECONNRESET, f"connection reset by peer {self.remote}"))
        elif bits & BAD:
            self.violated(IMPOSSIBLE)
        elif bits & DONE and bits & FIN and not bits & DATA:
            self.release()
        return bits

    def gone(self, now_ns: int) -> None:
        """Make an orphan of it, or release it: the peer is dead, has left, or dropped the link."""
        if self.state is not OPEN:
            self.release()
        elif not self.orphaned_ns:
            self.orphaned_ns = now_ns or 1
            self.slots.orphans.add(self)
            if self.home.trace:
                self.home.trace("is left with what its peer sent: %r", self)
            self.home.lib.sh_ep_orphan(self.ep)

    def violated(self, seen: str) -> None:
        """Abort, as the peer wrote what no honest one writes; `seen` says what."""
        self.error = violation(f"{self.remote[0]!r} (section {self.peer})", seen)
        if self.home.trace:
            self.home.trace("violation, %s: %r", seen, self)
        self.abort()
        self.link.offence()

    def fail(self, error: OSError) -> None:
        """Release it; calls that come later raise `error`."""
        self.error = error
        self.release()

    def broke(self, why: BaseException) -> None:
        """End it because bytes that had left the ring could not be handed over: the peer gets a reset, and
        the handler is told."""
        self.fail(ConnectionAbortedError(errno.ECONNABORTED, f"bytes of {self.remote} were lost: {why!r}"))
        self.home.emit(self.ready, RESET_BIT)

    # -- moves of the user

    def finish(self) -> None:
        """Publish FIN behind what was written (write_eof)."""
        if self.state is OPEN:
            if self.home.trace:
                self.home.trace("FIN: %r", self)
            self.home.lib.sh_ep_finish(self.ep)
            self.home.stir()

    def close(self) -> None:
        """Publish FIN and DONE: what was written arrives, nothing more is read."""
        self._shut(rst=0)

    def abort(self) -> None:
        """Publish RST and DONE: the peer gets a reset, now."""
        self._shut(rst=1)

    def cut(self) -> None:
        """Publish DONE without FIN: what was written arrives, then a reset, since it was not all."""
        self._shut(rst=0, fin=0)

    def _shut(self, rst: int, fin: int = 1) -> None:
        if self.state is OPENING or (self.state is OPEN and self.orphaned_ns):
            self.release()
        elif self.state is OPEN:
            self.let_go()
            self.home.lib.sh_ep_close(self.ep, fin and 1 - rst, rst)

    def release(self) -> None:
        """Let go, and have slot and ring given to another connection."""
        if self.state is not FREE:
            self.let_go()
            self.home.lib.sh_ep_release(self.ep)

    def let_go(self) -> None:
        """Go to FREE: the caller has the core close or release the slot."""
        if self.home.trace:
            self.home.trace("lets go (%s): %r", self.error or "no error", self)
        self.state = FREE
        if self.handler is not None:
            self.handler.freed()  # `ep` may be another connection's after this
        self.slots.free(self)
        self.home.stir()

    # -- bytes

    def write(self, data: Any, size: int) -> int:
        """Write up to `size` bytes of `data`. Returns how many went in, fewer when the ring is full (an event
        comes when there is space), or a status."""
        return self._put(self.home.lib.sh_write, data, size)

    def write_file(self, fd: int, at: int, size: int) -> int:
        """Write bytes of a file, from `at` on, as write() does: the kernel puts them into the ring. Returns
        EOF when the file ends there, 0 when the ring is full. Raises OSError when the file cannot be read."""
        return self._read_into(self.home.lib.sh_write_file, fd, at, size)

    def write_socket(self, fd: int, size: int) -> int:
        """Write what a kernel socket has received, as write_file() does. Raises OSError: BlockingIOError when
        there is nothing."""
        return self._read_into(self.home.lib.sh_write_socket, fd, size)

    def _read_into(self, put: Any, *source: int) -> int:
        taken = self._put(put, *source)
        if taken == UNREADABLE:
            code = self.home.ffi.errno
            raise OSError(code, os.strerror(code))
        return taken

    def _put(self, put: Any, *source: Any) -> int:
        if self.state is not OPEN:
            return CLOSED
        taken: int = put(self.ep, *source)
        if taken == VIOLATION:
            self.violated("its head went where nothing was written")
        if taken != UNREADABLE:  # what follows may change errno
            self.home.stir()
        return taken

    def read(self, want: int) -> bytes | int:
        """Take out 1 to `want` bytes that are there, or return a status. Does not wait."""
        room, bytes_of = self.home.room
        n = self.read_into(room, want)
        if n <= 0:
            return n
        try:
            data: bytes = bytes_of[:n]
        except BaseException as error:  # they have left the ring: what is read next would follow a gap
            self.broke(error)
            raise
        return data

    def read_into(self, to: Any, want: int) -> int:
        """Put 1 to `want` bytes that are there into `to`, and return how many; or return a status. Does not
        wait."""
        if self.state is not OPEN:
            return self.ended()
        n: int = self.home.lib.sh_read(self.ep, to, min(want, COPY_MAX))
        if n <= 0:
            return self.ended_by(n)
        self.home.stir()
        return n

    def available(self) -> int:
        """Count the bytes that are there, without taking any; or return a status."""
        if self.state is not OPEN:
            return self.ended()
        n: int = self.home.lib.sh_available(self.ep)
        return n if n > 0 else self.ended_by(n)

    def ended(self) -> int:
        """Return what a read answers when the connection is not open: EOF or RESET."""
        return EOF if self.error is None else RESET

    def ended_by(self, status: int) -> int:
        """Act on the status that a read gave, and return the one to hand on."""
        if self.state is not OPEN:
            return self.ended()
        if status == VIOLATION:
            self.violated(IMPOSSIBLE)
            return RESET
        if status == RESET:
            if self.error is None:
                what = "reset by peer" if not self.orphaned_ns else "lost: its peer is gone,"
                self.fail(ConnectionResetError(errno.ECONNRESET, f"connection {what} {self.remote}"))
        elif status == EOF:
            if self.home.lib.sh_poll(self.ep) & DONE or self.orphaned_ns:
                self.release()  # read to FIN, and the peer reads nothing any more
        elif status == STALE:
            if self.home.alive and not self.home.is_inert():
                raise wrong_thread(repr(self))
            self.error = self.error or self.home.failure()
            return RESET
        return status
