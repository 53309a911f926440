"""Every exception that shmsock raises on purpose.

    OSError
     ├─ RegionError                     the region cannot be used; `.errno` and `.filename` say which way
     │   ├─ RegionNotFoundError         also FileNotFoundError: no such file, no such device
     │   ├─ RegionExistsError           also FileExistsError: refusing to overwrite
     │   ├─ RegionPermissionError       also PermissionError: not ours, or not allowed
     │   ├─ RegionUrlError              also ValueError: not a region URL, or one of a kind not supported
     │   └─ RegionFormatError           wrong magic, wrong version, truncated: the bytes are not a region
     ├─ NodeClosedError                 the node was closed, or lost its section
     └─ ConnectionResetError
         └─ ProtocolViolation           a broken or hostile peer; only the link to it is affected
    RuntimeError
     ├─ ForkedError                     an object inherited over fork() was used in the child
     └─ WrongThreadError                used from another thread, or under another event loop

Where programs that know asyncio expect a builtin (`socket.gaierror`, `ConnectionRefusedError`, plain
`OSError` with an errno), that builtin is what they get; the functions below build it. None of them raises:
they return, so that the caller writes `raise name_unknown(...)` and type checkers see the control flow.

Every message says what was seen, what was expected, and what to do.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence

__all__ = [
    "ForkedError",
    "NodeClosedError",
    "ProtocolViolation",
    "RegionError",
    "RegionExistsError",
    "RegionFormatError",
    "RegionNotFoundError",
    "RegionPermissionError",
    "RegionUrlError",
    "WrongThreadError",
    "address_unavailable",
    "command",
    "datagram_too_long",
    "disk_full",
    "forked",
    "format_error",
    "listing",
    "name_malformed",
    "name_unknown",
    "no_buffers",
    "no_listeners",
    "node_closed",
    "not_local",
    "not_published",
    "other_memory",
    "peer_gone",
    "peer_silent",
    "pinned",
    "port_refused",
    "port_taken",
    "ports_exhausted",
    "region_error",
    "section_taken",
    "sections_full",
    "upgrade_needed",
    "violation",
    "went_away",
    "wrong_thread",
]

_LISTED = 8
"""How many names or numbers are spelled out in a message; the rest is counted."""
_MOST_SECTIONS = 64


class RegionError(OSError):
    """The region cannot be used. `.errno` is set always, `.filename` where a file is to blame.

    `str()` is the message alone: it names the file and says more than `[Errno 13]` would.
    """

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class RegionNotFoundError(RegionError, FileNotFoundError):
    """No such file, or no such device."""


class RegionExistsError(RegionError, FileExistsError):
    """There is a file already, and replacing it was not asked for."""


class RegionPermissionError(RegionError, PermissionError):
    """Not allowed (the message says by whom), or owned by somebody who must not be trusted."""


class RegionUrlError(RegionError, ValueError):
    """Not a region URL, or one of a kind that this version does not support."""


class RegionFormatError(RegionError):
    """The bytes are no region: wrong magic, wrong version, too small, truncated."""


class NodeClosedError(OSError):
    """The node was closed, or had to stop because its section was taken from it."""


class ProtocolViolation(ConnectionResetError):
    """A peer wrote something that no honest peer writes. Only the link to that peer is affected."""


class ForkedError(RuntimeError):
    """An object inherited over fork() was used in the child."""


class WrongThreadError(RuntimeError):
    """Used from another thread, or under another event loop, than the one it belongs to."""


_BY_ERRNO: dict[int, type[RegionError]] = {
    errno.ENOENT: RegionNotFoundError,
    errno.ENODEV: RegionNotFoundError,
    errno.EEXIST: RegionExistsError,
    errno.EACCES: RegionPermissionError,
    errno.EPERM: RegionPermissionError,
}


def region_error(code: int, message: str, path: str | None = None) -> RegionError:
    """Build a RegionError of the class that fits `code`, an errno.

    (`OSError.__new__` does that for OSError itself, and not for classes made from it.)
    """
    made = _BY_ERRNO.get(code, RegionError)(code, message)
    # Set afterwards: with a third argument None, OSError would carry a filename of None as if one were known.
    if path is not None:
        made.filename = path
    return made


def format_error(message: str, path: str | None = None) -> RegionFormatError:
    """Build the error for a region whose bytes are not what they must be (EINVAL)."""
    made = RegionFormatError(errno.EINVAL, message)
    if path is not None:
        made.filename = path
    return made


def disk_full(path: str, need: str = "", hint: str = "") -> RegionError:
    """Build ENOSPC, for when `need` ("2 GiB"; "": unknown) of `path` cannot be backed with storage."""
    room = f"room for {need} more" if need else "room left"
    do = hint or "free some space, or use a smaller region"
    return region_error(errno.ENOSPC, f"disk full: the file system of {path} has no {room}; {do}", path)


def listing(items: Iterable[object], *, nothing: str = "none") -> str:
    """Write a list as 'a, b, c and 4 more': bounded, since what is listed may come from other peers."""
    known = [str(item) for item in items]
    shown = ", ".join(known[:_LISTED])
    more = len(known) - _LISTED
    return nothing if not known else f"{shown} and {more} more" if more > 0 else shown


def other_memory() -> str:
    """Explain what it may mean that nobody else is there: a side that is on other memory than it should be
    looks healthy, and is alone."""
    return (
        "if others run, they are on other memory: every QEMU needs share=on and the same mem-path (or "
        "ivshmem server), a program of the host SHMSOCK_REGION, and the id that `shmsock info` shows of the "
        "region must be the same everywhere"
    )


def name_unknown(
    name: object, others: Sequence[str] = (), region: str = "the region", hint: str = ""
) -> socket.gaierror:
    """Build socket.gaierror, as no attached peer has this name: what getaddrinfo says of an unknown host.

    `others`: who else is there, this node left out. `region`: its URL. `hint`: what else may be the reason.
    """
    seen = f"attached: {listing(sorted(others))}" if others else _alone(region)
    close = []
    if isinstance(name, str):
        import difflib

        close = difflib.get_close_matches(name, others, n=1)
    do = f"did you mean {close[0]!r}?" if close else _start_it(region)
    return socket.gaierror(
        socket.EAI_NONAME,
        f"no peer named {name!r} is attached to {region} ({seen}); {do}{hint and '; ' + hint}",
    )


def went_away(name: object) -> ConnectionResetError:
    """Build the error for a peer that left, or died, before it answered."""
    return ConnectionResetError(errno.ECONNRESET, f"peer {name!r} went away while connecting: try again")


def peer_silent(name: object, section: int, region: str = "") -> ConnectionRefusedError:
    """Build the error for a peer that has not beaten since this node attached, as when a VM was reset."""
    return ConnectionRefusedError(
        errno.ECONNREFUSED,
        f"peer {name!r} (section {section}) has not shown a sign of life since this node attached: its "
        "program was killed, or its VM is paused or gone; start it again "
        f"(`{command('reap', region, f'--section {section}')}` frees what it left)",
    )


def peer_gone(remote: object) -> ConnectionResetError:
    """Build the error for a peer, (name, port), that died or left, and whose bytes nobody came to read."""
    return ConnectionResetError(
        errno.ECONNRESET, f"peer {remote} is gone, and its bytes were not read for linger_s"
    )


def pinned(name: str, section: int, owner: str | None) -> ConnectionRefusedError:
    """Build the error for a name that is believed of that section only, whose owner, if any, has another."""
    seen = "nobody is there" if owner is None else f"who is there calls itself {owner!r}"
    return ConnectionRefusedError(
        errno.ECONNREFUSED,
        f"{name!r} is pinned to section {section}, and {seen}: start it there "
        f"(shmsock.attach(section={section}), or SHMSOCK_SECTION={section}), or change the pin "
        "(Settings(pin=), or SHMSOCK_PIN)",
    )


def not_local(name: object, port: int, locks: bool) -> ConnectionRefusedError:
    """Build the error for a port that is for the peer's own machine, when it is not proven that we are on
    it."""
    why = "its section has no lock under this kernel" if locks else "the region's file knows no locks here"
    return ConnectionRefusedError(
        errno.ECONNREFUSED,
        f"connection to ({name!r}, {port}) refused: it listens there for its own machine only, which is "
        f"proven by locks, and {why}: have it listen for all peers (host None), or attach both to one file "
        "under one kernel",
    )


def not_published(address: object, port: int) -> ConnectionRefusedError:
    """Nobody who publishes that address, or those of several machines, or none of them listens there."""
    what = f"no peer publishes {address} and listens on port {port} (`shmsock info` shows both)"
    return ConnectionRefusedError(errno.ECONNREFUSED, what)


def name_malformed(why: object) -> socket.gaierror:
    """Build the error for a host that cannot be a name. `why` says what was seen and what was expected."""
    return socket.gaierror(socket.EAI_NONAME, str(why))


def port_refused(
    name: object, port: int, region: str = "the region", *, alone: bool = False, hint: str = ""
) -> ConnectionRefusedError:
    """Build ConnectionRefusedError: the peer is there, and nobody listens. `region`, `hint`: see
    name_unknown(). `alone`: nobody else is there at all."""
    return ConnectionRefusedError(
        errno.ECONNREFUSED,
        f"connection to ({name!r}, {port}) refused: nobody there listens on port {port} "
        f"({_alone(region) if alone else region}); {_start_it(region)}"
        f"{hint and '; ' + hint}",
    )


def _alone(region: str) -> str:
    return f"this process is alone on {region}"


def _start_it(region: str) -> str:
    return (
        "start the server there (one that knows nothing but TCP, by `shmsock run --listen PORT`), "
        f"or see who is there with `{command('info', region)}`"
    )


def command(name: str, region: str, rest: str = "") -> str:
    """Write the command to type; the region is left out where it is not known by its URL or path."""
    import shlex

    known = shlex.quote(region) if ":" in region or "/" in region else ""
    return " ".join(filter(None, ("shmsock", name, known, rest)))


def port_taken(name: object, port: int, who: str = "another listener of that name") -> OSError:
    """Build EADDRINUSE: `who`, this process or another that goes by the same name, listens on the port
    already."""
    return OSError(
        errno.EADDRINUSE,
        f"address ({name!r}, {port}) is already in use: {who} has the port; "
        "stop it, choose another port, or pass reuse_port=True on both sides",
    )


def ports_exhausted(name: object, first: int, last: int) -> OSError:
    """Build EADDRINUSE: port 0 was asked for, and none is left of those that this section chooses from."""
    return OSError(
        errno.EADDRINUSE,
        f"no port is left for {name!r} to choose: {first} to {last} are all in use; close some, or name a "
        "port below 32768",
    )


def address_unavailable(host: object, own: Sequence[str] = ()) -> OSError:
    """Build EADDRNOTAVAIL: asked to listen under a name that is not the own one."""
    return OSError(
        errno.EADDRNOTAVAIL,
        f"cannot listen on {host!r}: this node goes by {listing(own)}; listen on None for all peers, "
        "on 'localhost' for those of this machine, or attach with name= (on a loop that knows .shm hosts: on "
        "'*.shm' or 'localhost.shm', or with SHMSOCK_NAME)",
    )


def datagram_too_long(size: int, maximum: int) -> OSError:
    """Build EMSGSIZE, as a UDP socket raises it."""
    return OSError(
        errno.EMSGSIZE, f"a datagram of {size} bytes is too long, {maximum} is the most: send it in pieces"
    )


def no_buffers(what: str, larger: tuple[str, int] | None = None, peer: str | None = None) -> OSError:
    """Build ENOBUFS: a section has no `what` left, that of `peer` or the own one. `larger`: size and peers of
    a region that would do; None: there is none."""
    whose = "this process's section" if peer is None else f"the section of {peer!r}"
    if larger is None:
        do = "let more processes share them: a section cannot have more"
    else:
        size, peers = larger
        create = f"shmsock create /dev/shm/NAME --size {size.replace(' ', '')} --peers {peers}"
        do = f"make a region of {size} (`{create}`), to be named by SHMSOCK_REGION or region="
    return OSError(errno.ENOBUFS, f"no {what} left in {whose}: close connections, or {do}")


def no_listeners(most: int) -> OSError:
    """Build ENOBUFS: a section has `most` entries for listeners and ports of datagrams, whatever its size."""
    return OSError(
        errno.ENOBUFS,
        f"no listener entries left in this process's section, which has {most}: close servers or datagram "
        "ports, or let another process listen",
    )


def sections_full(
    silent: Sequence[object] = (),
    total: int = 0,
    path: str | None = None,
    region: str = "",
    stopped: Sequence[int] = (),
) -> RegionError:
    """Build ENOSPC: no section can be claimed. `silent`: the sections whose owner no longer beats, as "3
    (name)".
    `region`: its URL. `stopped`: pids, as the sections say, of who holds one on this machine and does not
    beat."""
    do = []
    if silent:
        free = command("reap", region, f"--section {str(silent[0]).split()[0]}")
        do.append(f"silent are {listing(silent)}: free one with `{free}`, if its owner is gone for good")
    if stopped:
        # No command to be typed: a pid is what its section says, and anybody can write that.
        do.append(
            f"stopped here are processes {listing(stopped)}, by what their sections say: continue or kill "
            "one, when `shmsock info` and ps agree that it is one of these"
        )
    if not do:
        more = "`shmsock create /dev/shm/NAME --size SIZE --peers N`"
        larger = (
            "a second region" if total >= _MOST_SECTIONS else f"a region with more and name that ({more})"
        )
        do.append(f"all their owners are alive; stop one, or make {larger}")
    count = f"all {total} sections" if total else "all sections"
    return region_error(errno.ENOSPC, f"{count} of the region are taken: {'; '.join(do)}", path)


def section_taken(
    section: int, name: str, silent: bool, path: str | None = None, region: str = ""
) -> RegionError:
    """Build ENOSPC: the section that was asked for has an owner."""
    free = command("reap", region, f"--section {section}")
    do = (
        f"it is silent: free it with `{free}` if it is gone for good"
        if silent
        else "stop that one, or ask for another section"
    )
    owner = f"{name!r}" if name else "somebody who does not say its name"
    return region_error(errno.ENOSPC, f"section {section} is taken by {owner}: {do}", path)


def node_closed(name: object, why: str = "it was closed") -> NodeClosedError:
    """Build NodeClosedError (EBADF, as of a closed socket): the node cannot be used any more."""
    return NodeClosedError(errno.EBADF, f"node {name!r} is not attached any more: {why}; attach again")


def violation(peer: object, seen: str, expected: str = "") -> ProtocolViolation:
    """Build ProtocolViolation: a word of `peer` failed its check; the connection, or the link, is reset."""
    rest = f", expected {expected}" if expected else ""
    return ProtocolViolation(
        errno.ECONNRESET, f"peer {peer} broke the protocol: {seen}{rest}; connection reset"
    )


def upgrade_needed(why: str) -> ConnectionRefusedError:
    """Build the error for a peer whose version this one cannot talk to. Its errno tells it from a port that
    nobody listens on: who has another way may take that."""
    return ConnectionRefusedError(errno.EPROTONOSUPPORT, why)


def forked(what: str) -> ForkedError:
    """Build ForkedError: `what` was made by the parent process."""
    return ForkedError(f"{what} was inherited over fork() and is dead in this process: make a new one here")


def wrong_thread(what: str, owner: str = "the one that made it") -> WrongThreadError:
    """Build WrongThreadError: `what` is not thread-safe, just as asyncio's own objects are not."""
    return WrongThreadError(
        f"{what} was used from another thread or event loop than {owner}: "
        "use loop.call_soon_threadsafe() or asyncio.run_coroutine_threadsafe()"
    )
