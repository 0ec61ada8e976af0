"""Equalization: scales moved between a channel's producer and its consumers, before anything of either is quantized.

What is rounded on one grid should have channels of one range, as the widest decides the step of all. Where the graph
proves that a factor s of each channel can be moved (ocs.model.scale_paths), the columns of the layers after it get the
ranges W s. What they are given gets X / s: where it is quantized, both are even at s = sqrt(X / W) (SmoothQuant, Xiao
et al. 2023, with alpha = 0.5). Else the rows of the layer before get R / s: where they are quantized with one scale,
s = sqrt(R / W) (Nagel et al. 2019, eq. 11). Else a norm takes the factor, which costs nothing: s = 1 / W.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocs.calibration.calibrate import Calibration, collect
from ocs.calibration.run import Watch
from ocs.calibration.statistics import Statistics
from ocs.model.batchnorm_folding import Folding, plan_folding
from ocs.model.equalization import Equalization, Factors, Magnitudes, factors_by_module, scaled_module
from ocs.model.scale_paths import ScalePath, channels_of, find_paths
from ocs.model.wrappers import named_modules
from ocs.nn.registry import is_quantizable
from ocs.nn.weights import input_weight
from ocs.plan.choose import choose
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import ModelOptions, Request

SWEEPS = 50  # over all paths, each of which changes the ranges of its neighbours
CLOSE = 0.01  # octaves: a sweep that changes no factor by more is the last
LIMIT = 256.0  # times their geometric mean, or a part of it: channels that are nearly dead would have any factor

Plans = Mapping[str, LayerPlan]


class Equalized(NamedTuple):
    """What equalization decided, and the request, with data that can be run once more."""

    equalization: Equalization
    request: Request


def plan_equalization(model: nn.Module, request: Request) -> Equalized:
    """Plan what takes the place of norms and layers whose scales are moved; the model itself is not changed.

    Raises:
        ValueError: no scale can be moved; it names the reason that most norms and layers have.
    """
    if not request.model.equalize:
        return Equalized(Equalization(), request)
    if isinstance(request.model.calibration, Calibration):
        raise ValueError(
            "equalize=True changes what layers are given, which ocs.calibrate saw before: use calibration=batches, or a"
            " callable that runs the model"
        )
    if isinstance(request.model.calibration, Iterator):  # which gives its batches once
        request = request._replace(model=replace(request.model, calibration=list(request.model.calibration)))
    plans, paths = {plan.name: plan for plan in choose(model, request)[0]}, find_paths(model)
    modules, inputs = dict(named_modules(model)), _largest_inputs(model, plans, paths.found.values(), request.model)
    with torch.inference_mode(False), torch.no_grad():
        folding = plan_folding(model) if request.model.fold_bn else Folding({}, {}, {})
        ranges = Ranges(modules, plans, folding, inputs)
        reasons = {name: ranges.reason_against(path) for name, path in paths.found.items()}
        used = [path for name, path in paths.found.items() if not reasons[name]]
        made, unmade = _scaled(modules, balanced(ranges, used))
    by_name = reasons | unmade | paths.left
    by_name = {name: by_name[name] for name in modules if name in by_name}
    if not made:
        raise ValueError(f"equalize=True has no effect: {_largest_cause(by_name)}")
    return Equalized(Equalization(made, by_name), request)


def _largest_cause(left: Mapping[str, str]) -> str:
    """Say why no scale can be moved."""
    if not left:
        return "the model has no norm, convolution or linear layer that runs by itself"
    (reason, count), *_ = Counter(left.values()).most_common(1)
    names = [name or "(model)" for name, each in left.items() if each == reason]
    return f"of {', '.join(names[:3])}{' ...' if count > 3 else ''}, {reason}"


def _scaled(
    modules: Mapping[str, nn.Module], factors: dict[ScalePath, Tensor]
) -> tuple[dict[int, nn.Module], dict[str, str]]:
    """Make the modules of these paths, by id of the old ones; and say of those carriers why not, where that cannot be.

    A path goes as a whole: where one of its modules cannot hold what it should, none of them is scaled for it.
    """
    factors, left = dict(factors), {}
    while True:
        wanted = factors_by_module(factors)
        made = {name: scaled_module(modules[name], each) for name, each in wanted.items()}
        failed = next((name for name, module in made.items() if module is None), None)
        if failed is None:
            return {id(modules[name]): module for name, module in made.items()}, left
        for path in [path for path in factors if failed in (path.carrier, *(name for name, _ in path.consumers))]:
            left[path.carrier] = f"{failed} would leave the range of its dtype"
            del factors[path]


# --- Ranges and factors -----------------------------------------------------------------------------------------------


class Ranges:
    """The ranges of what is quantized along paths, each relative to the largest channel's: [channels], float64.

    inputs: of layers whose inputs are quantized, the largest |x| of each channel.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], plans: Plans, folding: Folding, inputs: Mapping[str, Tensor]
    ) -> None:
        self.modules, self.plans, self.folding, self.inputs = modules, plans, folding, inputs
        self._magnitudes: dict[str, Magnitudes] = {}

    def channels(self, path: ScalePath) -> int:
        """Count the channels of a path."""
        return channels_of(self.modules[path.carrier])

    def reason_against(self, path: ScalePath) -> str:
        """Say why a path's scales had better stay, or ""."""
        quantized = [name for name, _ in path.consumers if self.plans[name].quantized]
        if not quantized:
            return "no layer after it is quantized"
        told = any(name in self.inputs for name in quantized) or self.divided(path)
        needed = any(self.plans[name].quantizes_input for name in quantized)
        return "what it gives is quantized, and no calibration tells its range" if needed and not told else ""

    def divided(self, path: ScalePath) -> str:
        """Name the layer whose quantized rows have these channels and one scale for all of them, or ""."""
        carrier = self.modules[path.carrier]
        name = path.carrier if is_quantizable(carrier) else path.convolution
        folded = name == path.carrier or id(carrier) in self.folding.norms
        one_scale = name and self.plans[name].quantized and self.plans[name].options.granularity == "tensor"
        return name if one_scale and folded else ""

    def rows(self, path: ScalePath, factors: Mapping[str, Factors]) -> Tensor | None:
        """Find max |w| of each row of the layer before; None where no grid of one scale holds them."""
        name = self.divided(path)
        if not name:
            return None
        return _relative(self._scaled(name, factors.get(name, Factors())._replace(rows=None)).amax(2).flatten())

    def given(self, path: ScalePath) -> Tensor | None:
        """Find max |x| of each channel; None where it stays float, or nothing tells it."""
        found = [self.inputs[name].view(-1, repeat).amax(1) for name, repeat in path.consumers if name in self.inputs]
        return _relative(torch.stack([_relative(each) for each in found]).amax(0)) if found else None

    def columns(self, path: ScalePath, factors: Mapping[str, Factors]) -> Tensor:
        """Find max |w| of each column of the layers after, where these are quantized, as a share of its grid's range.

        The grid is the layer's, or with a scale for each output channel that one's.
        """
        found = []
        for name, repeat in path.consumers:
            if self.plans[name].quantized:
                largest = self._scaled(name, factors.get(name, Factors())._replace(columns=None))
                if self.plans[name].options.granularity == "channel":
                    largest = largest / largest.amax(2, keepdim=True).clamp(min=1e-300)
                found.append(_relative(largest.amax(1).flatten().view(-1, repeat).amax(1)))
        return torch.stack(found).amax(0)

    def _scaled(self, name: str, factors: Factors) -> Tensor:
        """Scale the magnitudes of a layer's weight, as it is once a BatchNorm is folded into it."""
        module = self.modules[name]
        if name not in self._magnitudes:
            self._magnitudes[name] = Magnitudes(input_weight(self.folding.layers.get(id(module), module)))
        return self._magnitudes[name].scaled(factors)


