"""Unmodified programs under `shmsock run --auto`, at addresses of a network of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.aio.networks import Change, network_of_its_own
from tests.run.programs import Program, program, result

LOOPS = ["asyncio", "uvloop"]
ADDRESS, SIX, OUTSIDE = "10.77.0.5", "fd77::5", "10.78.0.5"
AUTO = ["--auto", "10.77.0.0/24", "--auto", "fd77::/64"]
SERVER = """
import asyncio, ssl, sys
async def serve(reader, writer):
    line = await reader.readline()
    peername = writer.get_extra_info("peername")[0]
    writer.write(f"{writer.get_extra_info('shmsock_path', 'tcp')} {peername} ".encode() + line)
    writer.close()
async def main():
    context = None
    if sys.argv[1:]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1])
    server = await asyncio.start_server(serve, None, 8000, ssl=context)
    print("serving", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
ASKING = """
import asyncio, socket, ssl, sys
async def ask(host, **kwds):
    reader, writer = await asyncio.open_connection(host, 8000, **kwds)
    writer.write(b"hello\\n")
    answer = (await reader.read()).decode().split()
    assert answer[2] == "hello" and len(answer) == 3
    assert writer.get_extra_info("peername") == ((host, 8000, 0, 0) if ":" in host else (host, 8000))
    writer.close()
    print(host, answer[0], answer[1], flush=True)
async def step():
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
"""


@pytest.fixture(autouse=True)
def network(region: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Change]:
    monkeypatch.setenv("SHMSOCK_REGION", region)
    with network_of_its_own() as change:
        for address in (ADDRESS, OUTSIDE):
            change("add", f"{address}/32")
        change("add", f"{SIX}/128")
        monkeypatch.setenv("SHMSOCK_PUBLISH", "10.0.0.0/8,fd77::/64")
        yield change


@pytest.fixture
def region(shm_region: Path) -> str:
    return str(shm_region)


def serving(*arguments: str) -> Program:
    running = Program([*AUTO, "--name", "server", "--listen", "8000"], "python", "-c", SERVER, *arguments)
    running.wait_for("serving")
    return running


def client(loop: str, main: str) -> tuple[list[str], str]:
    code = f"{ASKING}\nasync def main():\n{main}\nasyncio.run(main())\n"
    return ["--loop", loop, *AUTO, "--name", "client"], code


@pytest.mark.parametrize("loop", LOOPS)
def test_a_program_and_its_server(loop: str) -> None:
    """Inside of the range through memory, of both families; outside of it never; then the server stops and
    comes back, without its port in memory."""
    options, code = client(
        loop,
        f"""
    for host in ("{ADDRESS}", "{SIX}", "{OUTSIDE}"):
        await ask(host)
    await step()
    try:
        await ask("{ADDRESS}")
    except ConnectionRefusedError:
        print("nobody", flush=True)
    await step()
    await ask("{ADDRESS}")
""",
    )
    server = serving()
    try:
        with program(options, "python", "-c", code) as asking:
            asking.wait_for(OUTSIDE)
            assert asking.lines[:2] == [f"{ADDRESS} shm {ADDRESS}", f"{SIX} shm {ADDRESS}"]
            assert asking.lines[2] == f"{OUTSIDE} tcp {OUTSIDE}"
            server.stop()
            asking.tell()
            asking.wait_for("nobody")
            with program(AUTO, "python", "-c", SERVER) as plain:
                plain.wait_for("serving")
                asking.tell()
                assert asking.ends() == 0
            assert asking.lines[-1] == f"{ADDRESS} tcp {ADDRESS}"
    finally:
        server.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_sockets_that_programs_connect_themselves(loop: str) -> None:
    """Given to create_connection() they lead through memory; used as they are, over TCP."""
    options, code = client(
        loop,
        f"""
    loop = asyncio.get_running_loop()
    for way in ("transport", "socket"):
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, ("{ADDRESS}", 8000))
        if way == "transport":
            reader, writer = await asyncio.open_connection(sock=sock)
            writer.write(b"hello\\n")
            print(way, (await reader.read()).decode().split()[0])
            writer.close()
        else:
            await loop.sock_sendall(sock, b"hello\\n")
            print(way, (await loop.sock_recv(sock, 100)).decode().split()[0])
            sock.close()
""",
    )
    server = serving()
    try:
        assert result(options, "python", "-c", code).splitlines() == ["transport shm", "socket tcp"]
    finally:
        server.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_tls_names_the_address(loop: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert(ADDRESS).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    options, code = client(
        loop,
        f"""
    context = ssl.create_default_context(cafile="{tmp_path / "ca.pem"}")
    await ask("{ADDRESS}", ssl=context)
    try:
        await ask("{SIX}", ssl=context)
    except ssl.SSLCertVerificationError:
        print("not verified")
""",
    )
    server = serving(str(tmp_path / "server.pem"))
    try:
        lines = result(options, "python", "-c", code).splitlines()
        assert lines == [f"{ADDRESS} shm {ADDRESS}", "not verified"]
    finally:
        server.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_without_a_region(loop: str, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSOCK_REGION", f"{region}-not")
    options, code = client(loop, f'    for _ in range(3):\n        await ask("{ADDRESS}")\n')
    with program(AUTO, "python", "-c", SERVER) as server:
        server.wait_for("serving")
        lines = result(options, "python", "-c", code).splitlines()
    assert [line for line in lines if "tcp" in line] == [f"{ADDRESS} tcp {ADDRESS}"] * 3
    assert len(lines) == 4, lines  # and one warning
    assert not os.path.exists(f"{region}-not")


@pytest.mark.parametrize("text", ["10.0.0.1/24", "vm-b"])
def test_ranges_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, and not by each connection."""
    monkeypatch.setenv("SHMSOCK_PUBLISH", text)
    with program([], "python", "-c", "print('never')") as running:
        assert running.ends() == 2
    assert any(f"SHMSOCK_PUBLISH: '{text}'" in line for line in running.lines)
