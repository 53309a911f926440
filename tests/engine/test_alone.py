"""A node that waits for others on memory that nobody else has says so, once."""

from __future__ import annotations

import pytest

from tests.engine.world import Node, World


def told(world: World, node: Node, seconds: int) -> int:
    """How often it has said that it is alone, after so long."""
    for _ in range(seconds):
        world.advance(1.0)
        node.pump()
    return len(node.take("alone"))


def test_said_once(world: World) -> None:
    a = world.attach("a")
    assert told(world, a, 40) == 0  # it does not listen
    a.listen()
    assert told(world, a, 28) == 0
    assert told(world, a, 5) == 1
    assert told(world, a, 100) == 0
    assert a.engine.peers.alone


@pytest.mark.parametrize("way", ["is there", "was there", "comes"])
def test_not_with_others(world: World, way: str) -> None:
    a = world.attach("a")
    a.listen()
    if way == "comes":
        assert told(world, a, 20) == 0
    b = world.attach("b")
    world.advance(0.2)
    if way == "was there":
        world.leave(b)
    assert told(world, a, 100) == 0
    assert not a.engine.peers.alone


def test_what_former_lives_left_is_nobody(world: World) -> None:
    world.leave(world.attach("b"))
    a = world.attach("a")
    a.listen()
    assert told(world, a, 35) == 1


@pytest.mark.parametrize("how", ["for this machine", "by itself", "for a while"])
def test_not_who_is_alone_on_purpose(world: World, how: str) -> None:
    a = world.attach("a")
    listener = a.call(a.engine.listen, 7000, local_only=how == "for this machine")
    listener.handler = object()
    if how == "by itself":
        a.connect(a)
        world.quiet()
    if how == "for a while":
        assert told(world, a, 20) == 0
        a.call(listener.close)
        assert told(world, a, 20) == 0
        a.listen()
        assert told(world, a, 20) == 0
        return
    assert told(world, a, 100) == 0
