"""Which layers of a model are quantized, which stay float and why, and with which options."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ocs.errors import error_context
from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.input import ActSplit
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.nn.weights import check_values as check_weight_values
from ocs.weight.arguments import check_bits, check_choice, check_clip, check_ratio, check_rounding, check_select
from ocs.weight.types import Granularity, Rounding, Select, Split


class _FirstLayer:
    """The model's first convolution, which sees the image (section 5 of the paper)."""

    def __repr__(self) -> str:
        return "ocs.FIRST_LAYER"


FIRST_LAYER = _FirstLayer()

Predicate = Callable[[str, nn.Module], bool]
Selector = _FirstLayer | str | type[nn.Module] | Predicate


@dataclass(frozen=True)
class Options:
    """How one layer is quantized; see quantize()."""

    wbits: int | Literal["auto"] = 8
    r: float = 0.0
    clip: str | float = "none"
    granularity: Granularity = "tensor"
    split: Split = "qa"
    rounding: Rounding = "nearest"
    abits: int | None = None
    act_clip: str | float = "none"
    act_r: float = 0.0
    act_split: ActSplit = "static"
    act_signed: bool | str = True
    correct_bias: bool = False
    expand: bool = True
    select: Select = "max"

    def __post_init__(self) -> None:
        if not isinstance(self.expand, bool):
            raise ValueError(f"expand={self.expand!r}: use True (expanded) or False (folded)")
        if not isinstance(self.correct_bias, bool):
            raise ValueError(f"correct_bias={self.correct_bias!r}: use True or False")
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_rounding(self.rounding, self.split)
        check_select(self.select)
        check_choice("act_split", self.act_split, get_args(ActSplit))
        check_clip("act_clip", self.act_clip)
        if self.act_signed is not True and self.act_signed != "auto":
            raise ValueError(
                f'act_signed={self.act_signed!r}: use True, or "auto" (unsigned where nothing is negative)'
            )
        check_clip("clip", self.clip, auto=True)
        plain = {  # numpy's numbers become Python's, which JSON knows
            "wbits": self.wbits if self.automatic else check_bits("wbits", self.wbits),
            "r": check_ratio("r", self.r),
            "clip": self.clip if isinstance(self.clip, str) else float(self.clip),
            "abits": self.abits if self.abits is None else check_bits("abits", self.abits),
            "act_r": check_ratio("act_r", self.act_r),
            "act_clip": self.act_clip if isinstance(self.act_clip, str) else float(self.act_clip),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def automatic(self) -> bool:
        """Whether its bits are still to be chosen."""
        return isinstance(self.wbits, str) and self.wbits == "auto"

    @property
    def shown(self) -> dict[str, Any]:
        """As reports and files have them: a callable by its name."""
        return vars(self) | {"select": self.select if isinstance(self.select, str) else show(self.select)}

    @property
    def of_inputs(self) -> bool:
        """Whether it says anything of inputs."""
        given = (self.act_clip, self.act_r, self.act_split, self.act_signed)
        return given != (Options.act_clip, Options.act_r, Options.act_split, Options.act_signed)


@dataclass
class Layer:
    """A module that holds weights, and why it stays float or folded where it does."""

    module: nn.Module
    aliases: list[str]  # every name it has
    status: str = "quantized"
    reason: str = ""
    only_folded: str = ""
    float_input: str = ""  # why its input is not quantized, if so
    note: str = ""  # what is not as it was asked for
    input_mean: str = ""  # what is known of it, where a recipe asked
    overridden: bool = False
    asked_for: frozenset[str] = frozenset()  # the options that an override names

    @property
    def name(self) -> str:
        """Its first name."""
        return self.aliases[0]

    def leave(self, status: str, reason: str) -> None:
        """Do not quantize it."""
        self.status, self.reason = status, reason


# --- Which layers: every weight is accounted for ----------------------------------------------------------------------

# Modules whose forward reads their children's weights without calling them. They may: a quantized layer's `weight` has
# the float layer's shape. But it would be folded anew at every call, so that these children run folded from the start;
# and they would not see their input, so that it stays float.
_READ_BY_PARENT = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("self_attn", "linear1", "linear2"),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
}
_METHODS = ("forward", "_conv_forward", "__call__")


