"""What every quantized layer shares: the integers of each of its weights, and the float weights made of them.

Two executions with the same values (section 3 of the paper). Expanded: the layer has C + n input channels, the copies
fed by `source`; its integers fit k bits. This is the form to deploy. Folded (expand=False): the copies' weights are
added back onto their source channel, so that the layer costs what the float one did. They agree to float rounding and
hold the same state. A weight called `weight_hh_l0` is held as `weight_hh_l0_int` int8 [O, C + n, ...], `scale_hh_l0`
float32 [] or [O] and `source_hh_l0` int64 [C + n]; plain `weight` as `weight_int`, `scale` and `source`. The float
weights that run are not saved but rebuilt whenever the integers or the layer's dtype change.

A layer may quantize its input too (ocs.activation): `input_grid` says how, the buffer `input_form` likewise, so that no
state is taken for that of another grid; `input_scale` float32 [] and, where channels of it are split, `input_source`
int64 [C + n] hold what calibration gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ocs.kernels.composite import source_valid
from ocs.kernels.constants import qmax
from ocs.nn.input import Cuts, InputGrid, QuantizedInput, folded, oracle_cuts
from ocs.weight.types import QuantizedWeight

_HOOKS = frozenset(
    f"_{kind}_hooks{suffix}"
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
    for suffix in ("", "_with_kwargs", "_always_called")
) | {"_is_full_backward_hook"}


def state_names(weight: str) -> tuple[str, str, str]:
    """The buffers that hold a weight: its integers, scale and source."""
    return f"{weight}_int", weight.replace("weight", "scale"), weight.replace("weight", "source")


def problem_of(
    names: tuple[str, str, str], ints: Tensor, scale: Tensor, source: Tensor, bits: int, groups: int, channels: int
) -> str:
    """Why these values are no quantized weight, or "": a state may come from a stranger."""
    most = qmax(bits)
    if ints.dtype != torch.int8 or bool((ints.short().abs() > most).any()):
        return f"{names[0]} is not of {bits}-bit integers (int8 in [-{most}, {most}])"
    scale = scale.float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return f"{names[1]} is not positive and finite (in float32)"
    if source.is_floating_point() or not source_valid(source.long(), groups, channels):
        return f"{names[2]} is no split plan of this layer"
    return ""


INPUT_NAMES = ("input_form", "input_scale", "input_source")


def input_names(grid: InputGrid | None) -> tuple[str, ...]:
    """The tensors that calibration gave, of a quantized input."""
    if grid is None or grid.oracle:
        return ()
    return INPUT_NAMES[1 : 2 + (grid.splits > 0)]


def form_of(grid: InputGrid) -> Tensor:
    """A grid as a state_dict has it, uint8 [4]: bits, whether signed, quantization-aware, Oracle OCS."""
    return torch.tensor([grid.bits, grid.signed, grid.split == "qa", grid.oracle], dtype=torch.uint8)


def with_originals(copies: Tensor, groups: int, channels: int) -> Tensor:
    """A source [groups (C + n)] from that of its copies alone, group by group: the original channels come first."""
    own = torch.arange(groups * channels, device=copies.device).view(groups, channels)
    return torch.cat([own, copies.view(groups, -1)], 1).flatten()


def problem_of_input(scale: Tensor, source: Tensor | None, groups: int, channels: int) -> str:
    """The same of a quantized input."""
    if not bool(scale.isfinite() & (scale > 0)):
        return "input_scale is not positive and finite (in float32)"
    if source is None:
        return ""
    if source.is_floating_point() or not source_valid(source.long(), groups, channels):
        return "input_source is no split plan of this layer"
    copies = source.view(groups, -1)[:, channels:].flatten()
    return "" if copies.unique().numel() == copies.numel() else "input_source splits a channel twice"


class QuantizedLayer(nn.Module):
    """A layer with quantized weights.

    Args:
        float_layer: the layer to replace. Its public attributes, its other parameters (the same objects), its forward
            and backward hooks, its dtype and its memory format are taken over.
        quantized: its weights by name, from functional.quantize_weight.
        bits: what the integers fit, 2 to 8.
        expand: run expanded, else folded.
        quantized_input: how the input is quantized; None keeps it float.
    """

    float_kind: ClassVar[type[nn.Module]]  # what it replaces
    kept: ClassVar[tuple[str, ...]] = ()  # the float layer's private attributes that are needed
    kept_children: ClassVar[tuple[str, ...]] = ()
    only_folded: ClassVar[str] = ""  # why it cannot run expanded, if so
    more_running: ClassVar[tuple[str, ...]] = ()  # buffers of what runs besides those of running()
    input_names: ClassVar[tuple[str, ...]] = ("input",)  # the arguments of forward that are quantized
    splits_input: ClassVar[bool] = False  # whether channels of its input may be split
    input_if_asked: ClassVar[bool] = False  # whether its input stays float but where an override says otherwise

    groups: int = 1
    bits: int
    expand: bool
    channels: dict[str, int]  # of each weight: C, the original input channels of one group
    settings: dict[str, object]  # how it was quantized, for people and files
    input_grid: InputGrid | None = None
    input_axis: int = -1  # where the input has its channels

    def __init__(
        self,
        float_layer: nn.Module,
        quantized: Mapping[str, QuantizedWeight],
        bits: int,
        expand: bool = True,
        quantized_input: QuantizedInput | None = None,
    ) -> None:
        nn.Module.__init__(self)
        kept = {*self.kept, *_HOOKS}
        mine = {"input_grid", *INPUT_NAMES}
        carried = {k: v for k, v in vars(float_layer).items() if k in kept or not k.startswith("_")}
        vars(self).update({k: v for k, v in carried.items() if k not in mine})
        vars(self).update(bits=bits, expand=expand)
        self.channels, self.settings = {}, {"wbits": bits, "expand": expand}
        for name, weight in quantized.items():
            float_weight = float_layer._parameters[name].detach()
            self.channels[name] = self.layout(float_weight, self.groups).shape[1]
            for buffer, tensor in zip(state_names(name), weight[:3], strict=True):
                self.register_buffer(buffer, tensor)
            self.register_buffer(self.running(name), float_weight, persistent=False)  # its dtype counts, until rebuilt
        if quantized_input is not None:
            grid, scale, source = quantized_input
            self.input_grid = grid
            form = form_of(grid).to(next(iter(quantized.values())).ints.device)
            for buffer, tensor in zip(INPUT_NAMES, (form, scale, source), strict=True):
                self.register_buffer(buffer, tensor)
        self._buffers.update(dict.fromkeys(self.more_running))
        self._non_persistent_buffers_set.update(self.more_running)
        for name in self.other_names(float_layer):
            if name in float_layer._parameters:
                self.register_parameter(name, float_layer._parameters[name])
        for name in self.kept_children:
            self.add_module(name, float_layer._modules[name])
        self.rebuild()

    # --- What a kind of layer says of itself

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Its weights that are quantized."""
        return ("weight",)

    @staticmethod
    def other_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Its parameters that stay as they are."""
        return ("bias",)

    @staticmethod
    def layout(weight: Tensor, groups: int) -> Tensor:
        """The float layer's weight as [O, C, ...], and such a one as the float layer's."""
        return weight

    def running(self, name: str) -> str:
        """The buffer of what runs for a weight."""
        return name

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """Of the weight that runs where the layer is expanded, in the float layer's layout."""
        ints = getattr(self, state_names(name)[0])
        return tuple(self.layout(ints, self.groups).shape)

    def effective(self, name: str) -> Tensor:
        """The float32 weight that runs, from the integers."""
        return self.layout(self.dequantized(name) if self.expand else self.folded(name), self.groups)

    # --- Integers to weights

    def held(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Integers, scale and source of a weight."""
        ints, scale, source = (self._buffers[buffer] for buffer in state_names(name))
        return ints, scale, source

    def source_of(self, name: str) -> Tensor:
        """The original channel of each expanded one."""
        return getattr(self, state_names(name)[2])

    def dequantized(self, name: str) -> Tensor:
        """Float32 [O, C + n, ...]."""
        ints, scale, _ = self.held(name)
        return torch.ops.ocs.dequantize(ints, scale)

    def folded(self, name: str) -> Tensor:
        """Float32 [O, C, ...], the copies added back onto their source channel."""
        return torch.ops.ocs.fold(*self.held(name), self.groups, self.channels[name])

    def copies(self, name: str = "weight") -> Tensor:
        """The source of each copy, group by group."""
        source, C = self.source_of(name), self.channels[name]
        return source[C:] if self.groups == 1 else source.view(self.groups, -1)[:, C:].flatten()

    def input_copies(self) -> Tensor:
        """Likewise of the input's copies, where calibration chose them; empty where there are none."""
        source = self._buffers.get("input_source")
        if source is None:
            return torch.empty(0, dtype=torch.int64)
        return source.view(self.groups, -1)[:, -self.input_grid.splits :].flatten()

    def splits_of(self, name: str) -> int:
        """The copies of one weight over all groups."""
        return self.source_of(name).numel() - self.groups * self.channels[name]

    @property
    def splits(self) -> int:
        """The copies over all weights."""
        return sum(self.splits_of(name) for name in self.channels)

    def rebuild(self) -> None:
        """Make the weights that run from the integers again, in the layer's dtype and memory format."""
        for name in self.channels:
            self.set_running(self.running(name), self.effective(name), like=self._buffers[self.running(name)])

    def set_running(self, buffer: str, weight: Tensor | None, like: Tensor) -> None:
        """Another tensor for a buffer of a running weight, in the dtype and memory format of `like`."""
        if weight is not None:
            weight = weight.to(like.dtype).contiguous(memory_format=_memory_format(like))
        self._buffers[buffer] = weight

    def on_grid(self, x: Tensor) -> Tensor:
        """An input as the layer sees it: rounded, where its input is quantized."""
        if self.input_grid is None:
            return x
        grid, axis = self.input_grid, self.input_axis
        return folded(x, grid, oracle_cuts(grid, x, axis, 1) if grid.oracle else Cuts(self.input_scale), axis)

    # --- As an nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Moves and casts as nn.Module does; scales stay float32, and weights are rounded once, from the integers."""
        names = [*(buffer for name in self.channels for buffer in state_names(name)), *self._input_names()]
        before = {buffer: getattr(self, buffer) for buffer in names}
        running = self.running(next(iter(self.channels)))
        dtype = getattr(self, running).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        if getattr(self, running).dtype != dtype:
            self.rebuild()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = [self._problem_of(name, state_dict, prefix) for name in self.channels]
        problems.append(self._problem_of_input(state_dict, prefix))
        if any(problems):  # nothing of this layer is loaded
            error_msgs.extend(f"{prefix.removesuffix('.')}: {problem}" for problem in problems if problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self.channels:  # assigned ones may have come in another dtype
            _, scale, source = state_names(name)
            self._buffers.update({scale: self._buffers[scale].float(), source: self._buffers[source].long()})
        for buffer, dtype in zip(self._input_names()[1:], (torch.float32, torch.int64), strict=False):
            self._buffers[buffer] = self._buffers[buffer].to(dtype)
        self.rebuild()

    def _problem_of(self, name: str, state_dict: Mapping[str, Tensor], prefix: str) -> str:
        """Why a state cannot be this weight's, or "". Its three tensors belong together: all of them, or none."""
        names = state_names(name)
        given, problem = self._given(names, state_dict, prefix)
        return problem or (problem_of(names, *given, self.bits, self.groups, self.channels[name]) if given else "")

    def _problem_of_input(self, state_dict: Mapping[str, Tensor], prefix: str) -> str:
        """Likewise of its quantized input."""
        given, problem = self._given(self._input_names(), state_dict, prefix)
        if problem or not given:
            return problem
        form, scale, source, *_ = (*given, None, None)
        if not torch.equal(form, self.input_form.to(form.device)):
            return f"input_form is {form.tolist()}: the state is of another input than one of {self.input_grid}"
        channels = next(iter(self.channels.values()))
        return "" if scale is None else problem_of_input(scale.float(), source, self.groups, channels)

    def _input_names(self) -> tuple[str, ...]:
        """The buffers of its quantized input that it has."""
        return tuple(name for name in INPUT_NAMES if self._buffers.get(name) is not None)

    def _given(self, names: tuple[str, ...], state_dict: Mapping[str, Tensor], prefix: str) -> tuple[list[Tensor], str]:
        """The tensors of a state that belong together, none where there are none or without values; what is wrong."""
        given = [state_dict.get(prefix + buffer) for buffer in names]
        if all(tensor is None for tensor in given):
            return [], ""
        for buffer, tensor in zip(names, given, strict=True):
            held = self._buffers[buffer]
            if tensor is None:
                return [], f"{buffer} is missing, without which {', '.join(set(names) - {buffer})} means nothing"
            if tensor.shape != held.shape:
                return [], f"{buffer} has a size mismatch: {list(tensor.shape)}, this layer needs {list(held.shape)}"
        return ([] if any(tensor.is_meta for tensor in given) else given), ""

    def extra_repr(self) -> str:
        """Hyperparameters as the float layer shows them, then what was quantized."""
        form = "expanded" if self.expand else "folded"
        scales = "channel" if self.held(next(iter(self.channels)))[1].dim() else "tensor"
        shown = self.float_kind.extra_repr(self)
        grid = f", input of {self.input_grid}" if self.input_grid else ""
        return (
            f"{shown}{', ' if shown else ''}bits={self.bits}, splits={self.splits} ({form}), scale per {scales}{grid}"
        )


def _memory_format(weight: Tensor) -> torch.memory_format:
    if weight.is_contiguous():
        return torch.contiguous_format
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == rank and weight.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format
