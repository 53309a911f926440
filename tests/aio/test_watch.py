"""A region whose file is removed or made anew under live processes: they are told, and where they can, they
follow."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import shmsock
from shmsock.aio.attach import current_node, prepare_region
from shmsock.region import create_file
from shmsock.testing import make_region
from tests.aio.conftest import LOOPS, Run, keepers, until
from tests.aio.processes import PATIENCE, Child, runner
from tests.aio.roles import echo

SIZE = 8 << 20


def create(path: Path) -> None:
    """As `shmsock create` does."""
    create_file(str(path), SIZE, prepare=prepare_region)


def make_anew(path: Path) -> None:
    path.unlink()
    create(path)


def rename_over(path: Path) -> None:
    os.rename(make_region(path.parent, size=SIZE), path)


def move_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


def remove_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="shmsock-test-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def path(directory: Path) -> Path:
    create(directory / "region")
    return directory / "region"


@pytest.fixture
def implicit(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The region that module-level functions use."""
    monkeypatch.setenv("SHMSOCK_REGION", str(path))
    monkeypatch.setenv("SHMSOCK_NAME", "here")
    return path


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "shmsock"]


def old_mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{path} (deleted)")


@asynccontextmanager
async def serving(path: Path, name: str = "server") -> AsyncIterator[Child]:
    async with Child("serve", str(path), name) as child:
        await child.says("ready")
        yield child


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello\n")
    await writer.drain()
    assert await reader.readline() == b"hello\n"


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass


async def ask(host: str = "server", **kwargs: Any) -> None:
    reader, writer = await shmsock.open_connection(host, 7000, **kwargs)
    await talk(reader, writer)
    await end(writer)


# -- who is told, and what


def test_servers_are_told(run: Run, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Callable[[Path], None]] = {
        "removed": Path.unlink,
        "gone": remove_directory,
        "moved away": move_away,
        "replaced by another one": make_anew,
        "replaced": rename_over,
    }

    async def one(what: str, change: Callable[[Path], None]) -> None:
        folder = directory / what.replace(" ", "-")
        folder.mkdir()
        path = folder / "region"
        create(path)
        async with (
            shmsock.attach(str(path), name="server") as node,
            shmsock.attach(str(path), name="beside") as other,
        ):
            server = await shmsock.start_server(echo, None, 7000, node=node)
            transport, _ = await shmsock.create_datagram_endpoint(
                asyncio.DatagramProtocol, (None, 9000), node=node
            )
            assert node.statistics()["region_replaced"] == ""
            change(path)
            await until(lambda: len([text for text in said(caplog) if str(path) in text]) == 2)
            looks = 0
            look = node.engine.once_a_second

            def count() -> None:
                nonlocal looks
                looks += 1
                look()

            node.engine.once_a_second = count
            await until(lambda: looks == 2)
            texts = [text for text in said(caplog) if str(path) in text]
            assert len(texts) == 2, "told more than once"
            (text,) = (text for text in texts if "Node 'server'" in text)
            seen = "removed" if what == "gone" else what
            assert f"the file {path} was {seen}" in text
            assert "ports 7000 and ports 9000 for datagrams" in text
            assert f"'beside' (process {os.getpid()}, section {other.section})" in text
            assert ("shmsock create" in text) == (not path.exists())
            assert "ttach again" in text
            assert node.statistics()["region_replaced"].startswith(f"the file {path} was {seen}")
            await ask(node=other)  # what is attached goes on
            server.close()
            transport.close()

    async def main() -> None:
        await asyncio.gather(*(one(what, change) for what, change in changes.items()))

    run(main())


