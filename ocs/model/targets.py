"""Which modules of a model hold weights, and what stands in the way of quantizing each of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ocs.errors import error_context
from ocs.model.references import held_elsewhere
from ocs.model.standardized import made_permanent
from ocs.model.subclasses import changed_methods
from ocs.model.wrappers import named_modules, submodule
from ocs.nn.base import QuantizedLayer, state_hooks
from ocs.nn.hooked import reason_of_forward
from ocs.nn.own_forward import PROMISED
from ocs.nn.prepared import PreparedLayer
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.nn.weights import check_values as check_weight_values
from ocs.nn.weights import is_weight

# Modules whose forward reads their children's weights without calling them. They may: a quantized layer's `weight` has
# the float layer's shape. But it would be folded anew at every call, so that these children run folded from the start;
# and they would not see their input, so that it stays float.
_READ_BY_PARENT = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("self_attn", "linear1", "linear2"),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
}

_STATE_METHODS = (
    "state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state",
    "set_extra_state",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A module that holds weights, as it was found in a model."""

    module: nn.Module
    aliases: tuple[str, ...]  # every name it has
    reason_float: str = ""  # why it cannot be quantized, if so
    reason_folded: str = ""  # why it cannot run expanded, if so
    reason_float_input: str = ""  # why its input cannot be quantized, if so
    tied_to: str = ""  # the embedding that a linear layer shares its weight with, or that layer, where no other does
    permanent: nn.Module | None = None  # what computes the same with a weight that is not standardized at every call

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.aliases[0]

    @property
    def layer(self) -> nn.Module:
        """The float layer that its replacement is made of."""
        return self.module if self.permanent is None else self.permanent


def check_model(model: nn.Module) -> None:
    """Refuse what is no module whose layers can be replaced, with a TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, whose layers cannot be replaced: quantize the model it was made from")
    if is_quantizable(model):
        name = type(model).__name__
        raise TypeError(f"model is a {name}, which cannot replace itself in place: wrap it, nn.Sequential({name}(...))")


def check_values(target: Target) -> None:
    """Refuse a target whose weights have no values yet, with a ValueError that names it."""
    with error_context(target.name):
        for name in replacement_of(target.module).weight_names(target.module):
            check_weight_values(target.module._parameters[name])


def find_targets(model: nn.Module) -> list[Target]:
    """Find every module that owns a weight of two or more dimensions, in the order of named_modules().

    Raises:
        ValueError: one of them is quantized already.
    """
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model, every_name=True):
        aliases.setdefault(module, []).append(name)
    owners, elsewhere = _owners(aliases), held_elsewhere(model)
    return [
        _target(model, module, names, owners, elsewhere.get(id(module), ""))
        for module, names in aliases.items()
        if _is_target(module, names)
    ]


def _is_target(module: nn.Module, names: list[str]) -> bool:
    if isinstance(module, QuantizedLayer):
        raise ValueError(f"{names[0] or 'model'}: already quantized; use a fresh float model (copy.deepcopy keeps one)")
    if isinstance(module, ParametrizationList):
        return False  # its layer is listed, and left float
    return any(is_weight(parameter) for parameter in module._parameters.values()) or is_quantizable(module)


def _target(
    model: nn.Module, module: nn.Module, names: list[str], owners: Mapping[int, list[str]], elsewhere: str
) -> Target:
    permanent = made_permanent(module)
    reason = _reason_adapted(model, names) or _reason_float(
        module if permanent is None else permanent, names[0], owners
    )
    reason = reason or (elsewhere and f"it {elsewhere}")
    tied_to = _tied_to(model, module, names[0], owners)
    if reason and not (tied_to and "is shared with" in reason):
        return Target(module, tuple(names), reason_float=reason)
    read = reason_read_by_parent(model, names)
    kind = replacement_of(module)
    folded, float_input = kind.only_folded or read, read or kind.unseen(module)
    return Target(module, tuple(names), reason, folded, float_input, tied_to, permanent)


def _owners(aliases: Mapping[nn.Module, list[str]]) -> dict[int, list[str]]:
    """List the names of each parameter by its id; a module used twice has one name."""
    owners: dict[int, list[str]] = {}
    for module, names in aliases.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{names[0]}.{name}")
    return owners


# --- What stands in the way -------------------------------------------------------------------------------------------


def _reason_float(module: nn.Module, name: str, owners: Mapping[int, list[str]]) -> str:
    """Say why a module cannot be quantized, or ""."""
    kind = type(module).__name__
    if isinstance(module, PreparedLayer):
        return "it is prepared for training: ocs.training.convert(model) quantizes it"
    if not is_quantizable(module):
        own = ", ".join(name for name, parameter in module._parameters.items() if is_weight(parameter))
        return f"{own} of {kind}, which is not among the layers that are quantized"
    replacement = replacement_of(module)
    wrapped = reason_of_forward(module)
    if wrapped:
        return wrapped
    weights, others = replacement.weight_names(module), replacement.unquantized_names(module)
    for each in (*weights, *others):
        if each not in module._parameters and getattr(module, each, None) is not None:
            return "it is re-parametrized (weight_norm, pruning or parametrize): make that permanent first"
    reasons = [
        "" if replacement.keeps_all else _reason_irreplaceable(module, {*weights, *others}),
        _reason_of_attributes(module, replacement.reserved_names(weights)),
        *(_reason_of_weight(module._parameters.get(each), f"{name}.{each}", owners) for each in weights),
    ]
    return next(filter(None, reasons), "")


def _has_own_state(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module saves or loads its state by methods of its own, hooks among them."""
    by_hook = any(getattr(hook, "__self__", None) is module for hook in state_hooks(module))
    return by_hook or any(getattr(type(module), method) is not getattr(kind, method) for method in _STATE_METHODS)


