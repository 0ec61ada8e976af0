"""Step 2 of quantizing a weight: where to clip (sections 2.1 and 4 of the paper)."""

import math
from typing import NamedTuple, get_args

import numpy as np
from torch import Tensor

from ocs.kernels.constants import CLIP_METHODS, MAX_BINS, RELEASE_METHODS, SMALLEST, TINY
from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_array, check_bits, check_choice, check_clip, check_values
from ocs.weight.arrays import array_like, filled_like
from ocs.weight.types import Array, Granularity, SplitPlan

METHODS = ("none", *(method for method in CLIP_METHODS if method not in RELEASE_METHODS))  # what people compare
BINS, CHANNEL_BINS = 2048, 512  # of the histogram that a threshold is searched in: of a tensor, of an output channel


class Clip(NamedTuple):
    """A way to find clip thresholds: a method, and the grid to come.

    method: one of CLIP_METHODS, which search in a histogram of |x|, or as the paper's release did in the values
        themselves; "none"; or a fraction of the largest magnitude.
    bits: 2 to 8. signed: the grid is -qmax .. qmax, else 0 .. 2^bits - 1.
    """

    method: str | float
    bits: int
    signed: bool = True

    @property
    def searches(self) -> bool:
        """Tell whether the threshold is searched in a histogram of |x|."""
        return self.method in CLIP_METHODS and not self.takes_values

    @property
    def takes_values(self) -> bool:
        """Tell whether the threshold is searched in the values, by threshold_of."""
        return self.method in RELEASE_METHODS

    def threshold_of(self, x: Array, counts: Array | None = None) -> Array:
        """Find the threshold of each row x [R, ...], float32 [R]; counts: how often each value is there, else once."""
        counts = array_like(np.zeros(0, np.int64), x) if counts is None else counts
        method = CLIP_METHODS.index(self.method)
        return kernels(x).release_threshold(x, counts, self.bits, self.signed, method)

    def threshold(self, largest: Array | float, counts: Array | None = None) -> Array | float:
        """Find the threshold of values whose largest magnitude is `largest`, shaped like it.

        counts: int64 [..., bins], the histogram of |x| over [0, largest] without zeros, where the method searches.
        """
        if self.searches:
            method = CLIP_METHODS.index(self.method)
            return kernels(counts).clip_threshold(counts, largest, self.bits, self.signed, method)
        if self.takes_values:
            raise ValueError(f"method={self.method!r} takes the values themselves, no histogram of |x|: clip_threshold")
        if self.method == "none":
            return largest
        if isinstance(largest, float):
            return largest * self.method
        threshold = largest * filled_like(largest, self.method)
        return threshold if isinstance(threshold, Tensor) else np.asarray(threshold)


def split_thresholds(
    w: Array,
    plan: SplitPlan,
    bits: int,
    clips: tuple[str | float, ...],
    granularity: Granularity,
    groups: int = 1,
    signed: bool = True,
) -> list[Array]:
    """Find the clip threshold float32 [] or [O] of the split w by each method: step 2, "OCS + clip" in the paper.

    The paper's release takes it from w before splitting, and so do the methods that compute as it does.

    w: a weight [O, C, ...], or a batch of activations [N, C, ...]. One histogram serves all other methods.
    """
    check_choice("granularity", granularity, get_args(Granularity))
    by_channel = granularity == "channel"
    if by_channel:
        largest = kernels(w).output_max(w, plan.source, plan.parts, groups)
    else:
        largest = kernels(plan.split_max).abs_max(plan.split_max)
    counts, found = None, [Clip(clip, bits, signed) for clip in clips]
    if any(clip.searches for clip in found):
        bins = CHANNEL_BINS if by_channel else BINS
        counts = kernels(w).split_histogram(w, plan.source, plan.parts, groups, bins, largest)
    rows = w if by_channel else w.reshape(1, -1)
    return [
        clip.threshold_of(rows).reshape(largest.shape) if clip.takes_values else clip.threshold(largest, counts)
        for clip in found
    ]


def scale_for(threshold: Array, largest_integer: int) -> Array:
    """Compute threshold / largest_integer, float32 and positive; 1 where the threshold is 0."""
    scale = threshold / filled_like(threshold, largest_integer)
    if isinstance(scale, Tensor):
        return scale.clamp(min=SMALLEST).masked_fill(threshold == 0, 1.0)
    return np.where(threshold > 0, np.maximum(scale, SMALLEST), np.float32(1))


def clip_threshold(x: Array, bits: int, method: str | float, signed: bool = True) -> float:
    """Find the clip threshold t of x: values beyond +-t saturate (sections 2.1 and 4 of the paper). At most max|x|.

    It is searched in a histogram of |x| without the zeros, which are on every grid; the release's in one of x.

    Args:
        x: any values; weights should be split before.
        bits: 2 to 8.
        method: "none" (max|x|), or a number in (0, 1], that fraction of max|x|, or
            "mse": the least squared error after rounding (equation 9);
            "aciq": the optimum for a Gaussian or a Laplace distribution, the likelier one, by its root mean square or
            mean |x|;
            "kl": the least Kullback-Leibler divergence of the rounded from the clipped histogram, as in MXNet;
            "percentile": 99.99 % of the values are below at 8 bits, 99.9 % at 4, 1 - 10^-(2 + bits / 4) at any;
            "std": (bits + 1) / 2 root mean squares, half of one more where not signed;
            "sawb": c1 times the root mean square minus c2 times the mean |x| (Choi et al., SysML 2019), good up to 5
            bits: a line then fits uniform and heavy-tailed values no longer both;
            "mse-release", "aciq-release", "kl-release": as the paper's own release computes them, for its tables
            (csrc/ocs.h has the formulas). They leave more error than ours; aciq-release may exceed max|x|.
        signed: the grid is -qmax .. qmax, else 0 .. 2^k - 1.
    """
    check_bits("bits", bits)
    check_clip("method", method)
    x = check_values("x", check_array("x", x))
    largest = _finite_max(x)
    clip = Clip(method, bits, signed)
    if method not in CLIP_METHODS:
        return clip.threshold(float(largest))
    if largest < TINY:
        return float(largest)
    if clip.takes_values:
        return float(clip.threshold_of(x.reshape(1, -1))[0])
    counts = kernels(x).histogram(x, BINS, float(largest))
    counts[0] -= count_zeros(x)
    return float(clip.threshold(largest, counts))


def count_zeros(x: Array) -> int:
    """Count the values that are zero, or too small for a normal float32. Some times faster than count_nonzero."""
    return int(kernels(x).histogram(x, 2, 2 * float(np.finfo(np.float32).tiny))[0])


def histogram(x: Array, bins: int) -> tuple[Array, float]:
    """Count |x| over [0, limit] in bins, int64 [bins], and return limit = max|x| too.

    Bin i counts floor(|x| / limit * bins) = i in float32; max|x| itself is in the last bin. bins: 1 to 2^24.
    """
    x = check_values("x", check_array("x", x))
    if not isinstance(bins, int) or not 1 <= bins <= MAX_BINS:
        raise ValueError(f"bins={bins!r}: use an integer from 1 to {MAX_BINS}")
    limit = float(_finite_max(x))
    return kernels(x).histogram(x, bins, limit), limit


def _finite_max(x: Array) -> Array:
    """Find max|x|, float32 []; a ValueError where it is not finite."""
    largest = kernels(x).abs_max(x)
    if not math.isfinite(largest):
        raise ValueError("x holds NaN or Inf as float32")
    return largest
