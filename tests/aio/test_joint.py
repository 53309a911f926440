"""UDP endpoints that are not connected, on a loop that knows `.shm` hosts: each datagram goes where its
address leads, to the network or to a peer."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

import shmsock
from shmsock import Settings
from shmsock.aio import attach, names
from shmsock.aio.datagram import DATAGRAM_MAX
from shmsock.aio.joint import JointTransport
from shmsock.engine.datagram_links import OVERHEAD
from tests.aio.conftest import until
from tests.aio.test_addresses import Datagrams, Run, base, datagrams, node_of_this_loop, resolve, run_shm

__all__ = ["base", "run_shm"]  # fixtures

KERNEL: dict[str, Any] = {
    "local_addr": {"local_addr": ("127.0.0.1", 0)},
    "family": {"family": socket.AF_INET},
    "sock": {},
}


def own_socket() -> socket.socket:
    """As aioquic makes one."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    return sock


@pytest.mark.parametrize("how", KERNEL)
def test_each_way(run_shm: Run, how: str) -> None:
    """To a peer, to the network, and back: sources are told as they were sent to."""

    async def main() -> None:
        network, outside = await datagrams(local_addr=("127.0.0.1", 0))
        assert isinstance(network, JointTransport)
        assert node_of_this_loop() == []  # nobody attached for that
        peer, inside = await datagrams(local_addr=("me.shm", 9))
        sending, protocol = await datagrams(**(KERNEL[how] or {"sock": own_socket()}))
        sock = sending.get_extra_info("socket")
        address = await resolve("me.shm", 9, socket.SOCK_DGRAM)
        ways = [address, address[:2], (*address[:2], 0, 0), (await resolve("localhost.shm", 9))]
        there = network.get_extra_info("sockname")
        if sock.family == socket.AF_INET6:
            there = (f"::ffff:{there[0]}", there[1], 0, 0)
        for i, way in enumerate(ways):
            sending.sendto(b"in%d" % i, way)
            sending.sendto(b"out%d" % i, there)
        for name in ("me.shm", "ME.SHM.", b"me.shm", "localhost.shm"):
            sending.sendto(b"name", (name, 9))
        await until(lambda: len(inside.got) == 8 and len(outside.got) == 4)
        assert [data for data, _ in inside.got] == [b"in0", b"in1", b"in2", b"in3"] + [b"name"] * 4
        assert {source for _, source in inside.got} == {inside.got[0][1]}
        assert names.is_address(inside.got[0][1][0])
        peer.sendto(b"answer", inside.got[0][1])
        network.sendto(b"reply", outside.got[0][1])
        await until(lambda: len(protocol.got) == 2)
        assert dict(protocol.got)[b"answer"] in ways
        assert dict(protocol.got)[b"reply"] == there
        assert protocol.errors == []
        for transport in (network, peer, sending):
            transport.close()
        await until(lambda: protocol.log == ["made", "lost"])

    run_shm(main())


def test_the_source_is_who_was_asked(run_shm: Run) -> None:
    """Whatever the spelling: programs compare (DNS, QUIC)."""

    async def main() -> None:
        peer, inside = await datagrams(local_addr=("*.shm", 9))
        for host in ("me.shm", "localhost.shm", "*.shm"):
            address = await resolve(host, 9, socket.SOCK_DGRAM)
            for way in (address, address[:2], (*address[:2], 0, 0)):
                for how in ({"local_addr": ("127.0.0.1", 0)}, {"local_addr": ("me.shm", 0)}):
                    asking, protocol = await datagrams(**how)
                    inside.got.clear()
                    asking.sendto(b"question", way)
                    await until(lambda: inside.got)
                    peer.sendto(b"answer", inside.got[0][1])
                    await until(lambda: protocol.got)  # noqa: B023
                    assert protocol.got == [(b"answer", way)]
                    asking.close()
        peer.close()

    run_shm(main())