def find_layers(model: nn.Module) -> list[Layer]:
    """Every module that owns a weight of two or more dimensions, in the order of named_modules()."""
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    owners = _owners(aliases)
    layers = []
    for module, names in aliases.items():
        if isinstance(module, QuantizedLayer):
            raise ValueError(
                f"{names[0] or 'model'}: already quantized; use a fresh float model (copy.deepcopy keeps one)"
            )
        if isinstance(module, ParametrizationList):
            continue  # its layer is listed, and left float
        if any(_holds_weight(parameter) for parameter in module._parameters.values()) or is_quantizable(module):
            layer = Layer(module, names)
            reason = _reason_to_leave(layer, owners)
            if reason:
                layer.leave("float", reason)
            else:
                layer.float_input = _reader(model, layer)
                layer.only_folded = replacement_of(module).only_folded or layer.float_input
            layers.append(layer)
    return layers


def _holds_weight(parameter: Tensor | None) -> bool:
    return parameter is not None and (nn.parameter.is_lazy(parameter) or parameter.dim() >= 2)


def check_model(model: nn.Module) -> None:
    """A module whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, whose layers cannot be replaced: quantize the model it was made from")
    if is_quantizable(model):
        name = type(model).__name__
        raise TypeError(f"model is a {name}, which cannot replace itself in place: wrap it, nn.Sequential({name}(...))")


def check_values(layer: Layer) -> None:
    """A layer whose weights have values."""
    with error_context(layer.name):
        for name in replacement_of(layer.module).weight_names(layer.module):
            check_weight_values(layer.module._parameters[name])


def _owners(aliases: Mapping[nn.Module, list[str]]) -> dict[int, list[str]]:
    """Every name of each parameter, by its id; a module used twice has one name."""
    owners: dict[int, list[str]] = {}
    for module, names in aliases.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{names[0]}.{name}")
    return owners


def _reason_to_leave(layer: Layer, owners: Mapping[int, list[str]]) -> str:
    """Why the layer cannot be quantized, or ""."""
    kind, module = type(layer.module).__name__, layer.module
    if not is_quantizable(module):
        own = ", ".join(name for name, parameter in module._parameters.items() if _holds_weight(parameter))
        return f"{own} of {kind}, which is not among the layers that are quantized"
    replacement = replacement_of(module)
    if _overrides_forward(module, replacement.float_kind):
        return f"{kind} has a forward of its own"
    weights, others = replacement.weight_names(module), replacement.unquantized_names(module)
    for name in (*weights, *others):
        if name not in module._parameters and getattr(module, name, None) is not None:
            return "it is re-parametrized (weight_norm, pruning or parametrize): make that permanent first"
    own = {*module._parameters, *module._buffers, *module._modules} - {*weights, *others, *replacement.kept_children}
    own |= _own_methods(type(module), replacement.float_kind) if not _is_lazy(module) else set()
    if own:
        return f"{kind} has {', '.join(sorted(own))} of its own besides what {replacement.float_kind.__name__} has"
    return next(filter(None, (_reason_of_weight(layer, name, owners) for name in weights)), "")


def _reason_of_weight(layer: Layer, name: str, owners: Mapping[int, list[str]]) -> str:
    weight = layer.module._parameters[name]
    if weight is None:
        return f"it has no {name}"
    tied = [owner for owner in owners[id(weight)] if owner != f"{layer.name}.{name}"]
    if tied:
        return f"its {name} is shared with {', '.join(tied)}"
    return "" if weight.is_floating_point() else f"its {name} is {weight.dtype}"


def _is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values())


@lru_cache(maxsize=256)
def _own_methods(kind: type[nn.Module], of: type[nn.Module]) -> frozenset[str]:
    """What a subclass can do that its replacement could not."""
    names = (name for name in set(dir(kind)) - set(dir(of)) if not name.startswith("_"))
    return frozenset(n for n in names if isinstance(getattr(kind, n), property) or callable(getattr(kind, n)))


def _overrides_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """By its class, or on the instance, as wrappers do."""
    by_class = any(getattr(type(module), method, None) is not getattr(kind, method, None) for method in _METHODS)
    return by_class or any(method in vars(module) for method in _METHODS)


def _reader(model: nn.Module, layer: Layer) -> str:
    """Who reads its weight instead of calling it, or ""."""
    for name in layer.aliases:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(parent).__mro__)
        if any(child in _READ_BY_PARENT.get(kind, ()) for kind in kinds):
            return f"{type(parent).__name__} reads its weight itself"
    return ""


# --- Which settings: skip and overrides -------------------------------------------------------------------------------


def apply_skip(layers: list[Layer], skip: Selector | Collection[Selector] | None) -> None:
    """Mark what the user leaves out. A name or pattern that fits no layer is a ValueError."""
    for selector in selectors(skip):
        chosen = [layer for layer in layers if _selects(selector, layer, layers)]
        if isinstance(selector, str) and not chosen:
            raise ValueError(f"skip={selector!r}: no layer has that name; the layers are {_names(layers)}")
        for layer in chosen:
            if layer.status == "quantized":
                first = isinstance(selector, _FirstLayer)
                reason = "first convolution" if first else f"skip={show(selector)}"
                layer.leave("skipped", reason + "; its override was not used" * layer.overridden)


def selectors(skip: Selector | Collection[Selector] | None) -> list[Selector]:
    """The selectors of `skip`, one by one."""
    if skip is None:
        return []
    return list(skip) if isinstance(skip, list | tuple | set) else [skip]


def _selects(selector: Selector, layer: Layer, layers: list[Layer]) -> bool:
    if isinstance(selector, _FirstLayer):
        convolutions = (each for each in layers if isinstance(each.module, CONVOLUTIONS))
        return layer is next(convolutions, None)
    if isinstance(selector, str):
        return _has_name(layer, selector)
    if isinstance(selector, type):
        return isinstance(layer.module, selector)
    if callable(selector) and not isinstance(selector, nn.Module):
        return bool(selector(layer.name, layer.module))
    raise TypeError(f"skip={selector!r}: use ocs.FIRST_LAYER, a name or pattern, a module type, or a predicate")


def _has_name(layer: Layer, pattern: str) -> bool:
    return pattern in layer.aliases or any(fnmatch.fnmatchcase(alias, pattern) for alias in layer.aliases)


def show(selector: Selector) -> str:
    """A selector as a user wrote it."""
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))


def _names(layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def apply_overrides(
    layers: list[Layer], chosen: Mapping[str, Options], overrides: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Options]:
    """The options of each layer by name, overridden; of several overrides that fit a layer, later ones win."""
    chosen = dict(chosen)
    known = [each.name for each in fields(Options)]
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"overrides={overrides!r}: use a dict from names or patterns to dicts of options")
    for pattern, changes in (overrides or {}).items():
        if not isinstance(pattern, str) or not isinstance(changes, Mapping):
            raise TypeError(f"overrides={{{pattern!r}: {changes!r}}}: use a name or pattern, and a dict of options")
        fitting = [layer for layer in layers if _has_name(layer, pattern)]
        if not fitting:
            raise ValueError(f"overrides={pattern!r}: no layer has that name; the layers are {_names(layers)}")
        unknown = [key for key in changes if key not in known]
        if unknown:
            raise ValueError(f"overrides[{pattern!r}]: unknown option {unknown[0]!r}; use {', '.join(known)}")
        for layer in fitting:
            layer.overridden = True
            layer.asked_for |= changes.keys()
            with error_context(layer.name, f"overrides[{pattern!r}]"):
                chosen[layer.name] = replace(chosen[layer.name], **changes)
    return chosen
