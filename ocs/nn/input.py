"""Quantized inputs of layers, and their outlier channel splitting (sections 3.4 and 5.3 of the paper).

An input x is rounded to k bits with one scale d, round_half_even(x / d). Where a channel is split, its values are cut
in two, (x - d/2) / 2 and (x + d/2) / 2 where quantization-aware, x / 2 both where naive, and its weights are there
twice. With u = x / d, round((u - 1/2) / 2) + round((u + 1/2) / 2) = round(u) but for ties (Hermite): the grid then
holds values twice as large, or is twice as fine. The channels are chosen once, from calibration, or (Oracle OCS) for
each batch from its own values, where a channel may be split repeatedly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.fx
from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.kernels.ops import fake_quantize
from ocs.weight.arguments import check_bits, check_choice, check_clip
from ocs.weight.threshold import scale_for, split_thresholds
from ocs.weight.types import Split, SplitPlan

ActSplit = Literal["static", "oracle"]


@dataclass(frozen=True)
class InputGrid:
    """How a layer quantizes its input; what files keep of it."""

    bits: int
    signed: bool = True  # integers -qmax .. qmax, else 0 .. 2^k - 1
    splits: int = 0  # in each group
    split: Split = "qa"
    act_split: ActSplit = "static"
    clip: str | float = "none"  # which method gave the threshold, or gives it for each batch

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return qmax(self.bits + (not self.signed))

    @property
    def oracle(self) -> bool:
        """Whether each batch has its own splits and scale."""
        return self.act_split == "oracle"

    def __str__(self) -> str:
        kind = "oracle" if self.oracle else ""
        splits = [f"{self.splits} {kind} splits".replace("  ", " ")] * bool(self.splits)
        return ", ".join([f"{self.bits}{'' if self.signed else ' unsigned'} bits", *splits])


def check_grid(grid: InputGrid) -> None:
    """That it is possible: it may come from a stranger's file."""
    check_bits("bits", grid.bits)
    check_choice("split", grid.split, get_args(Split))
    check_choice("act_split", grid.act_split, get_args(ActSplit))
    check_clip("clip", grid.clip)
    if not isinstance(grid.signed, bool) or type(grid.splits) is not int or grid.splits < 0:
        raise ValueError(f"signed={grid.signed!r}, splits={grid.splits!r}: use a bool and a number of splits")


class QuantizedInput(NamedTuple):
    """A layer's grid, and what calibration gave; Oracle OCS needs neither."""

    grid: InputGrid
    scale: Tensor | None = None  # float32 []
    source: Tensor | None = None  # int64 [C + n]: the original channel of each, group by group, as of a weight


class Cuts(NamedTuple):
    """How channels are cut: x * factor + shift * scale is what is rounded; None where no channel is split."""

    scale: Tensor | None
    source: Tensor | None = None  # int64 [copies]: the original channel, over all groups
    factor: Tensor | None = None  # float32 [channels + copies], the original channels first
    shift: Tensor | None = None


def cut(scale: Tensor, source: Tensor, depth: Tensor, offset: Tensor, channels: int, split: Split) -> Cuts:
    """Cuts from a plan over the original channels, then the copies: part `offset` of 2^depth."""
    factor = torch.ldexp(torch.ones_like(depth, dtype=torch.float32), -depth)
    shift = (offset + 0.5) * factor - 0.5 if split == "qa" else torch.zeros_like(factor)
    return Cuts(scale, source[channels:], factor, shift)


def static_cuts(grid: InputGrid, scale: Tensor, source: Tensor, groups: int) -> Cuts:
    """Of channels chosen before, each of which is split once. source [C + n] is laid out group by group."""
    if not grid.splits:
        return Cuts(scale)
    source = _originals_first(source, groups, grid.splits)
    channels = source.numel() - groups * grid.splits
    further = torch.arange(source.numel(), device=source.device) >= channels
    depth = further.int().index_fill(0, source[channels:], 1)
    return cut(scale, source, depth, further.int(), channels, grid.split)


def oracle_cuts(grid: InputGrid, x: Tensor, axis: int, groups: int) -> Cuts:
    """Of the channels with the largest |x| in this batch, one split at a time; the scale from the split values."""
    rows = as_rows(x.detach(), axis)
    channel_max = torch.ops.ocs.channel_max(rows, 1)
    plan = torch.ops.ocs.split_plan(channel_max, groups, grid.splits)
    plan = SplitPlan(*(_originals_first(part, groups, grid.splits) for part in plan), channel_max)
    (threshold,) = split_thresholds(rows, plan, grid.bits, (grid.clip,), "tensor", signed=grid.signed)
    scale = scale_for(threshold, grid.qmax)
    if not grid.splits:
        return Cuts(scale)
    return cut(scale, plan.source, plan.depth, plan.offset, x.shape[axis], grid.split)


def as_rows(x: Tensor, axis: int) -> Tensor:
    """x as [N, C, K], without a copy where its memory is in that order, or has the channels last."""
    last = x.movedim(axis, -1)
    if last.is_contiguous():
        return last.reshape(-1, last.shape[-1], 1)
    x = x.contiguous()
    return x.view(math.prod(x.shape[: x.dim() + axis]), x.shape[axis], -1)


