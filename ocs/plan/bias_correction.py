"""Bias correction: the mean of a layer's outputs as before it was quantized (Nagel et al. 2019, arXiv 1906.04721).

Where inputs have a mean, errors of the weights shift each output's mean, by (w_hat - w) E[x] summed over channels and
filter taps. The bias takes that back. E[x] is measured where there is calibration, else what the norms before the layer
say (section 4.2, ocs.model.input_statistics).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocs.calibration.statistics import Statistics
from ocs.model.input_statistics import InputEstimate
from ocs.nn.product import QuantProduct


class InputMean(NamedTuple):
    """The mean of each channel of a layer's input, and what tells it."""

    mean: Tensor  # float64 [C], over all groups
    source: str  # "calibration" or "norms"


def measured_means(statistics: Mapping[str, Statistics]) -> dict[str, InputMean]:
    """Map layers to the mean inputs that calibration measured, where there is one."""
    measured = {name: found.mean() for name, found in statistics.items()}
    return {name: InputMean(mean, "calibration") for name, mean in measured.items() if mean is not None}


def means_of_graph(estimates: Mapping[str, InputEstimate | None]) -> dict[str, InputMean]:
    """Map layers to the mean inputs that the graph tells, those that are no guess."""
    return {
        name: InputMean(found.mean, "norms")
        for name, found in estimates.items()
        if found is not None and not found.guessed
    }


def restore_mean(layer: QuantProduct, weight: Tensor, mean: Tensor) -> None:
    """Give a linear layer or convolution another bias, one of its own.

    weight: the float one, in the float layer's layout. mean: float64 [C] of the input, over all groups.
    Every tap counts as if it met the input at every output, which it does not at the borders of padded and transposed
    convolutions: a little too much for images, too much to help where most of a small output is border. A transposed
    convolution meets one tap in prod(stride) at each output.
    A ValueError where mean and layer do not fit, or the new bias would not be finite.
    """
    w, w_hat = layer.layout(weight.detach(), layer.groups), layer.folded("weight")
    d = (w.cpu().double() - w_hat.cpu().double()).unsqueeze(2).flatten(2).sum(2)
    d = d.unflatten(0, (layer.groups, -1))  # [groups, O / groups, C]
    if mean.numel() != layer.groups * d.shape[2]:
        raise ValueError(f"calibration saw {mean.numel()} input channels, this layer has {layer.groups * d.shape[2]}")
    shift = torch.einsum("goc,gc->go", d, mean.view(layer.groups, -1)).flatten()
    if getattr(layer, "transposed", False):
        shift = shift / math.prod(layer.stride)
    old = layer.bias
    bias = shift if old is None else old.detach().cpu().double() + shift
    bias = bias.to(weight.device, (layer.original if old is None else old).dtype)
    if not bool(bias.isfinite().all()):
        raise ValueError(f"correct_bias=True: the corrected bias is not finite in {bias.dtype}; use correct_bias=False")
    layer.bias = nn.Parameter(bias, weight.requires_grad if old is None else old.requires_grad)
