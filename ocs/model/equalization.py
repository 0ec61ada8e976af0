"""Scales moved along the paths of a model: the ranges they even out, and the norms and layers that have taken them.

With a factor s of each channel, what carries the path has its weight and bias divided by s, and the layers that it ends
in have the columns of their weights multiplied.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocs.model.batchnorm_folding import with_parameters
from ocs.model.references import Place
from ocs.model.rewrite import Slot, Step
from ocs.model.scale_paths import ScalePath
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.nn.weights import Weight, input_weight


@dataclass(frozen=True)
class Equalization:
    """What shall stand in a model, and of every norm and layer whether its scales are moved."""

    modules: dict[int, nn.Module] = field(default_factory=dict)  # by id of the old one: a copy with other parameters
    by_name: dict[str, str] = field(default_factory=dict)  # "" where scales are moved, else why not

    def steps(self, model: nn.Module) -> Iterator[Step]:
        """Put the new parameters into the old modules, and the old ones back."""
        for old in model.modules() if self.modules else ():
            new = self.modules.get(id(old))
            for name, parameter in {} if new is None else new._parameters.items():
                if parameter is not old._parameters[name]:
                    yield Slot(Place(old._parameters, name), parameter).step()


class Factors(NamedTuple):
    """What the parameters of a module are to be scaled by, float64 each."""

    rows: Tensor | None = None  # [O]: what each output channel, or a norm's, is divided by
    columns: Tensor | None = None  # [C]: what each input channel is multiplied by


class Magnitudes:
    """The largest |w| of each pair of channels of a layer's weight, [groups, O / groups, C], float64 on the CPU."""

    def __init__(self, weight: Weight) -> None:
        largest = weight.tensor.detach().abs().unsqueeze(2).flatten(2).amax(2).to("cpu", torch.float64)
        self.values = largest.unflatten(0, (weight.groups, -1))

    def scaled(self, factors: Factors) -> Tensor:
        """Divide rows and multiply columns by their factors, where they have some."""
        found, groups = self.values, self.values.shape[0]
        if factors.rows is not None:
            found = found / factors.rows.view(groups, -1, 1)
        return found if factors.columns is None else found * factors.columns.view(groups, 1, -1)


def factors_by_module(factors: Mapping[ScalePath, Tensor]) -> dict[str, Factors]:
    """Collect what is scaled of each module, by name, from the factor of each channel of each path."""
    found: dict[str, Factors] = {}
    for path, factor in factors.items():
        found[path.carrier] = found.get(path.carrier, Factors())._replace(rows=factor)
        for name, repeat in path.consumers:
            found[name] = found.get(name, Factors())._replace(columns=factor.repeat_interleave(repeat))
    return found


def scaled_module(module: nn.Module, factors: Factors) -> nn.Module | None:
    """Copy a norm or layer with scaled parameters; None where these would leave the range of their dtype."""
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        scaled = {name: _scaled_weight(module, factors) if is_quantizable(module) else _float64(module.weight)}
        if factors.rows is not None:
            if not is_quantizable(module):
                scaled[name] /= factors.rows
            if module._parameters.get("bias") is not None:
                scaled["bias"] = _float64(module.bias) / factors.rows
        made = {}
        for each, exact in scaled.items():
            old = module._parameters[each]
            new = torch.empty_like(old).copy_(exact)
            if not _holds(new, exact, old):
                return None
            made[each] = nn.Parameter(new, old.requires_grad)
        return with_parameters(module, **made)


def _scaled_weight(module: nn.Module, factors: Factors) -> Tensor:
    """Scale rows and columns of a layer's weight, float64 in its own layout."""
    weight = input_weight(module)
    scaled = _float64(weight.tensor).unflatten(0, (weight.groups, -1))  # [groups, O / groups, C, ...]
    taps = [1] * (weight.tensor.dim() - 2)
    if factors.rows is not None:
        scaled /= factors.rows.view(weight.groups, -1, 1, *taps)
    if factors.columns is not None:
        scaled *= factors.columns.view(weight.groups, 1, -1, *taps)
    return replacement_of(module).layout(scaled.flatten(0, 1), weight.groups)


def _float64(x: Tensor) -> Tensor:
    """Copy to float64, on the CPU: some devices have none."""
    return x.detach().to("cpu", torch.float64, copy=True)


def _holds(new: Tensor, exact: Tensor, old: Tensor) -> bool:
    """Tell whether a dtype has these values, with as many bits as it had the old ones."""
    if not all(bool(bound.isfinite()) for bound in new.aminmax()):
        return False
    tiny = torch.finfo(old.dtype).tiny
    if tiny < 1e-30:  # which no factor reaches
        return True
    return not bool(((exact.abs() < tiny) & (old.to("cpu").abs() >= tiny)).any())
