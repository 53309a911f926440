"""Rules: what may be written, what is said of mistakes, and a file that is read again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shmsock
from shmsock.forward import forwarder, rules
from shmsock.forward.endpoints import Endpoint, parse
from shmsock.forward.rules import Rule, RuleError, check, read
from shmsock.testing import make_region
from tests.aio.conftest import until
from tests.forward.processes import PATIENCE_S, SHMSOCK, Forwarder, Process, exactly


def rule(listen: str, target: str) -> Rule:
    return Rule(parse(listen, listens=True), parse(target, listens=False))


@pytest.mark.parametrize(
    ("text", "listens", "endpoint"),
    [
        ("tcp:127.0.0.1:80", True, Endpoint("tcp", "127.0.0.1", 80)),
        ("tcp:80", True, Endpoint("tcp", "127.0.0.1", 80)),
        ("tcp:[::1]:80", False, Endpoint("tcp", "::1", 80)),
        ("tcp:*:0", True, Endpoint("tcp", "*", 0)),
        ("unix:/run/a:b", False, Endpoint("unix", "/run/a:b")),
        ("shm:7000", True, Endpoint("shm", "", 7000)),
        ("shm:localhost:7000", True, Endpoint("shm", "localhost", 7000)),
        ("shm:VM-b.shm:7000", False, Endpoint("shm", "vm-b", 7000)),
        ("udp:dns.example:53", False, Endpoint("udp", "dns.example", 53)),
        ("socks5", False, Endpoint("socks5")),
    ],
)
def test_endpoints(text: str, listens: bool, endpoint: Endpoint) -> None:
    assert parse(text, listens=listens) == endpoint
    assert parse(str(endpoint), listens=listens) == endpoint


@pytest.mark.parametrize(
    ("text", "listens", "seen"),
    [
        ("http:a:1", True, "is no endpoint"),
        ("7000", True, "is no endpoint"),
        ("tcp:a:b", True, "port 'b'"),
        ("tcp:a:65536", True, "port '65536'"),
        ("tcp:a:-1", True, "port '-1'"),
        ("tcp:a:²", True, "port '²'"),
        ("tcp:a:0", False, "port '0'"),
        ("tcp::80", True, "host is missing"),
        ("tcp:::1:80", True, "brackets"),
        ("tcp:*:80", False, "host '\\*'"),
        ("unix:", True, "a path"),
        ("unix:" + "x" * 108, True, "a path"),
        ("unix:a\0b", True, "a path"),
        ("tcp:a..b:80", False, "'a..b' is no host name"),
        ("udp:" + "x" * 64 + ":80", True, "is no host name"),
        ("shm:vm-b:1", True, "host 'vm-b'"),
        ("shm:1", False, "name is missing"),
        ("shm:a b:1", False, "'a b' is no peer name"),
        ("socks5", True, "is no endpoint"),
    ],
)
def test_endpoints_that_are_none(text: str, listens: bool, seen: str) -> None:
    with pytest.raises(ValueError, match=seen):
        parse(text, listens=listens)


@pytest.mark.parametrize(
    "rules",
    [
        [("shm:1", "shm:own:1")],
        [("shm:1", "shm:localhost:1")],
        [("tcp:80", "shm:own:1"), ("shm:1", "tcp:localhost:80")],
        [("tcp:*:80", "shm:own:1"), ("shm:1", "tcp:10.0.0.1:80")],
        [("tcp:[::]:80", "shm:own:1"), ("shm:1", "tcp:[::1]:80")],
        [("unix:/a", "shm:own:1"), ("shm:1", "shm:own:2"), ("shm:2", "unix:/a")],
        [("udp:53", "shm:own:53"), ("shm:53", "udp:127.0.0.1:53")],
    ],
)
def test_rules_that_lead_in_a_circle(rules: list[tuple[str, str]]) -> None:
    with pytest.raises(RuleError, match="circle"):
        check([rule(*one) for one in rules], "own")


@pytest.mark.parametrize(
    "rules",
    [
        [("tcp:80", "shm:own:1"), ("shm:1", "tcp:127.0.0.1:81")],
        [("tcp:80", "shm:other:1"), ("shm:1", "tcp:127.0.0.1:80")],
        [("udp:53", "shm:own:53"), ("shm:53", "tcp:127.0.0.1:53")],
    ],
)
def test_rules_that_do_not(rules: list[tuple[str, str]]) -> None:
    check([rule(*one) for one in rules], "own")


@pytest.mark.parametrize("again", ["tcp:127.0.0.1:80", "tcp:*:80", "tcp:localhost:80"])
def test_two_rules_that_listen_on_the_same(again: str) -> None:
    with pytest.raises(RuleError, match="listens where"):
        check([rule("tcp:80", "shm:b:1"), rule(again, "shm:b:2")], "own")


GOOD = '[[rule]]\nlisten = "tcp:127.0.0.1:80"\ntarget = "shm:b:1"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a =\n", "line 1, column"),
        ("", "line 1, rule: [[rule]] tables"),
        ('name = "b"\n', "line 1, rule: [[rule]] tables"),
        ('# c\nregoin = "/x"\n' + GOOD, "line 2, regoin: no such key; did you mean region?"),
        ('name = "a b"\n' + GOOD, "line 1, name: 'a b' is no peer name"),
        (GOOD + GOOD.replace("80", "x"), "line 5, listen: 'tcp:127.0.0.1:x': port 'x'"),
        (GOOD + '[[rule]]\nlisten = "shm:1"\n', "line 4, target: missing"),
        (GOOD + "idle_timeot = 3\n", "line 4, idle_timeot: no such key; did you mean idle_timeout?"),
        (GOOD + "idle_timeout = true\n", "line 4, idle_timeout: True: seconds"),
        (GOOD + "connect_timeout = -1\n", "line 4, connect_timeout: -1: seconds"),
        (GOOD + "\nproxy_protocol = 'v3'\n", "line 5, proxy_protocol: 'v3': 'v1' or 'v2'"),
        (GOOD + "source_per_peer = true\n", "line 4, source_per_peer: "),
        (GOOD + "source_per_peer = 1\n", "line 4, source_per_peer: 1: true or false"),
        (GOOD + "mode = '0668'\n", "line 4, mode: '0668'"),
        (GOOD + GOOD, "line 5, listen: tcp:127.0.0.1:80 -> shm:b:1: listens where"),
        (GOOD.replace("shm:b:1", "tcp:b:1"), "line 2, listen: "),
        (GOOD.replace("target", "listen"), "line 3"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_mistakes_in_a_file_are_told_by_line_and_key(text: str, said: str) -> None:
    with pytest.raises(RuleError) as error:
        read(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_many_rules_is_read_in_steps_that_grow_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def count(original: Any) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            return original(*args)

        return counted

    for name in ("_meets", "_host", "_line", "_place"):
        monkeypatch.setattr(rules, name, count(getattr(rules, name)))
    text = "".join(
        f'[[rule]]\nlisten = "tcp:127.0.0.1:{port}"\ntarget = "shm:b:{port}"\n' for port in range(1, 401)
    )
    assert len(read(text).rules) == 400
    assert steps <= 10 * 400


def test_a_file() -> None:
    text = (
        'region = "/dev/shm/x"\nname = "b"\n'
        + GOOD
        + '[[rule]]\nlisten = "shm:5"\ntarget = "tcp:localhost:5"\n'
    )
    config = read(text + "source_per_peer = true\nconnect_timeout = 3\n")
    assert (config.region, config.name) == ("/dev/shm/x", "b")
    assert [str(rule) for rule in config.rules] == ["tcp:127.0.0.1:80 -> shm:b:1", "shm:5 -> tcp:localhost:5"]
    assert config.rules[1].source_per_peer
    assert config.rules[1].connect_timeout == 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def lines_of(rules: list[tuple[str, str]]) -> str:
    return "".join(f'[[rule]]\nlisten = "{listen}"\ntarget = "{target}"\n' for listen, target in rules)


def test_a_file_is_read_again(shm_region: Path, tmp_path: Path) -> None:
    """Connections stay, those of rules that are gone too; a mistake changes nothing."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    targets = [f"tcp:127.0.0.1:{server.getsockname()[1]}" for server in servers]
    ports = [free_port() for _ in range(3)]
    path = tmp_path / "rules.toml"

    def near(*targets: str) -> str:
        return lines_of([(f"tcp:127.0.0.1:{p}", t) for p, t in zip(ports, targets, strict=False)])

    def connected(port: int, server: int) -> tuple[socket.socket, socket.socket]:
        client = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        servers[server].settimeout(PATIENCE_S)
        there, _ = servers[server].accept()
        there.settimeout(PATIENCE_S)
        return client, there

    def alive(client: socket.socket, there: socket.socket) -> bool:
        client.sendall(b"ping")
        there.sendall(exactly(there, 4))
        return exactly(client, 4) == b"ping"

    path.write_text(near("shm:vm-b:1", "shm:vm-b:2"))
    far = Forwarder("shm:1", targets[0], "shm:2", targets[1], name="vm-b", rules=2)
    with far, Forwarder("--config", str(path), name="vm-a", rules=2) as forwarder:

        def again(text: str, said: str) -> None:
            path.write_text(text)
            mark = len(forwarder.lines)
            forwarder.send_signal(signal.SIGHUP)
            forwarder.said(said, mark)

        pairs = [connected(ports[0], 0), connected(ports[1], 1)]
        assert all(alive(*pair) for pair in pairs)
        # one leads elsewhere, one is new
        again(near("shm:vm-b:1", "shm:vm-b:1", "shm:vm-b:2"), "3 rules")
        pairs += [connected(ports[1], 0), connected(ports[2], 1)]
        assert all(alive(*pair) for pair in pairs)
        # mistakes: a key, a port that is taken, a file that is not there
        again(near("shm:vm-b:2") + "[[rule]]\nlistn = 3\n", "line 5, listn: no such key.*going on with")
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = f"tcp:127.0.0.1:{other.getsockname()[1]}"
            again(lines_of([(taken, "shm:vm-b:1")]), f"cannot listen on {taken}.*going on with")
        path.unlink()
        mark = len(forwarder.lines)
        forwarder.send_signal(signal.SIGHUP)
        forwarder.said("No such file.*going on with", mark)
        pairs += [connected(ports[0], 0), connected(ports[1], 0)]
        assert all(alive(*pair) for pair in pairs)
        # one rule is left: the others listen no more, and their connections stay
        again(near("shm:vm-b:1"), "1 rules")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports[1]), PATIENCE_S)
        assert all(alive(*pair) for pair in pairs)
        for ends in pairs:
            for end in ends:
                end.close()
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("narrow", "wide", "target"),
    [
        ("tcp:127.0.0.1:{}", "tcp:*:{}", "shm:vm-b:1"),
        ("udp:127.0.0.1:{}", "udp:*:{}", "shm:vm-b:1"),
        ("shm:localhost:{}", "shm:{}", "tcp:127.0.0.1:9"),
    ],
)
def test_a_rule_may_take_the_port_of_one_that_goes(
    narrow: str, wide: str, target: str, shm_region: Path, tmp_path: Path
) -> None:
    port, path = free_port(), tmp_path / "rules.toml"
    narrow, wide = narrow.format(port), wide.format(port)
    path.write_text(lines_of([(narrow, target)]))
    with Forwarder("--config", str(path), name="vm-a") as forwarder:
        for listen in (wide, narrow):
            # as long as another cannot listen, the former does
            with socket.create_server(("127.0.0.1", 0)) as other:
                taken = f"tcp:127.0.0.1:{other.getsockname()[1]}"
                path.write_text(lines_of([(listen, target), (taken, "shm:vm-b:1")]))
                mark = len(forwarder.lines)
                forwarder.send_signal(signal.SIGHUP)
                forwarder.said(f"cannot listen on {taken}.*going on with", mark)
            if listen == "tcp:*:" + str(port):
                socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
            path.write_text(lines_of([(listen, target)]))
            mark = len(forwarder.lines)
            forwarder.send_signal(signal.SIGHUP)
            forwarder.said("1 rules", mark)
            forwarder.said(re.escape(f"listening on {listen} -> "), mark)