def test_what_is_sent_before_the_node_is_there(run_shm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits, in order, up to the bound; the protocol is asked to pause."""
    bound = Settings().datagram_queue_bytes

    async def main() -> None:
        held, gate = attach._make, asyncio.Event()

        async def make(*args: Any) -> Any:
            await gate.wait()
            return await held(*args)

        monkeypatch.setattr(attach, "_make", make)
        sending, protocol = await datagrams(local_addr=("127.0.0.1", 0))
        sending.sendto(b"", ("me.shm", 9))
        size, count = 40000, 0
        while (count + 1) * (size + OVERHEAD) + OVERHEAD <= bound:
            sending.sendto(bytes(size), ("me.shm", 9))
            count += 1
        assert sending.get_write_buffer_size() == count * (size + OVERHEAD) + OVERHEAD
        sending.sendto(bytes(size), ("me.shm", 9))  # too much
        sending.sendto(b"", ("me.shm", 9))  # small enough
        assert protocol.log == ["made", "pause"]
        with pytest.raises(OSError, match="too long"):
            sending.sendto(bytes(DATAGRAM_MAX + 1), ("me.shm", 9))
        with pytest.raises(TypeError, match="bytes-like"):
            sending.sendto("text", ("me.shm", 9))
        gate.set()
        await until(lambda: "resume" in protocol.log)
        (node,) = node_of_this_loop()
        assert node.statistics()["datagrams_dropped_unsent"] == 1
        assert node.statistics()["datagrams_unreachable"] == count + 2  # nobody has that port
        sending.close()
        await until(lambda: protocol.log[-1] == "lost")
        assert protocol.log == ["made", "pause", "resume", "lost"]

    run_shm(main())


def test_closed_at_once(run_shm: Run) -> None:
    """close() sends what waits, abort() drops it; connection_lost() comes once."""

    async def main() -> None:
        peer, inside = await datagrams(local_addr=("me.shm", 9))
        (node,) = node_of_this_loop()
        for end in ("abort", "close"):
            for first in (b"", b"first"):  # with an endpoint in shared memory already, and without
                sending, protocol = await datagrams(local_addr=("127.0.0.1", 0))
                if first:
                    sending.sendto(first, ("me.shm", 9))
                    await until(lambda: inside.got.pop() if inside.got else None)
                sending.sendto(end.encode(), ("me.shm", 9))
                getattr(sending, end)()
                assert sending.is_closing()
                sending.close()
                sending.sendto(b"too late", ("me.shm", 9))
                await until(lambda: protocol.log == ["made", "lost"])  # noqa: B023
                if end == "close" or first:
                    await until(lambda: [d for d, _ in inside.got] == [end.encode()])  # noqa: B023
                    inside.got.clear()
        await asyncio.sleep(0)
        assert inside.got == []
        peer.close()
        await until(lambda: not node.transports)

    run_shm(main())


def test_a_region_that_cannot_be_used(run_shm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by error_received(); what goes to the network goes on."""

    async def main() -> None:
        monkeypatch.setenv("SHMSOCK_REGION", "/dev/shm/there-is-none/of-that-name")
        network, outside = await datagrams(local_addr=("127.0.0.1", 0))
        for _ in range(2):
            network.sendto(b"x", ("me.shm", 9))
            await until(lambda: outside.errors)
            (error,) = outside.errors
            assert isinstance(error, FileNotFoundError)
            outside.errors.clear()
        network.sendto(b"x", network.get_extra_info("sockname"))
        await until(lambda: outside.got)
        network.close()

    run_shm(main())


def test_who_is_told_of_a_failure_may_send_again(run_shm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """From error_received() itself: that datagram has its own error, and is not dropped with those before."""

    async def main() -> None:
        monkeypatch.setenv("SHMSOCK_REGION", "/dev/shm/there-is-none/of-that-name")
        network, outside = await datagrams(local_addr=("127.0.0.1", 0))
        told: list[Exception] = []

        def error_received(exc: Exception) -> None:
            told.append(exc)
            if len(told) < 3:
                network.sendto(b"again", ("me.shm", 9))

        monkeypatch.setattr(outside, "error_received", error_received)
        network.sendto(b"x", ("me.shm", 9))
        await until(lambda: len(told) == 3)
        network.close()

    run_shm(main())


def test_the_node_ends_before_the_endpoint(run_shm: Run) -> None:
    """The next datagram finds another."""

    async def main() -> None:
        sending, protocol = await datagrams(local_addr=("127.0.0.1", 0))
        for _ in range(2):
            peer, inside = await datagrams(local_addr=("me.shm", 9))
            (node,) = node_of_this_loop()
            sending.sendto(b"x", ("me.shm", 9))
            await until(lambda: inside.got)  # noqa: B023
            await node.aclose()
            await until(lambda: inside.log[-1] == "lost")  # noqa: B023
            assert peer.is_closing()
        assert protocol.log == ["made"]
        sending.close()
        await until(lambda: protocol.log == ["made", "lost"])

    run_shm(main())


@pytest.mark.parametrize("port", ["9", 70000, None])
def test_an_address_that_is_none(run_shm: Run, port: Any) -> None:
    """It ends an endpoint as over UDP, and never moves it to another port behind its program's back."""

    async def main() -> None:
        ended: list[Exception | None] = []
        peer, inside = await datagrams(local_addr=("me.shm", 9))
        joint, protocol = await datagrams(local_addr=("127.0.0.1", 0))
        protocol.connection_lost = ended.append  # type: ignore[assignment]
        joint.sendto(b"good", ("me.shm", 9))
        await until(lambda: len(inside.got) == 1)
        joint.sendto(b"bad", ("me.shm", port))
        await until(lambda: ended)
        assert isinstance(ended[0], (TypeError, OverflowError))
        assert joint.is_closing()
        assert protocol.errors == []
        peer.close()

    run_shm(main())


def test_another_thread(run_shm: Run) -> None:
    """Is told so, as by all that is in shared memory."""

    async def main() -> None:
        sending, protocol = await datagrams(local_addr=("127.0.0.1", 0))
        for _ in range(2):  # before there is an endpoint in shared memory, and then
            with pytest.raises(shmsock.WrongThreadError):
                await asyncio.to_thread(sending.sendto, b"x", ("me.shm", 9))
            sending.sendto(b"x", ("me.shm", 9))
            await until(node_of_this_loop)
            await until(lambda: node_of_this_loop()[0].transports)
        sending.close()
        await until(lambda: protocol.log == ["made", "lost"])

    run_shm(main())


def test_protocols_and_limits(run_shm: Run) -> None:
    async def main() -> None:
        peer, inside = await datagrams(local_addr=("me.shm", 9))
        sending, before = await datagrams(local_addr=("127.0.0.1", 0))
        sending.set_write_buffer_limits(0)
        after = Datagrams()
        assert sending.get_protocol() is before
        sending.set_protocol(after)
        assert sending.get_protocol() is after
        sending.sendto(b"question", ("me.shm", 9))
        await until(lambda: inside.got)
        peer.sendto(b"answer", inside.got[0][1])
        await until(lambda: [data for data, _ in after.got] == [b"answer"])
        assert before.got == []
        assert "JointTransport" in repr(sending)
        for transport in (peer, sending):
            transport.close()
        await until(lambda: after.log[-1:] == ["lost"])

    run_shm(main())


def test_what_is_not_joint(run_shm: Run) -> None:
    async def main() -> None:
        connected, _ = await datagrams(remote_addr=("127.0.0.1", 9))
        assert not isinstance(connected, JointTransport)
        connected.close()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(("127.0.0.1", 9))
        connected, _ = await datagrams(sock=sock)
        assert not isinstance(connected, JointTransport)
        connected.close()

    run_shm(main())
