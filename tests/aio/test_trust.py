"""Who is believed to be who: names that are pinned to a section, and who is on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import shmsock
from shmsock.aio.datagram import create_datagram_endpoint
from tests.aio.conftest import Run, until
from tests.aio.processes import Child, Lines
from tests.aio.roles import Datagrams, echo
from tests.forked import ROOT

FAR = """
import asyncio, sys, shmsock
from shmsock.region.base import Region
from shmsock.aio.datagram import create_datagram_endpoint
from tests.aio.roles import Datagrams, echo, hear, say
# What a guest can do: say that it runs under the host's kernel, whose id it has read. It has no locks there.
Region.can_lock = property(lambda region: False)
Region.lock_section = lambda region, index: True
async def main():
    async with shmsock.attach(sys.argv[1], name="far") as node:
        await shmsock.start_server(echo, None, 7001, node=node)
        await shmsock.start_server(echo, "localhost", 7003, node=node)
        await create_datagram_endpoint(Datagrams, (None, 8001), node=node)
        say("ready")
        while await hear():
            try:
                reader, writer = await shmsock.open_connection("test", 7000, node=node)
                writer.write(b"x")
                say("read", await reader.readexactly(1))
                writer.close()
            except ConnectionRefusedError as error:
                say("refused", error.strerror)
            transport, _ = await create_datagram_endpoint(Datagrams, None, ("test", 8000), node=node)
            transport.sendto(b"far")
            say("sent")
asyncio.run(main())
"""


class Far:
    """A process that says that it is on this machine, and has nothing to prove it."""

    def __init__(self, region: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", FAR, region],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = Lines(self.process.stdout.fileno())

    async def tries(self) -> tuple[str, str]:
        """What becomes of a connect and of a datagram, from there."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        return await self.lines.next(), await self.lines.next()


@asynccontextmanager
async def far(region: str) -> AsyncIterator[Far]:
    made = Far(region)
    try:
        assert await made.lines.next() == "ready"
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


class Heard(Datagrams):
    def __init__(self) -> None:
        super().__init__()
        self.got: list[bytes] = []

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.append(data)


def test_a_boot_id_does_not_make_a_machine_this_one(run: Run, region: str) -> None:
    """Neither for who connects to "localhost", nor to who listens for this machine only."""

    async def main() -> None:
        async with far(region) as there, shmsock.attach(region, name="test") as node:
            await shmsock.start_server(echo, "localhost", 7000, node=node)
            _, heard = await create_datagram_endpoint(Heard, ("localhost", 8000), node=node)
            _, everybody = await create_datagram_endpoint(Heard, (None, 8002), node=node)
            refused, sent = await there.tries()
            assert (refused.split()[0], sent) == ("refused", "sent")
            for port in (7001, 8001):
                with pytest.raises(ConnectionRefusedError):
                    await shmsock.open_connection("localhost", port, node=node)
            with pytest.raises(ConnectionRefusedError, match=r"own machine only.* no lock under this kernel"):
                await shmsock.open_connection("far", 7003, node=node)
            # It is there all the same.
            reader, writer = await shmsock.open_connection("far", 7001, node=node)
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"
            writer.close()
            # And who is here has a lock.
            async with Child("serve", region, "near", 7002) as near:
                await near.says("ready")
                reader, writer = await shmsock.open_connection("localhost", 7002, node=node)
                writer.write(b"z")
                assert await reader.readexactly(1) == b"z"
                writer.close()
            async with shmsock.attach(region, name="beside") as beside:
                reader, writer = await shmsock.open_connection("test", 7000, node=beside)
                writer.write(b"z")
                assert await reader.readexactly(1) == b"z"
                writer.close()
                sender, _ = await create_datagram_endpoint(Datagrams, None, ("test", 8000), node=beside)
                sender.sendto(b"near")
                await until(lambda: heard.got == [b"near"], f"{heard.got}", 10)
                sender.close()
            assert everybody.got == []

    run(main())


