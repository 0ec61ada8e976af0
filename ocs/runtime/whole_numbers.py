"""The int8 weight that an integer engine multiplies: copies added up where sums fit, in as few columns as they need.

A channel of a split weight is there several times, and a product adds up what all its columns give: only their sum M
counts, a whole number for each output. Where all of a channel's |M| fit, it is one column and costs what the float one
did; where not, M is cut into m even parts, floor((M + i) / m), i = 0 .. m - 1, which add up to M for any m (Hermite),
with the least m for which all parts fit. So a lowered weight never needs more columns than the expanded one.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class WholeNumbers(NamedTuple):
    """Integers of a weight, and which channel of its input each column meets."""

    ints: Tensor  # int8 [O, C + n, ...]
    source: Tensor  # int64 [G (C + n)], group by group: those of each group first, in order, then n more


def whole_numbers(ints: Tensor, source: Tensor, groups: int, channels: int) -> Tensor:
    """Add up the columns of each channel: int32 [O, C, ...].

    ints: int8 [O, C + n, ...]. source: int64 [G (C + n)], the original channel of each column, group by group.
    channels: C.
    """
    grouped = ints.int().unflatten(0, (groups, -1))
    within = source.view(groups, -1) - _first(groups, channels, source)
    index = within.view(groups, 1, -1, *[1] * (ints.dim() - 2)).expand_as(grouped)
    zeros = grouped.new_zeros(*grouped.shape[:2], channels, *ints.shape[2:])
    return zeros.scatter_add_(2, index, grouped).flatten(0, 1)


def in_columns(whole: Tensor, groups: int, limit: int) -> WholeNumbers:
    """Cut whole numbers [O, C, ...] into as few columns as keep each |integer| within the limit."""
    grouped = whole.unflatten(0, (groups, -1))
    C = grouped.shape[2]
    parts = (-(-grouped.abs().amax((1, *range(3, grouped.dim()))) // limit)).clamp(min=1)  # [G, C]
    column, part = _columns(parts)
    shape = (groups, 1, -1, *[1] * (grouped.dim() - 3))
    of_column = parts.gather(1, column).view(shape)
    chosen = grouped.gather(2, column.view(shape).expand(-1, grouped.shape[1], -1, *grouped.shape[3:]))
    cut = (chosen + part.view(shape)).div(of_column, rounding_mode="floor")
    cut = cut * (part >= 0).view(shape)  # groups are filled up with zero columns
    return WholeNumbers(cut.to(torch.int8).flatten(0, 1), (column + _first(groups, C, column)).flatten())


def _columns(parts: Tensor) -> tuple[Tensor, Tensor]:
    """List the channel of each column and which part of it that is, [G, C + n] each, from the parts of each [G, C].

    The first parts of all channels stand before all others; a filler is part -1 of channel 0.
    """
    groups, C = parts.shape
    more = (parts - 1).flatten()
    of_group = more.view(groups, C).sum(1)
    channel = torch.arange(groups * C, device=parts.device).repeat_interleave(more)
    place = torch.arange(len(channel), device=parts.device)
    at = (channel // C, C + place - (of_group.cumsum(0) - of_group)[channel // C])
    column = torch.arange(C, device=parts.device).repeat(groups, 1)
    column, part = (torch.nn.functional.pad(x, (0, int(of_group.max()))) for x in (column, column.new_zeros(groups, C)))
    part[:, C:] = -1
    column[at] = channel % C
    part[at] = 1 + place - (more.cumsum(0) - more)[channel]
    return column, part


def _first(groups: int, channels: int, like: Tensor) -> Tensor:
    """Give the first channel of each group [G, 1]."""
    return channels * torch.arange(groups, device=like.device)[:, None]