def _reason_of_attributes(module: nn.Module, reserved: Collection[str]) -> str:
    if getattr(module, "max_norm", None) is not None:
        return f"its rows are changed by lookups, max_norm={module.max_norm}"
    taken = next((name for name in vars(module) if name in reserved), None)
    if taken is None:
        return ""
    return f"{type(module).__name__} has an attribute {taken}, a name that quantized layers use themselves: rename it"


def _reason_of_weight(weight: Tensor | None, full_name: str, owners: Mapping[int, list[str]]) -> str:
    name = full_name.rpartition(".")[2]
    if weight is None:
        return f"it has no {name}"
    tied = [owner for owner in owners.get(id(weight), ()) if owner != full_name]
    if tied:
        return f"its {name} is shared with {', '.join(tied)}"
    unlike = _unlike_plain(weight)
    if unlike:
        return f"its {name} is {unlike}: make it a plain dense tensor first"
    return "" if weight.is_floating_point() else f"its {name} is {weight.dtype}"


def _unlike_plain(weight: Tensor) -> str:
    """Say what kind of tensor a weight is whose values cannot be read as those of a plain one, or ""."""
    if nn.parameter.is_lazy(weight):
        return ""
    if weight.is_nested or weight.layout != torch.strided:
        return "nested" if weight.is_nested else str(weight.layout)
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # DTensor, FakeTensor and their like
        return f"a {type(weight).__name__}"
    try:
        weight.untyped_storage().data_ptr()
    except RuntimeError:  # inside a transformation of functions
        return "a tensor without memory of its own"
    return ""


def _is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values())


def _reason_irreplaceable(module: nn.Module, parameters: set[str]) -> str:
    """Say what a layer of torch's kind would not do that this module does, or ""."""
    kind, replacement = type(module).__name__, replacement_of(module)
    of = replacement.float_kind
    if kind == of.__name__:  # another's Linear, say
        kind = f"{type(module).__module__}.{kind}"
    changed = changed_methods(type(module), of)
    if changed:
        reason = f"{kind} has a {' and '.join(changed)} of its own"
        return f"{reason}; ocs.register({kind}, like=nn.{of.__name__}) quantizes it" if of in PROMISED else reason
    if not _is_lazy(module) and _has_own_state(module, of):
        return f"{kind} has a way of its own to save or load its state"
    own = {*module._parameters, *module._buffers, *module._modules} - {*parameters, *replacement.kept_children}
    return f"{kind} has {', '.join(sorted(own))} of its own besides what {of.__name__} has" if own else ""


def _reason_adapted(model: nn.Module, names: list[str]) -> str:
    """Say which adapter (of peft, say) a module belongs to, which would be lost when it is merged later, or ""."""
    for name in names:
        parts = name.split(".")
        for parent in (submodule(model, ".".join(parts[:depth])) for depth in range(len(parts))):
            if isinstance(getattr(parent, "base_layer", None), nn.Module) and callable(getattr(parent, "merge", None)):
                adapter = f"{type(parent).__module__}.{type(parent).__name__}"
                return f"it is part of an adapter ({adapter}): merge that into its base layer first"
    return ""


def _tied_to(model: nn.Module, module: nn.Module, name: str, owners: Mapping[int, list[str]]) -> str:
    """Name the one other owner of a weight that an embedding and a linear layer share, or ""."""
    sharing = owners.get(id(module._parameters.get("weight")), ())
    others = [owner.removesuffix(".weight") for owner in sharing if owner != f"{name}.weight"]
    if len(sharing) != 2 or len(others) != 1 or not all(owner.endswith(".weight") for owner in sharing):
        return ""
    both = (module, submodule(model, others[0]))
    kinds = {replacement_of(each).float_kind for each in both if is_quantizable(each)}
    return others[0] if kinds == {nn.Embedding, nn.Linear} else ""


def reason_read_by_parent(model: nn.Module, names: list[str]) -> str:
    """Say who reads a module's weight instead of calling it, or ""."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = submodule(model, parent_name)
        kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(parent).__mro__)
        if any(child in _READ_BY_PARENT.get(kind, ()) for kind in kinds):
            return f"{type(parent).__name__} reads its weight itself"
    return ""
