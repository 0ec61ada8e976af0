"""What quantization leaves of a weight, and of the outputs that it computes."""

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_array, check_groups
from ocs.weight.arrays import array_like, as_tensor
from ocs.weight.hessian import Hessian, in_blocks
from ocs.weight.integers import fold
from ocs.weight.types import GAIN, GROUP, Array, Quantization, QuantizedWeight, Scheme


def weight_error(w: Array, quantized: QuantizedWeight, groups: int = 1, group: int = GROUP) -> tuple[float, float]:
    """Measure signal and noise of a quantized weight: the sums of w^2 and of (w - w_hat)^2.

    group: as of functional.fold.
    """
    w = check_array("w", w, min_rank=2)
    check_groups(groups, w.shape[0])
    if quantized.scale.ndim > 1:
        v, d = _with_error(w, quantized, groups, group)
        return float(v.square().sum()), float(d.square().sum())
    signal, noise = kernels(w).weight_error(w, quantized.ints, quantized.scale, quantized.source, groups).tolist()
    return signal, noise


def output_error(
    w: Array, quantized: QuantizedWeight, groups: int = 1, gain: float = GAIN, group: int = GROUP
) -> Array:
    """Estimate how far each output of a layer is off with the quantized weight: float64 [O], without inputs.

    For rows d = w_hat - w and w of [C, K] it is q(d) + gain q(w) (sum d w / sum w^2)^2, where

        q(v) = (sum_ck v^2 + sum_c (sum_k v)^2 + (sum_ck v)^2) / 3

    is v^T E[x x^T] v for inputs of E[x^2] = 1 whose squared mean is 1/3 (1/pi after the ReLU of a normal), half of the
    rest common to the K inputs that a filter sees of a channel: SQuant's three terms (section 3). The second part is
    the output's change of gain. Saturation shrinks all outputs of all layers; these errors do not average out as others
    do but multiply, so that over L layers they weigh L times as much. A norm of single inputs (LayerNorm, say) takes
    them away: gain is how many layers there are, on average, to each such norm, all layers where there is none.
    """
    w = check_array("w", w, min_rank=2)
    check_groups(groups, w.shape[0])
    if quantized.scale.ndim > 1:
        v, d = _with_error(w, quantized, groups, group)
        power = v.square().flatten(1).sum(1)
        of_gain = (d * v).flatten(1).sum(1) / (power + (power == 0))
        error = output_power(d.float()) + gain * output_power(v.float()) * of_gain.square()
        return error if isinstance(w, Tensor) else error.numpy()
    return kernels(w).output_error(w, quantized.ints, quantized.scale, quantized.source, groups, gain)


def _with_error(w: Array, quantized: QuantizedWeight, groups: int, group: int) -> tuple[Tensor, Tensor]:
    """Give a weight and what it is off by once it is quantized, float64 both."""
    v = as_tensor(w).double()
    return v, as_tensor(fold(quantized, w.shape[1], groups, group)) - v


def output_power(w: Array) -> Array:
    """Compute q(w) of output_error, float64 [O]: what the outputs are off where every integer is 0."""
    w = check_array("w", w, min_rank=2)
    zeros = w.new_zeros(w.shape, dtype=torch.int8) if isinstance(w, Tensor) else np.zeros(w.shape, np.int8)
    one, source = (array_like(values, w) for values in (np.ones((), np.float32), np.arange(w.shape[1])))
    return kernels(w).output_error(w, zeros, one, source, 1, 0.0)


SAMPLE = 128  # rows of a group that tell of the others


