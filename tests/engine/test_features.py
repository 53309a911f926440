"""Peers of other versions: feature bits, releases, and the line that says which side is to be upgraded."""

from __future__ import annotations

import errno

import pytest

from shmsock.engine import layout as lay
from shmsock.engine.features import OWN, Terms, release_text
from shmsock.engine.layout import format_region, read_layout
from shmsock.errors import RegionFormatError
from tests.engine.world import Node, World

NEW = 9 << 24
BIT = 1 << 40
OLD = Terms()
TOLD = "upgrade it here, `pip install -U 'shmsock>=9.0.0'`"
#: Terms of a version to come, and what this one says to them: nothing, where it can talk to it.
FUTURE = {
    "compatible": (Terms(NEW, 0, OWN.features | BIT), ""),
    "read-only": (Terms(NEW, 0, OWN.features, BIT), "needs feature 40"),
    "incompatible": (Terms(NEW, 0, OWN.features, 0, BIT), "needs feature 40"),
    "minimum": (Terms(NEW, NEW, OWN.features), "needs shmsock 9.0.0"),
}


def echoes(world: World, a: Node, b: Node) -> bool:
    listener = b.listen()
    conn = a.connect(b)
    world.quiet()
    assert a.take("connected", conn)
    there = b.accepted(listener)
    a.write(conn, b"hello")
    world.quiet()
    b.write(there, bytes(b.read(there)))
    world.quiet()
    return a.read(conn) == b"hello"


def refused(a: Node, b: Node) -> str:
    with pytest.raises(ConnectionRefusedError) as caught:
        a.connect(b)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    return str(caught.value.strerror)


@pytest.mark.parametrize("kind", FUTURE)
@pytest.mark.parametrize("first", ["this", "the new one"])
def test_with_a_version_to_come(world: World, kind: str, first: str) -> None:
    terms, needs = FUTURE[kind]
    if first == "this":
        a, b = world.attach("a"), world.attach("b", terms=terms)
    else:
        b, a = world.attach("b", terms=terms), world.attach("a")
    world.quiet()
    if not needs:
        assert echoes(world, a, b)
        assert a.link(b).features == b.link(a).features == OWN.features
        return
    here, there = refused(a, b), refused(b, a)
    assert here == f"peer 'b' (section {b.section}) runs shmsock 9.0.0 and {needs}, and this is shmsock " + (
        f"{release_text(OWN.release)}: {TOLD}"
    )
    assert there.startswith(
        f"peer 'a' (section {a.section}) runs shmsock {release_text(OWN.release)}, and this"
    )
    assert there.endswith(f"{needs}: {TOLD.replace('here', 'there')}")
    # Others are not concerned, and neither is who comes next.
    assert echoes(world, a, world.attach("c"))
    world.leave(b)
    assert echoes(world, a, world.attach("b"))


def test_a_release_without_bits_is_talked_to(world: World) -> None:
    a, b = world.attach("a"), world.attach("b", terms=OLD)
    assert echoes(world, a, b)
    assert a.link(b).features == 0


def test_what_a_former_owner_of_another_version_left_is_not_its_successor_s(world: World) -> None:
    new = FUTURE["incompatible"][0]
    a, b, *_ = [
        world.attach(name, terms=terms) for name, terms in zip("abcd", [OWN, new, OWN, OWN], strict=True)
    ]
    section = b.section
    world.leave(b)
    b = world.attach("b", terms=OLD)
    world.poke(
        world.layout.section(section) + lay.TO_LOOK, BIT
    )  # one of 0.1 knows no such word, and leaves it
    assert b.section == section
    assert echoes(world, a, b)


@pytest.mark.parametrize("word", ["FEATURES", "TO_LINK", "TO_LOOK", "RELEASE"])
def test_bits_that_change_later_change_nothing(world: World, word: str) -> None:
    a, b = world.attach("a"), world.attach("b")
    assert echoes(world, a, b)
    before, c = a.link(b).features, world.attach("c")
    world.poke(world.layout.section(b.section) + getattr(lay, word), 2**64 - 1)
    for _ in range(30):
        world.advance(0.1)
        world.quiet()
    conn = a.connect(b)
    world.quiet()
    assert a.take("connected", conn)
    assert a.link(b).features == before
    assert echoes(world, a, c)  # and of others they decide nothing at all


def test_who_is_refused_costs_little(world: World) -> None:
    """It notifies as often as it likes: nobody answers, or the two would do so for ever."""
    a, b = world.attach("a"), world.attach("b", terms=FUTURE["read-only"][0])
    world.quiet()
    own = world.layout.pair(a.section, b.section)
    before = world.word(own), a.statistic("adoptions")
    for _ in range(100):
        world.poke(pair := world.layout.pair(b.section, a.section), world.word(pair) + 1)
        world.quiet()
    assert (world.word(own), a.statistic("adoptions")) == before
    assert a.statistic("violations") == 0


def test_a_life_that_begins_while_the_bits_are_read_is_adopted_by_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = world.attach("a"), world.attach("b", terms=OLD)
    world.quiet()
    read = world.layout.terms

    at, pair = world.layout.section(b.section), world.layout.pair(b.section, a.section)

    def restarts(section: int) -> Terms:
        found = read(section)
        if section == b.section and found == OLD:  # as its successor does, just now
            world.poke(at + lay.RELEASE, OWN.release)
            world.poke(at + lay.FEATURES, OWN.features)
            world.poke(pair, world.word(pair) + (1 << 32))
        return found

    monkeypatch.setattr(world.layout, "terms", restarts)
    a.call(a.engine.links.adopt, b.section, world.now)
    world.quiet()
    assert a.link(b).features == OWN.features


WORDS = {"compatible": lay.H_FEATURES, "read-only": lay.H_TO_LINK, "incompatible": lay.H_TO_LOOK}


@pytest.mark.parametrize("version", lay.VERSIONS)
@pytest.mark.parametrize("kind", [*WORDS, "minimum"])
def test_regions_of_a_version_to_come(world: World, kind: str, version: int) -> None:
    world.poke(lay.H_VERSION, version)
    world.poke(lay.H_RELEASE, (NEW if kind == "minimum" else 0) << 32 | NEW)
    if kind in WORDS:
        world.poke(WORDS[kind], BIT)
    if kind != "incompatible" and kind != "minimum":
        assert read_layout(world.memory, looks=True).peers == world.layout.peers
    if kind == "compatible":
        assert read_layout(world.memory).peers == world.layout.peers
        return
    for read in (read_layout, format_region):
        with pytest.raises(
            RegionFormatError, match=r"made by shmsock 9\.0\.0 and needs .*40|9\.0\.0"
        ) as caught:
            read(world.memory)
        assert TOLD in str(caught.value)


def test_this_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert version("shmsock") == release_text(OWN.release)


def test_any_word_is_a_release() -> None:
    assert release_text(0xFFFFFFFF) == "255.255.65535"
    assert release_text(0) == "0.1"
    most = Terms(*[2**64 - 1] * 5)
    assert len(OWN.refuses(most, "peer 'x' runs")) < 250
