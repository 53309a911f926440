"""Internet addresses that nodes publish: what is told, what is believed, who is found by them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

import shmsock
from shmsock.address import Address, may_be_published, packed, parsed_address, unpacked
from shmsock.aio import publisher
from shmsock.aio.attach import current_node, node_if_any
from shmsock.aio.endpoints import create_connection
from shmsock.aio.published import peer_of
from shmsock.engine import layout as lay
from shmsock.engine.memory import Memory
from tests.aio.conftest import Run, until
from tests.aio.liars import memory_of
from tests.aio.networks import Change, network_of_its_own
from tests.aio.processes import Child
from tests.anyio_face.conftest import until as anyio_until

ADDRESS, OTHER, SIX = "10.77.0.5", "10.77.0.6", "fd77::5"
RANGES = "10.77.0.0/24,fd77::/64"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Change]:
    with network_of_its_own() as change:
        change("add", f"{ADDRESS}/32")
        change("add", f"{SIX}/128")
        change("add", "10.78.0.1/32")
        monkeypatch.setenv("SHMSOCK_PUBLISH", RANGES)
        yield change


def section_of(node: shmsock.Node, ip: str, port: int = 7000) -> int | None:
    host = peer_of(node, ip, port)
    try:
        return None if host is None else node.find(host, port, ()).section
    except ConnectionRefusedError:  # it was withdrawn in between
        return None


def info(region: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "shmsock", "info", "--json", region], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)["regions"][0]
    return found


@pytest.mark.parametrize(
    "text", ["10.0.0.1/24", "10.0.0.0/33", "vm-b", "fd00::/129", "10.0.0.0/24;fd00::/64"]
)
def test_ranges_that_are_none(run: Run, region: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_PUBLISH", f"fd00::/64, {text}")

    async def main() -> None:
        with pytest.raises(ValueError, match=r"^SHMSOCK_PUBLISH: ") as told:
            await shmsock.attach(region)
        assert repr(text) in str(told.value)

    run(main())


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("10.0.0.5", True),
        ("fd00::5", True),
        ("2001:db8::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("169.254.1.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("ff01::1", False),
    ],
)
def test_addresses_that_may_be_published(text: str, may: bool) -> None:
    address: Address = ip_address(text)
    assert unpacked(packed(address)) == address
    assert may_be_published(address) is may


def test_spellings() -> None:
    assert parsed_address("::ffff:10.0.0.5") == ip_address("10.0.0.5")
    assert parsed_address("FD00:0::5") == ip_address("fd00::5")
    assert parsed_address("vm-b") is parsed_address("fe80::1%lo") is parsed_address("10.0.0") is None


def test_published_and_found(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child, shmsock.attach(region, name="a") as a:
            await child.says("ready")
            section = a.find("b", 7000, ()).section
            assert section_of(a, ADDRESS) == section_of(a, SIX) == section
            assert section_of(a, "fd77:0::5") == section_of(a, f"::ffff:{ADDRESS}") == section
            assert section_of(a, ADDRESS, 7001) is None  # nobody listens there
            assert section_of(a, OTHER) is section_of(a, "10.78.0.1") is section_of(a, "b") is None
            assert sorted(a.statistics()["published"]) == [ADDRESS, SIX]
            shown = {s["name"]: s["addresses"] for s in info(region)["content"]["sections"] if s["name"]}
            assert shown == {"a": [ADDRESS, SIX], "b": [ADDRESS, SIX]}
            child.tell()
            assert await child.ended() == 0
            assert section_of(a, ADDRESS) is None

    run(main())


def test_nothing_without_being_asked(
    run: Run, region: str, network: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHMSOCK_PUBLISH")

    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child, shmsock.attach(region, name="a") as a:
            await child.says("ready")
            assert a.statistics()["published"] == []
            assert section_of(a, ADDRESS) is None

    run(main())


def test_addresses_come_and_go(run: Run, region: str, network: Change) -> None:
    """The kernel tells, and the peer sees it at its next look."""

    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child, shmsock.attach(region, name="a") as a:
            await child.says("ready")
            assert section_of(a, OTHER) is None
            network("add", f"{OTHER}/32")
            await until(lambda: section_of(a, OTHER) is not None)
            network("del", f"{ADDRESS}/32")
            await until(lambda: section_of(a, ADDRESS) is None)
            assert section_of(a, SIX) is not None

    run(main())


def test_more_than_there_is_room_for(
    run: Run, region: str, network: Change, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(100, 110):
        network("add", f"10.77.0.{i}/32")

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            assert len(a.statistics()["published"]) == lay.ADDRESSES

    run(main())
    assert "12 addresses" in caplog.text


def test_killed_stopped_and_restarted(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            async with Child("serve", region, "b", loop=run.loop) as child:
                await child.says("ready")
                assert section_of(a, ADDRESS) is not None
                child.kill()
                assert section_of(a, ADDRESS) is None  # at once: its lock fell
            async with Child("serve", region, "b", loop=run.loop) as child:
                await child.says("ready")
                assert section_of(a, ADDRESS) is not None
                child.stop()
                await until(lambda: section_of(a, ADDRESS) is None)
                assert a.statistics()["peers"] == 2  # and it is not taken for dead yet
                child.resume()
                await until(lambda: section_of(a, ADDRESS) is not None)

    run(main())


def test_connecting_to_one_that_stands_still(run: Run, region: str, network: Change) -> None:
    """Who has another way does not wait until it is dead."""

    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child:
            await child.says("ready")
            async with shmsock.attach(region, name="a") as a:
                address = parsed_address(ADDRESS)
                conn = await a.connect(address, 7000, impatient=True)
                conn.close()
                child.stop()
                with pytest.raises(ConnectionError):
                    await a.connect(address, 7000, impatient=True)
                assert a.statistics()["peers"] == 2
                assert not a.engine.impatient
                child.resume()

    run(main())


def test_processes_of_one_machine_take_turns(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        async with (
            Child("sign", region, "b", loop=run.loop) as one,
            Child("sign", region, "b", loop=run.loop) as two,
            shmsock.attach(region, name="a") as a,
        ):
            await one.says("ready")
            await two.says("ready")
            found = []
            for _ in range(4):
                conn = await a.connect(parsed_address(ADDRESS), 7000)
                found.append(conn.peer)
                conn.close()
            assert len(set(found)) == 2
            assert found[:2] == found[2:]

    run(main())


def test_two_machines_with_one_address(
    run: Run, region: str, network: Change, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with (
            Child("serve", region, "b", loop=run.loop) as one,
            Child("serve", region, "c", loop=run.loop) as two,
        ):
            await one.says("ready")
            await two.says("ready")
            with memory_of(region) as layout:
                names = [getattr(layout.identity(i), "name", "") for i in range(layout.peers)]
                layout.memory.write(layout.section(names.index("c")) + lay.BOOT, b"another kernel's")
            async with shmsock.attach(region, name="a") as a:
                assert section_of(a, ADDRESS) is section_of(a, ADDRESS) is None
                warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
                assert len(warnings) == 1
                assert all(word in warnings[0] for word in (ADDRESS, "'b'", "'c'"))
                two.kill()
                await until(lambda: section_of(a, ADDRESS) is not None)

    run(main())


# -- connections to such an address


class Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.line: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.line.set_result(data)


async def way_to(ip: str, port: int = 7000, going: asyncio.Event | None = None, **kwds: Any) -> str:
    """Connect, as a loop does that was told to take such ways; say which way the bytes went. `going`: is set
    when it is to be TCP."""

    def over_tcp() -> Any:
        if going is not None:
            going.set()
        return asyncio.get_running_loop().create_connection(Client, ip, port, **kwds)

    host, node = parsed_address(ip), await node_if_any()
    if node is None:
        transport, protocol = await over_tcp()
    else:
        transport, protocol = await create_connection(
            Client,
            host,
            port,
            node=node,
            seen_as=(ip, port, 0, 0) if ":" in ip else (ip, port),
            otherwise=lambda error: over_tcp(),
            **kwds,
        )
    transport.write(b"hello\n")
    answer: str = (await protocol.line).decode()
    assert answer.endswith(" hello\n")
    peername, sockname = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    assert peername == ((ip, port, 0, 0) if ":" in ip else (ip, port))
    assert sockname[0] == ip  # it is of this machine too
    assert len(sockname) == len(peername)
    transport.close()
    return answer.split()[0]


@pytest.fixture
def implicit(region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", region)
    monkeypatch.setenv("SHMSOCK_NAME", "a")


def test_through_memory_while_there_is_a_peer(run: Run, region: str, network: Change, implicit: None) -> None:
    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS, SIX], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to(ADDRESS) == await way_to(SIX) == "shm"
            node = await current_node()
            assert node.statistics()["connected"] == 2
            with pytest.raises(ConnectionRefusedError):
                await way_to(ADDRESS, 7001)  # nobody, neither way
            child.tell()
            await child.says("left")
            assert await way_to(ADDRESS) == "tcp"
            assert node.statistics()["connected"] == 2

    run(main())


def test_a_peer_that_stands_still_is_asked_over_tcp(
    run: Run, region: str, network: Change, implicit: None
) -> None:
    """The kernel answers for the stopped process, and the bytes wait there."""

    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to(ADDRESS) == "shm"
            child.stop()
            going = asyncio.Event()
            waiting = asyncio.create_task(way_to(ADDRESS, going=going))
            await going.wait()
            assert (await current_node()).statistics()["peers"] == 2  # it is not taken for dead yet
            child.resume()
            assert await waiting == "tcp"

    run(main())


def test_over_tcp_when_there_is_no_room(
    run: Run, make: Callable[..., str], network: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = make(size=1 << 19, peers=2)
    monkeypatch.setenv("SHMSOCK_REGION", region)

    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            node = await current_node()
            conns = [await node.connect("b", 7000) for _ in range(node.engine.layout.connections)]
            with pytest.raises(OSError, match="slots"):
                await node.connect("b", 7000)
            assert await way_to(ADDRESS) == "tcp"
            for conn in conns:
                conn.close()

    run(main())


@pytest.mark.parametrize("how", ["missing", "nonsense", "full"])
def test_over_tcp_without_a_region(
    run: Run,
    make: Callable[..., str],
    network: Change,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    region = make(peers=1)
    there = tmp_path / "region"
    if how == "nonsense":
        there.write_bytes(b"nonsense" * 10000)
    monkeypatch.setenv("SHMSOCK_REGION", region if how == "full" else str(there))

    async def main() -> None:
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to(ADDRESS) == await way_to(ADDRESS) == "tcp"
            assert there.exists() is (how == "nonsense")

    run(main())
    assert caplog.text.count("TCP is used") == 1


def test_a_region_that_comes_later(run: Run, region: str, network: Change, implicit: None) -> None:
    os.rename(region, f"{region}-aside")

    async def main() -> None:
        def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"tcp hello\n")
            writer.close()

        async with await asyncio.start_server(answer, ADDRESS, 7000):
            assert await way_to(ADDRESS) == "tcp"
        os.rename(f"{region}-aside", region)
        async with Child("both", region, "b", [ADDRESS], loop=run.loop) as child:
            await child.says("ready")
            assert await way_to(ADDRESS) == "shm"

    run(main())


Liar = Callable[[lay.Layout, int, int], None]


def _word(count: int) -> Liar:
    def lie(layout: lay.Layout, at: int, word: int) -> None:
        layout.memory.store(at + lay.PUBLISHED, word & ~0xFFFFFF | 1 << 8 | count)

    return lie


def _another_life(layout: lay.Layout, at: int, word: int) -> None:
    layout.memory.store(at + lay.PUBLISHED, word ^ 1 << 40)


def _addresses(*texts: str) -> Liar:
    def lie(layout: lay.Layout, at: int, word: int) -> None:
        raw = b"".join(packed(ip_address(text)) for text in texts)
        layout.memory.write(at + lay.ADDRESS, raw)
        layout.memory.store(at + lay.PUBLISHED, (word & ~0xFFFFFF) + (99 << 8 | len(texts)))

    return lie


@pytest.mark.parametrize(
    "lie",
    [
        *map(_word, (0, 7, 100, 254, 255)),
        _another_life,
        _addresses("127.0.0.1", "::", "::1", "224.0.0.1", "fe80::1", "169.254.0.1"),
    ],
)
def test_nonsense_is_not_believed(run: Run, region: str, network: Change, lie: Liar) -> None:
    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child, shmsock.attach(region, name="a") as a:
            await child.says("ready")
            section = section_of(a, ADDRESS)
            assert section is not None
            with memory_of(region) as layout:
                at = layout.section(section)
                word = layout.memory.load(at + lay.PUBLISHED)
                lie(layout, at, word)
                for ip in (ADDRESS, "127.0.0.1", "::", "::1", "224.0.0.1", "fe80::1", "169.254.0.1"):
                    assert section_of(a, ip) is None
                assert layout.published(section, layout.life(section))[1] == frozenset()
                _addresses(OTHER)(layout, at, word)
                assert section_of(a, OTHER) == section  # it says so, and that is all there is to know

    run(main())


def test_a_list_that_changes_while_it_is_read(
    run: Run, region: str, network: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="b") as b, shmsock.attach(region, name="a") as a:
            await shmsock.start_server(lambda r, w: None, None, 7000, node=b)
            layout = a.engine.layout
            life = layout.life(b.section)
            before, read = layout.published(b.section, life)[1], Memory.read
            assert before == {ip_address(ADDRESS), ip_address(SIX)}

            def read_slowly(memory: Memory, offset: int, n: int) -> bytes:
                found = read(memory, offset, n)
                b.engine.publish([ip_address(OTHER), ip_address(SIX)])
                return found

            with monkeypatch.context() as patch:
                patch.setattr(Memory, "read", read_slowly)
                assert layout.published(b.section, life)[1] == frozenset()
            assert layout.published(b.section, life)[1] == {ip_address(OTHER), ip_address(SIX)}
            assert section_of(a, OTHER) == b.section

    run(main())


def test_left_over_words_are_nobodys(
    run: Run, region: str, network: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that knows nothing of these words leaves a former owner's in place."""
    monkeypatch.setattr(lay.Layout, "publish", lambda *args: None)

    async def main() -> None:
        async with Child("serve", region, "b", loop=run.loop) as child:
            await child.says("ready")
            child.tell()
            await child.ended()
        async with shmsock.attach(region, name="b", section=0) as b:
            await shmsock.start_server(lambda r, w: None, None, 7000, node=b)
            with memory_of(region) as layout:
                word = layout.memory.load(layout.section(0) + lay.PUBLISHED)
            assert word & 0xFF == 2
            assert section_of(b, ADDRESS) is None

    run(main())


def test_a_kernel_that_tells_nothing(
    run: Run, region: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(groups: int = 0) -> Any:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setenv("SHMSOCK_PUBLISH", RANGES)
    monkeypatch.setattr(publisher, "_netlink", refused)

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            assert a.statistics()["published"] == []

    run(main())
    assert "does not tell the addresses" in caplog.text


def test_on_trio(region: str, network: Change) -> None:
    import trio

    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            assert section_of(a, OTHER) is None
            a.listen([None], 7000, backlog=0, reuse_port=False)
            network("add", f"{OTHER}/32")
            await anyio_until(lambda: section_of(a, OTHER) is not None)

    trio.run(main)


def test_a_forked_child_leaves_the_parents_alone(run: Run, region: str, network: Change) -> None:
    async def main() -> None:
        async with shmsock.attach(region, name="a") as a:
            await shmsock.start_server(lambda r, w: None, None, 7000, node=a)
            child = os.fork()
            if not child:
                os._exit(a.publisher is None or a.publisher._sock is None or a.publisher._sock.fileno() >= 0)
            assert os.waitpid(child, 0)[1] == 0
            network("add", f"{OTHER}/32")
            await until(lambda: section_of(a, OTHER) is not None)

    run(main())
