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
        for old in model.modules():
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
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        scales = {name: _scale_of_weight(module, module._parameters[name], factors)}
        if factors.rows is not None and module._parameters.get("bias") is not None:
            scales["bias"] = 1 / factors.rows
        made = {}
        for each, scale in scales.items():
            old = module._parameters[each]
            exact = old.detach().to("cpu", torch.float64) * scale
            new = torch.empty_like(old).copy_(exact)
            tiny = torch.finfo(old.dtype).tiny
            if not bool(new.isfinite().all()) or bool(((exact.abs() < tiny) & (old.to("cpu").abs() >= tiny)).any()):
                return None
            made[each] = nn.Parameter(new, old.requires_grad)
        return with_parameters(module, **made)


def _scale_of_weight(module: nn.Module, weight: Tensor, factors: Factors) -> Tensor:
    """Make what a weight is multiplied by, in its own layout."""
    if not is_quantizable(module):
        return 1 / factors.rows
    seen = input_weight(module)
    shape = (seen.groups, -1, *[1] * (seen.tensor.dim() - 1))
    scale = torch.ones(seen.tensor.shape, dtype=torch.float64, device="cpu").unflatten(0, (seen.groups, -1))
    if factors.rows is not None:
        scale = scale / factors.rows.view(shape)
    if factors.columns is not None:
        scale = scale * factors.columns.view(seen.groups, 1, seen.channels, *shape[3:])
    return replacement_of(module).layout(scale.flatten(0, 1), seen.groups)
