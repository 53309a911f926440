"""CPython's own tests of loops, as the interpreter brings them, over shared memory (cpython.py says how).

Streams, buffered protocols, TLS, sendfile, servers. What does not run is listed with the reason; a test or a
test case that is in no list (a new Python has more) fails here until somebody has looked at it.
"""

from __future__ import annotations

import functools
import importlib
import sys
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from tests.aio.cpython import OverSharedMemory
from tests.aio.test_cpython import NOT_THE_READER, READER, UNCONNECTED

pytest.importorskip("test.test_asyncio.functional", reason="this Python has no tests")

#: What runs, by module and test case.
RUN = {
    "test_buffered_proto.BufferedProtocolSelectorTests": """
        test_buffered_proto_create_connection
    """,
    "test_sslproto.SelectorStartTLSTests": """
        test_create_connection_memory_leak test_create_connection_ssl_failed_certificate
        test_create_connection_ssl_slow_handshake
        test_handshake_timeout test_start_tls_client_buf_proto_1 test_start_tls_client_corrupted_ssl
        test_start_tls_client_reg_proto_1 test_start_tls_server_1 test_start_tls_slow_client_cancel
        test_start_tls_wrong_args
    """,
    "test_ssl.TestSSL": """
        test_create_connection_memory_leak test_create_connection_ssl_1
        test_create_connection_ssl_failed_certificate test_create_connection_ssl_slow_handshake
        test_create_server_ssl_1 test_create_server_ssl_over_ssl test_flush_before_shutdown
        test_handshake_timeout_handler_leak test_remote_shutdown_receives_trailing_data
        test_shutdown_cleanly
        test_shutdown_timeout_after_eof_from_not_reading_peer test_shutdown_timeout_handler_leak
        test_shutdown_timeout_handler_not_set
        test_ssl_handshake_connection_lost test_ssl_handshake_timeout test_start_tls_client_buf_proto_1
        test_start_tls_client_corrupted_ssl test_start_tls_client_reg_proto_1 test_start_tls_server_1
        test_start_tls_slow_client_cancel
    """,
    "test_sendfile.SelectEventLoopTests": """
        test_sendfile test_sendfile_close_peer_after_receiving
        test_sendfile_close_peer_in_the_middle_of_receiving
        test_sendfile_fallback_close_peer_in_the_middle_of_receiving test_sendfile_for_closing_transp
        test_sendfile_force_fallback test_sendfile_no_fallback_for_fallback_transport
        test_sendfile_not_supported test_sendfile_offset test_sendfile_partial test_sendfile_pre_and_post_data
        test_sendfile_ssl test_sendfile_ssl_close_peer_after_receiving test_sendfile_ssl_partial
        test_sendfile_ssl_pre_and_post_data test_sock_sendfile_mix_with_regular_send
        test_sock_sendfile_offset test_sock_sendfile_success test_sock_sendfile_with_offset_and_count
        test_sock_sendfile_zero_size
    """,
    "test_server.SelectorStartServerTests": "test_start_server_1",
    "test_server.TestServer2": """
        test_close_clients test_close_with_hanging_client test_wait_closed_basic test_wait_closed_race
    """,
    "test_streams.StreamTests": NOT_THE_READER["tests of streams on a loop: test_cpython_loop.py"],
}
#: The same code is run, and no connection made, by some versions of these.
MAY_NOT_CONNECT = """
    test_sendfile_no_fallback_for_fallback_transport test_sendfile_not_supported
    test_start_tls_wrong_args test_wait_closed_basic test_wait_closed_race
"""
NOT_RUN = {
    "the kernel's sendfile: there is no descriptor to send to": {
        "test_sendfile.SelectEventLoopTests": """
            test_sendfile_force_unsupported_native test_sendfile_prevents_bare_write
        """,
    },
    "waits until asyncio's reader has paused its transport: ours leaves bytes in the ring instead": {
        "test_server.TestServer2": "test_abort_clients",
    },
    "puts a socket of its own into asyncio's transport: ours has none": {
        "test_ssl.TestSSL": "test_remote_shutdown_receives_trailing_data_on_slow_socket",
    },
    "a transport of ours whose handshake failed is freed by the collector, not before": {
        "test_sslproto.SelectorStartTLSTests": """
            test_create_connection_ssl_failed_certificate_no_cycles
            test_start_tls_failed_certificate_no_cycles
        """,
    },
    "gives the loop a socket that it accepted itself": {
        "test_ssl.TestSSL": "test_connect_accepted_socket",
    },
    "makes contexts, no connection": {"test_ssl.TestSSL": "test_ssl_connect_accepted_socket"},
    "is refused, so there is nothing of ours in it": {"test_ssl.TestSSL": "test_connect_timeout_warning"},
    "a function inside asyncio": {"test_sslproto.SelectorStartTLSTests": "test_buf_feed_data"},
    "over Unix sockets": {
        "test_server.SelectorStartServerTests": "test_start_unix_server_1",
        "test_server.TestServer2": """
            test_unix_server_addr_cleanup test_unix_server_cleanup_gone test_unix_server_cleanup_prevented
            test_unix_server_cleanup_replaced test_unix_server_sock_cleanup
        """,
    },
    "in test_cpython.py: run there, or not, with the reason": {
        "test_streams.StreamTests": " ".join([READER, UNCONNECTED, *NOT_THE_READER.values()]),
    },
}
CASES_NOT_RUN = {
    "Windows": """
        test_buffered_proto.BufferedProtocolProactorTests test_server.ProactorStartServerTests
        test_sslproto.ProactorStartTLSTests
    """,
    "the same tests with other selectors": """
        test_sendfile.EPollEventLoopTests test_sendfile.PollEventLoopTests
    """,
    "asyncio's TLS protocol alone, between mocks": "test_sslproto.SslProtoHandshakeTests",
    "over Unix sockets": "test_server.UnixServerCleanupTests",
}
#: Where it is not in every Python: since when.
SINCE = {"test_ssl.TestSSL": (3, 11), "test_server.TestServer2": (3, 12)}
#: Small rings, for tests that fill a connection with a few hundred KiB.
REGION_BYTES = {"test_sendfile.SelectEventLoopTests": 1 << 20}


