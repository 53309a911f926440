"""A world per test, in every temper: what holds when stores are seen at once must hold when they are seen
late."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.world import World

TEMPERS = ["eager-0", "lazy-1", "lazy-2", "lazy-3", "nested-1", "nested-2", "nested-3"]


@pytest.fixture(params=TEMPERS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Four sections; checked for leaks and lost wakeups at the end."""
    how, _, seed = request.param.partition("-")
    made = World(how, int(seed))
    yield made
    made.check()
