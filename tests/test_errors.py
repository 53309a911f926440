"""The exceptions: their builtin faces, their errnos, and messages that say what to do."""

from __future__ import annotations

import errno
import pickle
import socket

import pytest

from shmsock import errors


@pytest.mark.parametrize(
    ("code", "kind", "builtin"),
    [
        (errno.ENOENT, errors.RegionNotFoundError, FileNotFoundError),
        (errno.ENODEV, errors.RegionNotFoundError, FileNotFoundError),
        (errno.EEXIST, errors.RegionExistsError, FileExistsError),
        (errno.EACCES, errors.RegionPermissionError, PermissionError),
        (errno.EPERM, errors.RegionPermissionError, PermissionError),
        (errno.ENOSPC, errors.RegionError, OSError),
    ],
)
def test_region_error_has_the_class_of_its_errno(
    code: int, kind: type[OSError], builtin: type[OSError]
) -> None:
    error = errors.region_error(code, "message", "/the/path")
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert isinstance(error, errors.RegionError)
    assert (error.errno, error.strerror, error.filename) == (code, "message", "/the/path")
    assert str(error) == "message"


def test_region_error_without_a_path() -> None:
    assert errors.region_error(errno.ENODEV, "message").filename is None


def test_url_error_is_a_value_error() -> None:
    error = errors.RegionUrlError(errno.EINVAL, "message")
    assert isinstance(error, ValueError)
    assert isinstance(error, OSError)
    assert error.errno == errno.EINVAL


def test_errors_can_be_pickled() -> None:
    error = errors.region_error(errno.EACCES, "message", "/the/path")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.errno, str(copy)) == (errno.EACCES, "message")


@pytest.mark.parametrize(
    ("error", "kind", "code", "says"),
    [
        (errors.name_unknown("vm-x", ["vm-b", "vm-a"]), socket.gaierror, socket.EAI_NONAME, "vm-a, vm-b"),
        (errors.name_unknown("vmb", ["vm-b"]), socket.gaierror, socket.EAI_NONAME, "did you mean 'vm-b'"),
        (errors.name_unknown(7), socket.gaierror, socket.EAI_NONAME, "shmsock info"),
        (errors.name_unknown("a", (), "file:/r"), socket.gaierror, socket.EAI_NONAME, "alone on file:/r"),
        (
            errors.name_unknown("a", (), "file:/r"),
            socket.gaierror,
            socket.EAI_NONAME,
            "shmsock info file:/r`",
        ),
        (errors.name_unknown("a", ["b"], hint="why"), socket.gaierror, socket.EAI_NONAME, "; why"),
        (errors.name_malformed("a b is no name"), socket.gaierror, socket.EAI_NONAME, "a b is no name"),
        (errors.port_refused("b", 80), ConnectionRefusedError, errno.ECONNREFUSED, "port 80"),
        (errors.port_refused("b", 80, "file:/r"), ConnectionRefusedError, errno.ECONNREFUSED, "(file:/r)"),
        (errors.port_refused("b", 80, hint="why"), ConnectionRefusedError, errno.ECONNREFUSED, "; why"),
        (errors.port_taken("b", 80), OSError, errno.EADDRINUSE, "reuse_port"),
        (errors.address_unavailable("x", ["vm-a"]), OSError, errno.EADDRNOTAVAIL, "vm-a"),
        (errors.no_buffers("slots", ("128 MiB", 4)), OSError, errno.ENOBUFS, "--size 128MiB --peers 4`"),
        (errors.no_buffers("slots"), OSError, errno.ENOBUFS, "in this process's section: close"),
        (errors.no_buffers("slots", peer="b"), OSError, errno.ENOBUFS, "in the section of 'b': close"),
        (errors.sections_full([3, 5], 16), errors.RegionError, errno.ENOSPC, "shmsock reap"),
        (
            errors.sections_full(["3 (a)"], 16, "/r", "file:/r"),
            errors.RegionError,
            errno.ENOSPC,
            "`shmsock reap file:/r --section 3`",
        ),
        (errors.sections_full(), errors.RegionError, errno.ENOSPC, "--peers"),
        (
            errors.sections_full((), 2, stopped=[7, 8]),
            errors.RegionError,
            errno.ENOSPC,
            "7, 8, by what their sections say: continue or kill one",
        ),
        (errors.sections_full((), 64), errors.RegionError, errno.ENOSPC, "a second region"),
        (
            errors.section_taken(3, "a", True, "/r", "file:/r x"),
            errors.RegionError,
            errno.ENOSPC,
            "`shmsock reap 'file:/r x' --section 3`",
        ),
        (errors.port_taken("b", 80, "process 7"), OSError, errno.EADDRINUSE, "process 7 has the port"),
        (errors.ports_exhausted("b", 40000, 40009), OSError, errno.EADDRINUSE, "40000 to 40009"),
        (errors.no_listeners(448), OSError, errno.ENOBUFS, "448: close servers"),
        (errors.disk_full("/x", "4 KiB"), errors.RegionError, errno.ENOSPC, "disk full"),
        (errors.format_error("bad", "/x"), errors.RegionFormatError, errno.EINVAL, "bad"),
        (errors.node_closed("vm-a"), errors.NodeClosedError, errno.EBADF, "attach again"),
        (errors.violation("vm-b", "tail 9"), ConnectionResetError, errno.ECONNRESET, "tail 9"),
        (errors.violation("vm-b", "9", "at most 8"), ConnectionResetError, errno.ECONNRESET, "at most 8"),
    ],
)
def test_what_asyncio_users_expect(error: OSError, kind: type[OSError], code: int, says: str) -> None:
    assert isinstance(error, kind)
    assert error.errno == code
    assert says in str(error)


def test_listings_are_bounded() -> None:
    text = str(errors.name_unknown("x", [f"peer-{i:02}" for i in range(60)]))
    assert "peer-07 and 52 more" in text
    assert "peer-08" not in text


def test_misuse_is_a_runtime_error() -> None:
    assert isinstance(errors.forked("node 'a'"), RuntimeError)
    assert isinstance(errors.wrong_thread("node 'a'"), RuntimeError)
    assert "call_soon_threadsafe" in str(errors.wrong_thread("node 'a'"))


def test_no_error_gives_a_command_to_kill_what_a_section_names() -> None:
    """Anybody who maps the region can write that number."""
    assert "kill -" not in str(errors.sections_full((), 2, stopped=[1]))
