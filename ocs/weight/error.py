"""What quantization leaves of a weight, and of the outputs that it computes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_array, check_groups
from ocs.weight.gptq import OutputErrors
from ocs.weight.integers import fold
from ocs.weight.types import GAIN, Array, Quantization, QuantizedWeight, Scheme


def weight_error(w: Array, quantized: QuantizedWeight, groups: int = 1) -> tuple[float, float]:
    """Signal and noise of a quantized weight: the sums of w^2 and of (w - w_hat)^2."""
    w = check_array("w", w, min_rank=2)
    check_groups(groups, w.shape[0])
    signal, noise = kernels(w).weight_error(w, quantized.ints, quantized.scale, quantized.source, groups).tolist()
    return signal, noise


def output_error(w: Array, quantized: QuantizedWeight, groups: int = 1, gain: float = GAIN) -> Array:
    """How far each output of a layer is off with the quantized weight: float64 [O], an estimate without inputs.

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
    return kernels(w).output_error(w, quantized.ints, quantized.scale, quantized.source, groups, gain)


def output_power(w: Array) -> Array:
    """q(w) of output_error, float64 [O]: what the outputs are off where every integer is 0."""
    w = check_array("w", w, min_rank=2)
    if isinstance(w, Tensor):
        zeros, one = w.new_zeros(w.shape, dtype=torch.int8), w.new_ones((), dtype=torch.float32)
        return kernels(w).output_error(w, zeros, one, torch.arange(w.shape[1], device=w.device), 1, 0.0)
    return kernels(w).output_error(
        w, np.zeros(w.shape, np.int8), np.ones((), np.float32), np.arange(w.shape[1]), 1, 0.0
    )


def signal_and_noise(w: Array, quantized: QuantizedWeight, how: Scheme) -> tuple[float, float]:
    """Of a layer's outputs: their power and what they are off by; by the inputs' second moments where how has them."""
    if how.hessian is None:
        power, error = output_power(w), output_error(w, quantized, how.groups, how.gain)
    else:
        measured = OutputErrors(w, how.hessian)
        power, error = measured.power, measured.error(fold(quantized, w.shape[1], how.groups), how.gain)
    return float(power.sum()), float(error.sum())


def remaining_error(w: Array, step: Quantization, how: Scheme) -> float:
    """Noise to signal of a quantized weight: e / (1 - e), where the share e of its power is error.

    The error is that of the weight, sum (w - w_hat)^2 / sum w^2; where clip="auto" or rounding is not to nearest, that
    of the layer's outputs over what they would be off without the layer. 1 - e is what w_hat still has of the signal:
    nothing as e nears 1, which no other layer makes up for. At most some 1000.
    """
    of_weight = how.rounding == "nearest" and how.clip != "auto"
    signal, noise = step.error if of_weight else signal_and_noise(w, step.quantized, how)
    return noise / max(signal - noise, 1e-3 * signal) if signal else 0.0


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
