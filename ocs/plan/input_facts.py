"""What quantize() finds out about the inputs of layers, by calibration or from the graph: what each option needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ocs.calibration.run import Calibration, Data, Statistics, moments_for, observe, reached, statistics_for
from ocs.errors import error_context
from ocs.model.input_statistics import input_moments
from ocs.model.targets import Layer, Options
from ocs.nn.product import QuantProduct
from ocs.nn.registry import replacement_of
from ocs.plan.bias_correction import InputMean, means_of_graph, measured_means
from ocs.weight.hessian import Hessian
from ocs.weight.types import GAIN

_TAKES_GAIN = re.compile("(Layer|RMS|Group|Instance)Norm")  # in the names of classes, torch's and others'


class Known(NamedTuple):
    """What is known of a layer besides its weights."""

    statistics: Statistics | None = None  # of its input, where that is to be quantized with a scale of its own
    mean: InputMean | None = None  # of its input, where the bias is to be corrected
    hessians: Mapping[str, Hessian] | None = None  # of what each weight meets, where these are rounded by them
    gain: float = GAIN  # see functional.output_error
    splits: Mapping[str, int | None] | None = None  # of each weight, in each group; None is what r says

    def unfactorized(self) -> Known:
        """The same, with Hessians whose factorizations, large ones, go when this does."""
        own = self.hessians and {name: Hessian(each.second, each.count) for name, each in self.hessians.items()}
        return self._replace(hessians=own)


def wants_input(layer: Layer, options: Options) -> bool:
    """Whether its input is to be quantized."""
    if options.abits is None or layer.float_input or layer.status != "quantized":
        return False
    return not replacement_of(layer.module).input_if_asked or "abits" in layer.asked_for


def wants_statistics(layer: Layer, options: Options) -> bool:
    """Whether calibration must tell of its input."""
    known = options.act_split == "oracle" and options.act_signed is True
    return wants_input(layer, options) and not known


def wants_mean(layer: Layer, options: Options) -> bool:
    """Whether its bias is to be corrected, by the mean of its input."""
    return options.correct_bias and layer.status == "quantized" and corrects(layer)


def corrects(layer: Layer) -> bool:
    """Whether that is possible for a layer of its kind."""
    return issubclass(replacement_of(layer.module), QuantProduct)


def wants_moments(layer: Layer, options: Options) -> bool:
    """Whether calibration must tell of what its weights meet."""
    return layer.status == "quantized" and options.rounding == "gptq"


def look_at_inputs(
    model: nn.Module,
    layers: list[Layer],
    chosen: Mapping[str, Options],
    calibration: Data | Calibration | None,
    progress: bool | None,
    has_use: bool,
) -> dict[str, Known]:
    """What is known of each layer. Those whose input shall be quantized stay float where calibration never saw it.

    has_use: whether calibration is used for something else, too.
    """
    seen = _calibrated(model, layers, chosen, calibration, progress, has_use)
    wanted = {layer.name for layer in layers if wants_mean(layer, chosen[layer.name])}
    means = measured_means(seen)
    if wanted - means.keys():
        means = means_of_graph(input_moments(model)) | means
    hessians = {
        name: {weight: Hessian(moments.products, moments.count) for weight, moments in of_layer.items()}
        for name, of_layer in seen.moments.items()
    }
    gain = _gain(model, layers)
    return {
        name: Known(seen.get(name), means.get(name) if name in wanted else None, hessians.get(name), gain)
        for name in (layer.name for layer in layers)
    }


def _gain(model: nn.Module, layers: list[Layer]) -> float:
    """Through how many layers an error of an output's gain passes on the mean, see functional.output_error.

    That is, until a norm takes it away; a BatchNorm, which divides by what it has seen in training, does not.
    """
    depth = sum(getattr(layer.module, "num_layers", 1) for layer in layers if layer.status == "quantized")
    leaves = (type(module).__name__ for module in model.modules() if not module._modules)
    norms = sum(_TAKES_GAIN.search(name) is not None for name in leaves)
    return max(depth / (norms + 1), 1.0)


def _calibrated(
    model: nn.Module,
    layers: list[Layer],
    chosen: Mapping[str, Options],
    calibration: Data | Calibration | None,
    progress: bool | None,
    has_use: bool,
) -> Calibration:
    _check_of_inputs(layers, chosen)
    needed = [layer for layer in layers if wants_statistics(layer, chosen[layer.name])]
    watched = [layer for layer in layers if layer in needed or wants_mean(layer, chosen[layer.name])]
    compensated = [layer for layer in layers if wants_moments(layer, chosen[layer.name])]
    if calibration is None:
        needs = [(layer, f"abits={chosen[layer.name].abits}") for layer in needed]
        for layer, need in [*needs, *((layer, "rounding='gptq'") for layer in compensated)]:
            raise ValueError(f"{layer.name}: {need} needs calibration=: batches of inputs, say")
        return Calibration()
    if not has_use and not any(
        options.abits is not None or options.correct_bias or options.rounding == "gptq" for options in chosen.values()
    ):
        raise ValueError(
            "calibration= has no effect on these options: add rounding='gptq', correct_bias=True or abits= to use it;"
            " batches (no ocs.Calibration) serve allocate='error' and wbits='auto', too"
        )
    if not watched and not compensated:
        return Calibration()
    if not isinstance(calibration, Calibration):
        calibration = _run(model, watched, compensated, chosen, calibration, progress)
    elif not any(layer.name in calibration for layer in [*watched, *compensated]):
        raise ValueError(f"calibration is of another model: it has {', '.join([*calibration][:3])} ...")
    elif compensated and not calibration.moments:
        raise ValueError("rounding='gptq': calibration has no second moments; use ocs.calibrate(..., moments=True)")
    for layer in compensated:
        if layer.name in calibration.moments:
            with error_context(layer.name):
                calibration.moments[layer.name].check(layer.module)
    for layer in needed:
        if layer.name not in calibration:
            layer.leave("float", "calibration never reached it")
    return calibration


def _check_of_inputs(layers: list[Layer], chosen: Mapping[str, Options]) -> None:
    for layer in layers:
        options = chosen[layer.name]
        if options.abits is None and options.of_inputs and "abits" not in layer.asked_for:
            raise ValueError(f"{layer.name}: an act_ option without abits has no effect: set abits, too")


def _run(
    model: nn.Module,
    watched: list[Layer],
    compensated: list[Layer],
    chosen: Mapping[str, Options],
    data: Data,
    progress: bool | None,
) -> Calibration:
    """What these layers need and no more."""
    statistics = {}
    for layer in watched:
        options = chosen[layer.name]
        split = options.abits is not None and options.act_r > 0 and options.act_split == "static"
        statistics[layer.name] = (layer.module, statistics_for(layer, channels=split))
    moments = {layer.name: moments_for(model, layer) for layer in compensated}
    observe(model, data, statistics, progress, moments)
    return reached(statistics, moments)
