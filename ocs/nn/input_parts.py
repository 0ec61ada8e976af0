"""Round inputs of layers, and split their outlier channels (sections 3.4 and 5.3 of the paper).

An input x is rounded to k bits with one scale d, round_half_even(x / d). Where a channel is split, its values are cut
in two, (x - d/2) / 2 and (x + d/2) / 2 where quantization-aware, x / 2 both where naive, and its weights are there
twice. With u = x / d, round((u - 1/2) / 2) + round((u + 1/2) / 2) = round(u) but for ties (Hermite): the grid then
holds values twice as large, or is twice as fine. Copies may be split again: a part is the k-th of n equal ones,
(u + k + 1/2) / n - 1/2 for k = 0 .. n - 1, n a power of two, or where split="even" the number of all parts. The
channels are chosen once, from calibration, or (Oracle OCS) for each batch from its own values. The scale may be that of
each row as well (ocs.nn.input_rows), of the parts of channels that were chosen once.
"""

import math
from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor

from ocs.kernels.ops import fake_quantize
from ocs.nn.input import InputGrid
from ocs.nn.input_rows import refuse_nested, round_rows, row_scales
from ocs.weight.plan import occurrences, split_plan_of
from ocs.weight.threshold import scale_for, split_thresholds
from ocs.weight.types import Split


class InputParts(NamedTuple):
    """The parts that an input's channels are split into, each of which is rounded: x * factor + shift * scale.

    All but the scale are None where no channel is split.
    """

    scale: Tensor | None  # float32 [], or of each row [..., 1]
    source: Tensor | None = None  # int64 [copies]: the original channel, over all groups
    factor: Tensor | None = None  # float32 [channels + copies], the original channels first
    shift: Tensor | None = None


def _parts_of_plan(
    scale: Tensor, source: Tensor, parts: Tensor, offset: Tensor, channels: int, split: Split
) -> InputParts:
    """Make each channel of a plan part `offset` of `parts` equal ones; the plan has all original channels first."""
    factor = 1 / parts.float()
    shift = (offset.float() + 0.5) / parts - 0.5 if split != "naive" else torch.zeros_like(factor)
    return InputParts(scale, source[channels:], factor, shift)


def static_parts(grid: InputGrid, scale: Tensor | None, source: Tensor, groups: int) -> InputParts:
    """Split channels that calibration chose, as often as each is named. source [C + n] is laid out group by group."""
    if not grid.splits:
        return InputParts(scale)
    source = _originals_first(source, groups, grid.splits).long()  # packed layers may hold int32
    channels = source.numel() - groups * grid.splits
    parts, offset = parts_of(source, channels, grid.split)
    return _parts_of_plan(scale, source, parts, offset, channels, grid.split)


def parts_of(source: Tensor, channels: int, split: Split) -> tuple[Tensor, Tensor]:
    """Tell which part of its channel each copy is: one of how many equal ones, and which, int64 [C + n] both.

    source: the original channels first, then copies in the order of splitting, which says all (ocs.weight.plan): the
    j-th copy is part j, of as many as there are where all are equal; else always the largest copy is halved, and part j
    is one of 2^M or 2^(M + 1).
    """
    copy = occurrences(source)
    splits = source.new_zeros(channels).index_add(0, source, torch.ones_like(source)) - 1
    last = splits[source]
    equal = largest_part(last, split)
    return torch.where(copy % equal + equal <= last, 2 * equal, equal), copy


def largest_part(splits: Tensor, split: Split) -> Tensor:
    """Count how many of the largest part of a channel that is split so often would make it up."""
    return splits + 1 if split == "even" else 2 ** (torch.frexp((splits + 1).float())[1].long() - 1)


def with_row_scales(x: Tensor, grid: InputGrid, parts: InputParts) -> InputParts:
    """Measure the scale of each row of x [..., C] over all its parts, where each row has its own."""
    return parts._replace(scale=_scales_of_parts(x, grid.bits, parts)) if grid.dynamic else parts


@torch.fx.wrap  # as a whole: tracing knows no shapes
def _scales_of_parts(x: Tensor, bits: int, parts: InputParts) -> Tensor:
    refuse_nested(x)
    if not x.shape[-1]:
        return torch.ones_like(x.sum(-1, keepdim=True), dtype=torch.float32)
    return row_scales(x.detach(), bits, largest_factor(parts))


