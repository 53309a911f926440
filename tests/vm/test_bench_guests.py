"""`shmsock bench serve` in one guest, `shmsock bench connect` in the other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vm.conftest import Pair

pytestmark = pytest.mark.vm

SECONDS = 60


def test_serve_and_connect(two_guests: Pair) -> None:
    with two_guests.b.start(["shmsock", "bench", "serve"]) as serving:
        assert "vm-b port 7000" in serving.readline(SECONDS)
        short = ["--rounds", "1", "--seconds", "0.1", "--only", "echo"]
        done = two_guests.a.run(
            ["shmsock", "bench", "connect", "vm-b", *short, "--json", "-"], timeout=SECONDS
        )
        serving.close_stdin()
        serving.wait(SECONDS, check=True)
    report = json.loads(done.text[done.text.index("\n{") :])
    assert list(report["measures"]) == ["echo"]
    (figures,) = report["measures"]["echo"]["results"].values()
    assert 0 < figures["p50_us"] <= figures["max_us"]
    assert "to vm-b" in done.text
