"""A multiple-choice knapsack: one candidate for each item, so that all fit a budget and the sum of errors is least."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNITS = 2**14  # that the bytes to spend are counted in, where they are more

Floats = NDArray[np.float64]


class Candidate(NamedTuple):
    """One way to quantize an item: its size, the error that it leaves, and what it is."""

    packed_bytes: int
    error: float
    what: Any


def solve_knapsack(items: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """Choose one candidate for each item, by dynamic programming.

    `least[b]` is the least error of the items so far in b units of bytes beyond their smallest candidates. Sizes count
    in whole units, rounded up; what that leaves over is spent where it lowers the error most per byte.

    Args:
        items: the candidates of each.
        budget: bytes, at least the sum of the smallest candidates.
    """
    sizes = [np.array([each.packed_bytes for each in candidates], np.float64) for candidates in items]
    errors = [np.array([each.error for each in candidates], np.float64) for candidates in items]
    smallest = [size.min() for size in sizes]
    spare = budget - sum(smallest)
    unit = max(1, spare / UNITS)
    units = [np.ceil((size - low) / unit).astype(int) for size, low in zip(sizes, smallest, strict=True)]
    least, choices = np.zeros(int(spare // unit) + 1), []
    for cost, error in zip(units, errors, strict=True):
        totals = np.full((len(cost), least.size), np.inf)
        for i, at in enumerate(cost):
            totals[i, at:] = least[: max(least.size - at, 0)] + error[i]
        choices.append(totals.argmin(0))
        least = totals.min(0)
    chosen = _filled(sizes, errors, _traced_back(units, choices, least.size - 1), budget)
    return [candidates[i] for candidates, i in zip(items, chosen, strict=True)]


def _traced_back(units: Sequence[NDArray[np.int64]], choices: Sequence[NDArray[np.int64]], b: int) -> list[int]:
    """Read off the choice of each item, the last first, from b units."""
    chosen = []
    for cost, choice in zip(reversed(units), reversed(choices), strict=True):
        chosen.append(int(choice[b]))
        b -= cost[chosen[-1]]
    return chosen[::-1]


def _filled(sizes: list[Floats], errors: list[Floats], chosen: list[int], budget: int) -> list[int]:
    """Take the best step per byte that still fits, again and again."""
    chosen = list(chosen)
    while True:
        left = budget - sum(size[i] for size, i in zip(sizes, chosen, strict=True))
        best_gain, best_item, best_choice = 0.0, 0, 0
        for item, (size, error) in enumerate(zip(sizes, errors, strict=True)):
            more, less = size - size[chosen[item]], error[chosen[item]] - error
            gain = np.where((less > 0) & (more <= left), less / np.maximum(more, 1e-9), 0)
            if gain.max() > best_gain:
                best_gain, best_item, best_choice = gain.max(), item, int(gain.argmax())
        if not best_gain > 0:
            return chosen
        chosen[best_item] = best_choice
