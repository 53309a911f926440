"""Programs that know nothing of shared memory, in two guests: web servers and clients, curl, redis.

SHMSOCK_LONG=1 runs redis-benchmark for as long as figures take, and prints them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmsock.guests.image import command_path
from shmsock.guests.qemu import Bridge, Command, Fleet, Guest, Ivshmem
from shmsock.observe.snapshot import inspect
from shmsock.region import open_file
from tests.vm.conftest import PAIR_SIZE, Pair

LONG = os.environ.get("SHMSOCK_LONG") == "1"

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200 if LONG else 300)]

SECONDS = 120.0  # for a program to start: importing takes long under emulation, and others use the processors
RANGE = "10.0.0.0/24"
BODY = 1 << 20

WEB = b"""
async def app(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = [(b"x-client", scope["client"][0].encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body or b"hello"})
"""

# At once, a large one, and on pooled connections.
FETCH = b"""
import asyncio, os, sys
import httpx

async def main(url):
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(2):
            answers = await asyncio.gather(*(client.get(url) for _ in range(10)))
            assert [answer.text for answer in answers] == ["hello"] * 10
        body = os.urandom(1 << 21)
        assert (await client.post(url, content=body)).content == body
    print("well")

asyncio.run(main(sys.argv[1]))
"""

# One POST for each line of its standard input; the connection is held until the next.
POST = b"""
import asyncio, os, sys
import httpx

async def main(url, size):
    body = os.urandom(size)
    while sys.stdin.readline():
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(url, content=body)
            print(answer.content == body, answer.headers["x-client"])
            await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""

# To each host in turn; then how long a GET takes.
REDIS = b"""
import asyncio, json, os, sys, time
import redis, redis.asyncio

async def check(client):
    value = os.urandom(1 << 20)
    await client.set("key", value)
    assert await client.get("key") == value
    await client.set("count", 0)
    assert sorted(await asyncio.gather(*(client.incr("count") for _ in range(10)))) == list(range(1, 11))
    async with client.pubsub() as subscriber:
        await subscriber.subscribe("news")
        assert (await subscriber.get_message(timeout=60))["type"] == "subscribe"
        await client.publish("news", "it rains")
        assert (await subscriber.get_message(timeout=60))["data"] == b"it rains"

async def get(client, count):
    took = []
    for _ in range(count):
        start = time.perf_counter()
        assert await client.get("count") == b"10"
        took.append(time.perf_counter() - start)
    return round(sorted(took)[count // 2] * 1e6)

async def main(hosts, rounds):
    clients = [redis.asyncio.Redis(host=host, socket_timeout=60) for host in hosts]
    for client in clients:
        await check(client)
    for _ in range(rounds):
        print(json.dumps({host: await get(client, 100) for host, client in zip(hosts, clients)}))
    for client in clients:
        await client.aclose()

asyncio.run(main(sys.argv[2:], int(sys.argv[1])))
with redis.Redis(host="127.0.0.1", socket_timeout=60) as client:
    assert client.get("count") == b"10"
print("well")
"""


def has(command: str) -> None:
    if command_path(command) is None:
        pytest.skip(f"{command} is not installed")


def put(guest: Guest, **programs: bytes) -> None:
    """Write programs into a guest's working directory."""
    for name, text in programs.items():
        guest.run(["sh", "-c", f"cat > {name}.py"], input=text)


def started(guest: Guest, *argv: str, says: str, **env: str) -> Command:
    """Start a program that goes on once it has said that, on stdout or stderr."""
    command = guest.start(["sh", "-c", 'exec "$@" 2>&1', "sh", *argv], env=env)
    if says:
        command.expect(says, SECONDS)
    return command


def interfaces(guest: Guest) -> list[str]:
    """The network devices, as `ip link` numbers them."""
    return re.findall(r"^\d+: (\w+)", guest.run(["ip", "link"]).text, re.MULTILINE)


def web(guest: Guest, *how: str, **env: str) -> Command:
    uvicorn = [*how, "uvicorn", "web:app", "--host", "0.0.0.0", "--port", "8000"]
    return started(guest, *uvicorn, says="Uvicorn running on", **env)


def test_web_without_a_network(two_guests: Pair) -> None:
    a, b = two_guests.a, two_guests.b
    has("curl")
    assert [interfaces(guest) for guest in (a, b)] == [["lo"], ["lo"]]
    put(a, fetch=FETCH)
    put(b, web=WEB)
    with (
        started(a, "shmsock", "socks5", says="") as proxy,
        web(b, "shmsock", "run", "--listen", "8000", "--"),
    ):
        run = ["shmsock", "run", "--", "python", "fetch.py", "http://vm-b.shm:8000/"]
        assert a.run(run, timeout=SECONDS).text == "well"
        proxy.expect("listening on", SECONDS)
        curl = ["curl", "-sS", "--socks5-hostname", "127.0.0.1:1080", "--max-time", "60"]
        assert a.run([*curl, "http://vm-b.shm:8000/"]).text == "hello"
        proxy.expect("to shm:vm-b:8000: closed; ", SECONDS)
        big = a.run([*curl, "--data-binary", "@/bin/busybox", "http://vm-b.shm:8000/"]).stdout
        assert big == Path("/bin/busybox").read_bytes()
        nobody = a.run([*curl, "http://vm-c.shm:8000/"], check=False)
        assert nobody.returncode == 97, nobody  # that is how curl tells of a proxy's "host unreachable"


@pytest.fixture(scope="module")
def networked() -> Iterator[Pair]:
    """vm-a and vm-b as ever, which also have virtio-net: 10.0.0.1 and 10.0.0.2."""
    if os.geteuid():
        pytest.skip("a bridge takes root")
    with Bridge() as bridge, Fleet() as fleet:
        region = fleet.shared_file(PAIR_SIZE)
        guests = [
            fleet.boot(
                name,
                ivshmem=[Ivshmem(region, PAIR_SIZE)],
                net=dataclasses.replace(bridge.tap(), address=address),
            )
            for name, address in (("vm-a", "10.0.0.1/24"), ("vm-b", "10.0.0.2/24"))
        ]
        yield Pair(guests[0], guests[1], region, PAIR_SIZE)


def received(guest: Guest) -> int:
    """Bytes that came to it over virtio-net so far."""
    return int(guest.run(["sh", "-c", "cat /sys/class/net/e*/statistics/rx_bytes"]).text)


def connections(region: Path, name: str) -> int:
    """How many connections that peer has in the region, as `shmsock info` tells."""
    with open_file(str(region)) as opened:
        return sum(len(section.connections) for section in inspect(opened).sections if section.name == name)


def test_an_address_leads_through_memory_while_its_peer_is_there(networked: Pair) -> None:
    a, b, region, *_ = networked
    put(a, post=POST)
    put(b, web=WEB)
    run = ["shmsock", "run", "--auto", RANGE, "--listen", "8000", "--"]
    post = [*run, "python", "post.py", "http://10.0.0.2:8000/", str(BODY)]
    with a.start(post, env={"SHMSOCK_PUBLISH": RANGE}) as client:

        def post_one() -> tuple[bool, int]:
            """Whether one POST went over virtio-net, and the client's connections in memory then."""
            before = received(b)
            client.send(b"\n")
            assert client.readline(SECONDS) == "True 10.0.0.1"
            seen = received(b) - before > BODY, connections(region, a.name)
            client.send(b"\n")
            return seen

        with web(b, *run, SHMSOCK_PUBLISH=RANGE):
            assert post_one() == (False, 1)
        # It was killed without a word, and is started again as if there were no shared memory.
        with web(b):
            assert post_one() == (True, 0)
        with web(b, *run, SHMSOCK_PUBLISH=RANGE):
            assert post_one() == (False, 1)


def test_redis_behind_a_forward_beside_virtio_net(networked: Pair) -> None:
    a, b, *_ = networked
    for command in "redis-server", "redis-benchmark":
        has(command)
    put(a, client=REDIS)
    redis = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    forward = ["shmsock", "forward"]
    with (
        started(b, *redis, says="Ready to accept connections"),
        started(a, *forward, "tcp:127.0.0.1:6379", "shm:vm-b:6379", says="") as here,
        started(b, *forward, "shm:6379", "tcp:127.0.0.1:6379", says="listening on"),
    ):
        here.expect("listening on", SECONDS)
        client = ["python", "client.py", "3" if LONG else "0", "vm-b.shm", "127.0.0.1", "10.0.0.2"]
        said = a.run(["shmsock", "run", "--", *client], timeout=2 * SECONDS).text
        assert said.endswith("well")
        print("redis-py, microseconds:", said.splitlines()[:-1])
        kinds = [(["-c", "1"], 500), (["-c", "50"], 1000), (["-c", "1", "-P", "100"], 20000)]
        kinds.append((["-c", "10", "-d", "65536"], 200))
        for options, count in kinds * 3 if LONG else [(["-c", "10", "-d", "1000"], 300)]:
            for host in "127.0.0.1", "10.0.0.2":
                before = received(b)
                tests = ["-q", "-t", "set,get", "-n", str(count), *options]
                done = a.run(["redis-benchmark", "-h", host, *tests], timeout=SECONDS).text
                found = re.findall(r"(SET|GET): ([\d.]+) requests per second, p50=([\d.]+)", done)
                assert [name for name, *_ in found] == ["SET", "GET"], done
                assert (received(b) - before > 20 * count) == (host == "10.0.0.2")
                print(json.dumps([host, options, found]))
