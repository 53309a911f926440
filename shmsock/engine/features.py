"""What peers of different versions agree on: feature bits, releases, and which side has to be upgraded."""

from __future__ import annotations

from typing import NamedTuple

from shmsock.errors import listing
from shmsock.native._core import lib

__all__ = ["NONE", "OWN", "Terms", "release_text"]


class Terms(NamedTuple):
    """What a section's owner, or who formatted a region, says of its version. Whatever it says, it concerns
    itself only."""

    release: int = 0
    """major:8, minor:8, patch:16; 0: one of 0.1, which told nothing."""
    least: int = 0
    """The oldest release that may talk to it; 0: any."""
    features: int = 0
    """Those that it has, and can do without: compatible."""
    to_link: int = 0
    """Those that a peer must know to link to it (read-only compatible: tools may look),"""
    to_look: int = 0
    """and those that others must know to look, too (incompatible)."""

    @property
    def offers(self) -> int:
        return self.features | self.to_link | self.to_look

    def bars(self, other: Terms, looks: bool = False) -> str:
        """Say what these terms need and `other` has not; "": nothing. `looks`: it does not link."""
        unknown = (self.to_look | (0 if looks else self.to_link)) & ~other.offers
        if unknown:
            return f"needs feature {listing(bit for bit in range(64) if unknown >> bit & 1)}"
        return f"needs shmsock {release_text(self.least)}" if other.release < self.least else ""

    def barred(self, by: Terms, what: str, looks: bool = False) -> str:
        """Say that this process must be upgraded, to read a region or to link to a peer with the terms `by`;
        "": it need not. `what`: "the region was made by", say."""
        if needs := by.bars(self, looks):
            mine, theirs = release_text(self.release), release_text(by.release)
            do = _install(max(by.least, by.release))
            return f"{what} shmsock {theirs} and {needs}, and this is shmsock {mine}: upgrade it here, {do}"
        return ""

    def refuses(self, other: Terms, what: str) -> str:
        """Say why this process may not link to a peer, and which side is to be upgraded; "": it may. Both
        sides come to the same result."""
        if (here := self.barred(other, what)) or not (needs := self.bars(other)):
            return here
        mine, theirs = release_text(self.release), release_text(other.release)
        do = _install(max(self.least, self.release))
        return f"{what} shmsock {theirs}, and this shmsock {mine} {needs}: upgrade it there, {do}"

    def shared(self, other: Terms) -> int:
        """The features that a link between the two uses."""
        return self.offers & other.offers


NONE = Terms()
"""Those of release 0.1."""
OWN = Terms(lib.SH_RELEASE, lib.SH_LEAST_RELEASE, lib.SH_FEATURES)
"""The terms of this version."""


def release_text(release: int) -> str:
    """Write a release as "0.2.0"."""
    return f"{release >> 24 & 0xFF}.{release >> 16 & 0xFF}.{release & 0xFFFF}" if release else "0.1"


def _install(release: int) -> str:
    return f"`pip install -U 'shmsock>={release_text(release)}'`"