def test_who_listens_later_is_told_too(run: Run, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with shmsock.attach(str(path)) as node:
            move_away(path)
            await until(lambda: len(said(caplog)) == 1)
            assert "listens here" not in said(caplog)[0]
            server = await shmsock.start_server(echo, None, 7000, node=node)
            await until(lambda: len(said(caplog)) == 2)
            assert "Newcomers do not reach what listens here: ports 7000." in said(caplog)[1]
            server.close()

    run(main())
    assert len(said(caplog)) == 2


def test_nothing_is_told_without_need(run: Run, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with shmsock.attach(str(path)) as node:
            looks = 0
            displaced = node.region.displaced

            def counted() -> str:
                nonlocal looks
                looks += 1
                return displaced()

            node.region.displaced = counted  # type: ignore[method-assign]
            server = await shmsock.start_server(echo, None, 7000, node=node)
            reader, writer = await shmsock.open_connection(node.name, 7000, node=node)
            begin = asyncio.get_running_loop().time()
            while looks < 2:
                await talk(reader, writer)  # a busy loop looks no more often than an idle one
            assert asyncio.get_running_loop().time() - begin > 0.9
            os.utime(path)
            await end(writer)
            server.close()

    run(main())
    assert said(caplog) == []


def test_back_where_it_was(run: Run, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with shmsock.attach(str(path)) as node:
            move_away(path)
            assert "moved away" in node.statistics()["region_replaced"]
            path.with_name("moved").rename(path)
            assert node.statistics()["region_replaced"] == ""

    run(main())
    assert said(caplog) == []


# -- implicit nodes follow


async def by_streams(host: str) -> None:
    await ask(host)


async def by_streams_with_options(host: str) -> None:
    await ask(host, local_addr=(None, 0))


async def by_protocol(host: str) -> None:
    answer = asyncio.get_running_loop().create_future()

    class Protocol(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            answer.set_result(data)

    transport, _ = await shmsock.create_connection(Protocol, host, 7000)
    transport.write(b"hello")
    assert await answer == b"hello"
    transport.close()


@pytest.mark.parametrize("change", [make_anew, rename_over])
@pytest.mark.parametrize("face", [by_streams, by_streams_with_options, by_protocol])
def test_a_client_finds_the_server_of_the_new_file(
    run: Run,
    implicit: Path,
    face: Callable[[str], Awaitable[None]],
    change: Callable[[Path], None],
) -> None:
    async def main() -> None:
        for _ in range(2):
            async with serving(implicit) as server:
                await face("server")
                server.kill()
            with pytest.raises(OSError, match="server"):
                await face("server")
            change(implicit)
        async with serving(implicit):
            await face("server")  # at once: that it is not found there makes it look
            node = await current_node()
            assert node.region.identity[1] == implicit.stat().st_ino
            assert node.name == "here"
            assert node.statistics()["region_replaced"] == ""
            await until(lambda: not old_mappings(implicit) and keepers() == 1, "the old node ends")

    run(main())


def test_a_client_of_a_shm_loop_finds_it(loop_name: str, implicit: Path) -> None:
    import uvloop

    async def face() -> None:
        reader, writer = await asyncio.open_connection("server.shm", 7000)
        await talk(reader, writer)
        await end(writer)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(implicit) as server:
            await face()
            server.kill()
        make_anew(implicit)
        async with serving(implicit):
            ((*_, address),) = await loop.getaddrinfo("server.shm", 7000, type=1)
            reader, writer = await asyncio.open_connection(*address[:2])
            await talk(reader, writer)
            await end(writer)
            await face()

    loop = shmsock.loop_factory(uvloop.Loop if loop_name == "uvloop" else None)()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_who_looked_already_asks_the_new_one_first(run: Run, implicit: Path) -> None:
    async def main() -> None:
        async with serving(implicit):
            await ask()
            old = await current_node()
            make_anew(implicit)
            await until(lambda: old.watch.lost)
            with pytest.raises(OSError, match="restart it"):
                await ask()  # the server has not been restarted
            async with serving(implicit):
                await ask()
            assert (await current_node()) is not old

    run(main())


def test_removed_and_nothing_new_yet(run: Run, implicit: Path) -> None:
    async def main() -> None:
        async with serving(implicit):
            await ask()
            node = await current_node()
            implicit.unlink()
            await until(lambda: node.watch.lost)
            await ask()  # who is there is reached as ever
            assert (await current_node()) is node
            with pytest.raises(OSError, match=f"the file {implicit} was removed while .* make it anew"):
                await shmsock.open_connection("nobody", 7000)

    run(main())


def test_connections_live_on_in_the_old_file(run: Run, implicit: Path) -> None:
    async def main() -> None:
        async with serving(implicit) as first:
            reader, writer = await shmsock.open_connection("server", 7000)
            await talk(reader, writer)
            make_anew(implicit)
            async with serving(implicit, "second"):
                await ask("second")
                await talk(reader, writer)
                await until(lambda: keepers() == 2 and old_mappings(implicit))
                await end(writer)
                await until(lambda: keepers() == 1 and not old_mappings(implicit), "the old node ends")
                await ask("second")
                first.tell()

    run(main())


def test_one_loops_own_server_is_reached_still(run: Run, implicit: Path) -> None:
    async def main() -> None:
        old = await shmsock.start_server(echo, None, 7000)
        await ask("here")
        make_anew(implicit)
        node = await current_node()
        await until(lambda: node.watch.lost)
        await ask("here")
        new = await shmsock.start_server(echo, None, 7001)  # where newcomers come
        async with shmsock.attach(str(implicit), name="newcomer") as newcomer:
            reader, writer = await shmsock.open_connection("here", 7001, node=newcomer)
            await talk(reader, writer)
            await end(writer)
        await ask("here")
        old.close()
        await until(lambda: keepers() == 1 and not old_mappings(implicit), "the old node ends")
        with pytest.raises(ConnectionRefusedError):
            await ask("here")
        new.close()

    run(main())


def test_a_listener_goes_to_the_new_file_at_once(run: Run, implicit: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="server"):
            await ask()  # attached
        make_anew(implicit)
        server = await shmsock.start_server(echo, None, 7000)
        transport, _ = await shmsock.create_datagram_endpoint(asyncio.DatagramProtocol, (None, 9000))
        assert transport.get_extra_info("shmsock_node") is server._node
        async with shmsock.attach(str(implicit), name="newcomer") as newcomer:
            await ask("here", node=newcomer)
        transport.close()
        server.close()

    run(main())


def test_a_default_region_is_made_anew_by_who_listens(
    run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / f"shmsock-{os.geteuid()}"
    for where in ("shmsock.region", "shmsock.aio.watch"):
        monkeypatch.setattr(f"{where}.default_region", lambda: str(path))
    monkeypatch.setattr("shmsock.region.find_devices", lambda sysfs: [])
    monkeypatch.delenv("SHMSOCK_REGION", raising=False)
    monkeypatch.setenv("SHMSOCK_NAME", "here")

    async def main() -> None:
        with pytest.raises(OSError, match="server"):
            await ask()
        path.unlink()
        server = await shmsock.start_server(echo, None, 7000)
        async with shmsock.attach(str(path), name="newcomer") as newcomer:
            await ask("here", node=newcomer)
        server.close()

    run(main())


def test_given_names_stay(run: Run, implicit: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="server"):
            await ask(name="mine")
        for other in (str(implicit), f"file:{implicit}", None):
            make_anew(implicit)
            async with serving(implicit):
                await ask(region=other)
                node = await current_node()
                assert node.name == "mine"
                assert node is await current_node(str(implicit)) is await current_node(f"file:{implicit}")

    run(main())


def test_several_at_once_attach_once(run: Run, implicit: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="server"):
            await ask()
        old = await current_node()
        make_anew(implicit)
        await until(lambda: old.watch.lost)
        async with serving(implicit):
            await asyncio.gather(*(ask() for _ in range(5)))
            async with shmsock.attach(str(implicit), name="onlooker") as third:
                await until(lambda: third.statistics()["peers"] == 3)

    run(main())


def test_a_new_file_that_is_no_region_yet(run: Run, implicit: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="server"):
            await ask()
        implicit.unlink()
        implicit.write_bytes(b"no region" * 1000)
        with pytest.raises(shmsock.RegionError):
            await ask()
        make_anew(implicit)
        async with serving(implicit):
            await ask()
            await until(lambda: not old_mappings(implicit) and keepers() == 1, "the old node ends")

    run(main())


# -- explicit nodes are told


def test_an_explicit_node_attaches_again(run: Run, path: Path) -> None:
    async def main() -> None:
        async with shmsock.attach(str(path), name="client") as node:
            make_anew(path)
            async with serving(path):
                with pytest.raises(OSError, match=f"the file {path} was replaced .*: attach again"):
                    await ask(node=node)
        # what that said
        async with shmsock.attach(str(path), name="client") as node, serving(path):
            await ask(node=node)

    run(main())


# -- what newcomers are told


def test_newcomers_are_told_who_holds_the_old_file(run: Run, implicit: Path) -> None:
    async def main() -> None:
        async with serving(implicit) as holder:
            implicit.unlink()
            holds = (
                rf"the file at {implicit} was removed or replaced while process {holder.pid} \(.*restart it"
            )
            with pytest.raises(shmsock.RegionNotFoundError, match=f"make it with `shmsock create.*; {holds}"):
                await ask()
            create(implicit)
            for host in ("server", "here"):
                with pytest.raises(OSError, match=holds):
                    await ask(host)
            holder.tell()
            assert await holder.ended() == 0
        async with serving(implicit):
            await ask()

    run(main())


def test_other_users_regions(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = directory / "shmsock-0"
    create(own)
    monkeypatch.setattr("shmsock.aio.watch.default_region", lambda: str(own))

    async def told() -> str:
        async with shmsock.attach(str(own)) as node:
            with pytest.raises(ConnectionRefusedError) as caught:
                await ask("localhost", node=node)
            return str(caught.value)

    assert "other users" not in run(told())
    for name in ("shmsock-70000", "shmsock-1234567", "shmsock-x", "shmsock-1.old"):
        (directory / name).touch()
    text = run(told())
    assert "other users' regions exist: " in text
    assert f"{directory}/shmsock-70000 (uid 70000), {directory}/shmsock-1234567 (uid 1234567); " in text
    assert "SHMSOCK_REGION" in text
    assert "shmsock-0 (" not in text
    monkeypatch.setattr("shmsock.aio.watch.default_region", lambda: "/elsewhere")
    assert "other users" not in run(told())


def test_what_is_there_is_named_and_nobody_else(run: Run, path: Path) -> None:
    url = f"file:{path}"

    async def main() -> None:
        async with shmsock.attach(str(path), name="client") as node:
            for host in ("server", "clients"):  # its own name is no help
                with pytest.raises(
                    OSError, match=f"named '{host}' .*this process is alone on {url}"
                ) as caught:
                    await ask(host, node=node)
                assert "did you mean" not in str(caught.value)
                assert f"`shmsock info {url}`" in str(caught.value)
            for own in ("client", "localhost", node.section):
                with pytest.raises(
                    ConnectionRefusedError, match=f"port 7000 .this process is alone on {url}"
                ):
                    await shmsock.open_connection(own, 7000, node=node)
            async with serving(path, "server-1") as server:
                with pytest.raises(
                    OSError, match=rf"to {url} \(attached: server-1\); did you mean 'server-1'"
                ):
                    await ask(node=node)
                with pytest.raises(ConnectionRefusedError, match=rf"listens on port 1 \({url}\)"):
                    await shmsock.open_connection("server-1", 1, node=node)
                assert node.statistics()["names"] == ["client", "server-1"]
                server.kill()
                with pytest.raises(OSError, match=f"this process is alone on {url}") as caught:
                    await ask(node=node)
                assert "server-1" not in str(caught.value)
                assert node.statistics()["names"] == ["client"]
            with pytest.raises(OSError, match=f"named 63 .*this process is alone on {url}"):
                await shmsock.open_connection(63, 7000, node=node)

    run(main())


# -- several loops of a process


@pytest.mark.parametrize("loop", LOOPS)
def test_each_loop_follows_for_itself(loop: str, implicit: Path) -> None:
    async def main() -> None:
        async with serving(implicit):
            await ask()
            await asyncio.to_thread(runner(loop), other())
        async with serving(implicit):
            await ask()

    async def other() -> None:
        await ask()
        make_anew(implicit)
        async with serving(implicit, "second"):
            await ask("second")

    runner(loop)(asyncio.wait_for(main(), PATIENCE))
