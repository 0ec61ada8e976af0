"""Statistics of a layer's input: what thresholds and splits need.

What is kept does not grow with the number of batches: histograms of |x| and of the negative ones, the largest and
smallest value, the sum of each channel, and where channels shall be split a logarithmic histogram of each. Limits are
powers of two, so that a histogram over a larger one has the counts of the smaller one added up: statistics merge
exactly, over batches as over the ranks of a torch.distributed group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocs.calibration.ranks import reduced
from ocs.kernels.constants import BINS_PER_OCTAVE, OCTAVE_BINS, OCTAVES, TINY
from ocs.nn.input_parts import as_nck, largest_part
from ocs.nn.registry import replacement_of
from ocs.weight.threshold import Clip
from ocs.weight.types import Split

BINS = 4096  # of |x| below the limit, besides OCTAVE_BINS of each channel
PARTS = 16  # of a bin, over which its values are spread to be counted into other bins
VALUES = 1 << 20  # that are looked at together
ROWS = 4096  # whose sum float32 still holds well
PERCENTILE = 0.99  # a channel is split for its values beyond this share of the layer's (section 5.3 of the paper)


class Statistics:
    """Statistics of the inputs of one layer, whose channels are on axis `axis`.

    channels: their number, where they may be split; None keeps no histogram for each of them.
    """

    def __init__(self, axis: int, channels: int | None = None) -> None:
        self.axis, self.channels = axis, channels
        self.inputs = 0  # tensors seen
        self.rows = 0  # values of each channel seen
        self.sums = torch.zeros(0, dtype=torch.float64, device="cpu")  # of each channel, once there is one
        self.zeros = 0
        self.largest, self.smallest, self.highest = 0.0, math.inf, -math.inf  # max |x|, min x, max x
        self.limit = 0.0  # a power of two above every |x|, or 0 as long as there are only zeros
        self.counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")  # of |x| over [0, limit], zeros left out
        self.negative = torch.zeros(BINS, dtype=torch.int64, device="cpu")  # of those x alone that are below 0
        self.octaves = torch.zeros(channels or 0, OCTAVE_BINS, dtype=torch.int64, device="cpu")
        self.channel_max = torch.zeros(channels or 0, dtype=torch.float32, device="cpu")

    # --- Growing

    def observe(self, layer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one call of the layer with these arguments by name, each tensor once."""
        inputs = [arguments[name] for name in replacement_of(layer).input_names if name in arguments]
        for x in {id(x): x for x in inputs}.values():
            self.update(x)

    def update(self, x: Any) -> None:
        """Take in one more input; what is no tensor of floats, and no packed sequence of them, is passed over."""
        x = values_of(x)
        if x is None:
            return
        if self.channels not in (None, x.shape[self.axis]):
            raise ValueError(f"its input has {x.shape[self.axis]} channels, it needs {self.channels}")
        rows = as_nck(x.detach(), self.axis)
        at_once = VALUES // rows[:1].numel() if rows.is_cpu else rows.shape[0]
        for part in rows.split(max(at_once, 1)):
            self._update(part)
        self.inputs += 1
        if self.channels is not None and self.limit:
            self.octaves = self.octaves + torch.ops.ocs.octave_histogram(rows, self.limit).cpu()
            self.channel_max = self.channel_max.maximum(torch.ops.ocs.channel_max(rows, 1).cpu())
        elif self.channels is not None:
            lowest = torch.zeros_like(self.octaves)
            lowest[:, 0] = rows.numel() // rows.shape[1]
            self.octaves = self.octaves + lowest

    def _update(self, rows: Tensor) -> None:
        """Take in values [N, C, K], which the processor's cache holds while they are looked at from all sides."""
        smallest, most = (float(bound) for bound in rows.aminmax())
        largest = max(abs(smallest), abs(most))
        if not largest < 2.0**127:  # NaN, too
            raise ValueError("its input holds NaN, Inf or values that float32 hardly holds: repair model or batch")
        largest = largest if largest >= TINY else 0.0
        self._add(rows.shape[0] * rows.shape[2], _channel_sums(rows))
        self.smallest, self.highest = min(self.smallest, smallest), max(self.highest, most)
        self.largest = max(self.largest, largest)
        self._grow(largest)
        if not largest:
            self.zeros += rows.numel()
            return
        counts = torch.ops.ocs.signed_histogram(rows, BINS, self.limit).cpu()
        negative = counts[:BINS].flip(0)
        self.zeros += int(counts[BINS])
        self.negative = self.negative + negative  # not in place: they may be of inference mode
        self.counts = self.counts + counts[BINS + 1 :] + negative

    def _add(self, rows: int, sums: Tensor) -> None:
        """Take in the sums of so many values of each channel; of inputs that differ in size there is no mean."""
        if not rows:
            return
        if not self.rows:
            self.sums = sums
        elif self.sums.shape == sums.shape:
            self.sums = self.sums + sums
        else:
            self.sums = self.sums.new_empty(0)
        self.rows += rows

    def _grow(self, largest: float) -> None:
        """Raise the limit to a power of two above `largest`."""
        limit = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 0.0
        if limit <= self.limit:
            return
        doublings = round(math.log2(limit / self.limit)) if self.limit else 0
        if doublings:
            merged = 2 ** min(doublings, int(math.log2(BINS)))
            room = (0, BINS - BINS // merged)
            self.counts = nn.functional.pad(self.counts.view(-1, merged).sum(1), room)
            self.negative = nn.functional.pad(self.negative.view(-1, merged).sum(1), room)
            down = min(BINS_PER_OCTAVE * doublings, OCTAVE_BINS - 1)
            lowest = self.octaves[:, : down + 1].sum(1, keepdim=True)
            self.octaves = nn.functional.pad(torch.cat([lowest, self.octaves[:, down + 1 :]], 1), (0, down))
        self.limit = limit

    def merge(self, other: Statistics) -> None:
        """Take in what another has seen of the same layer."""
        self._grow(other.largest)
        other._grow(self.largest)
        self.smallest, self.highest = min(self.smallest, other.smallest), max(self.highest, other.highest)
        self.largest = max(self.largest, other.largest)
        self.inputs, self.zeros = self.inputs + other.inputs, self.zeros + other.zeros
        self.negative = self.negative + other.negative
        self.counts, self.octaves = self.counts + other.counts, self.octaves + other.octaves
        self.channel_max = self.channel_max.maximum(other.channel_max)
        self._add(other.rows, other.sums)

    def reduce(self) -> None:
        """Merge what all ranks have seen, so that each has the same."""
        bounds = torch.tensor([self.largest, -self.smallest, self.highest], dtype=torch.float64, device="cpu")
        self.largest, smallest, self.highest = reduced(bounds, dist.ReduceOp.MAX).tolist()
        self.smallest = -smallest
        self._grow(self.largest)
        sums = reduced(torch.tensor([self.inputs, self.zeros], device="cpu"), dist.ReduceOp.SUM)
        self.inputs, self.zeros = sums.tolist()
        self._reduce_sums()
        self.counts = reduced(self.counts, dist.ReduceOp.SUM)
        self.negative = reduced(self.negative, dist.ReduceOp.SUM)
        if self.channels:
            self.octaves = reduced(self.octaves, dist.ReduceOp.SUM)
            self.channel_max = reduced(self.channel_max, dist.ReduceOp.MAX)

    def _reduce_sums(self) -> None:
        """Merge the sums of all ranks; those that have seen nothing have none, and do not know their number."""
        size = self.sums.numel()
        bounds = torch.tensor([size, -size if self.rows else -(2**62)], device="cpu")
        most, least = reduced(bounds, dist.ReduceOp.MAX).tolist()
        sums = self.sums if self.rows else self.sums.new_zeros(most)
        self.rows = int(reduced(torch.tensor(self.rows, device="cpu"), dist.ReduceOp.SUM))
        self.sums = reduced(sums, dist.ReduceOp.SUM) if most == -least and most else self.sums.new_zeros(0)

    # --- What follows from them

    def mean(self) -> Tensor | None:
        """Compute the mean of each channel, float64 [C]; None where there is none, or inputs differ in size."""
        return self.sums / self.rows if self.sums.numel() else None

    def threshold(
        self, bits: int, method: str | float, signed: bool, split: Tensor | None = None, how: Split = "qa"
    ) -> float:
        """Find where to clip the inputs, by functional.clip_threshold's methods; at most max|x|, but by the release's.

        split: the channels (int64) whose values are halved first, the largest copy of one that is named again, or where
        how="even" cut into one part more of equal size; the release's methods look at them before.
        """
        clip, largest = Clip(method, bits, signed), self._split_max(split, how)
        if not largest:
            return largest
        if clip.takes_values:
            return float(clip.threshold_of(*self.representatives()))
        if not clip.searches:
            return float(clip.threshold(largest))
        zoom = max(math.frexp(self.limit / largest)[1] - 2, 0) if split is not None else 0  # lest most bins be empty
        limit = torch.tensor(math.ldexp(self.limit, -zoom), dtype=torch.float32, device="cpu")
        return min(float(clip.threshold(limit, self.split_counts(split, zoom, how))), largest)

    def _split_max(self, split: Tensor | None, how: Split) -> float:
        """Find max |x| once these channels are split, as often as each is named."""
        if split is None:
            return self.largest
        return float((self.channel_max / largest_part(self._times(split), how)).amax())

    def _times(self, split: Tensor) -> Tensor:
        """Count how often each channel is split, int64 [channels]."""
        return split.bincount(minlength=self.channels)

    def representatives(self) -> tuple[Tensor, Tensor]:
        """Find values float32 [1, M] that stand for all inputs, and how often each of them is there, int64 [1, M].

        Their number, the zeros, the smallest and the largest one are exact; the others are taken to be spread evenly
        within each of 2 BINS bins over [-limit, limit].
        """
        line = torch.cat([self.negative.flip(0), self.counts - self.negative])
        occupied = line.nonzero().flatten()
        ends = {end: occupied[i] for end, i in ((self.smallest, 0), (self.highest, -1)) if abs(end) >= TINY}
        for at in ends.values():
            line[at] -= 1
        centers = (torch.arange(2 * BINS * PARTS, dtype=torch.float64, device="cpu") + 0.5) / (BINS * PARTS) - 1
        parts = (line[:, None] * torch.arange(PARTS + 1, device="cpu") // PARTS).diff().flatten()
        values = torch.cat([centers * self.limit, torch.tensor([0.0, *ends], dtype=torch.float64, device="cpu")])
        counts = torch.cat([parts, torch.tensor([self.zeros, *(1 for _ in ends)], device="cpu")])
        return values.clamp(self.smallest, self.highest).float()[None], counts[None]

    def split_counts(self, split: Tensor | None, zoom: int = 0, how: Split = "qa") -> Tensor:
        """Count |x| once these channels are split, as often as each is named: all parts, see `threshold`.

        In each eighth of an octave their values are taken to be spread as all values are.

        zoom: count over [0, limit / 2^zoom], beyond which nothing must be left.
        """
        if split is None or not split.numel():
            return self.counts
        times = self._times(split)
        found = _scaled(self._counts_of(times == 0), 2**zoom)
        for splits in times[times > 0].unique():
            whole, equal = self._counts_of(times == splits), int(largest_part(splits, how))
            smaller = 2 * (int(splits) + 1 - equal)  # are halved once more
            found += (int(splits) + 1 - smaller) * _scaled(whole, 2**zoom / equal)
            found += smaller * _scaled(whole, 2**zoom / (2 * equal))
        return nn.functional.pad(found.cumsum(0), (1, 0)).round().diff().long()  # so that rounding adds up

    def _counts_of(self, channels: Tensor) -> Tensor:
        """Count the |x| of some channels (bool) as far as the histograms tell, float64 [BINS]."""
        centers = (torch.arange(BINS, dtype=torch.float32, device="cpu") + 0.5) / BINS
        octave = centers.log2().floor()
        eighth = (BINS_PER_OCTAVE * (OCTAVES + octave + centers / 2**octave - 1)).long().clamp(min=0)
        share = self.octaves[channels].sum(0).double() / self.octaves.sum(0).clamp(min=1)
        return self.counts * share[eighth]

    def most_outliers(self, splits: int, groups: int = 1) -> Tensor:
        """Choose each group's channels with most outliers, int64 [groups, splits]; the lowest first where they tie.

        This is the paper's rule for inputs.
        """
        own = torch.arange(self.channels, device="cpu").view(groups, -1)
        order = self.outliers().view(groups, -1).argsort(dim=1, descending=True, stable=True)
        return order[:, :splits] + own[:, :1]

    def largest_first(self, splits: int, groups: int = 1, how: Split = "qa") -> Tensor:
        """Choose each group's channel with the largest |x|, copies included, so many times, int64 [groups, splits].

        This is the paper's rule for weights.
        """
        source = torch.ops.ocs.split_plan(self.channel_max, groups, splits, how == "even")[0]
        return source.view(groups, -1)[:, self.channels // groups :]

    def outliers(self) -> Tensor:
        """Count the |x| of each channel beyond the layer's 99th percentile, float64 [channels]."""
        in_all = self.octaves.sum(0).double()
        beyond = in_all.flip(0).cumsum(0).flip(0)
        wanted = (1 - PERCENTILE) * beyond[0]
        at = int((beyond > wanted).sum()) - 1  # the percentile is in this bin, of which a share is beyond it
        share = (wanted - (beyond[at] - in_all[at])) / in_all[at] if at >= 0 and in_all[at] else 0.0
        of_channel = self.octaves.double()
        return of_channel[:, at + 1 :].sum(1) + share * of_channel[:, max(at, 0)]


def _scaled(counts: Tensor, factor: float) -> Tensor:
    """Count values of |x|, counted by [BINS], in the same bins once they are so many times as large.

    They are taken to be spread evenly within their bins.
    """
    edges = (torch.arange(BINS + 1, dtype=torch.float64, device="cpu") / factor).clamp(max=BINS)
    below = nn.functional.pad(counts.cumsum(0), (1, 0))
    whole = edges.long()
    return (below[whole] + (edges - whole) * counts[whole.clamp(max=BINS - 1)]).diff()


def _channel_sums(rows: Tensor) -> Tensor:
    """Sum the channels of [N, C, K], float64 [C].

    In float32 parts first, which is fast in any layout and on devices without float64.
    """
    if rows.shape[2] == 1:
        sums = torch.stack([part.sum(0, dtype=torch.float32) for part in rows[:, :, 0].split(ROWS)])
    else:
        sums = rows.sum(2, dtype=torch.float32)
    return sums.sum(0, dtype=torch.float64 if rows.is_cpu else torch.float32).cpu().double()


def values_of(x: Any) -> Tensor | None:
    """Take the values out of what a layer was given: a tensor of floats or a packed sequence; None where it has none.

    Raises:
        ValueError: the tensor is on the meta device.
    """
    x = x.data if isinstance(x, PackedSequence) else x
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or not x.numel():
        return None
    if x.is_meta:
        raise ValueError("its input holds no values: give a model on the meta device weights first")
    return x