def test_a_pinned_name_is_found_in_its_section_only(run: Run, region: str) -> None:
    """By streams, datagrams and getaddrinfo, the first time and later."""

    async def main() -> None:
        settings = shmsock.Settings(pin={"VM-b.shm": 2})
        async with contextlib.AsyncExitStack() as stack:
            node = await stack.enter_async_context(shmsock.attach(region, name="a", settings=settings))
            impostor = await stack.enter_async_context(shmsock.attach(region, name="vm-b", section=3))
            await shmsock.start_server(echo, None, 7000, node=impostor)
            _, wrong = await create_datagram_endpoint(Heard, (None, 8000), node=impostor)

            async def nobody_is_there(seen: str) -> None:
                with pytest.raises(ConnectionRefusedError, match=f"pinned to section 2, and {seen}"):
                    await shmsock.open_connection("vm-b", 7000, node=node)
                with pytest.raises(ConnectionRefusedError, match="pinned to section 2"):
                    await create_datagram_endpoint(Datagrams, None, ("vm-b", 8000), node=node)

            await nobody_is_there("nobody is there")
            async with shmsock.attach(region, name="other", section=2):
                await nobody_is_there("who is there calls itself 'other'")
            await nobody_is_there("nobody is there")
            for _ in range(2):  # it comes, goes and comes again
                # (It believes itself only, else the port would be taken.)
                async with shmsock.attach(region, name="vm-b", section=2, settings=settings) as real:
                    served: list[str] = []

                    async def serve(reader: Any, writer: Any, served: list[str] = served) -> None:
                        served.append("real")
                        await echo(reader, writer)

                    await shmsock.start_server(serve, None, 7000, node=real)
                    _, right = await create_datagram_endpoint(Heard, (None, 8000), node=real)
                    for count in range(1, 20):
                        reader, writer = await shmsock.open_connection("vm-b", 7000, node=node)
                        writer.write(b"x")
                        assert await reader.readexactly(1) == b"x"
                        writer.close()
                        await writer.wait_closed()
                        assert len(served) == count
                    sender, _ = await create_datagram_endpoint(Datagrams, None, ("vm-b", 8000), node=node)
                    sender.sendto(b"for vm-b")
                    await until(lambda right=right: right.got == [b"for vm-b"])  # type: ignore[misc]
                    sender.close()
            await until(lambda: node.statistics()["names"] == ["a", "section-3"])
            assert wrong.got == []

    run(main())


def test_an_impostor_does_not_send_in_a_pinned_name(run: Run, region: str) -> None:
    """Nor is its connection shown as that of who has it."""

    async def main() -> None:
        names: asyncio.Queue[str] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            names.put_nowait(writer.get_extra_info("peername")[0])
            writer.close()

        pinned = shmsock.Settings(pin={"vm-b": 2})
        async with (
            shmsock.attach(region, name="a", settings=pinned) as node,
            shmsock.attach(region, name="vm-b", section=2) as real,
            shmsock.attach(region, name="vm-b", section=3) as impostor,
        ):
            await shmsock.start_server(serve, None, 7000, node=node)
            for who, shown in ((real, "vm-b"), (impostor, "section-3")):
                _, writer = await shmsock.open_connection("a", 7000, node=who)
                assert await names.get() == shown
                writer.close()

    run(main())


def test_pins_and_sections_from_the_environment(
    run: Run, region: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", region)
    monkeypatch.setenv("SHMSOCK_NAME", "a")
    monkeypatch.setenv("SHMSOCK_PIN", "vm-b=2, vm-c=3")
    monkeypatch.setenv("SHMSOCK_SECTION", "5")

    async def main() -> None:
        async with shmsock.attach(region, name="vm-b", section=4, settings=shmsock.Settings(pin={})) as other:
            await shmsock.start_server(echo, None, 7000, node=other)
            with pytest.raises(ConnectionRefusedError, match="pinned to section 2"):
                await shmsock.open_connection("vm-b", 7000)
            await shmsock.start_server(echo, None, 7001)
            _, writer = await shmsock.open_connection(5, 7001, node=other)
            assert writer.get_extra_info("peername")[0] == "a"
            writer.close()

    run(main())


def test_a_section_that_is_taken_says_by_whom(run: Run, make: Any) -> None:
    region = make(peers=4)

    async def main() -> None:
        async with shmsock.attach(region, name="first", section=2) as node:
            assert node.section == 2
            with pytest.raises(OSError, match="section 2 is taken by 'first'") as caught:
                await shmsock.attach(region, name="second", section=2)
            assert caught.value.errno == errno.ENOSPC
        async with shmsock.attach(region, name="second", section=2) as node:
            assert node.section == 2
        for section in (-1, 4):
            with pytest.raises(ValueError, match=f"section {section} was asked for.*0 to 3"):
                await shmsock.attach(region, section=section)
        with pytest.raises(TypeError):
            await shmsock.attach(region, section="2")  # type: ignore[arg-type]

    run(main())


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
def test_getaddrinfo_knows_pins(region: str, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", region)
    monkeypatch.setenv("SHMSOCK_PIN", "vm-b=2")

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"the real one")
        writer.close()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with shmsock.attach(region, name="vm-b", section=3) as impostor:
            await shmsock.start_server(echo, None, 7000, node=impostor)
            with pytest.raises(socket.gaierror, match="pinned to section 2"):
                await loop.getaddrinfo("vm-b.shm", 7000, type=socket.SOCK_STREAM)
            pin = shmsock.Settings(pin={"vm-b": 2})
            async with shmsock.attach(region, name="vm-b", section=2, settings=pin) as real:
                await shmsock.start_server(hello, None, 7000, node=real)
                for _ in range(10):
                    found = await loop.getaddrinfo("vm-b.shm", 7000, type=socket.SOCK_STREAM)
                    for info in found:
                        reader, writer = await asyncio.open_connection(str(info[4][0]), 7000)
                        assert await reader.read() == b"the real one"
                        writer.close()
            for host in "vm-b.shm", str(found[0][4][0]):
                with pytest.raises(ConnectionRefusedError, match="pinned to section 2"):
                    await asyncio.open_connection(host, 7000)

    if factory == "uvloop":
        import uvloop

        loop = shmsock.loop_factory(uvloop.Loop)()
    else:
        loop = shmsock.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 60))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
