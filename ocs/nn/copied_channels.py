"""The channels that an expanded layer has beyond the original ones, where its weight, its input or both are split."""

from typing import NamedTuple

import torch
from torch import Tensor

from ocs.nn.input_parts import InputParts


class CopiedChannels(NamedTuple):
    """The expanded channels beyond the original ones, which splits of weight and input make together, group by group.

    Each pairs a column of the expanded weight with a part of the input: the weight's copies with their channel's first
    part, and every column of a channel with each further part of it. Groups are filled up with zero columns.
    """

    column: Tensor  # int64 [groups, m]: of the expanded weight of the group
    used: Tensor  # bool [groups, m]
    channel: Tensor  # int64 [groups m]: of the input
    part: Tensor  # int64 [groups m]: which of InputParts it meets


def copied_channels(weight_source: Tensor, parts: InputParts, groups: int, channels: int) -> CopiedChannels:
    """Pair the columns of an expanded weight with the parts of its input, beyond those of the original channels.

    weight_source: int64 [groups (C + n)], group by group. channels: C.
    """
    columns = weight_source.view(groups, -1)
    source = columns[:, channels:]  # a copy in the weight meets the first part of its channel, which has its number
    column = torch.arange(channels, columns.shape[1], device=source.device).expand_as(source)
    found = CopiedChannels(column, torch.ones_like(source, dtype=torch.bool), source, source)
    if parts.source is not None:
        more = _further_parts(columns, parts.source.view(groups, -1), groups * channels)
        found = CopiedChannels(*(torch.cat(both, 1) for both in zip(found, more, strict=True)))
    return found._replace(channel=found.channel.flatten(), part=found.part.flatten())


def _further_parts(columns: Tensor, copies: Tensor, first: int) -> CopiedChannels:
    """Pair each copy of the input [groups, n_a] with every column of its channel; all that is given is [groups, m].

    columns: int64 [groups, C + n], the original channel of each column. first: which part the first copy is.
    """
    group, copy, column = (copies[:, :, None] == columns[:, None, :]).nonzero(as_tuple=True)
    counts = group.bincount(minlength=len(copies))
    place = torch.arange(group.numel(), device=group.device) - (counts.cumsum(0) - counts)[group]
    shape = (len(copies), int(counts.max()))

    def filled(filler: Tensor, values: Tensor) -> Tensor:
        return filler.expand(shape).index_put((group, place), values)

    zero = column.new_zeros(())
    used = filled(zero.bool(), torch.ones_like(column, dtype=torch.bool))
    part = filled(zero + first, first + group * copies.shape[1] + copy)
    return CopiedChannels(filled(zero, column), used, filled(copies[:, :1], copies[group, copy]), part)


def copies_needed(weight_source: Tensor, input_source: Tensor | None, groups: int, channels: int) -> int:
    """Count the channels that copied_channels() gives to each group."""
    columns = weight_source.view(groups, -1)
    needed = columns.shape[1] - channels
    if input_source is None:
        return needed
    copies = input_source.view(groups, -1)[:, channels:]
    columns_of = columns.flatten().bincount(minlength=groups * channels)
    return needed + int(columns_of[copies].sum(1).max())
