"""Quantizing a weight with a scale for each output channel and block of input channels (granularity="group").

Each block is a weight of its own with a scale for each output channel, so that every clip method and rounding serves
blocks as it serves weights: those that are equally wide lie as rows below each other. A channel and its copies lie in
blocks of other scales, and Hermite's identity no longer joins them. So parts are rounded one after the other, each to
its share of what those before it have left of the weight: in the end a channel is off by the rounding of its last part
alone. (split="naive": each part for itself.)

With rounding="gptq" that last part is what is compensated. In the notation of ocs.weight.hessian, where d are errors in
units of the weight and columns J of a block come after columns P of others: rounding w - x instead of w by R_JJ alone,

    x R_JJ = d_P R_PJ,

has each column meet what it would among all, so that one block after the other is rounded by its own scales.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ocs.weight.arrays import as_tensor
from ocs.weight.blocks import blocks_of, count_blocks
from ocs.weight.hessian import Hessian
from ocs.weight.integers import quantize_split
from ocs.weight.plan import largest_first, occurrences
from ocs.weight.types import Array, Quantization, QuantizedWeight, Scheme, SplitPlan

ROWS = 4096  # blocks that are quantized at once: each may need a histogram

QuantizeRows = Callable[[Tensor, SplitPlan, Scheme], Quantization]


def quantize_in_blocks(
    w: Array, plan: SplitPlan, scheme: Scheme, quantize_rows: QuantizeRows
) -> tuple[str | float, QuantizedWeight]:
    """Find the clip method and the integers of a weight [O, C, ...]; its scale and threshold are [O, B].

    quantize_rows: quantizes a weight with a scale for each output channel and no splits. The clip method is "auto"
    where blocks differ.
    """
    C, K, n = w.shape[1], math.prod(w.shape[2:]), len(plan.source) // scheme.groups - w.shape[1]
    groups = scheme.groups if n or scheme.hessian is not None else 1
    parts, source = (as_tensor(each).view(scheme.groups, C + n)[:groups] for each in (plan.parts, plan.source))
    copies = source[:, C:] - C * torch.arange(groups, device=source.device)[:, None]
    made = []
    for g, rows in enumerate(as_tensor(w).float().reshape(len(w), C, K).chunk(groups)):
        hessian = None if scheme.hessian is None else scheme.hessian.of_group(g, groups)
        weight = _Weight(rows, copies[g], parts[g], scheme, hessian, quantize_rows)
        weight.round_own()
        weight.round_copies()
        if hessian is not None:
            weight.compensate(hessian)
        made.append(weight)
    ints, scale, threshold = (torch.cat([getattr(each, name) for each in made]) for name in _MADE)
    ints, clips = ints.view(len(w), C + n, *w.shape[2:]), {clip for each in made for clip in each.clips}
    if not isinstance(w, Tensor):
        ints, scale, threshold = (each.numpy() for each in (ints, scale, threshold))
    clip = clips.pop() if len(clips) == 1 else scheme.clip
    return clip, QuantizedWeight(ints, scale, plan.source, threshold)


_MADE = ("ints", "scale", "threshold")


class _Weight:
    """A weight [O, C, K] that is rounded part by part: what is left of it, and the integers so far.

    Args:
        w: float32 [O, C, K].
        copies: int64 [n], the channels that are split.
        parts: int32 [C + n], how many like each expanded channel make up the channel.
        hessian: of what this group of channels meets.
    """

    def __init__(
        self,
        w: Tensor,
        copies: Tensor,
        parts: Tensor,
        scheme: Scheme,
        hessian: Hessian | None,
        quantize_rows: QuantizeRows,
    ) -> None:
        (outputs, C, K), n = w.shape, len(copies)
        self.w, self.copies, self.scheme, self.quantize_rows = w, copies, scheme, quantize_rows
        self.share = 1 / parts.double()
        self.left, self.rest = torch.ones(C, dtype=torch.float64, device=w.device), w.clone()
        self.ints = torch.zeros(outputs, C + n, K, dtype=torch.int8, device=w.device)
        self.scale = w.new_ones(outputs, count_blocks(C, n, scheme.group))
        self.threshold = torch.zeros_like(self.scale)
        self.block = torch.from_numpy(blocks_of(C, n, scheme.group)).to(w.device)
        self.clips: set[str | float] = set()
        compensates = scheme.rounding == "gptq"
        self.rounding = "nearest" if compensates else scheme.rounding
        self.of_rows = scheme._replace(granularity="channel", rounding=self.rounding, groups=1, hessian=None)
        whole = hessian is not None and len(hessian.second) == 1
        self.measured = hessian if scheme.clip == "auto" and whole else None

    def round_own(self) -> None:
        """Round the channels themselves, all blocks of one width at once."""
        (outputs, C, K), width = self.w.shape, self.scheme.group
        target = self.w * self.share[:C, None].float()
        for begin, end in ((0, C // width * width), (C // width * width, C)):
            blocks = -(-(end - begin) // width)
            rows = target[:, begin:end].reshape(outputs, blocks, min(width, end - begin), K).transpose(0, 1)
            if not rows.numel():
                continue
            first, at_once = begin // width, max(1, ROWS // outputs)
            for b in range(0, blocks, at_once):
                some = rows[b : b + at_once]
                start, count = begin + b * width, len(some) * some.shape[2]
                channels = torch.arange(start, start + count, device=some.device)
                step, at = self._quantize(some, channels), slice(first + b, first + b + len(some))
                ints = step.ints.view(some.shape).transpose(0, 1)
                self.ints[:, channels] = ints.reshape(outputs, len(channels), K)
                for made, found in ((self.scale, step.scale), (self.threshold, step.threshold)):
                    made[:, at] = found.view(len(some), outputs).T
        self.rest -= self.ints[:, :C].float() * self.scale[:, self.block[:C], None]
        self.left -= self.share[:C]

    def round_copies(self) -> None:
        """Round the copies, one block after the other."""
        C, n = self.w.shape[1], len(self.copies)
        for begin in range(0, n if self.w.numel() else 0, self.scheme.group):
            at = torch.arange(begin, min(begin + self.scheme.group, n), device=self.w.device)
            step = self._quantize(self._target(at)[None], self.copies[at])
            b = self.block[C + begin]
            self.scale[:, b], self.threshold[:, b] = step.scale, step.threshold
            for same in _in_turn(self.copies[at]):
                self._round(at[same], step.threshold)

    def _target(self, at: Tensor) -> Tensor:
        """Compute what these copies are to hold: their share of what the parts before them have left."""
        channel, share = self.copies[at], self.share[self.w.shape[1] + at]
        if self.scheme.split == "naive":
            return self.w[:, channel] * share[:, None].float()
        left = self.left[channel]
        of_rest = torch.where(left > 1e-9, share / left, 1.0).clamp(max=1.0)  # zeros are not halved, however often
        return self.rest[:, channel] * of_rest[:, None].float()

    def _round(self, at: Tensor, threshold: Tensor) -> None:
        """Round copies, of as many channels."""
        target, C = self._target(at), self.w.shape[1]
        plan = largest_first(target, 0, 1)
        ints, scale, _, _ = quantize_split(target, plan, threshold, self.scheme.bits, "qa", self.rounding)
        self.ints[:, C + at] = ints
        self.rest[:, self.copies[at]] -= ints.float() * scale[:, None, None]
        self.left[self.copies[at]] -= self.share[C + at]

    def _quantize(self, rows: Tensor, channels: Tensor) -> QuantizedWeight:
        """Quantize blocks [B, O, width, K] of these channels; measured by calibration, where it finds thresholds."""
        w = rows.flatten(0, 1).contiguous()
        if self.measured is None:
            steps = [self.quantize_rows(some, largest_first(some, 0, 1), self.of_rows) for some in w.split(ROWS)]
            self.clips |= {step.clip for step in steps}
            ints, scale, threshold = (torch.cat([getattr(step.quantized, name) for step in steps]) for name in _MADE)
            return QuantizedWeight(ints, scale, channels, threshold)
        groups, K = len(rows), rows.shape[3]
        of_blocks = (channels[:, None] * K + torch.arange(K, device=channels.device)).view(groups, -1).to(w.device)
        second = torch.stack([self.measured.second[0][each][:, each] for each in of_blocks])
        measured = {"rounding": "gptq", "groups": groups, "hessian": Hessian(second, self.measured.count)}
        plan = largest_first(w, 0, groups)
        step = self.quantize_rows(w, plan, self.of_rows._replace(**measured))
        self.clips.add(step.clip)
        return quantize_split(w, plan, step.quantized.threshold, self.of_rows.bits, "qa", "nearest", groups)

    # --- GPTQ

    def compensate(self, hessian: Hessian) -> None:
        """Round the last part of each channel again, column by column, each error compensated in those that follow."""
        outputs, C, K = self.w.shape
        last = np.arange(C)
        np.maximum.at(last, self.copies.cpu().numpy(), C + np.arange(len(self.copies)))
        last = torch.from_numpy(last).to(self.w.device)
        target = self.rest + self.ints[:, last].float() * self.scale[:, self.block[last], None]
        place = (last[:, None] * K + torch.arange(K, device=self.w.device)).flatten()
        block, target = self.block[last].repeat_interleave(K), target.reshape(outputs, C * K)
        ints, width = self.ints.view(outputs, -1), hessian.second.shape[1]
        for i, second in enumerate(hessian.second if width else ()):
            columns = slice(i * width, min((i + 1) * width, C * K))
            part = Hessian(second[None], hessian.count, _by_block(second, block[columns]))
            ints[:, place[columns]] = self._compensated(target[:, columns], block[columns], part)

    def _compensated(self, target: Tensor, block: Tensor, hessian: Hessian) -> Tensor:
        """Round columns [O, N], whose scales are those of `block` [N], in the order of the Hessian: int8 [O, N]."""
        order, factor = hessian.order[0, : len(block)].to(target.device), hessian.factor[0].to(target.device)
        ints, errors = torch.zeros_like(target, dtype=torch.int8), torch.zeros_like(target)  # errors in that order
        begin = 0
        for size in block[order].unique_consecutive(return_counts=True)[1].tolist():
            now, columns = slice(begin, begin + size), order[begin : begin + size]
            own = factor[now, now].contiguous()
            met = errors[:, :begin] @ factor[now, :begin].T
            shift = torch.linalg.solve_triangular(own, met.T, upper=False, unitriangular=True).T
            scale = self.scale[:, block[columns[0]]].contiguous()
            rounded = _gptq((target[:, columns] - shift).contiguous(), scale, self.scheme.bits, own)
            errors[:, now] = rounded.float() * scale[:, None] - target[:, columns]
            ints[:, columns] = rounded
            begin += size
        return ints


def _in_turn(channels: Tensor) -> list[Tensor]:
    """Cut copies into sets of one for each channel, in order: positions int64."""
    rank = occurrences(channels)
    return [(rank == k).nonzero().flatten() for k in range(int(rank.max()) + 1)]


def _by_block(second: Tensor, block: Tensor) -> Tensor:
    """Order the columns of one block after the other, in each those of the largest inputs first: int64 [1, L]."""
    power = second.diagonal()[: len(block)].double().cpu().numpy()
    order = np.concatenate([np.lexsort((-power, block.cpu().numpy())), np.arange(len(block), len(second))])
    return torch.from_numpy(order).to(second.device)[None]


def _gptq(w: Tensor, scale: Tensor, bits: int, factor: Tensor) -> Tensor:
    """Round w [O, N], nothing of which is split, column by column."""
    columns = torch.arange(w.shape[1], device=w.device)
    parts = torch.ones_like(columns, dtype=torch.int32)
    plan = (columns, parts, torch.zeros_like(parts))
    return torch.ops.ocs.gptq_weight(w, scale, *plan, bits, columns[None], factor[None])[0]