def alignment(w: Array, groups: int = 1) -> float:
    """Measure by how much more a weight passes on of what layers like it give than of errors; 1 for random numbers.

    Training makes layers agree: what one gives lies where the next one looks. For rows w_o of N columns it is the mean
    over groups of what (w_o w_p)^2, summed over all pairs of O rows, is to what random rows of this power have,
    |w|^4 (1 / O + 1 / N): 1.2 to 4.4 in the layers of trained networks, 0.96 to 1.03 in random ones. Of more rows than
    SAMPLE, some evenly spaced ones tell. Groups of one row tell nothing: 2.
    """
    count = w.shape[0] // groups
    rows = as_tensor(w).reshape(groups, count, math.prod(w.shape[1:]))
    if count < 2 or not rows.shape[2]:
        return 2.0
    rows = rows[:, :: -(-count // SAMPLE)].double()
    among, n, N = rows @ rows.mT, rows.shape[1], rows.shape[2]
    own = among.diagonal(dim1=1, dim2=2).square().mean(1)
    others = (among.square().sum((1, 2)) - n * own) / (n * (n - 1))
    power = rows.square().sum(2).mean(1).square().clamp(min=sys.float_info.min)
    return float(((own / count + (1 - 1 / count) * others) / power / (1 / count + 1 / N)).mean())


def gain_share(w: Array, groups: int) -> float:
    """Tell how much changes of the outputs' gain count: in full for weights of alignment 1.5 and more.

    Where weights pass signals on better than errors, there are directions that layers share, in which such changes add
    up; where they pass both on alike, as random ones do, they are errors as all others.
    """
    return min(max(2 * (alignment(w, groups) - 1), 0.0), 1.0)


def with_gain_of(scheme: Scheme, share: Callable[[], float]) -> Scheme:
    """Weigh gain by a weight's gain_share, which is asked for only where clip="auto" estimates."""
    estimates = scheme.clip == "auto" and scheme.hessian is None
    return scheme._replace(gain=scheme.gain * share()) if estimates else scheme


STRIP = 512  # columns that are multiplied with all later ones at once


class MeasuredOutputs:
    """Measures what the outputs of one weight are off by, on the inputs whose second moments are known.

    Args:
        w: float32 [O, C, ...].
        hessian: of what it meets. groups: of the weight.
    """

    def __init__(self, w: Array, hessian: Hessian, groups: int = 1) -> None:
        w = as_tensor(w).float()
        self.second, self.groups = hessian.second.to(w.device, torch.float32), groups
        self.rows = self._blocks(w)
        self.product = self.rows @ self.second  # w H
        self.power = self._sum(self.product * self.rows)  # w H w^T

    def _blocks(self, w: Tensor) -> Tensor:
        """Cut the columns of w [O, C, ...] as the second moments are: [G B, O / G, L]."""
        return in_blocks(w.reshape(self.groups, len(w) // self.groups, math.prod(w.shape[1:])), self.second.shape[1])

    def _sum(self, products: Tensor) -> Tensor:
        """Sum over the columns of all blocks, float64 [O]."""
        of_blocks = products.sum(-1).double()  # torch sums in pairs, 20 times faster than in float64
        return of_blocks.view(self.groups, len(products) // self.groups, -1).sum(1).flatten()

    def error(self, w_hat: Array, gain: float) -> Array:
        """Measure how far outputs are off with w_hat instead of w, float64 [O]: d H d^T + gain (d H w^T)^2 / w H w^T.

        For rows d = w_hat - w and w. The second part is the change of the outputs' gain, see functional.output_error.
        """
        d = self._blocks(as_tensor(w_hat)) - self.rows
        error = self._sum(self._with_later(d) * d)
        return (error if isinstance(w_hat, Tensor) else error.numpy()) + self.error_of_gain(w_hat, gain)

    def error_of_gain(self, w_hat: Array, gain: float) -> Array:
        """Measure the second part of `error` alone."""
        of_gain = self._sum(self.product * self._blocks(as_tensor(w_hat))) - self.power
        error = gain * of_gain**2 / (self.power + (self.power == 0))
        return error if isinstance(w_hat, Tensor) else error.numpy()

    def _with_later(self, d: Tensor) -> Tensor:
        """Compute d H but for what a column has in common with those of earlier strips, which counts twice instead."""
        strips, parts = range(0, d.shape[2], STRIP), []
        for start in strips:
            strip = self.second[:, start : start + STRIP]
            part = d[..., start : start + STRIP] @ strip[..., start : start + STRIP].mT
            if start + STRIP < d.shape[2]:
                part = part + 2 * (d[..., start + STRIP :] @ strip[..., start + STRIP :].mT)
            parts.append(part)
        return torch.cat(parts, -1) if parts else d


def measured_outputs(w: Array, scheme: Scheme) -> MeasuredOutputs:
    """Measure what a weight's outputs are, once for all ways to quantize it."""
    known = scheme.hessian.__dict__.get("measured")
    if known is None or known[0] is not w:
        known = scheme.hessian.measured = (w, MeasuredOutputs(w, scheme.hessian, scheme.groups))
    return known[1]


def signal_and_noise(w: Array, quantized: QuantizedWeight, scheme: Scheme) -> tuple[float, float]:
    """Measure the power of a layer's outputs and what they are off by; estimate both where scheme has no Hessian."""
    if scheme.hessian is None:
        power, error = output_power(w), output_error(w, quantized, scheme.groups, scheme.gain, scheme.group)
    else:
        measured = measured_outputs(w, scheme)
        w_hat = fold(quantized, w.shape[1], scheme.groups, scheme.group)
        power, error = measured.power, measured.error(w_hat, scheme.gain)
    return float(power.sum()), float(error.sum())


def remaining_error(w: Array, step: Quantization, scheme: Scheme) -> float:
    """Compute noise to signal of a quantized weight: e / (1 - e), where the share e of its power is error.

    The error is that of the weight, sum (w - w_hat)^2 / sum w^2; where clip="auto" or rounding is not to nearest, that
    of the layer's outputs over what they would be off without the layer. 1 - e is what w_hat still has of the signal:
    nothing as e nears 1, which no other layer makes up for. At most some 1000.
    """
    of_weight = scheme.rounding == "nearest" and scheme.clip != "auto"
    signal, noise = step.error if of_weight else signal_and_noise(w, step.quantized, scheme)
    return noise / max(signal - noise, 1e-3 * signal) if signal else 0.0


def sqnr_db(signal: float, noise: float) -> float:
    """Compute the signal-to-quantization-noise ratio in dB; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
