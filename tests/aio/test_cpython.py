"""CPython's own tests of StreamReader, as the interpreter brings them, on our reader.

Each runs twice: on the reader as such, which is fed as any other, and on one end of a real connection, where
feed_data() is a write at the other end. What does not run is listed with the reason; a test that is in no
list (a new Python has more) fails here until somebody has looked at it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import warnings
from typing import Any
from unittest import mock

import pytest

import shmsock
from shmsock.aio.streams import ShmStreamReader, ShmStreamReaderProtocol
from shmsock.aio.transport import ShmTransport
from shmsock.testing import make_region
from tests.aio.conftest import until

cpython: Any = pytest.importorskip("test.test_asyncio.test_streams", reason="this Python has no tests")

READER = """
    test_at_eof test_exception test_exception_cancel test_exception_waiter test_feed_empty_data
    test_feed_nonempty_data test_invalid_limit test_read test_read_eof test_read_exception
    test_read_limit test_read_line_breaks test_read_until_eof test_read_zero test_readexactly
    test_readexactly_eof test_readexactly_exception test_readexactly_limit
    test_readexactly_zero_or_less test_readline test_readline_empty_eof test_readline_eof
    test_readline_exception test_readline_limit test_readline_limit_with_existing_data
    test_readline_nolimit_nowait test_readline_read_byte_count test_readuntil_bytearray
    test_readuntil_eof test_readuntil_limit_found_sep test_readuntil_multi_chunks
    test_readuntil_multi_chunks_1 test_readuntil_multi_separator test_readuntil_multi_separator_limit
    test_readuntil_multi_separator_negative_offset test_readuntil_separator
"""
# With a reader that nobody connects: repr() would show our transport, constructors get no loop to connect on,
# and the pipe is a connection of its own.
UNCONNECTED = """
    test___repr__ test___repr__data test___repr__eof test___repr__exception
    test___repr__nondefault_limit test___repr__transport test___repr__waiter
    test_read_all_from_pipe_reader test_streamreader_constructor_use_global_loop
    test_streamreader_constructor_use_running_loop test_streamreader_constructor_without_loop
"""
NOT_THE_READER = {
    "tests of exceptions": """
        test_IncompleteReadError_pickleable test_LimitOverrunError_pickleable
    """,
    "tests of streams on a loop: test_cpython_loop.py": """
        test_async_writer_api test_async_writer_api_exception_after_close test_drain_raises
        test_eof_feed_when_closing_writer test_loop_is_closed_resource_warnings
        test_open_connection test_open_connection_error test_open_connection_no_loop_ssl
        test_start_server test_start_tls test_start_tls_buffered_data test_unclosed_resource_warnings
        test_unclosed_server_resource_warnings test_unhandled_cancel test_unhandled_exception
        test_unhandled_exception_sync_callback test_unhandled_exceptions test_wait_closed_on_close
        test_wait_closed_on_close_with_unread_data
    """,
    "tests over Unix sockets": """
        test_open_unix_connection test_open_unix_connection_error
        test_open_unix_connection_no_loop_ssl test_start_unix_server
    """,
    "is refused, so there is nothing of ours in it": """
        test_open_connection_happy_eyeball_refcycles
    """,
    "tests of asyncio's StreamWriter alone, on mocks": """
        test_streamwriter_start_tls_updates_reader_transport
    """,
    "tests of asyncio's StreamReaderProtocol alone": """
        test_multiple_drain test_streamreaderprotocol_constructor_use_global_loop
        test_streamreaderprotocol_constructor_use_running_loop
        test_streamreaderprotocol_constructor_without_loop
    """,
}


def test_all_of_them_are_accounted_for() -> None:
    known = " ".join([READER, UNCONNECTED, *NOT_THE_READER.values()]).split()
    assert {n for n in dir(cpython.StreamTests) if n.startswith("test_")} <= set(known)


def only(names: str) -> Any:
    """CPython's test case with all others hidden."""
    hidden = {n: None for n in dir(cpython.StreamTests) if n.startswith("test_") and n not in names.split()}
    return type("StreamTests", (cpython.StreamTests,), hidden)


class TestReaderAlone(only(READER + UNCONNECTED)):  # type: ignore[misc]
    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(asyncio, "StreamReader", ShmStreamReader)
        patch.start()
        self.addCleanup(patch.stop)


class FedProtocol(ShmStreamReaderProtocol):
    """Feeds what has come, past what the tests call; also a reader that has enough, as they do."""

    def data_received(self, data: bytes) -> None:
        reader: Any = self._stream_reader  # type: ignore[attr-defined]
        ShmStreamReader.feed_data(reader, data)
        if reader._paused:
            reader._paused = False
            reader._transport.resume_reading()


class FedReader(ShmStreamReader):
    """Made as `asyncio.StreamReader(limit=, loop=)`, and fed by writing at the other end."""

    nodes: tuple[shmsock.Node, shmsock.Node]

    def __init__(self, limit: int = 1 << 16, loop: Any = None) -> None:
        super().__init__(limit=limit, loop=loop)
        self._fed_eof = False
        loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        accepted = self._loop.create_future()
        a, b = self.nodes
        server = await shmsock.start_server(lambda r, w: accepted.set_result((r, w)), None, 7000, node=b)
        conn = await a.connect("b", 7000)
        protocol = FedProtocol(self, loop=self._loop)
        ShmTransport(a, conn, protocol, contextvars.copy_context()).start()
        self.fed_by = await accepted
        server.close()

    def feed_data(self, data: Any) -> None:
        expected = len(self._buffer) + len(data)
        self.fed_by[1].write(data)
        if not self._loop.is_running():
            self._loop.run_until_complete(until(lambda: len(self._buffer) == expected))

    def feed_eof(self) -> None:
        if self._fed_eof:  # by the protocol
            super().feed_eof()
            return
        self._fed_eof = True
        self.fed_by[1].write_eof()
        if not self._loop.is_running():
            self._loop.run_until_complete(until(lambda: self._eof))


class TestReaderConnected(only(READER)):  # type: ignore[misc]
    def setUp(self) -> None:
        super().setUp()
        self.region = make_region(peers=2, size=8 << 20)
        FedReader.nodes = self.loop.run_until_complete(self.attach())
        patch = mock.patch.object(asyncio, "StreamReader", FedReader)
        patch.start()
        self.addCleanup(patch.stop)

    async def attach(self) -> tuple[shmsock.Node, shmsock.Node]:
        return await shmsock.attach(self.region, name="a"), await shmsock.attach(self.region, name="b")

    def tearDown(self) -> None:
        for node in FedReader.nodes:
            assert node.statistics()["healed"] == 0
            self.loop.run_until_complete(node.aclose())
        os.unlink(self.region)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            super().tearDown()
