"""For tests of programs that use shmsock: a pytest plugin (installed with the package), and its parts.

async def test_my_service(shm_region):          # a private region; module-level functions of shmsock use it
    server = await shmsock.start_server(handler, port=7000)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["make_region", "shm_region"]


def make_region(
    directory: str | os.PathLike[str] = "/dev/shm", *, size: int = 64 << 20, peers: int = 16
) -> str:
    """Create and format a region file with a name of its own, sparse. Returns its path; the caller removes
    it.

    `directory`: where, best on tmpfs. `size`: bytes of the region. `peers`: how many nodes can be attached at
    the same time, 1 to 64. Raises OSError: ENOSPC, EACCES, EINVAL when `size` is too small for
    `peers`.
    """
    from shmsock.aio.attach import prepare_region
    from shmsock.region import open_file

    fd, path = tempfile.mkstemp(prefix=f"shmsock-test-{os.getpid()}-", dir=directory)
    try:
        os.ftruncate(fd, size)
        with open_file(path) as region:
            prepare_region(region, peers)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    return path


@pytest.fixture
def shm_region(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a test the path of a region of its own (64 MiB, 16 peers, sparse; safe with xdist). SHMSOCK_REGION
    names it meanwhile, for child processes too; the file is removed afterwards. Raises what make_region()
    does."""
    path = make_region()
    monkeypatch.setenv("SHMSOCK_REGION", path)
    try:
        yield Path(path)
    finally:
        os.unlink(path)
