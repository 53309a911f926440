"""Protocols, TLS, datagrams, anyio and the `.shm` loop between two guests: each kind as server and as client,
with others and with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vm.conftest import Pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PROGRAM = Path(__file__).with_name("faces.py")
PATIENCE = 120.0
MODULES = ("shmsock.aio.attach", "shmsock.aio.endpoints", "trustme")
PAIRS = {
    "uvloop": ["asyncio", "stock-uvloop", "trio"],
    "stock-asyncio": ["uvloop"],
    "trio": ["trio", "stock-asyncio"],
}


@pytest.mark.parametrize("server", PAIRS)
def test_every_face(two_guests: Pair, server: str) -> None:
    with two_guests.b.start(["python", PROGRAM, "serve", server], modules=MODULES) as serving:
        pem = json.loads(serving.readline(PATIENCE))["ca"]
        for client in PAIRS[server]:
            host = "vm-b.shm" if client.startswith("stock") else "vm-b"
            ask = ["python", PROGRAM, "ask", client, host, pem]
            said = two_guests.a.run(ask, timeout=PATIENCE, modules=MODULES)
            done = json.loads(said.text)
            assert done[-1] == "datagrams"
            if client == "trio":
                assert done == ["ShmStream", "TLSStream", "ShmStream", "datagrams"]
            else:
                assert done[0] == "ShmStreamReader over ShmTransport"
                assert "SSLProtocolTransport" in done[1]
                address = "ff01:" if client.startswith("stock") else "vm-b"
                assert done[2].startswith(f"protocol with ('{address}")
        serving.close_stdin()
        serving.wait(PATIENCE, check=True)
