"""One view of a float layer's weights, whatever its kind: each as [O, C, ...] with its groups."""

from typing import NamedTuple

from torch import Tensor, nn

from ocs.nn.registry import replacement_of

_NO_VALUES = "its weight holds no values yet: run a batch through lazy layers, fill meta tensors"


class Weight(NamedTuple):
    """A weight of a float layer, one that is quantized."""

    name: str  # in the layer: "weight", "weight_hh_l0", or of an expert in a parameter "gate_up_proj.3"
    tensor: Tensor  # [O, C, ...], detached
    groups: int

    @property
    def outputs(self) -> int:
        """O, the output channels of all groups."""
        return self.tensor.shape[0]

    @property
    def channels(self) -> int:
        """C, the input channels of one group."""
        return self.tensor.shape[1]

    @property
    def in_channels(self) -> int:
        """The input channels of all groups."""
        return self.groups * self.channels

    @property
    def input_axis(self) -> int:
        """The axis, from the last, on which the input of the layer has its channels."""
        return 1 - self.tensor.dim()


def weights_of(module: nn.Module) -> list[Weight]:
    """List the weights of a float layer that are quantized, in the order in which its replacement has them.

    Raises:
        ValueError: a weight holds no values yet and so has no shape (lazy layers).
    """
    kind, groups = replacement_of(module), getattr(module, "groups", 1)
    found = []
    for name in kind.weight_names(module):
        if nn.parameter.is_lazy(module._parameters[name]):
            raise ValueError(_NO_VALUES)
        parts = kind.parts(name, module._parameters[name].detach())
        found += [Weight(part, kind.layout(tensor, groups), groups) for part, tensor in parts]
    return found


def parameter_of(weight: str) -> str:
    """Name the parameter that holds a weight of this name: an expert's is a part of it."""
    return weight.partition(".")[0]


def float_weight(module: nn.Module, weight: str) -> Tensor:
    """Find a weight by its name as the float layer holds it."""
    parts = replacement_of(module).parts(parameter_of(weight), module._parameters[parameter_of(weight)])
    return dict(parts)[weight]


def input_weight(module: nn.Module) -> Weight:
    """Find the first weight of a float layer, which its input meets."""
    return weights_of(module)[0]


def is_weight(tensor: Tensor | None) -> bool:
    """Tell whether a parameter is a weight: one of two or more dimensions, or lazy, which has none yet."""
    return tensor is not None and (nn.parameter.is_lazy(tensor) or tensor.dim() >= 2)


def bytes_of(tensor: Tensor) -> int:
    """Count the bytes of a tensor's values; a lazy one has none."""
    return 0 if nn.parameter.is_lazy(tensor) else tensor.numel() * tensor.element_size()


def check_values(weight: Tensor) -> None:
    """Refuse a weight that has no values: a lazy one, or one on the meta device."""
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        raise ValueError(_NO_VALUES)
