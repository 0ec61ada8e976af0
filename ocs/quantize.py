"""quantize(): plan every layer of a model, then rewrite it in place, all or nothing."""

from __future__ import annotations

import fnmatch
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ocs import functional
from ocs.functional import Granularity, QuantizedWeight, Rounding, Split, SplitPlan
from ocs.nn import REPLACEMENTS, QuantizedLayer
from ocs.report import LayerReport, Report


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

    wbits: int = 8
    r: float = 0.0
    clip: str | float = "none"
    granularity: Granularity = "tensor"
    split: Split = "qa"
    rounding: Rounding = "nearest"
    expand: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.expand, bool):
            raise ValueError(f"expand={self.expand!r}: use True (expanded) or False (folded)")
        functional.check_choice("granularity", self.granularity, get_args(Granularity))
        functional.check_choice("split", self.split, get_args(Split))
        functional.check_choice("rounding", self.rounding, get_args(Rounding))
        functional.clip_fraction(self.clip)
        plain = {  # numpy's numbers become Python's, which JSON knows
            "wbits": functional.check_bits("wbits", self.wbits),
            "r": functional.check_ratio("r", self.r),
            "clip": self.clip if isinstance(self.clip, str) else float(self.clip),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


@dataclass
class _Layer:
    """A module that holds a weight, and why it stays float where it does."""

    module: nn.Module
    aliases: list[str]  # every name it has
    status: str = "quantized"
    reason: str = ""
    overridden: bool = False

    @property
    def name(self) -> str:
        return self.aliases[0]

    def leave(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


# --- Which layers: every weight is accounted for ----------------------------------------------------------------------

# Modules whose forward reads their children's weights without calling them: a replacement would be passed over.
_READ_BY_PARENT = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


def find_layers(model: nn.Module) -> list[_Layer]:
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
        if any(_holds_weight(parameter) for parameter in module._parameters.values()) or _is_kind(module):
            layer = _Layer(module, names)
            reason = _reason_to_leave(model, layer, owners)
            if reason:
                layer.leave("float", reason)
            layers.append(layer)
    return layers


def _holds_weight(parameter: Tensor | None) -> bool:
    return parameter is not None and (nn.parameter.is_lazy(parameter) or parameter.dim() >= 2)


def _is_kind(module: nn.Module) -> bool:
    return isinstance(module, tuple(REPLACEMENTS))


def _replacement(module: nn.Module) -> type[QuantizedLayer]:
    return next(new for kind, new in REPLACEMENTS.items() if isinstance(module, kind))


def _owners(aliases: Mapping[nn.Module, list[str]]) -> dict[int, list[str]]:
    """The names of the modules that own each parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for module, names in aliases.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(names[0])
    return owners


def _reason_to_leave(model: nn.Module, layer: _Layer, owners: Mapping[int, list[str]]) -> str:
    """Why the layer cannot be quantized, or ""."""
    reason = _reason_of_kind(layer.module)
    for name in layer.aliases:
        reason = reason or _reason_of_parent(model, name)
    return reason or _reason_of_weight(layer, owners)


def _reason_of_kind(module: nn.Module) -> str:
    kind = type(module).__name__
    if not _is_kind(module):
        return f"{kind} is not among the layers that are quantized"
    if _overrides_forward(module):
        return f"{kind} has a forward of its own"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "it is re-parametrized (weight_norm, pruning or parametrize): make that permanent first"
    if len(module._parameters) > 2 or module._modules:
        return f"{kind} has parameters of its own besides weight and bias"
    return ""


def _reason_of_parent(model: nn.Module, name: str) -> str:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    reads = any(isinstance(parent, reader) and child in children for reader, children in _READ_BY_PARENT.items())
    return f"{type(parent).__name__} reads this weight itself" if reads else ""


def _reason_of_weight(layer: _Layer, owners: Mapping[int, list[str]]) -> str:
    weight = layer.module._parameters["weight"]
    others = [owner for owner in owners[id(weight)] if owner != layer.name]
    if others:
        return f"its weight is shared with {', '.join(others)}"
    return "" if weight.is_floating_point() else f"its weight is {weight.dtype}"


def _overrides_forward(module: nn.Module) -> bool:
    """By its class, or on the instance, as wrappers do."""
    kind = _replacement(module).float_kind
    methods = ("forward", "_conv_forward", "__call__")
    by_class = any(getattr(type(module), method, None) is not getattr(kind, method, None) for method in methods)
    return by_class or any(method in vars(module) for method in methods)


# --- Which settings: skip and overrides -------------------------------------------------------------------------------


def apply_skip(layers: list[_Layer], skip: Selector | Collection[Selector] | None) -> None:
    """Mark what the user leaves out. A name or pattern that fits no layer is a ValueError."""
    for selector in _selectors(skip):
        chosen = [layer for layer in layers if _selects(selector, layer, layers)]
        if isinstance(selector, str) and not chosen:
            raise ValueError(f"skip={selector!r}: no layer has that name; the layers are {_names(layers)}")
        for layer in chosen:
            if layer.status == "quantized":
                first = isinstance(selector, _FirstLayer)
                reason = "first convolution" if first else f"skip={_show(selector)}"
                layer.leave("skipped", reason + "; its override was not used" * layer.overridden)


def _selectors(skip: Selector | Collection[Selector] | None) -> list[Selector]:
    if skip is None:
        return []
    return list(skip) if isinstance(skip, list | tuple | set) else [skip]


def _selects(selector: Selector, layer: _Layer, layers: list[_Layer]) -> bool:
    if isinstance(selector, _FirstLayer):
        convolutions = (each for each in layers if _is_kind(each.module) and not isinstance(each.module, nn.Linear))
        return layer is next(convolutions, None)
    if isinstance(selector, str):
        return _has_name(layer, selector)
    if isinstance(selector, type):
        return isinstance(layer.module, selector)
    if callable(selector) and not isinstance(selector, nn.Module):
        return bool(selector(layer.name, layer.module))
    raise TypeError(f"skip={selector!r}: use ocs.FIRST_LAYER, a name or pattern, a module type, or a predicate")


def _has_name(layer: _Layer, pattern: str) -> bool:
    return pattern in layer.aliases or any(fnmatch.fnmatchcase(alias, pattern) for alias in layer.aliases)


def _show(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))


def _names(layers: list[_Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def options_for(
    layers: list[_Layer], options: Options, overrides: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Options]:
    """The options of each layer by name; of several overrides that fit a layer, later ones win."""
    chosen = {layer.name: options for layer in layers}
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
            with _named(layer.name, f"overrides[{pattern!r}]"):
                chosen[layer.name] = replace(chosen[layer.name], **changes)
    return chosen


@contextmanager
def _named(*context: str) -> Iterator[None]:
    """Says where in the model a ValueError or TypeError came from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(": ".join([*context, str(error)])) from error


# --- One layer --------------------------------------------------------------------------------------------------------


def quantize_layer(layer: _Layer, options: Options) -> tuple[QuantizedLayer, LayerReport]:
    """The layer that replaces this one, and its line of the report."""
    module = layer.module
    groups = getattr(module, "groups", 1)
    if nn.parameter.is_lazy(module.weight) or module.weight.is_meta:
        raise ValueError("its weight holds no values yet: run a batch through lazy layers, fill meta tensors")
    w = module.weight.detach().to(torch.float32, memory_format=torch.contiguous_format)
    plan = functional.plan_splits(w, options.r, groups)
    threshold = functional.weight_threshold(w, plan, options.clip, options.granularity, groups)
    quantized = functional.quantize_split(w, plan, threshold, options.wbits, options.split, groups)
    replacement = _replacement(module)(module, quantized, options.wbits, options.expand)
    _carry_hooks(module, replacement)
    error = functional.weight_error(w, quantized, groups)
    return replacement, _report_layer(layer, options, plan, quantized, error)


HOOKS = frozenset(
    f"_{kind}_hooks{suffix}"
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
    for suffix in ("", "_with_kwargs", "_always_called")
) | {"_is_full_backward_hook"}


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """The user's forward and backward hooks go on seeing the layer."""
    vars(new).update({k: v for k, v in vars(old).items() if k in HOOKS})


def _report_layer(
    layer: _Layer, options: Options, plan: SplitPlan, quantized: QuantizedWeight, error: tuple[float, float]
) -> LayerReport:
    weight = layer.module.weight
    groups = getattr(layer.module, "groups", 1)
    sources = [c for group in plan.source.reshape(groups, -1).tolist() for c in group[weight.shape[1] :]]
    common = _common(layer)
    common["reason"] = "depthwise: not split" if options.r and groups > 1 and weight.shape[1] == 1 else ""
    return LayerReport(
        **common,
        bits=options.wbits,
        granularity=options.granularity,
        channels=groups * weight.shape[1],
        splits=len(sources),
        sources=tuple(sources),
        threshold=_numbers(quantized.threshold),
        scale=_numbers(quantized.scale),
        max_before=max(plan.channel_max.tolist(), default=0.0),
        max_after=max(plan.split_max.tolist(), default=0.0),
        sqnr_db=functional.sqnr_db(*error),
        packed_bytes=math.ceil(quantized.ints.numel() * options.wbits / 8)
        + 4 * (quantized.scale.numel() + len(sources)),
    )


def _common(layer: _Layer) -> dict[str, Any]:
    """The part of a layer's report that does not depend on its quantization."""
    weights = [p for p in layer.module._parameters.values() if p is not None and not nn.parameter.is_lazy(p)]
    weights = [p for p in weights if p.dim() >= 2]
    return {
        "name": layer.name,
        "kind": type(layer.module).__name__,
        "shape": tuple(weights[0].shape) if len(weights) == 1 else (),
        "status": layer.status,
        "reason": layer.reason,
        "float_bytes": sum(p.numel() * p.element_size() for p in weights),
    }


def _numbers(x: Tensor) -> float | tuple[float, ...]:
    values = x.tolist()
    return values if isinstance(values, float) else tuple(values)


# --- The whole model --------------------------------------------------------------------------------------------------


def quantize(
    model: nn.Module,
    *,
    wbits: int = 8,
    r: float = 0.0,
    clip: str | float = "none",
    granularity: Granularity = "tensor",
    split: Split = "qa",
    rounding: Rounding = "nearest",
    skip: Selector | Collection[Selector] | None = FIRST_LAYER,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    expand: bool = True,
    progress: bool | None = None,
) -> Report:
    """Quantize the weights of a model in place by outlier channel splitting, without data (section 3 of the paper).

    Every nn.Conv1d/2d/3d and nn.Linear becomes an ocs.nn layer; whatever fails, the model is as it was.

    Args:
        model: a float model on any device, in train or eval mode.
        wbits: 2 to 8; integers -qmax .. qmax, qmax = 2^(wbits - 1) - 1.
        r: expand ratio in [0, 1]: a layer of C input channels gets ceil(r C) splits, in each group.
        clip: "none", or the fraction in (0, 1] of the largest split |w| that is kept.
        granularity: one scale per "tensor", or per output "channel".
        split: "qa" (quantization-aware: exact) or "naive" (halves).
        rounding: "nearest": floor(w / scale + 1/2).
        skip: what stays float: ocs.FIRST_LAYER (the first convolution), names, glob patterns, module types, predicates
            (name, module) -> bool, or a list of these. It replaces the default; None skips nothing.
        overrides: options for the layers that fit a name or pattern: {"layer4.*": dict(wbits=8)}.
        expand: True for layers that really have C + n channels, False to fold the copies back (same values).
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A Report with a line for every layer that has a weight.

    Raises:
        ValueError: an option is out of range, a name or pattern fits no layer, a weight holds NaN, Inf or nothing yet,
            the model is quantized already or has no layer to quantize.
        TypeError: the model is no nn.Module, is a ScriptModule, or is itself one of the layers to replace.
    """
    begin = time.perf_counter()
    options = Options(wbits, r, clip, granularity, split, rounding, expand)
    _check_model(model)
    layers = find_layers(model)
    if not any(_is_kind(layer.module) for layer in layers):
        raise ValueError(f"{type(model).__name__} has none of {', '.join(kind.__name__ for kind in REPLACEMENTS)}")
    chosen = options_for(layers, options, overrides)
    apply_skip(layers, skip)
    replacements, lines = {}, []
    with torch.no_grad():
        for layer in _with_progress(layers, progress):
            if layer.status != "quantized":
                lines.append(LayerReport(**_common(layer)))
                continue
            with _named(layer.name):
                replacements[id(layer.module)], line = quantize_layer(layer, chosen[layer.name])
            lines.append(line)
    swap(model, replacements)
    return Report(tuple(lines), _settings(options, skip, overrides), time.perf_counter() - begin)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, whose layers cannot be replaced: quantize the model it was made from")
    if _is_kind(model):
        name = type(model).__name__
        raise TypeError(f"model is a {name}, which cannot replace itself in place: wrap it, nn.Sequential({name}(...))")


def swap(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put the replacements (by id of the old module) wherever the old ones stand, or, if that fails, nowhere."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if id(child) in replacements:
                    done.append((parent, name, child))
                    parent._modules[name] = replacements[id(child)]
    except BaseException:
        for parent, name, child in done:
            parent._modules[name] = child
        raise


def _settings(options: Options, skip: Any, overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    return {
        **asdict(options),
        "skip": [_show(selector) for selector in _selectors(skip)],
        "overrides": {pattern: dict(changes) for pattern, changes in (overrides or {}).items()},
    }


def _with_progress(layers: list[_Layer], progress: bool | None) -> Iterable[_Layer]:
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if progress is False or (progress is None and not terminal):
        return layers  # tqdm is not even imported
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install torch-ocs[progress]") from None
        return layers
    return tqdm(layers, "quantize", unit="layer", delay=0 if progress else 2)
