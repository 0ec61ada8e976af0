"""What every quantized layer shares: the integers of each of its weights, and the float weights made of them.

Two executions with the same values (section 3 of the paper). Expanded: the layer has C + n input channels, the copies
fed by `source`; its integers fit k bits. This is the form to deploy. Folded (expand=False): the copies' weights are
added back onto their source channel, so that the layer costs what the float one did. They agree to float rounding and
hold the same state. A weight called `weight_hh_l0` is held as `weight_hh_l0_int` int8 [O, C + n, ...], `scale_hh_l0`
float32 [] or [O], or [O, B] for blocks of input channels (ocs.weight.blocks), and `source_hh_l0` int64 [C + n]; plain
`weight` as `weight_int`, `scale` and `source`. The float weights that run are not saved but rebuilt whenever the
integers or the layer's dtype change.

A layer may quantize its input too (ocs.nn.input): `input_grid` says how, and the buffer `input_form` encodes that, lest
a state be taken for that of another grid; `input_scale` float32 [] and, where channels of it are split, `input_source`
int64 [C + n] hold what calibration gave: copies in the order of splitting, which says what part of its channel each one
is (ocs.nn.input_parts). Where each row of the input has its own scale there is no `input_scale`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocs.nn.hooked import take_hook
from ocs.nn.input import InputGrid, QuantizedInput
from ocs.nn.input_parts import InputParts, as_dense, oracle_parts, round_folded
from ocs.nn.input_rows import round_rows
from ocs.nn.read_only import read_only, refusal
from ocs.nn.state import (
    INPUT_BUFFERS,
    encode_grid,
    input_problem,
    packed_buffers,
    tensors_of,
    weight_buffers,
    weight_problem,
)
from ocs.nn.weights import parameter_of, weights_of
from ocs.weight.blocks import dequantize_weight, fold_weight
from ocs.weight.types import QuantizedWeight

_STATE_HOOKS = ("state_dict", "state_dict_pre", "load_state_dict_pre", "load_state_dict_post")
_HOOKS = frozenset(
    f"_{kind}_hooks{suffix}"
    for kind in ("forward", "forward_pre", "backward", "backward_pre", *_STATE_HOOKS)
    for suffix in ("", "_with_kwargs", "_always_called")
) | {"_is_full_backward_hook"}


class QuantizedLayer(nn.Module):
    """A layer with quantized weights.

    Args:
        float_layer: the layer to replace. Its public attributes, its other parameters (the same objects), its forward
            and backward hooks and those of its state, its dtype and its memory format are taken over.
        quantized: its weights by name, from functional.quantize_weight.
        bits: what the integers fit, 2 to 8.
        expand: run expanded, else folded.
        quantized_input: how the input is quantized; None keeps it float.
        group: the input channels that share a scale, where scales are [O, B]; else 0.
    """

    float_kind: ClassVar[type[nn.Module]]  # what it replaces
    kept_attributes: ClassVar[tuple[str, ...]] = ()  # the float layer's private attributes that are needed
    kept_children: ClassVar[tuple[str, ...]] = ()  # the float layer's modules that are needed
    only_folded: ClassVar[str] = ""  # why it cannot run expanded, if so
    derived_buffers: ClassVar[tuple[str, ...]] = ()  # what rebuild() fills besides forward_buffer()
    input_names: ClassVar[tuple[str, ...]] = ("input",)  # the arguments of forward that are quantized
    splits_input: ClassVar[bool] = False  # whether channels of its input may be split
    opt_in: ClassVar[bool] = False  # whether it replaces float layers only where a caller asks for it
    keeps_all: ClassVar[bool] = False  # whether it has all that the float layer has, its class's forward too
    input_if_asked: ClassVar[bool] = False  # whether its input stays float but where an override says otherwise

    of_other_form: ClassVar[str] = "the state is of a packed model: load it into one, call ocs.pack on this one first"
    source_dtype: ClassVar[torch.dtype] = torch.int64  # of the buffers that say which channels are split

    groups: int = 1
    bits: int
    expand: bool
    scale_group: int = 0  # input channels that share a scale (ocs.weight.blocks); 0 where scales are [] or [O]
    channels: dict[str, int]  # of each weight: C, the original input channels of one group
    settings: dict[str, object]  # the options that it was quantized with, for people and files
    input_grid: InputGrid | None = None
    input_axis: int = -1  # where the input has its channels
    input_range: tuple[float, float] | None = None  # of a quantized input, as calibration saw it
    output_range: tuple[float, float] | None = None  # of outputs that are added to others, likewise

    def __init__(
        self,
        float_layer: nn.Module,
        quantized: Mapping[str, QuantizedWeight],
        bits: int,
        expand: bool = True,
        quantized_input: QuantizedInput | None = None,
        group: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self._take_attributes(float_layer)
        self.bits, self.expand, self.scale_group = bits, expand, group
        self.channels, self.settings = {}, {"wbits": bits, "expand": expand}
        self._register_weights(float_layer, quantized)
        if quantized_input is not None:
            self.hold_input(quantized_input, next(iter(quantized.values())).ints.device)
        for name in self.derived_buffers:
            self.register_buffer(name, None, persistent=False)
        for name in self.unquantized_names(float_layer):
            if name in float_layer._parameters:
                self.register_parameter(name, float_layer._parameters[name])
        for name in self.kept_children:
            self.add_module(name, float_layer._modules[name])
        self.rebuild()

    def _take_attributes(self, float_layer: nn.Module) -> None:
        """Take over the float layer's public attributes, its hooks, and the private attributes that are needed."""
        own = {"scale_group", "input_grid", "input_range", "output_range", "forward", *INPUT_BUFFERS}
        take_hook(self, float_layer)
        for name, value in vars(float_layer).items():
            public = not name.startswith("_") and name not in own
            if public or name in _HOOKS or name in self.kept_attributes:
                vars(self)[name] = value
        if set(dir(type(float_layer))) - set(dir(self.float_kind)):
            vars(self)["float_class"] = type(float_layer)

    def __getattr__(self, name: str) -> Any:
        """Find what a subclass of the float layer's kind had beyond that: its methods, properties and constants."""
        cls = vars(self).get("float_class")
        if cls is not None and hasattr(cls, name) and not hasattr(self.float_kind, name):
            found = getattr_static(cls, name)
            return found.__get__(self, cls) if hasattr(found, "__get__") else found
        return super().__getattr__(name)

    def _register_weights(self, float_layer: nn.Module, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Hold the quantized weights and, until rebuild() makes better ones, the float ones, whose dtype counts."""
        for weight in weights_of(float_layer):
            ints, scale, source, _ = quantized[weight.name]
            self.channels[weight.name] = weight.channels
            self.hold(weight.name, ints, scale, source)
            float_weight = float_layer._parameters[parameter_of(weight.name)].detach()
            self._buffers[self.forward_buffer(weight.name)] = float_weight
            self._non_persistent_buffers_set.add(self.forward_buffer(weight.name))

    def hold(self, name: str, ints: Tensor, scale: Tensor, source: Tensor) -> None:
        """Hold what a weight consists of."""
        for buffer, tensor in zip(self.buffers_of(name), (ints, scale, source), strict=True):
            self.register_buffer(buffer, tensor)

    def hold_input(self, quantized_input: QuantizedInput, device: torch.device) -> None:
        """Hold how the input is quantized."""
        self.input_grid, scale, source = quantized_input
        for buffer, tensor in zip(INPUT_BUFFERS, (encode_grid(self.input_grid).to(device), scale, source), strict=True):
            self.register_buffer(buffer, tensor)

    def _take_buffers(self, layer: QuantizedLayer, buffers: Mapping[str, Tensor | None]) -> None:
        """Take over what a layer holds besides its weights, the state that is saved in its order."""
        left = {*(b for name in layer.channels for b in layer.buffers_of(name)), *layer.derived_names()}
        self._buffers.update({name: tensor for name, tensor in buffers.items() if name not in left})
        self._non_persistent_buffers_set.difference_update(layer.derived_names())
        for name in self.derived_buffers:
            self.register_buffer(name, None, persistent=False)
        self._non_persistent_buffers_set.update(map(self.forward_buffer, self.channels))
        self.rebuild()

    # --- What a kind of layer says of itself

    @classmethod
    def for_class(cls, float_class: type[nn.Module]) -> type[QuantizedLayer]:
        """Give the class of layers that replaces a subclass of its kind."""
        return cls

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name the float layer's weights that are quantized."""
        return ("weight",)

    @classmethod
    def unseen(cls, float_layer: nn.Module) -> str:
        """Say why the layer's calls do not show what its weights meet, or ""."""
        return ""

    @staticmethod
    def unquantized_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name the float layer's parameters that stay as they are."""
        return ("bias",)

    @classmethod
    def reserved_names(cls, weights: Iterable[str]) -> set[str]:
        """Name the attributes of a quantized layer that a float one must not have: they mean something else there."""
        return {"bits", "channels", "expand", "settings", *(b for name in weights for b in weight_buffers(name))}

    @staticmethod
    def parts(name: str, parameter: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Give the weights that a parameter of the float layer holds, by name: one, or one for each expert."""
        return ((name, parameter),)

    @staticmethod
    def layout(weight: Tensor, groups: int) -> Tensor:
        """Permute a weight of the float layer to [O, C, ...], or one [O, C, ...] to the float layer's layout."""
        return weight

    def forward_buffer(self, name: str) -> str:
        """Name the buffer of the float weight that forward reads for this weight: running_hh_l0 for weight_hh_l0."""
        return name.replace("weight", "running")

    def forward_weight(self, name: str) -> Tensor:
        """Make the float32 weight that forward computes with from the integers."""
        return self.in_float_layout(self.dequantized(name) if self.expand else self.folded(name))

    def float_weight(self, name: str) -> Tensor:
        """Give a weight as it is computed, in the float layer's shape, copies added up, to be read."""
        return read_only(self.whole_weight(name), self, name)

    def whole_weight(self, name: str) -> Tensor:
        """Make that weight, anew where forward does not compute with it as a whole."""
        running = self._buffers[self.forward_buffer(name)]
        return running if not self.expand else self.in_float_layout(self.folded(name)).to(running.dtype)

    def derived_names(self) -> Iterable[str]:
        """Name the buffers that rebuild() fills besides those of weights."""
        return self.derived_buffers

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape, in the float layer's layout, of the weight that an expanded layer computes with."""
        ints, _, _ = self.weight_state(name)
        return tuple(self.in_float_layout(ints).shape)

    # --- Integers to weights

    def buffers_of(self, name: str) -> tuple[str, str, str]:
        """Name the buffers that hold a weight."""
        return weight_buffers(name)

    def weight_state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Give integers, scale and source of a weight."""
        ints, scale, source = (self._buffers[buffer] for buffer in weight_buffers(name))
        return ints, scale, source

    def source_of(self, name: str) -> Tensor:
        """Give the original channel of each expanded channel of a weight."""
        return self._buffers[weight_buffers(name)[2]]

    def in_float_layout(self, weight: Tensor) -> Tensor:
        """Permute a weight [O, C, ...] to the float layer's layout."""
        return self.layout(weight, self.groups)

    def dequantized(self, name: str) -> Tensor:
        """Dequantize a weight to float32 [O, C + n, ...]."""
        ints, scale, _ = self.weight_state(name)
        return dequantize_weight(ints, scale, self.channels[name], self.scale_group)

    def folded(self, name: str) -> Tensor:
        """Dequantize a weight to float32 [O, C, ...], with the copies added back onto their source channel."""
        return fold_weight(*self.weight_state(name), self.groups, self.channels[name], self.scale_group)

    def copies(self, name: str = "weight") -> Tensor:
        """Give the original channel of each copy in a weight, group by group."""
        source, C = self.source_of(name), self.channels[name]
        return source[C:] if self.groups == 1 else source.view(self.groups, -1)[:, C:].flatten()

    def input_copies(self) -> Tensor:
        """Give the original channel of each copy in the input that calibration chose, group by group."""
        source = self._buffers.get("input_source")
        if source is None:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        return source.view(self.groups, -1)[:, -self.input_grid.splits :].flatten()

    def splits_of(self, name: str) -> int:
        """Count the copies in one weight, over all groups."""
        return self.source_of(name).numel() - self.groups * self.channels[name]

    @property
    def splits(self) -> int:
        """The number of copies in all weights."""
        return sum(self.splits_of(name) for name in self.channels)

    def rebuild(self) -> None:
        """Make the weights that forward reads from the integers again, in the layer's dtype and memory format."""
        for name in self.channels:
            buffer = self.forward_buffer(name)
            self.set_forward_buffer(buffer, self.forward_weight(name), like=self._buffers[buffer])

    def set_forward_buffer(self, buffer: str, weight: Tensor, like: Tensor) -> None:
        """Put a weight into a buffer that forward reads, in the dtype and memory format of `like`."""
        self._buffers[buffer] = weight.to(like.dtype).contiguous(memory_format=memory_format(like))

    def round_input(self, x: Tensor) -> Tensor:
        """Round an input to its grid, the parts of split channels added up; a float input stays as it is."""
        if self.input_grid is None:
            return x
        x, grid, axis = as_dense(x), self.input_grid, self.input_axis
        if grid.dynamic:
            return round_rows(x, grid.bits)
        parts = oracle_parts(grid, x, axis, 1) if grid.oracle else InputParts(self.input_scale)
        return round_folded(x, grid, parts, axis)

    # --- As an nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but no weight: it would be read, and never computed with."""
        self._refuse_weight(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute, but no weight."""
        self._refuse_weight(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter that is called as no weight is."""
        self._refuse_weight(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a buffer that is called as no weight is."""
        self._refuse_weight(name)
        super().register_buffer(name, tensor, persistent)

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which asks for this."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot take it: use torch.export or torch.jit.trace"
        )

    def _refuse_weight(self, name: str) -> None:
        if name in map(parameter_of, self.__dict__.get("channels", ())):
            raise RuntimeError(refusal(self, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Move and cast as nn.Module does, but keep scales in float32 and round weights once, from the integers."""
        before = {buffer: self._buffers[buffer] for buffer in self._state_buffers()}
        forward_buffer = self.forward_buffer(next(iter(self.channels)))
        dtype = self._buffers[forward_buffer].dtype
        super()._apply(fn, recurse)
        for buffer, tensor in before.items():
            if self._buffers[buffer].dtype != tensor.dtype:
                self._buffers[buffer] = tensor.to(self._buffers[buffer].device)
        if self._buffers[forward_buffer].dtype != dtype:
            self.rebuild()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        *_, error_msgs = others
        for hook in self._load_state_dict_pre_hooks.values():  # of the float layer: they may rename what is checked
            hook.hook(*([self] if hook.with_module else []), state_dict, prefix, *others)
        problems = [self._weight_problem(name, state_dict, prefix) for name in self.channels]
        problems.append(self._input_problem(state_dict, prefix))
        if any(problems):  # nothing of this layer is loaded
            error_msgs.extend(f"{prefix.removesuffix('.')}: {problem}" for problem in problems if problem)
            return
        for key in (prefix + buffer for buffer in self._state_buffers()):
            if key in state_dict:  # a parameter that is assigned would stand beside the buffers
                state_dict[key] = state_dict[key].detach()
        with self._without_load_hooks():
            super()._load_from_state_dict(state_dict, prefix, *others)
        self._restore_dtypes()
        self.rebuild()

    @contextmanager
    def _without_load_hooks(self) -> Iterator[None]:
        """Let torch load a state without the hooks that have seen it."""
        hooks = self._load_state_dict_pre_hooks
        self._load_state_dict_pre_hooks = {}
        try:
            yield
        finally:
            self._load_state_dict_pre_hooks = hooks

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the float layer's hooks as this layer's: each knows the layer that it is called with."""
        hooks = self._load_state_dict_pre_hooks
        own = {key: type(each)(each.hook, self if each.with_module else None) for key, each in hooks.items()}
        made = {**vars(self), "_load_state_dict_pre_hooks": OrderedDict(own)}
        made.pop("_compiled_call_impl", None)  # as nn.Module does
        return made

    def _weight_problem(self, name: str, state: Mapping[str, Tensor], prefix: str) -> str:
        """Say why a state cannot be this weight's, or "". It has all three tensors of the weight, or none."""
        names = self.buffers_of(name)
        if prefix + names[0] not in state and prefix + self.other_codes(name) in state:
            return self.of_other_form
        given, problem = tensors_of(state, prefix, {buffer: self._buffers[buffer] for buffer in names})
        if problem or not given:
            return problem
        return self.state_problem(name, *given.values())

    def other_codes(self, name: str) -> str:
        """Name the buffer that a packed layer has of a weight, which this one has not."""
        return packed_buffers(name)[0]

    def state_problem(self, name: str, *tensors: Tensor) -> str:
        """Say why these tensors, shaped as they must be, cannot be what a weight consists of, or ""."""
        return weight_problem(self.buffers_of(name), *tensors, self.bits, self.groups, self.channels[name])

    def _input_problem(self, state: Mapping[str, Tensor], prefix: str) -> str:
        """Say why a state cannot be this layer's as to its quantized input, or ""."""
        given, problem = tensors_of(state, prefix, self._input_buffers())
        if problem or not given:
            return problem
        form = given["input_form"]
        if form.tolist() != self.input_form.tolist():  # of any two dtypes, some of which torch does not compare
            return f"input_form is {form.tolist()}: the state is of another input than one of {self.input_grid}"
        channels = next(iter(self.channels.values()))
        return input_problem(given.get("input_scale"), given.get("input_source"), self.groups, channels)

    def _restore_dtypes(self) -> None:
        """Cast scales to float32 and sources to integers: a state that is assigned may have come in another dtype."""
        form = INPUT_BUFFERS[0]
        if self._buffers.get(form) is not None:
            self._buffers[form] = self._buffers[form].to(torch.uint8)
        for _, *names in (INPUT_BUFFERS, *map(self.buffers_of, self.channels)):
            for buffer, dtype in zip(names, (torch.float32, self.source_dtype), strict=True):
                if self._buffers.get(buffer) is not None:
                    self._buffers[buffer] = self._buffers[buffer].to(dtype)

    def _state_buffers(self) -> list[str]:
        """Name the buffers that its weights and its quantized input consist of."""
        return [*(buffer for name in self.channels for buffer in self.buffers_of(name)), *self._input_buffers()]

    def _input_buffers(self) -> dict[str, Tensor]:
        """Find the buffers of its quantized input that it has."""
        return {name: self._buffers[name] for name in INPUT_BUFFERS if self._buffers.get(name) is not None}

    def _shown_scales(self, scale: Tensor) -> str:
        """Say what each scale of a weight is for."""
        if self.scale_group:
            return f"channel and {self.scale_group} inputs"
        return "channel" if scale.dim() else "tensor"

    def extra_repr(self) -> str:
        """Show the hyperparameters as the float layer does, then what was quantized."""
        form = "expanded" if self.expand else "folded"
        scales = self._shown_scales(self.weight_state(next(iter(self.channels)))[1])
        shown = self.float_kind.extra_repr(self)
        shown = f"{shown}, " if shown else ""
        grid = f", input of {self.input_grid}" if self.input_grid else ""
        return f"{shown}bits={self.bits}, splits={self.splits} ({form}), scale per {scales}{grid}"


def hooks_of(layer: nn.Module) -> dict[str, Any]:
    """Give the tables of a layer's hooks by attribute, those of its state not."""
    of_state = tuple(f"_{kind}_hooks" for kind in _STATE_HOOKS)
    return {name: table for name, table in vars(layer).items() if name in _HOOKS and not name.startswith(of_state)}


def state_hooks(layer: nn.Module) -> list[Callable[..., Any]]:
    """List what a layer calls when its state is saved or loaded."""
    hooks = [hook for kind in _STATE_HOOKS for hook in vars(layer).get(f"_{kind}_hooks", {}).values()]
    return [getattr(hook, "hook", hook) for hook in hooks]  # those before loading are wrapped


def memory_format(weight: Tensor) -> torch.memory_format:
    """Find the memory format of a weight."""
    if weight.is_contiguous():
        return torch.contiguous_format
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == rank and weight.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format