def find(case: str) -> Any:
    module, name = case.split(".")
    return getattr(importlib.import_module(f"test.test_asyncio.{module}"), name)


def names_in(case: Any) -> set[str]:
    return {n for n in dir(case) if n.startswith("test")}


HERE = [case for case in RUN if sys.version_info >= SINCE.get(case, (3, 10))]


@pytest.mark.parametrize("case", HERE)
def test_all_tests_are_accounted_for(case: str) -> None:
    known = " ".join([RUN[case], *(cases.get(case, "") for cases in NOT_RUN.values())]).split()
    assert names_in(find(case)) <= set(known)


@pytest.mark.parametrize("module", sorted({case.split(".")[0] for case in HERE}))
def test_all_test_cases_are_accounted_for(module: str) -> None:
    known = " ".join([*RUN, *CASES_NOT_RUN.values()]).split()
    found = importlib.import_module(f"test.test_asyncio.{module}")
    cases = {
        f"{module}.{name}"
        for name, value in vars(found).items()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    }
    assert cases <= set(known)


def over_shared_memory(case: str) -> Any:
    """CPython's test case on our loop, with the tests hidden that are not in its list."""
    base = find(case)
    body: dict[str, Any] = dict.fromkeys(names_in(base) - set(RUN[case].split()))
    for name in RUN[case].split():
        # Those of 3.14 that would run in a process of their own, without our loop, or not at all.
        test: Any = getattr(base, name, None)
        if hasattr(test, "memuse"):
            body[name] = functools.partialmethod(test.__wrapped__, test.size)
    body["may_not_connect"] = frozenset(MAY_NOT_CONNECT.split())
    body["region_bytes"] = REGION_BYTES.get(case, OverSharedMemory.region_bytes)
    return type(case.split(".")[1], (OverSharedMemory, base), body)


for _case in HERE:
    globals()[_case.split(".")[1]] = over_shared_memory(_case)


@pytest.fixture(autouse=True, scope="module")
def _files_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    helper = importlib.import_module("test.support.os_helper")
    with mock.patch.object(helper, "TESTFN", str(tmp_path_factory.mktemp("cpython") / "file")):
        yield
