"""The two ends of every measure, in processes of their own: that they measure what they say. Not how much."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

import pytest

from shmsock.bench import pairs as over
from shmsock.bench.child import cpus
from shmsock.bench.ends import streams
from shmsock.bench.ends.timing import BATCH, LEAST, batches, encoded, percentiles, trips
from shmsock.bench.ends.usage import used
from shmsock.bench.pairs import Variant, checked, peers, private_region
from shmsock.bench.results import merged
from shmsock.errors import RegionError

CPUS = len(os.sched_getaffinity(0))
BLOCK = 64 << 10
OF_STREAMS = [*over.variants(), *(v for v in over.with_unix() if v.module == "unix")]


def label(variant: Variant) -> str:
    return variant.label


def taken(variant: Variant, *kinds: str, more: tuple[object, ...] = ()) -> dict[str, Any]:
    """What one pair of processes measures; fair, or there is an error."""
    server, client, _ = cpus()
    with private_region("bench", 32 << 20, 2) as region:
        (found,) = peers(variant, region, 0.03, (server, client), "--measure", ",".join(kinds), *more)
    assert (found.pop("shmsock_modules") > 0) == variant.is_shmsock
    assert set(found) == set(kinds)
    return found


def check_times(found: dict[str, Any], least: int = 1) -> None:
    assert found["count"] >= least
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["p999_us"] <= found["max_us"]
    assert found["per_s"] > 0


def check_rates(found: dict[str, Any], size: int) -> None:
    assert found["bytes"] > 0
    assert found["bytes"] % size == 0
    assert found["mb_s"] == pytest.approx(found["per_s"] * size / 1e6)


@pytest.mark.parametrize("variant", OF_STREAMS, ids=label)
def test_streams(variant: Variant) -> None:
    kinds = ("echo", "readline", "write", "connect", "many", "beside")
    found = taken(variant, *kinds, more=("--connections", 3, "--block", 1000, "--histogram"))
    for kind in ("echo", "readline", "connect", "many", "beside"):
        check_times(found[kind])
        assert merged([found[kind]["hdr"]]).get_total_count() == found[kind]["count"]
    check_rates(found["write"], 1000)
    assert found["many"]["connections"] == found["beside"]["connections"] == 3
    check_times(found["beside"]["alone"])


@pytest.mark.parametrize("variant", over.short(), ids=label)
def test_quiet(variant: Variant) -> None:
    """Every echo is counted, and comes after the pause that was asked for, also where loops cannot sleep so
    shortly."""
    more = ("--think", 300, "--connections", 3)
    found = taken(variant, "sporadic", "idle", "memory", more=more)
    check_times(found["sporadic"], LEAST)
    assert found["sporadic"]["thought_us"] >= 300
    assert found["idle"]["connections"] == 3
    for kind in ("sporadic", "idle"):
        for side in (found[kind]["client"], found[kind]["server"]):
            assert 0 <= side["system"] <= side["cpu"] <= 100 * CPUS + 20  # a tick at either end
            assert side["sleeps_s"] >= 0
            assert variant.is_tcp == (not side["counters"])
        sides = found[kind]["client"]["cpu"] + found[kind]["server"]["cpu"]
        assert found[kind]["cpu"] == pytest.approx(sides)
    assert "bytes_out" not in found["idle"]["client"]["counters"]
    if variant.is_shmsock:
        assert found["sporadic"]["client"]["counters"]["bytes_out"] == 64 * found["sporadic"]["count"]
    memory = found["memory"]
    assert memory["heap_bytes"] - memory["own_bytes"] == memory["beyond_bytes"]
    assert min(memory["own_bytes"], memory["heap_bytes"]) > 500
    assert (memory["arena_bytes"] > 0) == variant.is_shmsock


@pytest.mark.parametrize("variant", over.short(), ids=label)
def test_protocols(variant: Variant) -> None:
    found = taken(variant, "protocol-echo", "protocol-write", "protocol-connect")
    check_times(found["protocol-echo"])
    check_times(found["protocol-connect"])
    check_rates(found["protocol-write"], BLOCK)


@pytest.mark.parametrize("variant", over.datagrams()[:2], ids=label)
def test_datagrams(variant: Variant) -> None:
    assert variant.is_tcp == ("UDP" in variant.label)
    check_times(taken(variant, "datagram")["datagram"])


@pytest.mark.parametrize("variant", over.of_anyio(), ids=label)
def test_anyio(variant: Variant) -> None:
    check_times(taken(variant, "echo")["echo"])


@pytest.mark.parametrize("variant", over.installed(), ids=label)
def test_others(variant: Variant) -> None:
    check_times(taken(variant, "echo")["echo"])
    check_rates(taken(variant, "write")["write"], BLOCK)


def test_peers() -> None:
    with private_region("bench", 32 << 20, 4) as region:
        found = peers(
            Variant("shmsock", "asyncio"), region, 0.03, (None, None), "--measure", "echo", clients=3
        )
    assert len(found) == 3
    for client in found:
        check_times(client["echo"])


def test_an_unfair_measure_is_refused() -> None:
    with pytest.raises(RegionError, match="asyncio TCP was measured with 3 modules of shmsock"):
        checked(Variant("asyncio", "asyncio"), {"shmsock_modules": 3})
    with pytest.raises(RegionError, match="with 0 modules"):
        checked(Variant("asyncio", "asyncio", stock=True), {"shmsock_modules": 0})


def test_labels_and_environments() -> None:
    names = [v.label for v in over.all_streams()]
    assert len(set(names)) == len(names)
    assert {over.OURS, over.TCP, over.UNIX, over.STOCK} <= set(names)
    assert over.UDP in [v.label for v in over.datagrams()]
    assert Variant("shmsock", "uvloop", note="doorbells", region="r").environment == {"SHMSOCK_REGION": "r"}


def test_where_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over, "have_uvloop", lambda: False)
    assert {v.loop for v in over.variants()} == {"asyncio"}
    assert len(over.variants()) == 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("zmq", "trio") else name)
    assert [v.label for v in over.installed()] == ["multiprocessing.Pipe", "iceoryx2"]
    assert {v.loop for v in over.of_anyio()} == {"asyncio"}


def test_trips_and_batches() -> None:
    times: list[int] = []
    assert [*trips(times, 0)] == [True]  # one at least
    assert len(times) == 1
    assert [*batches(0)] == []
    found = [*batches(0.001)]
    assert found == [*range(1, len(found) + 1)]
    assert len(found) % BATCH == 0


async def _served_late(count: int) -> dict[str, Any]:
    """`many` over connections whose first echo ends long after the measure, and the next at once."""

    class End:
        def __init__(self) -> None:
            self.echoes, self.data = -1, b""  # each connection is tried first

        def write(self, data: bytes) -> None:
            self.data = data

        async def drain(self) -> None: ...

        async def readexactly(self, n: int) -> bytes:
            self.echoes += 1
            await asyncio.sleep(0.05 if self.echoes == 1 else 0)
            return self.data

        def close(self) -> None: ...

        async def wait_closed(self) -> None: ...

    class Network:
        async def open_connection(self) -> tuple[Any, Any]:
            end = End()
            return end, end

    options = argparse.Namespace(connections=count, echo=64, seconds=0.01)
    return await streams.many(Network(), options, [])  # type: ignore[arg-type]


def test_who_is_served_late_counts_no_more() -> None:
    found = asyncio.run(_served_late(10))
    assert found["count"] == 10
    assert found["per_s"] < 10 / 0.04


def test_percentiles() -> None:
    found = percentiles([1000 * n for n in range(1000, 0, -1)])
    assert found == {
        "count": 1000,
        "per_s": pytest.approx(1e6 / 500.5),
        "p50_us": 501,
        "p99_us": 991,
        "p999_us": 1000,
        "max_us": 1000,
    }
    assert percentiles([7000])["p999_us"] == 7
    histogram = merged([encoded([1000, 1000, 10**12, 0])])
    assert histogram.get_total_count() == 4
    assert histogram.get_value_at_percentile(60) == pytest.approx(1000, rel=1e-3)


def test_used() -> None:
    before = {"at": 1.0, "user": 1.0, "system": 2.0, "sleeps": 10, "counters": {"pumps": 3, "reads": 4}}
    after = {"at": 3.0, "user": 1.5, "system": 2.25, "sleeps": 30, "counters": {"pumps": 8, "reads": 4}}
    assert used(before, after) == {"cpu": 37.5, "system": 12.5, "sleeps_s": 10, "counters": {"pumps": 5}}


def test_ends_that_lose_bytes_are_found() -> None:
    from shmsock.bench.ends import protocols, streams
    from shmsock.bench.ends.timing import same

    with pytest.raises(ValueError, match="128 bytes were sent and 64 "):
        streams.rates(2, 64, 64, 1.0)
    with pytest.raises(ValueError, match="differs"):
        same(b"a", b"b")

    async def lost() -> None:
        client = protocols.Client(4, trips([], 0.01))
        client.send = lambda data: None
        client.connection_lost(None)
        await client.play(b"e", 5)

    with pytest.raises(ConnectionResetError, match="server closed"):
        asyncio.run(lost())
