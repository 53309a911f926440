"""Rules and settings that are read from the environment."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest

import shmsock
from shmsock.run.rules import Rules


def test_addresses_are_mapped_in_every_spelling() -> None:
    text = "10.0.0.5=VM-B.shm, 10.0.0.5:80=vm-c,fd00:0::5=vm-d,[fd00::6]:80=localhost,::ffff:10.0.0.7=e"
    rules = Rules.from_environ({"SHMSOCK_MAP": text})
    found = {
        ("10.0.0.5", 1): "vm-b",
        ("10.0.0.5", 80): "vm-c",
        ("fd00::5", 1): "vm-d",
        ("fd00::6", 80): "localhost",
        ("fd00::6", 81): None,
        ("10.0.0.7", 1): "e",
        ("10.0.0.8", 1): None,
    }
    assert {key: rules.peer(ip_address(key[0]), key[1]) for key in found} == found


def test_ranges_ports_and_loop() -> None:
    rules = Rules.from_environ(
        {"SHMSOCK_AUTO": "10.0.0.0/24,fd00::/64", "SHMSOCK_LISTEN": " 8000,9000,", "SHMSOCK_LOOP": "uvloop"}
    )
    assert rules.trusts(ip_address("10.0.0.9"))
    assert rules.trusts(ip_address("fd00::1"))
    assert not rules.trusts(ip_address("10.0.1.9"))
    assert rules.listen == {8000, 9000}
    assert rules.loop == "uvloop"
    assert Rules.from_environ({}) == Rules()


def test_settings_are_read_from_the_environment() -> None:
    text = "busy_poll_us=50, doorbells=false,dead_after_s=1.5,reap_after_s=none"
    settings = shmsock.Settings.from_environ({"SHMSOCK_SETTINGS": text})
    assert settings == shmsock.Settings(busy_poll_us=50, doorbells=False, dead_after_s=1.5, reap_after_s=None)
    assert shmsock.Settings.from_environ({}) == shmsock.Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("busy_poll_us", "'busy_poll_us' is not FIELD=VALUE"),
        ("pin=1", "'pin=1' is not FIELD=VALUE"),
        ("busy_poll_us=x", "busy_poll_us is 'x', expected int"),
        ("doorbells=maybe", "doorbells is 'maybe', expected bool"),
        ("busy_poll_us=-1", "busy_poll_us is -1, expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="SHMSOCK_SETTINGS: ") as caught:
        shmsock.Settings.from_environ({"SHMSOCK_SETTINGS": text})
    assert said in str(caught.value)


async def _doorbells() -> bool:
    async with shmsock.attach() as node:
        return node.engine.settings.doorbells


def test_nodes_that_are_made_without_settings_have_those(
    shm_region: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMSOCK_SETTINGS", "doorbells=no")
    assert not asyncio.run(_doorbells())
