"""Memory that nobody formatted yet, as QEMU's memory-backend-file, or truncate, makes it; and on a disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmsock
from shmsock.engine import layout as lay
from shmsock.region import storage
from tests.aio.conftest import Run
from tests.aio.processes import Child

MIB = 1 << 20


@pytest.fixture
def blank(region: str) -> Iterator[Path]:
    """As QEMU makes it, and has it mapped: it must stay the same file."""
    path = Path(f"{region}-blank")
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    before = path.stat()
    yield path
    assert os.path.samestat(path.stat(), before)
    path.unlink()


@pytest.mark.parametrize("first", ["this", "other", "both"])
def test_the_first_formats_it(run: Run, loop_name: str, blank: Path, first: str) -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            child = None
            if first != "this":
                child = await stack.enter_async_context(Child("serve", str(blank), "there", loop=loop_name))
            if first == "other":
                assert child is not None
                await child.says("ready")
            node = await stack.enter_async_context(shmsock.attach(str(blank), name="here"))
            if first == "this":
                child = await stack.enter_async_context(Child("serve", str(blank), "there", loop=loop_name))
            assert child is not None
            if first != "other":
                await child.says("ready")
            reader, writer = await shmsock.open_connection("there", 7000, node=node)
            writer.write(b"hello")
            assert await asyncio.wait_for(reader.readexactly(5), 30) == b"hello"
            writer.close()
            await writer.wait_closed()

    run(main())
    assert blank.read_bytes()[:8] == lay.MAGIC.to_bytes(8, "little")


@pytest.mark.parametrize("at", [lay.HEADER, 5 * MIB, 16 * MIB - 1])
def test_a_file_that_holds_something(run: Run, blank: Path, at: int) -> None:
    """It may be a disk's image, or a region whose header was zeroed under those who use it."""
    with blank.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    before = blank.read_bytes()

    async def main() -> None:
        with pytest.raises(shmsock.RegionFormatError, match=r"not formatted.*create --force") as caught:
            await shmsock.attach(str(blank))
        assert caught.value.filename == str(blank)

    run(main())
    assert blank.read_bytes() == before


def test_a_format_that_was_begun(run: Run, region: str, blank: Path) -> None:
    """Who formatted it died in the middle: the next goes on."""
    word = slice(lay.H_ID, lay.H_ID + 8)
    begun = Path(region).read_bytes()[word]
    with blank.open("r+b") as file:
        file.seek(lay.H_ID)
        file.write(begun)

    async def main() -> None:
        async with shmsock.attach(str(blank)):
            assert blank.read_bytes()[word] == begun

    run(main())


def test_too_small(run: Run, blank: Path) -> None:
    os.truncate(blank, 4096)

    async def main() -> None:
        with pytest.raises(shmsock.RegionFormatError, match="too few for a region of 16 peers"):
            await shmsock.attach(str(blank))

    run(main())
    assert blank.read_bytes() == bytes(4096)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_disk_is_warned_of(
    run: Run, region: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda file: storage.FileSystem(kind, 4096))

    async def main() -> None:
        for name in ("a", "b"):
            async with shmsock.attach(region, name=name):
                pass

    run(main())
    assert caplog.text.count(f"{region} lies on a disk") == (kind == "ext4")