def test_a_mistake_at_the_start_is_one_line(shm_region: Path, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("[[rule]]\nlisten = 3\n")
    for args, said in (
        (["--config", str(path)], f"shmsock: {path}: line 2, listen: 3: a string expected"),
        (["shm:1", "shm:localhost:1"], "shmsock: rules lead in a circle: shm:1 -> shm:localhost:1"),
        (["tcp:1", "tcp:b:2"], "shmsock: tcp:127.0.0.1:1 -> tcp:b:2: neither side is shm:, so nothing goes "
         "through shared memory"),
        (["--config", f"{path}.x"], f"shmsock: {path}.x: No such file or directory"),
        (["tcp:x", "shm:b:2"], "shmsock: 'tcp:x': port 'x': a number from 0 to 65535 was expected"),
    ):  # fmt: skip
        failed = Process(*SHMSOCK, "forward", *args)
        assert failed.wait() == 1
        assert failed.lines == [said]
        failed.stop()


def test_systemd_is_told(shm_region: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with Forwarder("shm:1", "tcp:127.0.0.1:9", name="vm-b"):
            assert sock.recv(100) == b"READY=1"
        assert sock.recv(100) == b"STOPPING=1"


@pytest.mark.asyncio
async def test_a_port_that_is_taken_in_a_new_region_is_had_when_it_is_free(
    shm_region: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forwarder, "LOOK_S", 0.01)
    caplog.set_level("INFO", "shmsock.forward")
    made = forwarder.Forwarder(name="vm-a")
    await made.carry_out([rule("shm:7000", "tcp:127.0.0.1:9"), rule("shm:7000", "udp:127.0.0.1:9")])
    os.rename(make_region(shm_region.parent), shm_region)
    async with (
        shmsock.attach(str(shm_region), name="vm-a") as other,
        await shmsock.create_server(asyncio.Protocol, None, 7000, node=other),
    ):
        await shmsock.create_datagram_endpoint(asyncio.DatagramProtocol, (None, 7000), node=other)
        await until(lambda: caplog.text.count("cannot listen on shm:7000: another process") == 2)
        assert "again" not in caplog.text
    await until(lambda: caplog.text.count("listening again") == 2)
    await made.stop()


@pytest.mark.asyncio
async def test_permissions_of_a_socket_file_are_changed(shm_region: Path, tmp_path: Path) -> None:
    made, path = forwarder.Forwarder(name="vm-a"), tmp_path / "sock"
    for mode in ("0600", "0666"):
        await made.carry_out([replace(rule(f"unix:{path}", "shm:vm-b:7000"), mode=mode)])
        assert path.stat().st_mode & 0o777 == int(mode, 8)
    await made.stop()