def largest_factor(parts: InputParts) -> Tensor | None:
    """Find the size of each channel's largest part, float32 [C]; None where no channel is split."""
    if parts.factor is None:
        return None
    own, copies = parts.factor.split([parts.factor.numel() - parts.source.numel(), parts.source.numel()])
    return own.scatter_reduce(0, parts.source, copies, "amax")


def oracle_parts(grid: InputGrid, x: Tensor, axis: int, groups: int) -> InputParts:
    """Split the channels with the largest |x| in this batch, one at a time; the scale comes from the split values."""
    values = as_nck(x.detach(), axis)
    channel_max = torch.ops.ocs.channel_max(values, 1)
    plan = torch.ops.ocs.split_plan(channel_max, groups, grid.splits, grid.split == "even")
    plan = split_plan_of(*(_originals_first(array, groups, grid.splits) for array in plan), channel_max)
    (threshold,) = split_thresholds(values, plan, grid.bits, (grid.clip,), "tensor", signed=grid.signed)
    scale = scale_for(threshold, grid.qmax)
    if not grid.splits:
        return InputParts(scale)
    return _parts_of_plan(scale, plan.source, plan.parts, plan.offset, x.shape[axis], grid.split)


def as_nck(x: Tensor, axis: int) -> Tensor:
    """Reshape x to [N, C, K], without a copy where its memory is in that order, or has the channels last."""
    last = x.movedim(axis, -1)
    if last.is_contiguous():
        return last.reshape(-1, last.shape[-1], 1)
    x = x.contiguous()
    return x.view(math.prod(x.shape[: x.dim() + axis]), x.shape[axis], -1)


def _originals_first(array: Tensor, groups: int, splits: int) -> Tensor:
    """Put all original channels of a plan's array, laid out group by group, before all copies."""
    if not splits:
        return array
    own, copies = array.view(groups, -1).tensor_split([-splits], 1)
    return torch.cat([own.flatten(), copies.flatten()])


def as_dense(x: Tensor) -> Tensor:
    """Convert an input in a layout of its own (sparse, MKL-DNN's) to a plain one: others than F.linear know no such."""
    return _as_dense(x)  # torch.fx looks wrapped functions up in this module


@torch.fx.wrap
def _as_dense(x: Tensor) -> Tensor:
    return x if x.layout == torch.strided or x.is_nested else x.to_dense()


def take_channels(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Take channels of x: by indexing, as index_select is slow on channels-last inputs."""
    return x[(..., index, *[slice(None)] * (-axis - 1))]


def round_parts(
    x: Tensor, grid: InputGrid, parts: InputParts, axis: int, channel: Tensor | None = None, part: Tensor | None = None
) -> Tensor:
    """Round parts of x to the grid, in the dtype of x.

    channel: of x, for each part; None for all. part: which ones of `parts`; None for the first part of each channel.
    """
    return _round_parts(x, grid, parts, axis, channel, part)  # torch.fx looks wrapped functions up in this module


@torch.fx.wrap  # as a whole: tracing knows neither shapes nor gradients
def _round_parts(
    x: Tensor, grid: InputGrid, parts: InputParts, axis: int, channel: Tensor | None, part: Tensor | None
) -> Tensor:
    dtype = x.dtype
    refuse_nested(x)
    if channel is not None:
        x = take_channels(x, channel, axis)
    if parts.factor is not None:
        part = slice(x.shape[axis]) if part is None else part
        per_channel = (-1, *[1] * (-axis - 1))
        x = x * parts.factor[part].view(per_channel) + parts.shift[part].view(per_channel) * parts.scale
    if grid.dynamic:
        return round_rows(x, grid.bits, parts.scale).to(dtype)
    return fake_quantize(x, parts.scale, grid.bits, grid.signed).to(dtype)


def round_folded(x: Tensor, grid: InputGrid, parts: InputParts, axis: int) -> Tensor:
    """Round all parts of x and add up those of each channel: what an expanded layer computes with, shaped as x."""
    first = round_parts(x, grid, parts, axis)
    if parts.source is None:
        return first
    copies = torch.arange(x.shape[axis], parts.factor.numel(), device=x.device)
    return first.index_add(axis, parts.source, round_parts(x, grid, parts, axis, parts.source, copies))
