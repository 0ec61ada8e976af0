"""Layers that are trained as what they will be once they are quantized; ocs.training makes and converts them.

Such a layer is the float layer itself, of a class of its own that is made of PreparedLayer and the float one. Its float
parameters stay where they are, for optimizers and state_dict; whoever reads `layer.weight`, its forward first of all,
finds the quantized weight, folded, through which gradients pass to the float one (ocs.nn.straight_through). Beside
`weight` it holds `scale` float32 [] or [O], a parameter where thresholds are learned, else a buffer; `source` int64
[G (C + n)]; `steps` int64 [], training steps since the splits were planned; where its input is quantized,
`input_scale`, and `input_source` where that is split. Names follow those of quantized layers: scale_hh_l0 ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ocs.errors import error_context
from ocs.kernels.constants import qmax
from ocs.nn.base import QuantizedLayer, memory_format
from ocs.nn.input import InputGrid, QuantizedInput
from ocs.nn.input_parts import as_dense, parts_of, round_folded, static_parts, with_row_scales
from ocs.nn.own_forward import QuantOwnForward, own_forward
from ocs.nn.state import INPUT_BUFFERS, weight_buffers
from ocs.nn.straight_through import (
    ScaledGradient,
    TrainedGrid,
    gradient_scale,
    positive,
    split_integers,
    trained_weight,
)
from ocs.nn.weights import parameter_of
from ocs.weight.apply_plan import quantize_plan
from ocs.weight.error import gain_share, with_gain_of
from ocs.weight.plan import split_plan_of
from ocs.weight.selection import choose_splits
from ocs.weight.types import QuantizedWeight, Scheme, Select, SplitPlan

STEPS = "steps"  # the buffer that counts them
_OWN = ("_preparation", "_seen")  # attributes


@dataclass(frozen=True)
class Preparation:
    """How a layer is quantized while it is trained."""

    layer: str  # its name in the model that was prepared, for errors
    scheme: Scheme
    select: Select
    learned: bool  # whether thresholds are; else they are searched whenever splits are planned
    replan: int | None  # training steps after which that is; None is never
    names: tuple[str, ...]  # of its weights
    input_grid: InputGrid | None
    options: Any  # as the call said them
    input_range: tuple[float, float] | None = None  # as calibration saw it
    output_range: tuple[float, float] | None = None
    overridden: frozenset[str] | None = None  # the options that an override named

    @property
    def parameters(self) -> tuple[str, ...]:
        """Name the parameters that hold its weights."""
        return tuple(dict.fromkeys(map(parameter_of, self.names)))

    @property
    def grid(self) -> TrainedGrid:
        """The grid of its weights."""
        scheme = self.scheme
        return TrainedGrid(scheme.bits, scheme.split, scheme.rounding, scheme.groups, self.learned)


class Part(NamedTuple):
    """A weight as it is trained: float32 [O, C, ...], its scale and its source."""

    weight: Tensor
    scale: Tensor
    source: Tensor


class PreparedLayer(nn.Module):
    """A float layer that computes with its quantized weight; see the module's text."""

    float_class: ClassVar[type[nn.Module]]
    kind: ClassVar[type[QuantizedLayer]]  # what it will be
    _preparation: Preparation
    _seen: tuple[float, ...]  # the sums of its weights when it was last called in training

    def __getattr__(self, name: str) -> Any:
        """Make the quantized weight for whoever reads `weight`; the float one is in `_parameters`."""
        preparation = self.__dict__.get("_preparation")
        if preparation is not None and name in preparation.parameters:
            return self._quantized_parameter(name)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the float layer does, with the quantized weight, of inputs rounded where they are to be."""
        if self._preparation.input_grid is not None:
            args, kwargs = self._rounded_arguments(args, kwargs)
        return super().forward(*args, **kwargs)

    # --- Weights

    def part(self, name: str) -> Part:
        """Give a weight by name, [O, C, ...], with what it is quantized by."""
        parameter, groups = parameter_of(name), self._preparation.scheme.groups
        parts = dict(self.kind.parts(parameter, self._parameters[parameter]))
        _, scale, source = (self._tensor(each) for each in weight_buffers(name))
        return Part(self.kind.layout(parts[name], groups), positive(scale), source)

    def _tensor(self, name: str) -> Tensor | None:
        return self._parameters.get(name, self._buffers.get(name))

    def _quantized_parameter(self, parameter: str) -> Tensor:
        """Compute the weights that a parameter holds as the quantized layer does, in the float layer's layout."""
        if parameter == self._preparation.parameters[0]:  # once in each call
            self._count_step()
        preparation, old, made = self._preparation, self._parameters[parameter], []
        for name in (name for name in preparation.names if parameter_of(name) == parameter):
            with error_context(preparation.layer):
                folded = trained_weight(*self.part(name), preparation.grid)
            made.append(self.kind.layout(folded, preparation.scheme.groups))
        whole = torch.stack(made) if parameter not in preparation.names else made[0]
        return whole.to(old.dtype).contiguous(memory_format=memory_format(old))

    @torch.no_grad()
    def quantized(self, name: str) -> QuantizedWeight:
        """Give a weight's integers and all that belongs to them, tensors of their own."""
        preparation, (weight, scale, source) = self._preparation, self.part(name)
        scale, source = scale.detach().clone(), source.clone()
        if not bool(weight.isfinite().all() & scale.isfinite().all()):
            raise ValueError(f"{name} or its scale holds NaN or Inf: training diverged; load an earlier state")
        ints = split_integers(weight.detach().float(), scale, source, preparation.grid)
        return QuantizedWeight(ints, scale, source, scale * qmax(preparation.scheme.bits))

    @torch.no_grad()
    def split_plan(self, name: str) -> SplitPlan:
        """Give the splits of a weight as they are, tensors of their own."""
        scheme, (weight, _, source) = self._preparation.scheme, self.part(name)
        channel_max = torch.ops.ocs.channel_max(weight.detach().float(), scheme.groups)
        parts, offset = parts_of(source, channel_max.numel(), scheme.split)
        return split_plan_of(source.clone(), parts.int(), offset.int(), channel_max[source] / parts, channel_max)

    # --- Splits planned anew

    def _count_step(self) -> None:
        """Count a training step where the weights are others than the last time; plan anew after so many.

        Calling the layer twice between two steps, or again for gradients (checkpointing), counts nothing.
        """
        preparation = self._preparation
        if not self.training or preparation.replan is None:
            return
        sums = weight_sums(self, preparation)
        if sums == self._seen:
            return
        vars(self)["_seen"] = sums
        if int(self._buffers[STEPS].add_(1)) >= preparation.replan:
            self.plan_anew()

    @torch.no_grad()
    def plan_anew(self) -> None:
        """Choose splits by the weights as they are now, and search thresholds that are not learned."""
        preparation = self._preparation
        for name in preparation.names:
            weight, _, source = self.part(name)
            weight = weight.detach().float()
            scheme = with_gain_of(preparation.scheme, partial(gain_share, weight, preparation.scheme.groups))
            n = source.numel() // scheme.groups - weight.shape[1]
            with error_context(preparation.layer, name):
                plan = choose_splits(weight, n, preparation.select, scheme)
            source.copy_(plan.source)
            if not preparation.learned:
                self._tensor(weight_buffers(name)[1]).copy_(quantize_plan(weight, plan, scheme).quantized.scale)
        self._buffers[STEPS].zero_()

    # --- Input

    def round_input(self, x: Tensor) -> Tensor:
        """Round an input as the quantized layer will; gradients are straight through, of a learned scale LSQ's."""
        grid, axis = self._preparation.input_grid, self.input_axis
        x = as_dense(x)
        scale = positive(self._tensor("input_scale")) if grid.calibrated else None
        if scale is not None and scale.requires_grad:
            features = x.numel() // max(x.shape[0], 1)
            scale = ScaledGradient.apply(scale, gradient_scale(features, grid.qmax))
        groups = self._preparation.scheme.groups
        parts = static_parts(grid, scale, self._buffers.get("input_source"), groups)
        return round_folded(x, grid, with_row_scales(x, grid, parts), axis)

    @property
    def input_axis(self) -> int:
        """The axis on which the input has its channels."""
        name = self._preparation.names[0]
        return 1 - self.part(name).weight.dim()

    def quantized_input(self) -> QuantizedInput | None:
        """Say how its input is quantized, tensors of their own."""
        grid = self._preparation.input_grid
        if grid is None:
            return None
        source = self._buffers.get("input_source")
        scale = positive(self._tensor("input_scale").detach()).clone() if grid.calibrated else None
        return QuantizedInput(grid, scale, None if source is None else source.clone())

    def _rounded_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Round the arguments that are inputs; what is one tensor stays one."""
        rounded: dict[int, Any] = {}

        def once(x: Any) -> Any:
            if id(x) not in rounded:
                rounded[id(x)] = x._replace(data=self.round_input(x.data)) if _is_packed(x) else self.round_input(x)
            return rounded[id(x)]

        names = self.kind.input_names
        args = (*map(once, args[: len(names)]), *args[len(names) :])
        return args, {name: once(value) if name in names else value for name, value in kwargs.items()}

    # --- As the float layer

    def float_twin(self) -> nn.Module:
        """Make the float layer, of the same parameters, without what training as a quantized one has added."""
        twin = self.float_class.__new__(self.float_class)
        added = {*added_names(self._preparation)}
        vars(twin).update({name: value for name, value in vars(self).items() if name not in _OWN})
        for table in ("_parameters", "_buffers"):
            vars(twin)[table] = {name: value for name, value in vars(self)[table].items() if name not in added}
        return twin

    def extra_repr(self) -> str:
        """Show what the float layer shows, then how it is quantized."""
        preparation = self._preparation
        splits = sum(self._tensor(weight_buffers(name)[2]).numel() for name in preparation.names)
        splits -= preparation.scheme.groups * sum(self.part(name).weight.shape[1] for name in preparation.names)
        shown = self.float_class.extra_repr(self)
        grid = f", input of {preparation.input_grid}" if preparation.input_grid else ""
        return f"{shown}{', ' if shown else ''}bits={preparation.scheme.bits}, splits={splits}{grid}"

    def __reduce_ex__(self, protocol: int) -> Any:
        """Name what the class is made of, as it has no name in a module."""
        kind: Any = self.kind
        if issubclass(kind, QuantOwnForward):
            kind = (kind.float_kind, kind.like, kind.transposed_weight)
        return _blank, (self.float_class, kind), self.__getstate__()


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedSequence)


def added_names(preparation: Preparation) -> Iterator[str]:
    """Name the parameters and buffers that a prepared layer has and the float one has not."""
    for name in preparation.names:
        yield from weight_buffers(name)[1:]
    yield STEPS
    yield from INPUT_BUFFERS[1:]


def weight_sums(layer: nn.Module, preparation: Preparation) -> tuple[float, ...]:
    """Sum each parameter that holds weights of a layer: other weights have other sums."""
    held = (layer._parameters[name].detach() for name in preparation.parameters)
    return tuple(float(each.sum(dtype=torch.float64)) for each in held)


class _PreparedRecurrent(PreparedLayer):
    """A recurrent layer, whose forward reads its weights from a list that torch keeps."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor]) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: what runs is made anew at each call."""

    def _update_flat_weights(self) -> None:
        """Do nothing, likewise."""


@cache
def prepared_class(cls: type[nn.Module], kind: type[QuantizedLayer]) -> type[PreparedLayer]:
    """Make the class of prepared layers that are of a float class and become layers of a quantized kind."""
    base = _PreparedRecurrent if issubclass(cls, RNNBase) else PreparedLayer
    content = {"__doc__": f"{cls.__name__}, trained as quantized.", "__module__": __name__}
    untraced = torch.compiler.disable(base._quantized_parameter)  # only now: it imports all of torch._dynamo
    content |= {"float_class": cls, "kind": kind, "_quantized_parameter": untraced}
    return type(f"Prepared{cls.__name__}", (base, cls), content)


def _blank(cls: type[nn.Module], kind: Any) -> PreparedLayer:
    made = prepared_class(cls, own_forward(*kind) if isinstance(kind, tuple) else kind)
    return made.__new__(made)
