"""How much each layer counts: how far the model's outputs move when it alone is quantized."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ocs.calibration.ranks import mean_over_ranks
from ocs.calibration.run import Data, outputs_of
from ocs.errors import error_context
from ocs.model.rewrite import for_a_while, module_slots
from ocs.model.targets import Target
from ocs.progress import with_progress

Probe = Callable[[Target], tuple[nn.Module, float]]  # the layer quantized, and its error


def sensitivities(
    model: nn.Module, layers: Sequence[Target], sample: Data, probe: Probe, progress: bool | None = None
) -> dict[str, float]:
    """Measure by name the relative squared error of the model's outputs per error of a layer's weights.

    sample: one batch, or a callable that runs the model. Layers that move nothing, those that it does not reach say,
    count as the least of the others. Over the ranks of torch.distributed it is the mean.
    """
    values = mean_over_ranks(lambda: _by_layer(model, layers, sample, probe, progress), len(layers))
    least = min((value for value in values if value > 0), default=1.0)
    return {layer.name: value or least for layer, value in zip(layers, values, strict=True)}


def _by_layer(
    model: nn.Module, layers: Sequence[Target], sample: Data, probe: Probe, progress: bool | None
) -> list[float]:
    expected, values = outputs_of(model, sample), []
    for layer in with_progress(layers, "sensitivity", progress):
        with error_context(layer.name):
            module, error = probe(layer)
        slots = module_slots(model, {id(layer.module): module})
        moved = _moved(for_a_while([slot.step() for slot in slots], partial(outputs_of, model, sample)), expected)
        values.append(moved / error if error > 0 else 0.0)
    return values


def _moved(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Compute the mean over the output tensors of sum (y - y0)^2 / sum y0^2, those of zeros left out."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        raise ValueError("calibration gives outputs of other shapes each time: the same batch must give the same")
    parts = []
    for y, y0 in zip(outputs, expected, strict=True):
        power = y0.square().sum()
        if power != 0:  # NaN counts
            parts.append((y - y0).square().sum() / power)
    moved = float(torch.stack(parts).mean()) if parts else 0.0
    if not moved < float("inf"):
        raise ValueError("the model's outputs on a calibration batch hold NaN or Inf: repair model or batch")
    return moved