def _originals_first(part: Tensor, groups: int, splits: int) -> Tensor:
    """A plan's array, laid out group by group, with all original channels before all copies."""
    if not splits:
        return part
    own, copies = part.view(groups, -1).tensor_split([-splits], 1)
    return torch.cat([own.flatten(), copies.flatten()])


def gather(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Channels of x. By indexing, not index_select, which is slow on channels-last inputs."""
    return x[(..., index, *[slice(None)] * (-axis - 1))]


def rounded(
    x: Tensor, grid: InputGrid, cuts: Cuts, axis: int, index: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Channels of x on the grid, in the dtype of x.

    index: which channels of x, None for all. at: where their cuts are in cuts.factor, None for the first ones.
    """
    return _rounded(x, cuts.scale, cuts.factor, cuts.shift, grid.bits, grid.signed, axis, index, at)


@torch.fx.wrap  # as a whole: tracing knows neither shapes nor gradients
def _rounded(
    x: Tensor,
    scale: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    bits: int,
    signed: bool,
    axis: int,
    index: Tensor | None,
    at: Tensor | None,
) -> Tensor:
    dtype = x.dtype
    if x.is_nested:
        raise RuntimeError("a quantized layer input cannot be a nested tensor: pad it, torch.nested.to_padded_tensor")
    if index is not None:
        x = gather(x, index, axis)
    if factor is not None:
        at = slice(x.shape[axis]) if at is None else at
        per_channel = (-1, *[1] * (-axis - 1))
        x = x * factor[at].view(per_channel) + (shift[at] * scale).view(per_channel)
    return fake_quantize(x, scale, bits, signed).to(dtype)


def folded(x: Tensor, grid: InputGrid, cuts: Cuts, axis: int) -> Tensor:
    """x on the grid in its own shape, the rounded copies added up: what an expanded layer computes with."""
    own = rounded(x, grid, cuts, axis)
    if cuts.source is None:
        return own
    at = torch.arange(x.shape[axis], cuts.factor.numel(), device=x.device)
    return own.index_add(axis, cuts.source, rounded(x, grid, cuts, axis, cuts.source, at))


class CopiedChannels(NamedTuple):
    """The expanded channels beyond the original ones, of weight and input splits together, group by group.

    Each pairs a column of the expanded weight with a part of the input: the weight's copies with their channel's first
    part, and every column of a channel with each further part of it. Groups are filled up with zero columns.
    """

    column: Tensor  # int64 [groups, m]: of the expanded weight of the group
    used: Tensor  # bool [groups, m]
    index: Tensor  # int64 [groups m]: the input channel
    at: Tensor  # int64 [groups m]: where its cut is, see Cuts


def copied_channels(weight_source: Tensor, cuts: Cuts, groups: int, channels: int) -> CopiedChannels:
    """weight_source [groups (C + n)], as QuantizedLayer has it; channels: C."""
    columns = weight_source.view(groups, -1)
    source = columns[:, channels:]  # the weight's copies see their channel's first part, cut at the channel's number
    column = torch.arange(channels, columns.shape[1], device=source.device).expand_as(source)
    found = CopiedChannels(column, torch.ones_like(source, dtype=torch.bool), source, source)
    if cuts.source is not None:
        more = _further_parts(columns, cuts.source.view(groups, -1), groups * channels)
        found = CopiedChannels(*(torch.cat(both, 1) for both in zip(found, more, strict=True)))
    return found._replace(index=found.index.flatten(), at=found.at.flatten())


def _further_parts(columns: Tensor, copies: Tensor, first: int) -> CopiedChannels:
    """Every column [groups, C + n] that the input's copies [groups, n_a] are multiplied with, all [groups, m].

    first: where the cut of the first copy is.
    """
    group, copy, column = (copies[:, :, None] == columns[:, None, :]).nonzero(as_tuple=True)
    counts = group.bincount(minlength=len(copies))
    place = torch.arange(group.numel(), device=group.device) - (counts.cumsum(0) - counts)[group]
    shape = (len(copies), int(counts.max()))
    more = CopiedChannels(
        columns.new_zeros(shape), columns.new_zeros(shape, dtype=torch.bool), copies[:, :1].repeat(1, shape[1]),
        columns.new_full(shape, first)
    )  # fmt: skip
    values = (
        column,
        torch.ones_like(column, dtype=torch.bool),
        copies[group, copy],
        first + group * copies.shape[1] + copy,
    )
    for tensor, value in zip(more, values, strict=True):
        tensor[group, place] = value
    return more


def copies_needed(weight_source: Tensor, input_source: Tensor | None, groups: int, channels: int) -> int:
    """How many channels of each group copied_channels() gives."""
    columns = weight_source.view(groups, -1)
    needed = columns.shape[1] - channels
    if input_source is None:
        return needed
    copies = input_source.view(groups, -1)[:, channels:]
    columns_of = columns.flatten().bincount(minlength=groups * channels)
    return needed + int(columns_of[copies].sum(1).max())
