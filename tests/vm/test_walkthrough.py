"""The walk-through known from pages about ivshmem, word for word: hugetlbfs, one 2 GiB file in two guests."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shmsock.guests.qemu import Fleet
from tests.vm.peers import PeerError, Peers

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PAGES = 1024
RESERVED = Path("/proc/sys/vm/nr_hugepages")


def meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0


@pytest.fixture
def hugetlbfs() -> Iterator[Path]:
    """A mount of hugetlbfs with 1024 free pages of 2 MiB; all is as it was afterwards, whatever happens."""
    if meminfo("Hugepagesize") != 2048:
        pytest.skip(f"huge pages are {meminfo('Hugepagesize')} kB here, the walk-through needs 2048 kB")
    before = int(RESERVED.read_text())
    used = before - meminfo("HugePages_Free") + meminfo("HugePages_Rsvd")
    with ExitStack() as undo:
        try:
            RESERVED.write_text(str(used + PAGES))
        except OSError as error:
            pytest.skip(f"no huge pages can be reserved: {RESERVED}: {error}")
        undo.callback(RESERVED.write_text, str(before))
        free = meminfo("HugePages_Free") - meminfo("HugePages_Rsvd")
        if free < PAGES:
            pytest.skip(
                f"no {PAGES} huge pages of 2 MiB can be reserved, only {free}: too little free memory"
            )
        mount = Path(tempfile.mkdtemp(prefix="shmsock-huge-"))
        undo.callback(mount.rmdir)
        done = subprocess.run(
            ["mount", "-t", "hugetlbfs", "hugetlbfs", str(mount)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"hugetlbfs cannot be mounted: {done.stderr.strip()}")
        undo.callback(subprocess.run, ["umount", str(mount)], check=True)
        yield mount
        for file in mount.iterdir():
            file.unlink()


def test_walk_through(hugetlbfs: Path, fleet: Fleet, peers: Peers) -> None:
    words = (
        f"-object memory-backend-file,size=2G,mem-path={hugetlbfs}/shmem-file,share=on,id=HMB "
        "-device ivshmem-plain,memdev=HMB"
    )
    guests = [fleet.boot(name, extra=words.split()) for name in ("vm-a", "vm-b")]

    # the device is found in each
    for guest in guests:
        listing = guest.run(
            ["sh", "-c", "cd /sys/bus/pci/devices; grep -l 0x1110 */device | cut -d/ -f1"]
        ).text
        assert listing.startswith("0000:00:"), listing
        assert (
            guest.run(["sh", "-c", f"cat /sys/bus/pci/devices/{listing}/vendor"]).text,
            guest.run(["sh", "-c", f"stat -c %s /sys/bus/pci/devices/{listing}/resource2"]).text,
        ) == ("0x1af4", str(2 << 30))
    shared = hugetlbfs / "shmem-file"
    assert shared.stat().st_size == 2 << 30

    # a byte written in one is read in the other
    a, b = peers(*guests)
    end = (2 << 30) - 5
    assert a.ask("raw_write", region="pci:auto", offset=4096, text="A") == 2 << 30
    assert b.ask("raw_read", region="pci:auto", offset=4096, size=1) == "A"
    b.ask("raw_write", region="pci:auto", offset=end, text="hello")
    assert a.ask("raw_read", region="pci:auto", offset=end, size=5) == "hello"
    a.ask("raw_write", region="pci:auto", offset=4096, text="\0")

    # and sockets over the same memory
    a.attach("pci:auto")
    b.attach("pci:auto")
    (host,) = peers(None)
    host.attach(f"file:{shared}", name="host")
    for peer in a, b, host:
        peer.ask("listen", port=7000)
    for one, other in (a, b), (b, a), (host, a), (b, host):
        got = one.ask("swap", host=other.name, port=7000, size=4_000_000, timeout=120)
        assert (got["sent"], got["received"]) == (got["there_received"], got["there_sent"])
        assert one.ask("echo", host=other.name, port=7000, count=20)["count"] == 20
    for peer in a, b, host:
        seen = peer.statistics()
        assert (seen["peers"], seen["peers_lost"], seen["healed"]) == (3, 0, 0), seen
    with pytest.raises(PeerError, match="gaierror"):
        a.ask("echo", host="vm-c", port=7000, count=1)
