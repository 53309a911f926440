"""`ss` and `peers` agree with what two processes really hold, while others come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmsock.commands.observing import opened
from tests.observe.conftest import Process, command, said, seen
from tests.observe.holders import COMING, HELD

Start = Callable[..., Process]


def held(found: list[Any]) -> dict[int, Any]:
    return {c["local"]["port"]: c for c in found if c["remote"]["port"] == 7000}


def check_held(found: list[Any], ports: list[int]) -> None:
    """The connections that are held are there, once each, with what waits in them."""
    mine = held(found)
    assert sorted(mine) == sorted(ports)
    for number, port in enumerate(ports):
        c = mine[port]
        assert (c["state"], c["datagrams"]) == ("open", False)
        assert (c["local"]["name"], c["remote"]["name"]) == ("vm-a", "vm-b")
        assert (c["sent"]["queued"], c["received"]["queued"]) == (number, 0)
        assert c["sent"]["ring"] == 512


def test_while_others_come_and_go(region: Path, start: Start) -> None:
    server = start("vm-b")
    client = start("vm-a", "vm-b")
    ports = client.began["ports"]
    assert len(ports) == HELD
    client.tell("churn")
    others = 0
    for _ in range(3):
        view = seen("ss", region)
        check_held(view["connections"], ports)
        rest = [c for c in view["connections"] if c["remote"]["port"] != 7000]
        others += len(rest)
        assert {c["remote"]["port"] for c in rest} <= {7001, None}
        assert {(c["local"]["name"], c["remote"]["name"]) for c in rest} <= {("vm-a", "vm-b")}
        a, b = (next(p for p in view["peers"] if p["name"] == n) for n in ("vm-a", "vm-b"))
        assert a["rates"]["bytes_out"] > 0 < b["rates"]["bytes_out"]
        assert b["queued_in"] >= sum(range(HELD))
    assert others  # some of them were seen
    stood = client.tell("quiet")
    assert stood["came"] >= COMING
    there = server.tell("tell")
    while True:  # its heartbeat shows what is counted with the next beat
        view = seen("ss", region)
        a, b = (next(p for p in view["peers"] if p["name"] == n) for n in ("vm-a", "vm-b"))
        if (a["counts"]["bytes_out"], b["counts"]["bytes_in"]) == (stood["bytes_out"], there["bytes_in"]):
            break
    check_held(view["connections"], ports)
    assert len(view["connections"]) == stood["connections"] == there["connections"] == HELD
    for peer, told in ((a, stood), (b, there)):
        assert (peer["number"], peer["connections"], peer["links"]) == (told["section"], HELD, 0)
        assert (peer["state"], peer["here"]) == ("live", True)
        assert {"futex" if peer["futex"] else "polling"} == {*told["wakes"].values()}
        assert peer["counts"]["bytes_in"] == told["bytes_in"]
        assert (peer["queued_in"], peer["queued_out"]) == (
            (0, sum(range(HELD))) if peer is a else (sum(range(HELD)), 0)
        )
    assert b["ports"] == [7000, 7001]
    watched = wrote = None
    with opened(str(region)) as watcher:
        watcher.look()
        wrote = client.tell("write")["wrote"]
        watched = watcher.watch(1.2)  # longer than what is kept of surveys
    assert watched.seconds >= 1.2
    assert round(sum(c.sent.rate or 0 for c in watched.connections) * watched.seconds) == wrote
    assert watched.history[-1][-1] * watched.seconds == pytest.approx(wrote)
    server.tell("read")
    while server.tell("tell")["got"] < sum(range(HELD)) + wrote:
        pass
    assert {c["sent"]["queued"] for c in seen("ss", region)["connections"]} == {0}


def test_as_text(region: Path, start: Start) -> None:
    start("vm-b")
    client = start("vm-a", "vm-b")
    port = client.began["ports"][7]
    lines = said("ss", region).splitlines()
    assert lines[0].split() == ["State", "Recv-Q", "Send-Q", "Local", "Peer", "In/s", "Out/s"]
    assert f"open 0 7 vm-a:{port} vm-b:7000 0 0".split() in [line.split() for line in lines]
    assert len(lines) == 1 + HELD
    only = said("ss", region, "-H", "-n", "vm-b", "-p", port, "-i")
    assert f"open 7 0 vm-b:7000 vm-a:{port} 0 0".split() == only.splitlines()[0].split()
    assert "in: ring of 512 bytes" in only
    assert "vm-b, process" in only
    assert said("ss", region, "-u", "-H") == ""
    assert f"connections: {HELD} ({HELD} open)" in said("ss", region, "-s")
    assert [line.split()[0] for line in said("ss", region, "-l").splitlines()[1:]] == [
        "vm-b:7000",
        "vm-b:7001",
    ]
    rows = [line.split() for line in said("peers", region).splitlines()]
    assert [row[:3] for row in rows[1:]] == [["0", "live", "vm-b"], ["1", "live", "vm-a"]]
    more = said("peers", region, "-i")
    assert "listens on 7000, 7001" in more
    assert "since it attached: " in more


def test_no_line_is_too_wide(region: Path, start: Start) -> None:
    start("vm-b-with-a-name")
    start("vm-a", "vm-b-with-a-name")
    commands = (["ss", "-i"], ["peers", "-i"], ["info"])
    for arguments, columns in ((a, c) for a in commands for c in (60, 80)):
        text = said(*arguments, region, env={"COLUMNS": str(columns)})
        wide = [line for line in text.splitlines() if len(line) > columns and str(region) not in line]
        assert wide == [], (arguments, columns)


def test_a_peer_that_was_killed(region: Path, start: Start) -> None:
    start("vm-b")
    client = start("vm-a", "vm-b")
    view = seen("ss", region)
    assert {c["state"] for c in view["connections"]} == {"open"}
    client.end()
    while True:  # vm-b sees it within 0.2 s, and lets go of what it need not read
        view = seen("ss", region)
        if {p["name"]: p["state"] for p in view["peers"]} == {"vm-b": "live"}:
            break
    assert {c["state"] for c in view["connections"]} <= {"orphaned"}


@pytest.mark.parametrize(("arguments", "status"), [(["-n", "vm-c"], 2), (["--watch", "0"], 2)])
def test_ss_that_is_asked_for_nonsense(region: Path, start: Start, arguments: list[str], status: int) -> None:
    start("vm-b")
    done = command("ss", region, *arguments)
    assert done.exit_code == status
    assert "vm-b" in done.stderr or "0.5" in done.stderr


@pytest.mark.parametrize("name", ["ss", "peers"])
def test_what_is_no_region(tmp_path: Path, name: str) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(1 << 20))
    done = command(name, path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is unformatted: its first page is all zero" in done.stderr
    assert command(name, tmp_path / "nothing").exit_code == 1
