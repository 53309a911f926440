"""Figures beside those of the kernel's network: the ratio of each round, and how sure that of all is."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import Any

from shmsock.bench.measures import Column, Measure
from shmsock.bench.pairs import TCP, Variant
from shmsock.bench.results import flat

__all__ = ["DISAGREE", "beside", "reference", "spread"]

DISAGREE = 2.0
"""Rounds do not agree when the highest of their ratios is more than so many times the lowest."""
SURE = 0.95


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Tell the median of some rounds, and between which of them that of all rounds which could be taken lies;
    `sure` is the probability of it. Whatever the distribution, n rounds lie all above it, or all below, once
    in 2 ** (n - 1) times: so it is from the lowest to the highest, until fewer make it 95 % sure."""
    ordered, count = sorted(values), len(values)

    def sure(left_out: int) -> float:
        return 1.0 - 2 * sum(comb(count, below) for below in range(left_out + 1)) / 2.0**count

    left_out = 0
    while sure(left_out + 1) >= SURE:
        left_out += 1
    return {
        "ratio": median(ordered),
        "low": ordered[left_out],
        "high": ordered[-1 - left_out],
        "sure": max(0.0, sure(left_out)),
        "agree": ordered[-1] <= DISAGREE * ordered[0],
        "each": list(values),
    }


def reference(
    measure: Measure, variant: Variant, variants: Sequence[Variant], results: dict[str, Any]
) -> str | None:
    """Beside what a figure is told: the kernel's network on the same loop, else uvloop's TCP."""
    kernels = [v for v in variants if v.is_tcp and v.label in results]
    if measure.own_loop:
        return next((v.label for v in kernels if v.loop == variant.loop), None)
    return TCP if TCP in results else next((v.label for v in kernels), None)


def beside(measure: Measure, variants: Sequence[Variant], results: dict[str, Any]) -> None:
    """Add to the results how each column that is told as a ratio compares. A ratio above 1 is better; of a
    cost it is how many times as much is paid."""
    for variant in variants:
        than = reference(measure, variant, variants, results)
        if than is None or than == variant.label:
            continue
        pairs = list(zip(results[variant.label]["rounds"], results[than]["rounds"], strict=True))
        told = {c.key: ratios for c in measure.columns if c.beside and (ratios := _ratios(c, pairs))}
        results[variant.label]["beside"] = {
            key: {"than": than, **spread(ratios)} for key, ratios in told.items()
        }


def _ratios(column: Column, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    """Of each round; none where a figure is missing, or nothing at all."""
    found = [[dict(flat(taken)).get(column.key, 0.0) for taken in pair] for pair in pairs]
    if not all(all(pair) for pair in found):
        return []
    return [theirs / ours if column.less and not column.cost else ours / theirs for ours, theirs in found]