def balanced(ranges: Ranges, paths: Sequence[ScalePath]) -> dict[ScalePath, Tensor]:
    """Find the factor of each channel of each path, over chains of paths until none changes."""
    factors = {path: torch.ones(ranges.channels(path), dtype=torch.float64, device="cpu") for path in paths}
    before_norm = {path.convolution: path for path in paths if path.convolution and ranges.divided(path)}
    for _ in range(SWEEPS):
        change = 0.0
        for path in paths:
            of_modules = factors_by_module(factors)
            for name, after in before_norm.items():  # a factor of a BatchNorm that is folded is one of these rows
                of_modules[name] = of_modules.get(name, Factors())._replace(rows=factors[after])
            given = ranges.given(path)
            divided = ranges.rows(path, of_modules) if given is None else given
            new = _factor(divided, ranges.columns(path, of_modules))
            change = max(change, float((new / factors[path]).log2().abs().max()))
            factors[path] = new
        if change < CLOSE:
            break
    return factors


def _factor(divided: Tensor | None, multiplied: Tensor) -> Tensor:
    """Find the factor that evens out these ranges, of what it divides and multiplies; 1 for channels that have none."""
    factor = 1 / multiplied if divided is None else (divided / multiplied).sqrt()
    sound = factor.isfinite() & (factor > 0)
    if not bool(sound.any()):
        return torch.ones_like(factor)
    middle = factor[sound].log().mean().exp()
    return (factor / middle).clamp(1 / LIMIT, LIMIT).where(sound, 1.0)


def _relative(ranges: Tensor) -> Tensor:
    return ranges / ranges.max().clamp(min=1e-300)


# --- What data says ---------------------------------------------------------------------------------------------------


def _largest_inputs(
    model: nn.Module, plans: Plans, paths: Iterable[ScalePath], options: ModelOptions
) -> dict[str, Tensor]:
    """Find the largest |x| of each channel of the quantized inputs that paths lead to, by the layer's name."""
    names = {name for path in paths for name, _ in path.consumers if plans[name].quantizes_input}
    if not names or options.calibration is None:
        return {}
    watches = [_watch(plans[name]) for name in sorted(names)]
    seen = collect(model, options.calibration, watches, [], options.progress, "calibration")
    return {name: found.channel_max.double() for name, found in seen.items()}


def _watch(plan: LayerPlan) -> Watch:
    weight = input_weight(plan.module)
    return Watch(plan.name, plan.module, Statistics(weight.input_axis, weight.in_channels))
