"""A multiple-choice knapsack: one candidate for each item, so that all fit a budget and the sum of errors is least.

A price per byte decides nearly all: each item takes what leaves the least error at that price, and the price is the
highest at which all fits (the linear relaxation). The items that are nearest to choosing otherwise, all of them where
they are few, are then chosen together by dynamic programming. So an item costs the same however many there are.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

UNITS = 2**14  # that the bytes to spend are counted in, where they are more
CORE = 128  # items that are chosen together


class Candidate(NamedTuple):
    """One way to quantize an item: its size, the error that it leaves, and what it is."""

    packed_bytes: int
    error: float
    what: Any


Item = list[Candidate]  # sizes rise, errors fall


def solve_knapsack(items: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """Choose one candidate for each item.

    Args:
        items: the candidates of each.
        budget: bytes, at least the sum of the smallest candidates.
    """
    items = [_worthwhile(candidates) for candidates in items]
    chosen, price = _relaxed(items, budget)
    core = heapq.nsmallest(CORE, range(len(items)), key=lambda i: _loss(items[i], chosen[i], price))
    others = sum(each.packed_bytes for each in chosen) - sum(chosen[i].packed_bytes for i in core)
    for i, each in zip(core, _together([items[i] for i in core], budget - others), strict=True):
        chosen[i] = each
    return _filled(items, chosen, budget)


def _worthwhile(candidates: Sequence[Candidate]) -> Item:
    """Keep the candidates that leave less error than every smaller one."""
    kept: Item = []
    for each in sorted(candidates, key=lambda each: each[:2]):
        if not kept or each.error < kept[-1].error:
            kept.append(each)
    return kept


def _per_byte(a: Candidate, b: Candidate) -> float:
    """Compute what the larger candidate b lowers the error by for each byte more."""
    return (a.error - b.error) / (b.packed_bytes - a.packed_bytes)


def _hull(item: Item) -> Item:
    """Keep the candidates that are the best at some price: from one to the next they lower less and less per byte."""
    hull: Item = []
    for each in item:
        while len(hull) > 1 and _per_byte(hull[-2], hull[-1]) <= _per_byte(hull[-1], each):
            hull.pop()
        hull.append(each)
    return hull


def _relaxed(items: Sequence[Item], budget: int) -> tuple[list[Candidate], float]:
    """Choose by a price per byte, the lowest error that an item lowers for it, as long as all fits; and find it."""
    chosen, steps = [item[0] for item in items], []
    for i, hull in enumerate(map(_hull, items)):
        steps += [(-_per_byte(a, b), i, b) for a, b in pairwise(hull)]
    left = budget - sum(each.packed_bytes for each in chosen)
    for price, i, each in sorted(steps, key=lambda step: step[:2]):
        left -= each.packed_bytes - chosen[i].packed_bytes
        if left < 0:
            return chosen, -price
        chosen[i] = each
    return chosen, 0.0


def _loss(item: Item, chosen: Candidate, price: float) -> float:
    """Compute what the best other choice would lose at this price per byte."""
    costs = (each.error + price * each.packed_bytes for each in item if each is not chosen)
    return min(costs, default=np.inf) - chosen.error - price * chosen.packed_bytes


def _together(items: Sequence[Item], budget: int) -> list[Candidate]:
    """Choose by dynamic programming: `least[b]` is the least error of the items so far in b units of bytes.

    Beyond their smallest candidates, that is. Sizes count in whole units, rounded up.
    """
    spare = budget - sum(item[0].packed_bytes for item in items)
    unit = max(1, spare / UNITS)
    least, choices = np.zeros(int(spare // unit) + 1), []
    costs = [[int(np.ceil((each.packed_bytes - item[0].packed_bytes) / unit)) for each in item] for item in items]
    for item, of_item in zip(items, costs, strict=True):
        totals = np.full((len(item), least.size), np.inf)
        for total, each, cost in zip(totals, item, of_item, strict=True):
            total[cost:] = least[: max(least.size - cost, 0)] + each.error
        choices.append(totals.argmin(0).astype(np.uint16))
        least = totals.min(0)
    chosen, b = [], least.size - 1
    for item, of_item, choice in zip(reversed(items), reversed(costs), reversed(choices), strict=True):
        chosen.append(item[choice[b]])
        b -= of_item[choice[b]]
    return chosen[::-1]


def _filled(items: Sequence[Item], chosen: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Take the best step per byte that still fits, again and again."""
    chosen, left = list(chosen), budget - sum(each.packed_bytes for each in chosen)

    def step(i: int) -> tuple[float, int, Candidate] | None:
        larger = (each for each in items[i] if 0 < each.packed_bytes - chosen[i].packed_bytes <= left)
        return min(((-_per_byte(chosen[i], each), i, each) for each in larger), default=None)

    heap = [found for found in map(step, range(len(items))) if found is not None]
    heapq.heapify(heap)
    while heap:
        _, i, each = heapq.heappop(heap)
        if each.packed_bytes - chosen[i].packed_bytes <= left:
            left -= each.packed_bytes - chosen[i].packed_bytes
            chosen[i] = each
        found = step(i)
        if found is not None:
            heapq.heappush(heap, found)
    return chosen
